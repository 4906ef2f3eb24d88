from __future__ import annotations

import json
import sys

import pytest

from kvpack.calibrate.data import fingerprint, load_text, make_samples
from kvpack.core.errors import UsageError


class Bytes:
    def __init__(self, prefix: tuple[int, ...] = ()) -> None:
        self.prefix = prefix

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def builtin():
    return load_text("builtin:stdlib")


def test_builtin_text_is_plentiful_prose_and_always_the_same(builtin):
    assert sum(len(d) for d in builtin.documents) > 500_000
    assert builtin == load_text("builtin:stdlib")
    assert builtin.sha256 == load_text("builtin:stdlib").sha256
    words = [w for d in builtin.documents for w in d.split()]
    assert words.count("the") > len(words) / 50


def test_builtin_text_imports_no_module(builtin):
    for module in ("mailbox", "http.cookiejar", "xml.dom.minidom"):
        sys.modules.pop(module, None)
    load_text("builtin:stdlib")
    assert not {"mailbox", "http.cookiejar", "xml.dom.minidom"} & sys.modules.keys()


def test_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße\n", encoding="utf-8")
    text = load_text(str(tmp_path / "a.txt"))
    assert (text.name, text.documents) == ("a.txt", ("Grüße\n",))


def test_jsonl_fields_and_messages(tmp_path):
    rows = [
        {"text": "one"},
        {"content": "two", "id": 3},
        {"prompt": "three"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "five"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert load_text(str(path)).documents == ("one", "two", "three", "four\n\nfive")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", '{"words": "x"}', r"a\.jsonl:1: has no text"),
        ("a.txt", " \n", "holds no text"),
        ("a.pdf", "x", "is no calibration text"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path / name))


def test_missing_file_unknown_set_and_network(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_text(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="builtin:wikipedia"):
        load_text("builtin:wikipedia")
    with pytest.raises(UsageError, match="network") as info:
        load_text("hf:wikitext")
    assert "--allow-download" in info.value.hint


def test_missing_extra_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="pyarrow") as info:
        load_text(str(tmp_path / "a.parquet"))
    assert "kvpack[data]" in info.value.hint


def test_samples_have_the_asked_shape_and_depend_on_the_seed_only(builtin):
    one = make_samples(builtin, Bytes(), 5, 64, seed=1)
    assert tuple(one.shape) == (5, 64)
    assert fingerprint(one) == fingerprint(make_samples(builtin, Bytes(), 5, 64, seed=1))
    assert fingerprint(one) != fingerprint(make_samples(builtin, Bytes(), 5, 64, seed=2))


def test_every_sample_starts_with_the_prefix(builtin):
    found = make_samples(builtin, Bytes(prefix=(7,)), 4, 16, seed=0)
    plain = make_samples(builtin, Bytes(), 4, 15, seed=0)
    assert (found[:, 0] == 7).all()
    assert (found[:, 1:] == plain).all()


def test_samples_come_from_all_over_a_long_document(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i:07d}\n" for i in range(40_000)))
    found = make_samples(load_text(str(tmp_path / "a.txt")), Bytes(), 40, 1024, seed=0)
    lines = [int(line) for row in found.tolist() for line in bytes(row).decode().split("\n")[1:-1]]
    assert max(lines) - min(lines) > 20_000


def test_too_little_text_says_how_much_there_is(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(UsageError, match=r"100 tokens, enough for 3 samples of 32; 4 are asked for"):
        make_samples(load_text(str(tmp_path / "a.txt")), Bytes(), 4, 32, seed=0)
