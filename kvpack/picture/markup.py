"""Building HTML and SVG without ever trusting a text: everything that is not `Markup` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is markup already, made by the functions of this file."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """A text as markup: characters with a meaning are escaped, control characters dropped."""
    if isinstance(text, Markup):
        return text
    plain = "".join(c for c in str(text) if c.isprintable() or c in "\n\t")
    return Markup(html.escape(plain, quote=True))


def tag(name: str, attributes: dict[str, object] | None = None, *children: object) -> Markup:
    """An element; attributes that are None are left out, children that are not markup are escaped.

    Underscores in the names of attributes stand for hyphens.
    """
    words = [name]
    for key, value in (attributes or {}).items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            words.append(f'{key.replace("_", "-")}="{escape(str(shown))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start) if name in _VOID else Markup(f"{start}{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Parts one after another."""
    return Markup("".join(escape(part) for part in parts))


def shorten(text: str, longest: int = 28) -> str:
    """At most `longest` characters; the middle goes first, as paths differ at the end."""
    if len(text) <= longest:
        return text
    kept = longest - 1
    return f"{text[: kept // 3]}…{text[len(text) - (kept - kept // 3) :]}"
