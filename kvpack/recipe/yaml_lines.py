"""YAML to a tree that remembers where every value stands.

Only the JSON part of YAML is read: mappings with text keys, lists, numbers, true and false, null
and text. Tags are refused, so that a file can never name a Python object, and so are duplicate
keys. Anchors work, but their expansion is bounded.

Numbers follow YAML 1.2: ``1e-3`` is a number, ``yes`` and ``012:30`` are text.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.resolver import BaseResolver

from kvpack.core.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,40}|[0-9]{1,18}(\.[0-9]{0,40})?)([eE][-+]?[0-9]{1,2})?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Position:
    """A place in a file, counted from 1; line 0 means the source as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    @property
    def origin(self) -> str:
        """File name and line without folders, as stored in artifacts: ``kivi.yaml:14``."""
        name = re.split(r"[/\\]", self.file)[-1]
        return f"{name}:{self.line}" if self.line else name


_SCALARS = frozenset((str, int, float, bool, type(None)))


@dataclass(frozen=True)
class Node:
    """A value, where it stands, and where the key that leads to it stands."""

    value: str | int | float | bool | tuple[Node, ...] | dict[str, Node] | None
    at: Position
    key_at: Position | None = None

    @classmethod
    def of(cls, value: Any, at: Position) -> Node:
        """The tree of plain data, all of it at one place."""
        if type(value) in _SCALARS:  # most are; the abstract classes below are slow to ask
            return cls(value, at)
        if isinstance(value, Mapping):
            return cls({key: cls.of(item, at) for key, item in value.items()}, at)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return cls(tuple(cls.of(item, at) for item in value), at)
        return cls(value, at)

    def with_entry(self, key: str, node: Node) -> Node:
        """This mapping with one entry set."""
        entries = self.value if isinstance(self.value, dict) else {}
        return replace(self, value={**entries, key: node})

    def plain(self) -> Any:
        """The data without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


@functools.lru_cache(maxsize=64)
def parse(text: str, file: str) -> Node:
    """Read one YAML document. Trees are never changed in place, so equal texts share one.

    Args:
        text: the document.
        file: its name for messages.

    Raises:
        RecipeError: not YAML, or YAML that recipes may not use; says where.
    """
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES // 1024} KiB", where=file, why="recipes are short texts")
    try:
        root = _Composer(_checked_events(text, file)).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = str(_position(mark, file)) if mark else file
        raise RecipeError(f"not valid YAML: {error.problem or error}", where=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=file) from None
    if root is None:
        raise RecipeError("the file is empty", where=file, hint="start from `kvpack recipes show kivi`")
    return _Converter(file).convert(root, depth=0)


def _position(mark: Any, file: str) -> Position:
    return Position(file, mark.line + 1, mark.column + 1)


def _checked_events(text: str, file: str) -> list[yaml.Event]:
    """Refuse tags, deep nesting and second documents before the recursive composer sees them."""
    depth = documents = 0
    events = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        events.append(event)
        where = str(_position(event.start_mark, file))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", where=where)
        if documents > 1:
            raise RecipeError("a second document starts here", where=where, why="a recipe is one document")
        if tag := getattr(event, "tag", None):
            raise RecipeError(f"tag {tag!r}", where=where, why="recipes hold plain data only")
    return events


class _Composer(Composer, BaseResolver):
    """Composes events that were parsed before: parsing is what takes the time, so it is done once."""

    def __init__(self, events: list[yaml.Event]) -> None:
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.events = deque(events)

    def check_event(self, *kinds: type[yaml.Event]) -> bool:
        return bool(self.events) and isinstance(self.events[0], kinds)

    def peek_event(self) -> yaml.Event | None:
        return self.events[0] if self.events else None

    def get_event(self) -> yaml.Event:
        return self.events.popleft()


class _Converter:
    """Turns composed YAML nodes into `Node`, counting every expanded alias."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.left = MAX_NODES

    def convert(self, node: yaml.Node, depth: int) -> Node:
        at = _position(node.start_mark, self.file)
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise RecipeError("too large after expanding its anchors", where=str(at))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at, depth)
        if isinstance(node, yaml.SequenceNode):
            return Node(tuple(self.convert(item, depth + 1) for item in node.value), at)
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        return Node(node.value if quoted else _scalar(node.value), at)

    def _mapping(self, node: yaml.MappingNode, at: Position, depth: int) -> Node:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key_at = _position(key_node.start_mark, self.file)
            key = self.convert(key_node, depth + 1).value
            if not isinstance(key, str):
                raise RecipeError(
                    f"the key {key_node.value!r} is not text", where=str(key_at), hint="put it in quotes"
                )
            if key in entries:
                first = entries[key].key_at
                raise RecipeError(
                    f"the key {key!r} appears twice", where=str(key_at), why=f"it was first set at {first}"
                )
            entries[key] = replace(self.convert(value_node, depth + 1), key_at=key_at)
        return Node(entries, at)


def _scalar(text: str) -> str | int | float | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
