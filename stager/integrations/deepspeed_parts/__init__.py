"""What ``stager.integrations.deepspeed`` is made of; imports no DeepSpeed."""
