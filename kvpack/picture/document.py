"""The frame of every HTML report: one file that needs nothing else and runs no foreign code."""

from __future__ import annotations

from kvpack.picture.markup import Markup, tag
from kvpack.picture.style import COLOURS, PAGE, PLOT, SCRIPT

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, *content: Markup) -> str:
    """An HTML document with a heading and what follows it."""
    head = tag(
        "head",
        None,
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        tag("title", None, title),
        tag("style", None, COLOURS, PLOT, PAGE),
    )
    main = tag("main", None, tag("h1", None, title), *content)
    body = tag("body", None, main, tag("script", None, SCRIPT))
    return "<!DOCTYPE html>\n" + tag("html", {"lang": "en"}, head, body) + "\n"


def section(title: str, *content: Markup) -> Markup:
    """A part of a document under a heading of its own."""
    return tag("section", None, tag("h2", None, title), *content)


def table(caption: str, columns: list[str], rows: list[list[str]]) -> Markup:
    """A table that scrolls where the window is narrow; the first column is text."""
    head = tag("tr", None, *(tag("th", {"scope": "col"}, column) for column in columns))
    body = [tag("tr", None, *(tag("td", None, cell) for cell in row)) for row in rows]
    return tag(
        "div",
        {"class": "scroll"},
        tag(
            "table",
            None,
            tag("caption", None, caption),
            tag("thead", None, head),
            tag("tbody", None, *body),
        ),
    )
