"""JSON from files that nobody vouches for: one meaning per text, or an error.

The standard parser keeps the last of two equal keys and accepts NaN; two readers could then see
two different files. Here both are errors, as are texts nested so deep that they exhaust a stack.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from kvpack.core.errors import KvpackError

MAX_DEPTH = 64
"""Levels of nesting that any file of this package's formats needs, with room to spare."""


class _RefusedError(ValueError):
    """Valid for the standard parser, refused here."""


def parse_json(data: bytes, *, where: str, error: type[KvpackError]) -> Any:
    """Parse a JSON text.

    Args:
        data: the text, UTF-8.
        where: name of the file, for messages.
        error: class of the error to raise.

    Raises:
        KvpackError: of class `error`; not JSON, a key that appears twice, NaN or Infinity, text
            that is not Unicode, or nesting deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
        _check_tree(value)
    except RecursionError:
        raise error(f"nested deeper than {MAX_DEPTH} levels", where=where) from None
    except ValueError as problem:
        raise error(f"is not valid JSON: {problem}", where=where) from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {key[:200]!r} appears twice")
            seen.add(key)
    return entries


def _refuse_constant(text: str) -> NoReturn:
    raise _RefusedError(f"{text} is not a JSON number")


def _check_tree(root: Any) -> None:
    """Depth and text of every node, without recursion."""
    level = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            kind = type(value)  # what `json` makes is of no subclass
            if kind is dict:
                for key in value:
                    key.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
                below.extend(value.values())
            elif kind is list:
                below.extend(value)
            elif kind is str:
                value.encode("utf-8")
        if not below:
            return
        level = below
    raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels")
