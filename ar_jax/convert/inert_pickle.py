"""A pickle machine that cannot run anything.

A weight file of torch holds a pickle, a program for a stack machine that may import any name and
call it. Python's own machine with a restricted `find_class` is not used here: what that returns is
called and written to by the program (REDUCE, NEWOBJ, BUILD), its memo is an array whose size the
program chooses, and a deeply nested tuple as a key overflows the C stack. This machine

* takes its opcodes and their arguments from the tables of `pickletools`, which only read;
* knows only the opcodes that pickles of plain containers and tensors are made of, none of those
  whose arguments are text to be parsed (protocol 0);
* turns a name (GLOBAL, STACK_GLOBAL) into a `Name`, an inert string, and only if its caller listed
  the name. REDUCE looks the name up in the caller's table; nothing is imported or found by name;
* knows one class of objects, `argparse.Namespace`, which trainers keep their settings in: made of
  nothing (NEWOBJ, REDUCE), it stands as `Attributes`, our own, until BUILD gives it a plain dict;
* lets BUILD follow that and an ordered dictionary alone, whose attributes it drops;
* bounds the opcodes, the numbers and the kinds of keys; lengths are bounded by the bytes there are.

What it returns may still share branches or contain itself: `ar_jax.convert.torch_tensors.resolve`
copies it into a tree of bounded depth and size.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 16 << 20  # of a pickle; a model of 1,000 tensors takes some 200 KB
MAX_OPCODES = 2_000_000  # about 60 a tensor
MAX_BITS = 128  # of an integer; the legacy format's magic number has 80

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
PARSED = {"INT", "LONG", "STRING", "UNICODE", "FLOAT", "GET", "PUT", "PERSID"}

ADVICE = (
    "only tensors and plain containers (dict, list, tuple, str, numbers, None; argparse.Namespace "
    "of such values) are read, and nothing of the file was imported or run. If you trust the file, "
    "load it with the code that wrote it and save its tensors alone, as "
    "torch.save({'model': checkpoint['model']}, NEW) does where the model is under 'model'"
)

Constructor = Callable[[tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Name:
    """A listed name that the pickle mentions, 'collections OrderedDict'."""

    name: str


@dataclasses.dataclass(eq=False)
class Attributes:
    """An object that holds attributes and nothing else; ``held`` is None until BUILD gives them."""

    kind: str
    held: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        """Takes the attributes.

        Raises:
            ValueError: they are something else than one plain dict with names as its keys.
        """
        if type(state) is not dict or not all(isinstance(name, str) for name in state):
            raise ValueError(
                f"its pickle fills a {self.kind} with a {type(state).__name__} that is no plain "
                "dict of attributes"
            )
        if self.held is not None:
            raise ValueError(f"its pickle fills a {self.kind} twice")
        self.held = state


def load(
    stream: io.BytesIO,
    constructors: Mapping[str, Constructor | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What one pickle describes; the stream is left behind its end.

    Args:
        stream: of at most `MAX_BYTES`.
        constructors: names that may be mentioned, 'module name' -> what stands for a call of it
            with a tuple of arguments, None where it may not be called.
        persistent: of a persistent identifier -> the object; None: there may be none.

    Raises:
        ValueError: the pickle is broken, too large, or asks for something else, which is named.
    """
    machine = _Machine(constructors, persistent)
    for _ in range(MAX_OPCODES):
        position = stream.tell()
        opcode, argument = _next(stream)
        if opcode == "STOP":
            return machine.result()
        try:
            machine.step(opcode, argument)
        except IndexError as error:
            raise ValueError(
                f"its pickle is broken: {opcode} at byte {position} finds nothing to work on"
            ) from error
    raise ValueError(f"its pickle has more than {MAX_OPCODES:,} opcodes")


def _next(stream: io.BytesIO) -> tuple[str, Any]:
    """Name and argument of the next opcode; lengths are bounded by what the stream holds."""
    position, code = stream.tell(), stream.read(1)
    if code not in OPCODES:
        what = f"{code!r} is no opcode" if code else "it ends without STOP"
        raise ValueError(f"its pickle is broken or truncated at byte {position}: {what}")
    opcode = OPCODES[code]
    if opcode.name in PARSED:
        raise _needless(opcode.name)
    try:
        if opcode.name in ("GLOBAL", "INST"):  # pickletools would look for escapes in the name
            return opcode.name, f"{_line(stream)} {_line(stream)}"
        return opcode.name, opcode.arg.reader(stream) if opcode.arg else None
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"its pickle is broken or truncated at byte {position}: {error}"
        ) from error


def _line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a name has no end")
    return line[:-1].decode("utf-8")


def _needless(opcode: str) -> ValueError:
    return ValueError(
        f"its pickle uses the opcode {opcode}, which tensors and plain containers do not need: "
        f"{ADVICE}"
    )


def ordered_dict(arguments: tuple[Any, ...]) -> collections.OrderedDict[Any, Any]:
    """`collections.OrderedDict`, called with nothing or with a list of pairs."""
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    if arguments:
        pairs = arguments[0]
        if len(arguments) > 1 or not isinstance(pairs, list):
            raise ValueError("its pickle is broken: an OrderedDict of something that is no list")
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("its pickle is broken: an OrderedDict of something but pairs")
            _set(made, *pair)
    return made


def namespace(arguments: tuple[Any, ...]) -> Attributes:
    """`argparse.Namespace`, made of nothing."""
    if arguments:
        raise refused("a call of argparse.Namespace with arguments")
    return Attributes("argparse.Namespace")


class _Machine:
    """The stack, the marked stacks below it and the memo."""

    def __init__(
        self,
        constructors: Mapping[str, Constructor | None],
        persistent: Callable[[Any], Any] | None,
    ):
        self.constructors = constructors
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What STOP returns."""
        if self.below or len(self.stack) != 1:
            raise ValueError("its pickle is broken: it does not end with one object")
        return self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """One opcode.

        Raises:
            IndexError: the stack is too short.
            ValueError: anything else.
        """
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"its pickle is broken: no object has the number {argument}")
                stack.append(self.memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if argument.bit_length() > MAX_BITS:
                    raise ValueError(f"its pickle holds an integer of more than {MAX_BITS} bits")
                stack.append(argument)
            case "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # str of Python 2
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE":
                marked = tuple(self._marked())
                self.stack.append(marked)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                self._target(list).append(item)
            case "APPENDS":
                items = self._marked()
                self._target(list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(self._target(dict), key, value)
            case "SETITEMS":
                items = self._marked()
                if len(items) % 2:
                    raise ValueError("its pickle is broken: a key without a value")
                target = self._target(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set(target, key, value)
            case "GLOBAL":
                stack.append(self._name(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._name(f"{module} {name}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                if not isinstance(made, Name) or self.constructors[made.name] is not namespace:
                    raise _needless(opcode)
                stack.append(self._call(made, arguments))
            case "BUILD":
                attributes = stack.pop()
                if isinstance(stack[-1], Attributes):
                    stack[-1].build(attributes)
                    return
                self._target(collections.OrderedDict)
                if not isinstance(attributes, dict):
                    raise ValueError("its pickle is broken: attributes that are no dict")
            case "BINPERSID":
                if self.persistent is None:
                    raise ValueError("its pickle is broken: it has a storage out of place")
                stack.append(self.persistent(stack.pop()))
            case "INST":
                raise refused(argument.replace(" ", "."))
            case "EXT1" | "EXT2" | "EXT4":
                raise refused(f"extension code {argument}")
            case _:
                raise _needless(opcode)

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which is taken away."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _target(self, kind: type) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise ValueError(
                f"its pickle is broken: it fills a {type(target).__name__} as a {kind.__name__}"
            )
        return target

    def _name(self, name: str) -> Name:
        if name not in self.constructors:
            raise refused(name.replace(" ", "."))
        return Name(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle is broken: it calls something that is no name")
        constructor = self.constructors[function.name]
        if constructor is None:
            raise refused(f"a call of {function.name.replace(' ', '.')}")
        return constructor(arguments)


def refused(what: str) -> ValueError:
    """The error of a file that asks for ``what``."""
    return ValueError(f"it asks for {what[:200]}: {ADVICE}")


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Tuples are hashed recursively, without a bound.
    if not (key is None or isinstance(key, str | int | float)):
        raise ValueError(f"its pickle has a {type(key).__name__} as a key")
    if key in target:
        raise ValueError(f"its pickle has the key {key!r:.200} twice in one dict")
    target[key] = value
