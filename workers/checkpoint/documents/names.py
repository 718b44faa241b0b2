"""The names in a run's directory.

step-00000100                      a committed checkpoint with the default name: the name tells its step
checkpoint-100, last.ckpt          a committed checkpoint with another name: its manifest has both, name and step
<name>.partial-<save_id>           being written, or left by a crash; never a checkpoint
<name>.partial-<save_id>.replaced  the checkpoint that this save replaces, for a moment, where the file system cannot
                                   exchange two names
<name>.removing-<nonce>            being removed, by retention or because its save failed
<name>.strangers-<nonce>           what somebody else had put into a directory that was removed (``own_files.py``)
<name>.unfinished-<save_id>        quarantined: parts did not arrive in time, and partners may have replicas of them
                                   (``stager/replication``)
<name>.not-a-checkpoint-<save_id>  what somebody else had put where a checkpoint was committed

Of a name that is not the default one, the directories that are no checkpoints are hidden: ``.checkpoint-100.partial-...``.
Frameworks take every ``checkpoint-*`` for a checkpoint, count it, and remove it. torchtitan does so with every name that has
``step-100`` anywhere in it, also behind a dot, so there is a tilde in it: ``.step-~100.partial-...``.
"""

from __future__ import annotations

import os
import re
import string

DEFAULT_TEMPLATE = "step-{step:08d}"
REPLACED = ".replaced"

_STEP = r"step-([0-9]{8}|[1-9][0-9]{8,})"  # as the default template writes it: a step has one name
_DEFAULT = re.compile(_STEP)
# A directory with another name is ours only with an id as saves have it: users may name theirs nearly like that.
_BASE, _ID = r"\.([^/]+?)", r"([0-9a-f]{16,})"
_BY_DEFAULT = rf"({_STEP})"
_DATA = re.compile(rf"{_STEP}\.data-[0-9a-f]+|[^/]+\.data-{_ID}")  # the prefix of a save's data in an object store
_SET_ASIDE = re.compile(r".+\.(?:partial|removing|strangers|unfinished|not-a-checkpoint)-[0-9a-f]*(?:\.replaced)?")

# torchtitan takes every name for a checkpoint that has "step-" and a digit somewhere. _hidden() puts a tilde between them,
# and one tilde more where there are some already, so that the name can be read back.
_LOOKS_LIKE_STEP, _LOOKED_LIKE_STEP = re.compile(r"step-(?=~*[0-9])"), re.compile(r"step-~(?=~*[0-9])")

_MAX_BYTES = 200  # file systems allow 255, and a partial directory has a longer name
_SPEC = re.compile(r"(?:0[1-9][0-9]?)?d?")
_SAMPLES = (0, 1, 99, 12_345_678, 123_456_789, (1 << 63) - 1)  # steps of all lengths that the default name has


def _pattern(what: str, ending: str = "") -> re.Pattern[str]:
    return re.compile(rf"(?:{_BY_DEFAULT}\.{what}-([0-9a-f]+)|{_BASE}\.{what}-{_ID}){ending}")


_PARTIAL = _pattern("partial", r"(?:\.replaced)?")
_REMOVING = _pattern("removing")
_UNFINISHED = _pattern("unfinished")


def checkpoint_name(step: int, template: str = DEFAULT_TEMPLATE) -> str:
    """Return the directory name of a committed checkpoint."""
    return template.format(step=step)


def parse_checkpoint(name: str) -> int | None:
    """Return the step of a default name; None for any other name."""
    match = _DEFAULT.fullmatch(name)
    return int(match[1]) if match is not None else None


def number_in(name: str) -> int | None:
    """Return the last number in a name, which most likely is the step; None: there is none that could be one."""
    numbers = re.findall(r"[0-9]+", name)
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 19 else None


def check_name(name: str) -> str:
    """Return ``name`` if a checkpoint can have it.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not name or "/" in name or "\0" in name:
        raise ValueError("it must be the name of one directory, without /")
    if name.startswith("."):
        raise ValueError("it must not begin with a dot: such directories are hidden, and no reader looks at them")
    if _SET_ASIDE.fullmatch(name) is not None:
        raise ValueError("its ending is one that stager gives directories which are no checkpoints")
    if is_data(name):
        raise ValueError("its ending is one that stager gives the data of a save in an object store")
    if len(os.fsencode(name)) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    return name


def check_template(template: str) -> str:
    """Return ``template`` if every step gets a name of its own from it.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no template: {error}") from error
    fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    if len(fields) != 1 or fields[0][0] != "step":
        raise ValueError('must have {step} in it, once, and no other field, as in "checkpoint-{step}"')
    _, spec, conversion = fields[0]
    if conversion or _SPEC.fullmatch(spec or "") is None:
        raise ValueError("takes a step as {step}, or with leading zeros as {step:08d}")
    for step in _SAMPLES:
        name = checkpoint_name(step, template)
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"names step {step} {name!r}: {error}") from error
        if parse_checkpoint(name) not in (None, step):
            raise ValueError(f"names step {step} {name!r}, which is the default name of step {parse_checkpoint(name)}")
    return template


def may_be_checkpoint(name: str) -> bool:
    """Return whether a directory of this name can be a checkpoint."""
    return not name.startswith(".") and _SET_ASIDE.fullmatch(name) is None


def is_data(name: str) -> bool:
    """Return whether this is the name of the data of a save in an object store."""
    return _DATA.fullmatch(name) is not None


def partial_name(name: str, save_id: str) -> str:
    """Return the name of a save's partial directory. ``name`` is that of the checkpoint."""
    return f"{_hidden(name)}.partial-{save_id}"


def removing_name(name: str, nonce: str) -> str:
    """Return the name that a checkpoint has while it is removed."""
    return f"{_hidden(name)}.removing-{nonce}"


def unfinished_name(name: str, save_id: str) -> str:
    """Return the name of a save's directory in quarantine."""
    return f"{_hidden(name)}.unfinished-{save_id}"


def not_a_checkpoint_name(name: str, save_id: str) -> str:
    """Return the new name of what somebody else had put where the checkpoint ``name`` was committed."""
    return f"{_hidden(name)}.not-a-checkpoint-{save_id}"


def _hidden(name: str) -> str:
    if parse_checkpoint(name) is not None:
        return name
    return "." + _LOOKS_LIKE_STEP.sub("step-~", name)


def is_partial(name: str) -> bool:
    """Return whether ``name`` is a partial directory's."""
    return _PARTIAL.fullmatch(name) is not None


def is_removing(name: str) -> bool:
    """Return whether ``name`` is that of a directory whose removal has begun."""
    return _REMOVING.fullmatch(name) is not None


def parse_partial(name: str) -> tuple[str, str]:
    """Return (name of the checkpoint, save_id) of a partial directory's name.

    Raises:
        ValueError: it is not a partial directory's name.
    """
    match = _PARTIAL.fullmatch(name)
    if match is None:
        raise ValueError(f"not a partial directory: {name}")
    return _parts(match)


def parse_removing(name: str) -> tuple[str, str]:
    """Return (name of the checkpoint, nonce) of the name of a directory whose removal has begun.

    Raises:
        ValueError: it is not such a name.
    """
    match = _REMOVING.fullmatch(name)
    if match is None:
        raise ValueError(f"not a directory whose removal has begun: {name}")
    return _parts(match)


def parse_unfinished(name: str) -> tuple[str, str] | None:
    """Return (name of the checkpoint, save_id) of a directory in quarantine; None for any other name."""
    match = _UNFINISHED.fullmatch(name)
    return None if match is None else _parts(match)


def _parts(match: re.Match[str]) -> tuple[str, str]:
    by_default, _, id_by_default, hidden, save_id = match.groups()
    if by_default is not None:
        return by_default, id_by_default
    return _LOOKED_LIKE_STEP.sub("step-", hidden), save_id
