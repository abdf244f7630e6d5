"""Are a configuration's values of the types that the parameters they are for are annotated with?"""

from __future__ import annotations

import collections.abc
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}


def check_types(section: str, fields: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Checks ``fields``, of the configuration's ``section``, that ``function`` is called with.

    Raises:
        ValueError: names the field, its value and the type that its parameter wants.
    """
    hints = typing.get_type_hints(function)
    for name, value in fields.items():
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise ValueError(f"{section}.{name}={value!r} must be of type {describe(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``, as far as a configuration can tell.

    An int will do for a float and a list for a tuple, but a bool is no number and text no list.
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if kind in (tuple, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def describe(hint: Any) -> str:
    """'int', 'tuple[int, ...] | None': the hint as it is written."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b[a-z_]+\.", "", str(hint))
