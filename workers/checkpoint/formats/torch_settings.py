"""torch without the settings that users make for the whole process or thread: they must not change what is saved and loaded.

torch.utils.serialization.config     memory mapping, alignment, pinned memory, offsets that are computed
skip_data()                          values are left out of archives, and not read from them
set_default_load_endianness()        bytes are swapped
FakeTensorMode and its like          tensors have no values
the default device                   tensors are made there
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES

_serialization: Any = torch.serialization
_ops: Any = torch._ops
_config: Any
try:
    from torch.utils.serialization import config as _config
except ImportError:  # older than torch 2.7
    _config = None

_SETTINGS = {
    "load.mmap": False,
    "load.calculate_storage_offsets": False,
    "load.endianness": None,
    "save.storage_alignment": BLOB_ALIGN_BYTES,  # trainer and workers must agree on every byte
    "save.use_pinned_memory_for_d2h": False,
    "save.compute_crc32": True,
}


def real_tensors() -> AbstractContextManager[Any]:
    """Let torch make tensors with values in this thread, also while a FakeTensorMode or its like is on."""
    if not torch._C._len_torch_dispatch_stack() and not _ops._len_torch_dispatch_stack_pre_dispatch():
        return nullcontext()
    return cast(AbstractContextManager[Any], _disable_current_modes())


@contextmanager
def torch_defaults(*, skips_data: bool = False) -> Iterator[None]:
    """Let torch do in this thread what it does without any setting. Its variables of the environment still hold.

    Args:
        skips_data: leave the values out of archives.
    """
    state = _serialization._serialization_tls
    skipped, state.skip_data = state.skip_data, skips_data
    try:
        with ExitStack() as stack:
            stack.enter_context(real_tensors())
            if (
                torch.empty(0).device.type != "cpu"
            ):  # each call of torch is slower inside of it, so only where it is needed
                stack.enter_context(torch.device("cpu"))
            if changed := _changed_settings():
                stack.enter_context(_config.patch(changed))
            yield
    finally:
        state.skip_data = skipped


def _changed_settings() -> dict[str, Any]:
    """Return the settings that have another value now. Most processes change none, and a patch takes 0.5 ms."""
    if _config is None:
        return {}
    sections = {"load": _config.load, "save": _config.save}
    changed = {}
    for name, value in _SETTINGS.items():
        section, _, setting = name.partition(".")
        if getattr(sections[section], setting, value) != value:  # a torch that does not know it has its default
            changed[name] = value
    return changed
