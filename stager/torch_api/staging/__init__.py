"""The staging API of torch.distributed.checkpoint, same names and signatures, over stager's engine."""

from stager.torch_api.staging.blocking import BlockingAsyncStager
from stager.torch_api.staging.contracts import AsyncStager, CheckpointStager, StateDict
from stager.torch_api.staging.default import CheckpointStagerConfig, DefaultStager, StagingOptions, auto_options
from stager.torch_api.staging.replication_stager import ReplicationStager, _ReplicationStager
from stager.torch_api.staging.worker_stager import WorkerStager

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "ReplicationStager",
    "StagingOptions",
    "StateDict",
    "WorkerStager",
    "_ReplicationStager",
    "auto_options",
]
