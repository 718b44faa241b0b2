"""stager in frameworks, one file each. Each imports its framework, and nothing imports this folder.

lightning           CheckpointIO, strategy and callbacks; pytorch_lightning: the same for the package of that name
lightning_parts     what these two have in common
transformers        the Trainer of Hugging Face, and those of TRL; transformers_parts: what its mixin is made of
accelerate          save_state() and load_state() of Hugging Face Accelerate
ray                 report() of Ray Train
deepspeed           save_checkpoint() of DeepSpeed's engine; deepspeed_parts: how a tag is published
megatron_bridge     a save strategy of Megatron-Core, and a checkpoint manager of Megatron-Bridge
"""
