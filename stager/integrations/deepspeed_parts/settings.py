"""The configurations of stager and of DeepSpeed with which DeepSpeed's files can be written, and what is refused."""

from __future__ import annotations

from typing import Any

from stager.config import StagerConfig, load_config
from stager.workers.checkpoint.documents.names import DEFAULT_TEMPLATE
from stager.workers.errors import ConfigError, UsageError


def settings(given: StagerConfig) -> StagerConfig:
    """Return stager's configuration with what DeepSpeed's files ask for.

    Raises:
        ConfigError: it sets something else.
    """
    persistence = given.persistence
    if "format" in persistence.model_fields_set and persistence.format != "torch":
        raise ConfigError(
            f"persistence.format is {persistence.format}, and DeepSpeed's files are of torch.save; take it out, or set it "
            "to torch"
        )
    if persistence.name != DEFAULT_TEMPLATE:
        raise ConfigError(
            f"persistence.name is {persistence.name!r}, and DeepSpeed names its tags itself; take it out, and give "
            "engine.save_checkpoint(dir, tag=...) the name"
        )
    if persistence.incremental:
        raise ConfigError(
            "persistence.incremental is true, and a file of DeepSpeed's is one file that always changes; take it out"
        )
    if persistence.tolerate_failures:
        raise ConfigError(
            f"persistence.tolerate_failures is {persistence.tolerate_failures}, and failed tags are not counted here; take "
            "it out, or set persistence.on_save_error to warn"
        )
    if "allow_pickle" in given.loading.model_fields_set and not given.loading.allow_pickle:
        raise ConfigError(
            "loading.allow_pickle is false, and DeepSpeed's files hold pickled objects, so loading them runs code that they "
            "hold; take it out, or set it to true if you trust the files"
        )
    if given.ranks.together is True:
        raise ConfigError(
            "ranks.together is true, and each rank of DeepSpeed saves files of its own; take it out, or set it to false"
        )
    if given.arena.when_full == "skip":
        raise ConfigError("arena.when_full is skip, and a tag needs all of its files; set it to wait or raise")
    return load_config(given, ["ranks.together=false", "persistence.format=torch", "loading.allow_pickle=true"])


def refuse_engine(engine: Any, guard: bool) -> None:
    """Refuse a DeepSpeed engine whose checkpoints stager cannot write.

    Raises:
        ConfigError: for what its configuration says.
        UsageError: with ``guard``, it cannot be guarded.
    """
    if engine.use_node_local_storage():
        raise ConfigError(
            "checkpoint.use_node_local_storage is on, and stager publishes the files of all ranks in one directory; turn it "
            "off, and save to a file system that all nodes see"
        )
    if engine.zero_nvme_offload_optimizer():
        raise ConfigError(
            "the optimizer is offloaded to NVMe, whose files DeepSpeed copies into the tag itself; offload it to the CPU, "
            "or save without stager"
        )
    if guard and getattr(engine, "zenflow", False):
        raise UsageError("ZenFlow steps beside the training loop, so its optimizer cannot be guarded; give guard=False")
