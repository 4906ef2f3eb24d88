"""Combining recipe trees: `extends`, variants and `--set`."""

from __future__ import annotations

from dataclasses import replace

from kvpack.core.errors import RecipeError
from kvpack.recipe.yaml_lines import Node, Position


def merge(base: Node, over: Node) -> Node:
    """`base` with everything that `over` says.

    Mappings merge key by key; lists and single values replace. A part of another kind replaces the
    whole part, because settings of one kind mean nothing to the next.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    if _other_kind(base, over):
        return over
    entries = dict(base.value)
    for key, node in over.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Node(entries, over.at, over.key_at)


def _other_kind(base: Node, over: Node) -> bool:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return False
    old, new = base.value.get("kind"), over.value.get("kind")
    return old is not None and new is not None and old.value != new.value


def set_path(root: Node, path: str, value: Node) -> Node:
    """`root` with the value at a dotted path replaced; missing mappings on the way are created.

    Numbers count list entries: ``weights.0.codec.bits``. ``tiers.<name>.codec`` stands for the key
    and the value side, as in a file. Setting a new `kind` drops the other settings of the part.

    Raises:
        RecipeError: a list has no such entry, or the path runs through a single value.
    """
    for words in _paths(path):
        root = _set(root, words, value, path)
    return root


def _paths(path: str) -> list[list[str]]:
    words = path.split(".")
    if words[:2] == ["kv_cache", "tiers"] and words[3:4] == ["codec"]:
        return [[*words[:3], side, *words[4:]] for side in ("key", "value")]
    return [words]


def _set(node: Node, words: list[str], value: Node, path: str) -> Node:
    if not words:
        return value
    word, rest = words[0], words[1:]
    if isinstance(node.value, tuple):
        index = _index(word, len(node.value), value.at, path)
        items = list(node.value)
        items[index] = _set(items[index], rest, value, path)
        return replace(node, value=tuple(items))
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(
            f"{path}: there is nothing below {node.value!r}", where=str(value.key_at or value.at)
        )
    if word == "kind" and not rest and _other_kind(node, Node({"kind": value}, value.at)):
        return replace(node, value={"kind": value})
    inner = (node.value or {}).get(word, Node(None, value.at, value.key_at))
    return node.with_entry(word, _set(inner, rest, value, path))


def _index(word: str, length: int, at: Position, path: str) -> int:
    if not word.isdecimal() or int(word) >= length:
        entries = f"entries 0 to {length - 1}" if length else "no entries"
        raise RecipeError(f"{path}: {word!r} is not in the list", where=str(at), hint=f"it has {entries}")
    return int(word)
