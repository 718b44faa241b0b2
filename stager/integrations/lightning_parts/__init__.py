"""What ``stager.integrations.lightning`` and ``stager.integrations.pytorch_lightning`` have in common.

``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one package, and each refuses classes of the other. So the
behaviour is in mixins that import neither, and the two modules derive their classes from a mixin and a class of Lightning.

writer           opens a PathCheckpointer when one is needed, and closes it after each fit
removals         removes checkpoints, once the ones that replace them are committed
earlier_run      finishes what a killed run has left, before anything is looked for
checkpoint_io    single device and DDP: rank 0 saves
model_parallel   FSDP2 and tensor parallel: all ranks save together
guarding, random_state, model_checkpoint    the callbacks
scratch          what Lightning saves only for itself
whole_file       ``load_from_checkpoint()`` of a directory
"""
