"""The report as a reader, a browser and an attacker see it."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from kvpack.evaluate.frontier import Comparison, Entry
from kvpack.evaluate.scores import RecallEvaluation
from kvpack.picture.markup import escape, shorten, tag
from kvpack.picture.page import page
from kvpack.picture.plot import plot_file
from tests.picture.conftest import Compared, evaluation

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;</style></title>\x00]]>"
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects elements, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_parses_and_refers_to_nothing_outside(compared: Compared) -> None:
    text = page(compared(6, budget_bits=4.0))
    read = Reader(text)
    assert read.tags.count("html") == read.tags.count("title") - text.count("<g ") - text.count("<rect ") == 1
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert {"src", "href", "onclick"}.isdisjoint({name for name, _ in read.attributes})
    assert read.tags.count("script") == 1
    assert text.count("prefers-color-scheme: dark") == 1
    assert "2 × " not in text


def test_names_cannot_inject_markup(compared: Compared) -> None:
    made = compared(3, HOSTILE, model=HOSTILE, missing=(HOSTILE,))
    failed = Entry(HOSTILE + "2", reason=HOSTILE)
    made = Comparison(made.model, (*made.entries, failed), 16, sinks={"layers": [{"layer": HOSTILE}]})
    clean = Reader(page(compared(3)))
    read = Reader(page(made))
    assert read.tags.count("script") == 1
    assert set(read.tags) == set(clean.tags)
    assert {name for name, _ in read.attributes} <= {name for name, _ in clean.attributes} | {"colspan"}
    assert any("<script>alert(1)</script>" in text for text in read.texts), "it is shown as text"
    root = ElementTree.fromstring(plot_file(made))
    assert {e.tag.rpartition("}")[2] for e in root.iter()} <= {
        "svg", "title", "style", "rect", "g", "text", "line", "circle", "path"
    }  # fmt: skip


def test_every_recipe_is_in_table_and_plots(compared: Compared) -> None:
    made = compared(5)
    text = page(made)
    for entry in made.entries:
        # Four panels with a label and a tooltip each, one row of the table, error rows.
        assert text.count(f">{entry.recipe}<") >= 4 + 1
        assert f"{entry.recipe}: {entry.evaluation.kv_bits['decode']:.2f} bits" in text


def test_the_source_is_a_line_in_plots_of_perplexity(compared: Compared) -> None:
    text = page(compared(4))
    assert text.count('class="source"') == 2
    assert "line: the source, 7.000" in text


def test_recall_is_drawn_with_its_own_axis() -> None:
    def found(bits: float, share: float) -> RecallEvaluation:
        kv_bits = {"prefill": bits, "decode": bits + 1}
        return RecallEvaluation(96, 4, 4, 3, 0, {"prefill": share, "decode": 1.0}, 16.0, 0.97, kv_bits)

    made = Comparison("m", (Entry("few", found(2, 0.5)), Entry("many", found(4, 0.9))), 16, 3.0)
    text = page(made)
    Reader(text)
    assert "few: 2.00 bits, recall 0.5" in text
    assert text.count("<circle") == 4
    assert "line: the source, 0.970" in text
    assert "<td>50.0%</td><td>47.0</td>" in text
    assert "A (best)" in text
    assert text.count('class="frontier"') == 2, "more bits buy recall under A, and nothing under B"
    ElementTree.fromstring(plot_file(made))


def test_failures_have_their_reason_in_the_table(compared: Compared) -> None:
    made = compared(2)
    failed = Entry("vq", reason="65,536 centroids, 100 rows")
    text = page(Comparison("m", (*made.entries, failed), 16))
    assert "not measured: 65,536 centroids, 100 rows" in text


def test_the_budget_is_marked(compared: Compared) -> None:
    made = compared(5, budget_bits=5.0)
    best = made.best("prefill")
    assert best is not None
    text = page(made)
    assert "A (best)" in text
    assert text.count('class="budget"') == 4


@pytest.mark.parametrize("kl", [None, 0.0, -1e-9, 1e-12])
def test_one_recipe_alone_and_perfect_or_without_a_source(kl: float | None) -> None:
    made = Comparison("m", (Entry("only", evaluation(4.0, kl)),), 16)
    assert page(made).count("<circle") == (2 if kl is None else 4)
    ElementTree.fromstring(plot_file(made))


def test_hopeless_numbers_do_not_break_it() -> None:
    entries = [
        Entry("nan", evaluation(2.0, math.nan, ppl=math.nan)),
        Entry("huge", evaluation(3.0, 80.0, ppl=math.exp(700))),
        Entry("fine", evaluation(4.0, 0.1)),
    ]
    text = page(Comparison("m", tuple(entries), 16))
    assert text.count("<circle") == 2 * 2 + 2 * 2
    assert not re.search(r'="-?(nan|inf)', text)


def test_nothing_measured_is_a_table_of_reasons() -> None:
    text = page(Comparison("m", (Entry("a", reason="no"),), 0))
    Reader(text)
    assert "not measured: no" in text
    ElementTree.fromstring(plot_file(Comparison("m", (), 0)))


def test_many_recipes_still_fit() -> None:
    entries = [Entry(f"recipe-with-long-name-{i}", evaluation(2 + i / 20, 1 / (1 + i))) for i in range(120)]
    made = Comparison("m", tuple(entries), 16)
    assert page(made).count("<circle") == 4 * 120


SINKS = {
    "tokens": 32,
    "layers": [
        {
            "layer": 0,
            "sink_rate": [[1.0, 0.0, 0.1], [0.5, 0.2, 0.0]],
            "key_channel_max": [[3.0] * 500, [1.0] * 500],
            "hidden_norm": [100.0, 1.0, 2.0],
        },
        {"layer": 1, "sink_rate": [[0.2, 0.2, 0.2]]},
    ],
}


def test_sinks_are_drawn_where_there_are_any(compared: Compared) -> None:
    text = page(compared(2, sinks=SINKS))
    Reader(text)
    assert "Outlier channels and attention sinks" in text
    assert "layer 0, head 1, position 0: 0.5" in text
    assert "layer 0, position 0: 100" in text
    assert text.count("channel") > 100


@pytest.mark.parametrize(
    "sinks",
    [
        {},
        {"layers": None},
        {"layers": [1, "x", {}]},
        {"layers": [{"layer": 0, "sink_rate": "no", "hidden_norm": [None, "x"], "key_channel_max": [[]]}]},
    ],
)
def test_missing_or_odd_sinks_are_left_out(compared: Compared, sinks: dict) -> None:
    assert "attention sinks" not in page(compared(2, sinks=sinks))


def test_sinks_that_are_not_finite_are_drawn_as_nothing(compared: Compared) -> None:
    text = page(compared(2, sinks={"layers": [{"hidden_norm": [math.nan, math.inf, 1.0]}]}))
    assert not re.search(r'="-?(nan|inf)', text)


def test_markup_escapes_everything_but_markup() -> None:
    inner = tag("b", None, "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert tag("a", {"title": '"<>&', "none": None, "x_y": 1.5}, inner, "&") == (
        '<a title="&quot;&lt;&gt;&amp;" x-y="1.5"><b>&lt;i&gt;</b>&amp;</a>'
    )
    assert tag("a", {"title": escape('"')}) == '<a title="&amp;quot;"></a>', "attributes trust nobody"
    assert escape("a\x00\x1bb\u202e") == "ab"


@pytest.mark.parametrize("text", ["kivi", "x" * 28, "/some/long/path/to/recipes/of/mine/kivi.yaml@4bit"])
def test_long_names_lose_their_middle(text: str) -> None:
    short = shorten(text)
    assert len(short) == min(len(text), 28)
    assert short[:5] == text[:5]
    assert short[-12:] == text[-12:]
