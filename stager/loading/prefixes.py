"""Finding that names differ by a prefix only, as those of a wrapped module do: one sentence in place of a line for each.

    module.              DistributedDataParallel, DataParallel
    _orig_mod.           torch.compile
    _forward_module.     DeepSpeed and FSDP in Lightning and Fabric
    base_model.model.    PEFT

Any other prefix that fits is found, too, and several on top of each other (``module._orig_mod.``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stager.workers.checkpoint.layout.structure import Path, describe

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "base_model.model.")
_MOST_TRIED = 200  # names from which a prefix is guessed
_SHOWN_NAMES = 3

Shape = tuple[int, ...]
NO_SHAPES: Mapping[Path, Shape] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PrefixFound:
    """That some names would fit but for a prefix.

    Attributes:
        sentence: says so, and what to do.
        missing: names of the target that would fit.
        unexpected: names of the checkpoint that would fit.
    """

    sentence: str
    missing: frozenset[Path]
    unexpected: frozenset[Path]


def find_prefixes(
    missing: Iterable[Path], unexpected: Iterable[Path], shapes: Mapping[Path, Shape] = NO_SHAPES
) -> list[PrefixFound]:
    """Find prefixes among names that do not fit, for each mapping by itself.

    Args:
        missing: key paths of the target that the checkpoint does not have.
        unexpected: key paths of the checkpoint that the target does not have.
        shapes: of the tensors among them, where they are known.
    """
    there, here = _by_mapping(unexpected), _by_mapping(missing)
    found = []
    for path, names in here.items():
        stored = there.get(path)
        if not stored:
            continue
        for one in (
            _in_checkpoint(path, names, stored, shapes),
            _in_target(path, names, stored, shapes),
            _inside(path, names, stored),
        ):
            if one is not None:
                found.append(one)
                break
    return found


def _by_mapping(paths: Iterable[Path]) -> dict[Path, set[str]]:
    names: dict[Path, set[str]] = {}
    for path in paths:
        if isinstance(path[-1], str):
            names.setdefault(path[:-1], set()).add(path[-1])
    return names


def _in_checkpoint(
    path: Path, missing: set[str], unexpected: set[str], shapes: Mapping[Path, Shape]
) -> PrefixFound | None:
    prefix = _prefix(path, unexpected, missing, shapes)
    if prefix is None:
        return None
    fitting = [name for name in missing if prefix + name in unexpected]
    wrapped = f"because a wrapped model was saved (in future, save {_unwrapped(path, prefix)});"
    sentence = _sentence(path, prefix, fitting, unexpected, ("the checkpoint", "the target"), wrapped)
    here, there = _names(path, "", fitting), _names(path, prefix, fitting)
    return PrefixFound(sentence, here, there)


def _in_target(path: Path, missing: set[str], unexpected: set[str], shapes: Mapping[Path, Shape]) -> PrefixFound | None:
    prefix = _prefix(path, missing, unexpected, shapes)
    if prefix is None:
        return None
    fitting = [name for name in unexpected if prefix + name in missing]
    wrapped = f"because its model is wrapped; load into {_unwrapped(path, prefix)}, or"
    sentence = _sentence(path, prefix, fitting, missing, ("the target", "the checkpoint"), wrapped)
    here, there = _names(path, prefix, fitting), _names(path, "", fitting)
    return PrefixFound(sentence, here, there)


def _sentence(
    path: Path, prefix: str, fitting: Collection[str], longer: set[str], sides: tuple[str, str], wrapped: str
) -> str:
    """Say that the names of one side begin with a prefix, and what to do.

    Args:
        fitting: the names of the other side that fit without the prefix.
        longer: all names of the one side that do not fit.
        sides: the one side, and the other.
        wrapped: why, and what else to do, if it is the prefix of a wrapper.
    """
    side, other = sides
    advice = f"pass strip_prefix={prefix!r}"
    begin = f"{side}'s keys{_of(path)} begin with {prefix!r},"
    if _is_wrapper(prefix):
        return f"{begin} {wrapped} {advice}"
    if len(fitting) == len(longer):
        return f"{begin} and {other}'s do not; {advice}"
    return _of_a_part(path, prefix, fitting, other, side)


def _names(path: Path, prefix: str, names: Iterable[str]) -> frozenset[Path]:
    return frozenset((*path, prefix + name) for name in names)


def _of_a_part(path: Path, prefix: str, fitting: Collection[str], short: str, long: str) -> str:
    """Say that one side has a part of what the other has, under a prefix; this may be a coincidence."""
    shown = ", ".join(sorted(fitting)[:_SHOWN_NAMES]) + (", ..." if len(fitting) > _SHOWN_NAMES else "")
    return (
        f"{short}'s keys{_of(path)} that do not fit ({shown}) are in {long} with {prefix!r} before them; if these are "
        f"meant, pass strip_prefix={prefix!r} and strict=False, which leaves out the other keys"
    )


def _unwrapped(path: Path, prefix: str) -> str:
    name = prefix.rstrip(".")
    return f"{describe(path)}.{name}" if path else f"its {name}"


def _inside(path: Path, missing: set[str], unexpected: set[str]) -> PrefixFound | None:
    """Find a wrapper around a part of the module: ``encoder._orig_mod.weight``."""
    for wrapper in _WRAPPERS:
        fitting = {name for name in unexpected if f".{wrapper}" in name and _without(name, wrapper) in missing}
        if fitting:
            return PrefixFound(
                f"the checkpoint's keys{_of(path)} have {wrapper!r} within them; pass "
                f"rename=lambda name: name.replace('.{wrapper}', '.')",
                frozenset((*path, _without(name, wrapper)) for name in fitting),
                frozenset((*path, name) for name in fitting),
            )
    return None


def _without(name: str, wrapper: str) -> str:
    return name.replace(f".{wrapper}", ".")


def _of(path: Path) -> str:
    return f" of {describe(path)}" if path else ""


def _prefix(path: Path, long: Collection[str], short: Collection[str], shapes: Mapping[Path, Shape]) -> str | None:
    """Return the prefix that makes the most of the short names long ones; None: there is none.

    Where the long names have others among them, the shapes have to be the same, too.
    """
    votes: Counter[str] = Counter()
    ordered = sorted(short)[:_MOST_TRIED]
    for name in sorted(long)[:_MOST_TRIED]:
        votes.update({name[: -len(one)] for one in ordered if name.endswith(f".{one}")})
    for prefix, _ in votes.most_common(5):
        fitting = [name for name in short if prefix + name in long]
        if fitting and _is_wrapper(prefix):
            return prefix
        if len(fitting) == len(long) or (
            len(fitting) == len(short)
            and not any(_differ(shapes, (*path, name), (*path, prefix + name)) for name in fitting)
        ):
            return prefix
    return None


def _differ(shapes: Mapping[Path, Shape], one: Path, other: Path) -> bool:
    return one in shapes and other in shapes and shapes[one] != shapes[other]


def _is_wrapper(prefix: str) -> bool:
    """Tell whether a prefix consists of those that wrappers make."""
    while prefix:
        known = next((one for one in _WRAPPERS if prefix.startswith(one)), None)
        if known is None:
            return False
        prefix = prefix[len(known) :]
    return True
