"""Finding that names differ by a prefix only, as those of a wrapped module do: one sentence in place of a line for each.

    module.              DistributedDataParallel, DataParallel
    _orig_mod.           torch.compile
    _forward_module.     DeepSpeed and FSDP in Lightning and Fabric
    base_model.model.    PEFT

Any other prefix that fits is found, too, and several on top of each other (``module._orig_mod.``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from stager.workers.checkpoint.layout.structure import Path, describe

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "base_model.model.")
_MOST_TRIED = 200  # names from which a prefix is guessed


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


def find_prefixes(missing: Iterable[Path], unexpected: Iterable[Path]) -> list[PrefixFound]:
    """Find prefixes among names that do not fit, for each mapping by itself.

    Args:
        missing: key paths of the target that the checkpoint does not have.
        unexpected: key paths of the checkpoint that the target does not have.
    """
    there, here = _by_mapping(unexpected), _by_mapping(missing)
    found = []
    for path, names in here.items():
        stored = there.get(path)
        if not stored:
            continue
        for one in (_in_checkpoint(path, names, stored), _in_target(path, names, stored), _inside(path, names, stored)):
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


def _in_checkpoint(path: Path, missing: set[str], unexpected: set[str]) -> PrefixFound | None:
    prefix = _prefix(unexpected, missing)
    if prefix is None:
        return None
    unwrapped = f"{describe(path) if path else 'the module'}.{prefix.rstrip('.')}"
    save = f"save {unwrapped}, or " if _is_wrapper(prefix) else ""
    return _found(path, prefix, missing, unexpected, "the checkpoint", save)


def _in_target(path: Path, missing: set[str], unexpected: set[str]) -> PrefixFound | None:
    prefix = _prefix(missing, unexpected)
    if prefix is None:
        return None
    unwrapped = f"{describe(path) if path else 'the module'}.{prefix.rstrip('.')}"
    give = f"load into {unwrapped}, or " if _is_wrapper(prefix) else ""
    found = _found(path, prefix, unexpected, missing, "the target", give)
    return PrefixFound(found.sentence, found.unexpected, found.missing)


def _inside(path: Path, missing: set[str], unexpected: set[str]) -> PrefixFound | None:
    """Find a wrapper around a part of the module: ``encoder._orig_mod.weight``."""
    for wrapper in _WRAPPERS:
        fitting = {name for name in unexpected if f".{wrapper}" in name and _without(name, wrapper) in missing}
        if fitting:
            return PrefixFound(
                f"the checkpoint's keys{_of(path)} have {wrapper} within them; pass "
                f"rename=lambda name: name.replace('.{wrapper}', '.')",
                frozenset((*path, _without(name, wrapper)) for name in fitting),
                frozenset((*path, name) for name in fitting),
            )
    return None


def _without(name: str, wrapper: str) -> str:
    return name.replace(f".{wrapper}", ".")


def _of(path: Path) -> str:
    return f" of {describe(path)}" if path else ""


def _found(path: Path, prefix: str, short: set[str], long: set[str], whose: str, other_way: str) -> PrefixFound:
    fitting = [name for name in short if prefix + name in long]
    if len(fitting) == len(long) or _is_wrapper(prefix):
        sentence = f"{whose}'s keys{_of(path)} have the prefix {prefix}; {other_way}pass strip_prefix={prefix!r}"
    else:  # a part of a larger module, or a coincidence
        sentence = (
            f"{len(fitting)} of {whose}'s {len(long)} keys{_of(path)} that do not fit have the prefix {prefix}, and "
            f"would fit without it; pass strip_prefix={prefix!r} and strict=False to load these only"
        )
    return PrefixFound(
        sentence,
        frozenset((*path, name) for name in fitting),
        frozenset((*path, prefix + name) for name in fitting),
    )


def _prefix(long: Collection[str], short: Collection[str]) -> str | None:
    """Return the prefix that makes the most of the short names long ones; None: there is none."""
    votes: Counter[str] = Counter()
    ordered = sorted(short)[:_MOST_TRIED]
    for name in sorted(long)[:_MOST_TRIED]:
        votes.update({name[: -len(one)] for one in ordered if name.endswith(f".{one}")})
    for prefix, _ in votes.most_common(5):
        fitting = sum(prefix + name in long for name in short)
        if fitting == min(len(short), len(long)) or (_is_wrapper(prefix) and fitting):
            return prefix
    return None


def _is_wrapper(prefix: str) -> bool:
    """Tell whether a prefix consists of those that wrappers make."""
    while prefix:
        known = next((one for one in _WRAPPERS if prefix.startswith(one)), None)
        if known is None:
            return False
        prefix = prefix[len(known) :]
    return True
