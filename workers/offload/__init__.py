"""Deep copy of any object with its tensors' storages staged elsewhere: the one engine, for trainer and workers."""

from stager.workers.memory.buffer_pool import BufferPool
from stager.workers.memory.host_buffers import HostBuffers, new_shared_mapping
from stager.workers.memory.shared_slice import SharedSlice, slice_shared
from stager.workers.offload.copier import OffloadCopier, StorageStager
from stager.workers.offload.hook_memo import HookMemo, reachable_leaves

__all__ = [
    "BufferPool",
    "HookMemo",
    "HostBuffers",
    "OffloadCopier",
    "SharedSlice",
    "StorageStager",
    "new_shared_mapping",
    "reachable_leaves",
    "slice_shared",
]
