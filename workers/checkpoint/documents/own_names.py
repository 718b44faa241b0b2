"""The names of stager's own files in the directory of a checkpoint, or of a save."""

from __future__ import annotations

import re

# Every file that stager has ever written into the directory of a step: data, indices, manifest, save records, receipts, and
# temporary files. Also the lock of a run, which earlier versions put into a checkpoint that was opened as a run; and what a
# network file system makes of a file that was removed while it was open.
_DATA = (
    r"__\d+_[0-9a-z]+\.distcp|state(-rank\d+)?(-\d+-of-\d+)?\.(pt|safetensors)|objects(-rank\d+)?\.bin"
    r"|\.nfs[0-9a-f]+|\.stager\.(lock|protected)"
)
_DOCUMENT = (
    r"manifest\.json|(__\d+)?\.metadata|state(-rank\d+)?\.safetensors\.index\.json|save-\d+\.json"
    r"|receipt-\d+-\d+-of-\d+\.json"
)
_OWN = re.compile(rf"{_DATA}|({_DOCUMENT})(\.\d+)?(\.tmp)?")


def is_own(name: str) -> bool:
    """Return whether a file in the directory of a step has a name that stager gives its files."""
    return _OWN.fullmatch(name) is not None
