"""stager in frameworks, one file each. Each imports its framework, and nothing imports this folder.

lightning           CheckpointIO, strategy and callbacks; pytorch_lightning: the same for the package of that name
lightning_parts     what these two have in common
transformers        the Trainer of Hugging Face, and those of TRL; transformers_parts: what its mixin is made of
accelerate          save_state() and load_state() of Hugging Face Accelerate
ray                 report() of Ray Train
torchft             a CheckpointTransport for replica groups that recover; torchft_parts: what it is made of
torch_checkpointing the stager, the storage and the CheckpointManager of Meta's torch_checkpointing
torch_checkpointing_parts    what these three are made of
torchtitan          a checkpoint manager of torchtitan; torchtitan_parts: what it is made of
deepspeed           save_checkpoint() of DeepSpeed's engine; deepspeed_parts: how a tag is published
megatron_bridge     a save strategy of Megatron-Core, and a checkpoint manager of Megatron-Bridge
"""
