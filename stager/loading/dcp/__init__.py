"""Reading through the planners of ``torch.distributed.checkpoint``: checkpoints of stager, and those of ``dcp.save``."""
