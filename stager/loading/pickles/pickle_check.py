"""Checking a pickle before it is loaded: would it take too much time or memory, or change the process?

An unpickler that allows only harmless classes is not enough:

- A tuple that holds a tuple twice, which holds a tuple twice, and so on, takes for ever to hash when it is a key.
- A value nested a million deep ends the process.
- A memo index of two billion makes the unpickler allocate an array of that length.
- ``bytearray(1 << 40)`` allocates a terabyte.
- ``numpy.asarray`` makes an array of any size and kind of little, if it is given a dtype.
- BUILD on a class changes the class for the whole process.
- A storage may claim to be longer than its bytes (torch 2.13 checks that itself; nothing here relies on it).

So the opcodes are walked first, with a size and a depth in place of each value. No code of the pickle runs.

Opcodes: pickletools, in Python's standard library.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from stager.workers.gc_pause import no_collection

_MAX_DEPTH = 1000  # pickle's own recursion does not write deeper ones
_MAX_HASHED = 10_000_000  # elements hashed in all, in addition to a few for each opcode
_HASHED_PER_OPCODE = 10
_HUGE = 1 << 40
_MAX_ASKED = 1 << 20  # bytes or elements that a call may ask for, in addition to the length of the pickle

_CACHED_NBYTES = 4096  # tensors of one dtype and shape have equal pickles
_CACHED_STORAGES = 16

_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ", "FROZENSET"}
_STORAGES = {"PERSID", "BINPERSID"}
_GROWS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_GLOBALS = {"GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
_ATOMS = {code.name for code in pickletools.opcodes if not code.stack_before and len(code.stack_after) == 1} - (
    _GET | _GLOBALS | _CONTAINERS | {"MARK", "INST"}
)
# Callables that allocate as much as a number among their arguments says; "" is a name that came from the stack.
_ALLOCATE = {
    "",
    *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("bytearray", "bytes", "list", "tuple")),
    *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "dict")),
    *("torch Tensor", "torch.nn.parameter Parameter", "collections deque", "collections Counter"),
    *(f"{module}.multiarray {name}" for module in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
}
_TAKES = {  # what an opcode pops: a number of values, and whether it then pops everything down to a mark
    code.name: (
        code.stack_before.index(pickletools.markobject)
        if pickletools.stackslice in code.stack_before
        else len(code.stack_before),
        pickletools.stackslice in code.stack_before,
    )
    for code in pickletools.opcodes
}
_ARRAY_OF_TENSOR = "numpy asarray"
_TENSOR_MAKERS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"}
_STORAGE_FIELDS = 5
_ELEMENT_NBYTES = {
    "torch.storage UntypedStorage": 1,
    **{
        f"torch {kind}Storage": nbytes
        for nbytes, kinds in {
            1: "Untyped Byte Char Bool QInt8 QUInt8 QUInt4x2 QUInt2x4",
            2: "Half BFloat16 Short",
            4: "Float Int QInt32",
            8: "Double Long ComplexFloat",
            16: "ComplexDouble",
        }.items()
        for kind in kinds.split()
    },
}
_ARGUMENT_DEPTH = 3  # arguments, the list in them, a pair in that, the key: OrderedDict([[key, value]])


class _Value:
    """Stands for a value of the pickle.

    Attributes:
        made_by: the opcode that made it.
        argument: of that opcode.
        size: number of elements, each counted as often as it occurs. Elements added later to a list inside of the value are
            not
            counted; a value with a list in it cannot be hashed anyway.
        depth: nesting depth of its elements.
        largest: largest number among its elements.
        children: its elements, except plain numbers and texts.
    """

    __slots__ = ("argument", "children", "depth", "largest", "made_by", "size")

    def __init__(self, made_by: str, parts: list[_Value], argument: Any = None) -> None:
        self.made_by = made_by
        self.argument = argument
        self.size, self.depth = 1, 1
        self.largest = argument if type(argument) is int else 0
        self.children: list[_Value] = []
        self.add(parts)

    def add(self, parts: list[_Value]) -> None:
        size, depth, largest = self.size, self.depth, self.largest
        for part in parts:
            size += part.size
            if part is not _ATOM:
                self.children.append(part)
                if part.depth >= depth:
                    depth = part.depth + 1
                largest = max(largest, part.largest)
        self.size, self.depth, self.largest = min(_HUGE, size), depth, largest

    def hashed(self, depth: int) -> int:
        """How many elements a function called with this value may hash. Children may have grown since they were added."""
        if depth == 0 or not self.children:
            return self.size
        return min(_HUGE, max(self.size, 1 + sum(child.hashed(depth - 1) for child in self.children)))


_ATOM = _Value("NONE", [])  # stands for every value that has no elements and is no number of interest
_MARK = _Value("MARK", [])


def check_pickle(data: bytes, storages: Mapping[str, int] | None = None) -> None:
    """Raise unless the pickle can be loaded at a cost that fits its length.

    Args:
        data: the pickle.
        storages: length in bytes of each storage in the same archive, by key; no tensor may claim more.

    Raises:
        ValueError: it is no pickle, or one that is made to do harm.
    """
    known = tuple((storages or {}).items())
    if len(data) <= _CACHED_NBYTES and len(known) <= _CACHED_STORAGES:
        _check_small(data, known)
    else:
        _check(data, known)


def claimed_storages(data: bytes, most_nbytes: int) -> dict[str, int]:
    """Check a pickle whose storages are not known yet, as :func:`check_pickle` does, and return what it says of them.

    Args:
        data: the pickle.
        most_nbytes: no storage may claim more.

    Returns:
        The length in bytes of each storage, by key.

    Raises:
        ValueError: it is no pickle, or one that is made to do harm.
    """
    walk = _Walk(len(data), defaultdict(lambda: most_nbytes, {"": most_nbytes}))
    try:
        with no_collection():
            walk.run(data)
    except (IndexError, KeyError) as error:
        raise ValueError(f"not a pickle: {error!r}") from error
    return walk.claimed


def _check(data: bytes, storages: tuple[tuple[str, int], ...]) -> None:
    try:
        with no_collection():
            _Walk(len(data), dict(storages)).run(data)
    except (IndexError, KeyError) as error:
        raise ValueError(f"not a pickle: {error!r}") from error


_check_small = lru_cache(maxsize=1024)(_check)


class _Walk:
    """One walk over the opcodes of a pickle.

    Args:
        nbytes: length of the pickle.
        storages: length in bytes of each storage, by key.

    Attributes:
        claimed: the length in bytes that the pickle says of each storage, by key; the largest, if it says several.
    """

    def __init__(self, nbytes: int, storages: Mapping[str, int]) -> None:
        self._storages = storages
        self.claimed: dict[str, int] = {}
        self._stack: list[_Value] = []
        self._atoms: dict[tuple[str, Any], _Value] = {}
        self._memo: dict[int, _Value] = {}
        self._hashed = 0
        self._num_opcodes = 0
        self._max_allocated = _MAX_ASKED + nbytes

    def run(self, data: bytes) -> None:
        stack = self._stack
        with_storages = b"Q" in data and bool(self._storages)  # Q is the opcode of a storage; atoms describe it
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            self._num_opcodes += 1
            name = opcode.name
            if name in _ATOMS:  # most opcodes are
                kept = type(argument) is str or (type(argument) is int and (with_storages or argument > _MAX_ASKED))
                stack.append(self._atom(name, argument) if kept else _ATOM)
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name in _GET:
                stack.append(self._memo[argument])
            elif name in _PUT:
                self._put(argument)
            else:
                self._step(name, opcode, argument)

    def _atom(self, name: str, argument: Any) -> _Value:
        key = name, argument
        if key not in self._atoms:
            self._atoms[key] = _Value(name, [], argument)
        return self._atoms[key]

    def _step(self, name: str, opcode: Any, argument: Any) -> None:
        if name == "MARK":
            self._stack.append(_MARK)
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name in _GROWS:
            self._grow(name, self._pop(opcode))
        else:
            if name == "PROTO" and argument > pickle.HIGHEST_PROTOCOL:
                raise ValueError(f"there is no pickle protocol {argument}")
            parts = self._pop(opcode)
            if name in _CALLS:
                self._call(parts)
            elif name == "DICT":
                self._count_hashing(parts[::2])
            elif name in _STORAGES:
                self._check_storage(parts)
            for _ in opcode.stack_after:
                self._push(_Value(name, parts, argument))

    def _call(self, parts: list[_Value]) -> None:
        """Check that a call takes neither long nor much memory.

        Args:
            parts: what is called, and its arguments.

        Raises:
            ValueError: it could.
        """
        self._count_hashing(parts, _ARGUMENT_DEPTH)  # the callable may put its arguments into a set or a dict
        called, *arguments = parts or [_ATOM]
        name = _name_of(called)
        if name == _ARRAY_OF_TENSOR and not _is_one_tensor(arguments):
            raise ValueError(
                "the pickle calls numpy.asarray with something other than one tensor: it is damaged or hostile"
            )
        asked = max((value.largest for value in arguments), default=0)
        if name in _ALLOCATE and asked > self._max_allocated:
            raise ValueError(
                f"the pickle asks for memory for {asked} elements, far more than its bytes can "
                "describe: it is damaged or hostile"
            )

    def _check_storage(self, parts: list[_Value]) -> None:
        """Check that a storage is not longer than its bytes in the archive.

        Args:
            parts: the tuple ("storage", class, key, device, number of elements). A class is given by its name.

        Raises:
            ValueError: it is longer, or described in another way.
        """
        fields = parts[0].children if len(parts) == 1 else []
        if fields and fields[0].argument == "module":  # a class and its source; ``weights_only`` rules refuse it
            return
        if len(fields) != _STORAGE_FIELDS or fields[0].argument != "storage":
            raise ValueError("the pickle describes a storage in another way than torch.save does")
        _, kind, key, _, count = fields
        if type(key.argument) is not str or type(count.argument) is not int:
            raise ValueError("the pickle has a storage without a key or a length")
        nbytes = count.argument * _ELEMENT_NBYTES[_name_of(kind)]
        if not 0 <= nbytes <= self._storages[key.argument]:
            raise ValueError(
                f"the pickle claims that storage {key.argument} has {nbytes} bytes, and the file has "
                f"{self._storages[key.argument]} for it"
            )
        self.claimed[key.argument] = max(nbytes, self.claimed.get(key.argument, 0))

    def _put(self, index: int) -> None:
        if index > self._num_opcodes:
            raise ValueError(f"the pickle writes entry {index} of a memo that has {len(self._memo)} entries")
        self._memo[index] = self._stack[-1]

    def _push(self, value: _Value) -> None:
        if value.depth > _MAX_DEPTH:
            raise ValueError(f"the pickle is nested deeper than {_MAX_DEPTH} containers: it is damaged or hostile")
        self._stack.append(value)

    def _grow(self, name: str, parts: list[_Value]) -> None:
        """Add all but the first of ``parts`` to the first."""
        target, *others = parts
        if target.made_by in _ATOMS or (name == "BUILD" and target.made_by in _GLOBALS):
            raise ValueError("the pickle changes a class, or a value that cannot be changed: it is damaged or hostile")
        if name in ("SETITEM", "SETITEMS"):
            self._count_hashing(others[::2])
        elif name == "ADDITEMS":
            self._count_hashing(others)
        target.add(others)
        self._push(target)

    def _pop(self, opcode: Any) -> list[_Value]:
        """Pop what an opcode takes from the stack, lowest first, without the mark."""
        num_fixed, up_to_mark = _TAKES[opcode.name]
        stack, parts = self._stack, []
        if up_to_mark:
            while (value := stack.pop()) is not _MARK:
                parts.append(value)
        for _ in range(num_fixed):
            parts.append(stack.pop())
        if _MARK in parts:
            raise ValueError("the pickle is malformed: a MARK opcode stands where a value belongs")
        parts.reverse()
        return parts

    def _count_hashing(self, values: list[_Value], depth: int = 0) -> None:
        """Add to the count of hashed elements what hashing these values may take.

        Args:
            depth: count the values' own elements down to this depth, which may have grown since.

        Raises:
            ValueError: the pickle hashes far more than it is long.
        """
        for value in values:
            self._hashed += value.hashed(depth) if depth and value.children else value.size
        if self._hashed > _MAX_HASHED + _HASHED_PER_OPCODE * self._num_opcodes:
            raise ValueError("the keys and arguments of the pickle are made to take very long to hash: it is hostile")


def _is_one_tensor(arguments: list[_Value]) -> bool:
    """Whether the arguments of a call are one value, which a function of torch made of a storage."""
    if len(arguments) != 1 or arguments[0].made_by != "TUPLE1" or len(arguments[0].children) != 1:
        return False
    tensor = arguments[0].children[0]
    return tensor.made_by == "REDUCE" and bool(tensor.children) and _name_of(tensor.children[0]) in _TENSOR_MAKERS


def _name_of(called: _Value) -> str:
    """Module and name of a callable; "" if the opcodes alone do not tell."""
    if called.made_by == "STACK_GLOBAL":
        words = [child.argument for child in called.children]
        return " ".join(words) if all(type(word) is str for word in words) else ""
    return called.argument if called.made_by in _GLOBALS and type(called.argument) is str else ""
