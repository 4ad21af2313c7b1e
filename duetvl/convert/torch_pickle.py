"""The pickle of a state dict, followed as far as it makes plain data and tensors. It is not unpickled.

**Reading is safe by construction.** A small machine follows the instructions, and knows none that imports or calls. It
makes plain containers, and tensors where it meets torch's own functions for them; all else (Megatron's arguments,
optimizer and random state) becomes `OPAQUE`.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from duetvl.storage.tensor_files import NUMPY_DTYPES, TensorSpec

OPAQUE: Final = type("Opaque", (), {"__slots__": (), "__repr__": lambda self: "OPAQUE"})()
STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_UNREADABLE: Final = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError, RecursionError, struct.error
)  # fmt: skip


@dataclass(frozen=True)
class PickledTensor:
    """A tensor that a pickle describes: the key of its storage, offset and strides counted in numbers."""

    storage: str
    spec: TensorSpec
    offset: int
    strides: tuple[int, ...]


def read_pickle(pickle: bytes) -> Any:
    """The content, with `PickledTensor` for tensors and OPAQUE for what is not read. ValueError for a damaged one."""
    try:
        return _Machine().run(pickle)
    except _UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from None


@dataclass(frozen=True)
class _Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None  # None: bytes, each tensor says what they are
    count: int


class _Machine:
    """Follows the instructions of a pickle as far as they make plain data and tensors.

    `pickletools` decodes them; that only reads bytes. Keys of dicts other than strings and numbers are left out: none
    of ours, and hashing what an attacker nested a million times would end the process.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        if handler := _HANDLERS.get(name):
            handler(self)
        elif name in _MEMO_GET:
            self.stack.append(self.memo[int(argument)])
        elif name in _MEMO_PUT:
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif name == "GLOBAL":
            self.stack.append(_Global(argument.replace(" ", ".")))
        elif name == "INST":
            self._items()
            self.stack.append(OPAQUE)
        elif name in ("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            self.stack.append(OPAQUE)
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            raise ValueError(f"unknown instruction {name}")

    def _items(self) -> list[Any]:
        """What lies above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _set(self, flat: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_pairs(zip(flat[::2], flat[1::2], strict=True)))

    def _global_from_stack(self) -> None:
        module, name = self._top(2)
        self.stack.append(_Global(f"{module}.{name}"))

    def _reduce(self) -> None:
        function, arguments = self._top(2)
        self.stack.append(_rebuild(function, arguments))

    def _persistent(self) -> None:
        (pid,) = self._top(1)
        self.stack.append(_storage(pid))

    def _opaque(self, count: int) -> None:
        self._top(count)
        self.stack.append(OPAQUE)

    def _object(self) -> None:
        self._items()
        self.stack.append(OPAQUE)


_MEMO_GET: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MEMO_PUT: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_LITERALS: Final = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
})  # fmt: skip
_HANDLERS: Final[Mapping[str, Callable[[_Machine], Any]]] = {
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": lambda m: m.marks.pop() if m.marks and m.marks[-1] == len(m.stack) else m._top(1),
    "POP_MARK": lambda m: m._items(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "NONE": lambda m: m.stack.append(None),
    "NEWTRUE": lambda m: m.stack.append(True),
    "NEWFALSE": lambda m: m.stack.append(False),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_SET": lambda m: m.stack.append([]),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "TUPLE": lambda m: m.stack.append(tuple(m._items())),
    "TUPLE1": lambda m: m.stack.append(tuple(m._top(1))),
    "TUPLE2": lambda m: m.stack.append(tuple(m._top(2))),
    "TUPLE3": lambda m: m.stack.append(tuple(m._top(3))),
    "LIST": lambda m: m.stack.append(m._items()),
    "FROZENSET": lambda m: m.stack.append(m._items()),
    "DICT": lambda m: m.stack.append(_pairs(_by_two(m._items()))),
    "APPEND": lambda m: m._extend(m._top(1)),
    "APPENDS": lambda m: m._extend(m._items()),
    "ADDITEMS": lambda m: m._extend(m._items()),
    "SETITEM": lambda m: m._set(m._top(2)),
    "SETITEMS": lambda m: m._set(m._items()),
    "STACK_GLOBAL": lambda m: m._global_from_stack(),
    "REDUCE": lambda m: m._reduce(),
    "BINPERSID": lambda m: m._persistent(),
    "BUILD": lambda m: m._top(1),  # attributes of an object: of no use here
    "NEWOBJ": lambda m: m._opaque(2),
    "NEWOBJ_EX": lambda m: m._opaque(3),
    "OBJ": lambda m: m._object(),
}


def _by_two(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _pairs(pairs: Iterator[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: value for key, value in pairs if isinstance(key, (str, int, float, bytes, type(None)))}


def _rebuild(function: Any, arguments: Any) -> Any:
    """The result of a call where it is a tensor or a plain dict; nothing is called."""
    name = function.name if isinstance(function, _Global) else ""
    if not isinstance(arguments, tuple):
        return OPAQUE
    if name == "collections.OrderedDict":
        return _pairs(tuple(pair) for pair in arguments[0]) if arguments else {}
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, strides = arguments[:4]
        return _tensor(storage, offset, shape, strides, arguments[6])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _rebuild(arguments[0], arguments[2])
    return OPAQUE


def _storage(pid: Any) -> Any:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Global):
        return OPAQUE
    module, _, kind = pid[1].name.rpartition(".")
    if (module, kind) == ("torch.storage", "UntypedStorage"):
        return _Storage(str(pid[2]), None, pid[4])
    return _Storage(str(pid[2]), STORAGES[kind], pid[4]) if module == "torch" and kind in STORAGES else OPAQUE


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Any:
    if not isinstance(storage, _Storage):
        return OPAQUE  # of a dtype that no weights have
    name = storage.dtype or (dtype.name.removeprefix("torch.") if isinstance(dtype, _Global) else "")
    if name not in NUMPY_DTYPES:
        return OPAQUE
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"a tensor has the shape {shape}, strides {strides} and offset {offset}")
    return PickledTensor(storage.key, TensorSpec(name, tuple(shape)), offset, tuple(strides))
