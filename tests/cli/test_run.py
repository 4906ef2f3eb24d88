"""Sizes as typed, and what becomes of the remarks of libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpack.cli.options import byte_count
from kvpack.core.errors import UsageError
from tests.cli.conftest import Kvpack


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4_000_000_000), ("512MiB", 512 << 20), ("1.5 kB", 1500), ("2gib", 2 << 30), ("0.001kB", 1)],
)
def test_sizes(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "4", "4 bytes", "GB", "-1GB", "0MB", "1e3MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the size"):
        byte_count(text)


def test_shards_are_cut_at_the_size_given(call_kvpack: Kvpack, tiny_source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call_kvpack("export", tiny_source, "-r", "w8", "-o", str(out), "--shard-size", "100kB")
    assert done.code == 0
    assert len(list(out.glob("kvpack-0*.safetensors"))) > 1
    refused = call_kvpack("export", tiny_source, "-r", "w8", "-o", str(tmp_path / "b"), "--shard-size", "4")
    assert refused.code == 2
    assert "write for example 4GB" in refused.err


WARNING = """
import sys, warnings
from kvpack.cli import recipes
from kvpack.parts.solvers import gptq
inner = recipes.bundled
def warns():
    code = compile("warnings.warn('too little text', RuntimeWarning)", gptq.__file__, "exec")
    exec(code, {"warnings": warnings, "__name__": gptq.__name__})
    warnings.warn("a library's remark", UserWarning)
    warnings.warn("another remark", RuntimeWarning)
    return inner()
recipes.bundled = warns
from kvpack.cli import main
main()
"""


def test_warnings_of_kvpack_are_shown_and_those_of_libraries_are_not(run_kvpack: Kvpack) -> None:
    assert run_kvpack("recipes", "list", code=WARNING).err == "warning: too little text\n"
    assert run_kvpack("recipes", "list", "--json", code=WARNING).json["warnings"] == ["too little text"]


ENVIRONMENT = """
import os
from kvpack.cli.entry import quiet_libraries
quiet_libraries()
print(os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_DISABLE_PROGRESS_BARS"])
"""


def test_what_the_user_set_wins(run_kvpack: Kvpack) -> None:
    assert run_kvpack(code=ENVIRONMENT).out == "error 1\n"
    chosen = {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    assert run_kvpack(code=ENVIRONMENT, **chosen).out == "info 0\n"
