"""Deep copy of any object with its tensors' storages staged elsewhere: the one engine, for trainer and workers."""

from workers.offload.buffer_pool import BufferPool
from workers.offload.copier import OffloadCopier, StorageStager
from workers.offload.hook_memo import HookMemo, reachable_leaves
from workers.offload.host_buffers import HostBuffers, new_shared_mapping
from workers.offload.shared_slice import SharedSlice, slice_shared

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
