"""What ``stager.integrations.transformers`` is made of.

trainer_saves       the saves of one ``train()``: a PathCheckpointer, and what it has begun
trainer_rotation    ``save_total_limit``, applied at each commit
trainer_files       the small files beside the state
trainer_leftovers   what lies where a checkpoint is going to be
trainer_refusals    what stager cannot save of a Trainer
peft_adapters       models of peft, whose adapters alone are saved
"""
