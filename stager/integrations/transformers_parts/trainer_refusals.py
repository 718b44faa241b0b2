"""What stager cannot save of a Trainer, or not while training goes on: told before training, on every rank."""

from __future__ import annotations

from typing import Any

from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from stager.config import load_config
from stager.workers.errors import UsageError


def refuse_what_cannot_be_saved(trainer: Any) -> None:
    """Raise a UsageError if the checkpoints of this Trainer cannot be stager's. It says why, and what to do."""
    args = trainer.args
    is_fsdp2 = trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2
    is_xla = is_torch_xla_available()
    jit = getattr(args, "enable_jit_checkpoint", False)  # since transformers 5.0
    several = args.world_size > 1
    refusals = {
        "DeepSpeed shards the state by itself; use the Trainer without stager": trainer.is_deepspeed_enabled,
        "FSDP1 is not supported; set fsdp_config={'version': 2}": trainer.is_fsdp_enabled and not is_fsdp2,
        "TPUs and SageMaker's model parallelism are not supported": is_xla or is_sagemaker_mp_enabled(),
        "save_on_each_node=True, but all ranks write one checkpoint together; set it to False, and output_dir to a "
        "directory that all nodes see": args.save_on_each_node,
        "a checkpoint is not there yet when the Trainer would push it to the hub; set hub_strategy='end', and call "
        "push_to_hub() after train()": args.push_to_hub and args.hub_strategy != "end",
        "enable_jit_checkpoint=True with several ranks: each would save at the step at which it gets the signal, and the "
        "steps may differ; set it to False, and save more often": jit and several,
        "several ranks save one checkpoint together, and ranks.together is False in stager_config; leave it out": (
            several and load_config(trainer.stager_config).ranks.together is False
        ),
    }
    for reason, applies in refusals.items():
        if applies:
            raise UsageError(f"stager cannot write this Trainer's checkpoints: {reason}")
