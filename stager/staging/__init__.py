"""The staging API of torch.distributed.checkpoint, same names and signatures, over stager's engine."""

from stager.staging.blocking import BlockingAsyncStager
from stager.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.staging.default import DefaultStager
from stager.staging.options import CheckpointStagerConfig, StagingOptions, auto_options
from stager.staging.replication import ReplicationStager, _ReplicationStager

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "ReplicationStager",
    "StagingOptions",
    "StateDict",
    "_ReplicationStager",
    "auto_options",
]
