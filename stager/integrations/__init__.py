"""stager in frameworks, one file each. Each imports its framework, and nothing imports this folder.

lightning           CheckpointIO and strategies
transformers        the Trainer of Hugging Face, and of TRL
transformers_parts  what that is made of
accelerate          save_state() and load_state()
"""
