"""`import kvpack` is enough for transformers to know artifacts, before or after its own import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvpack

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import torch
cache = model(torch.arange(3, 40)[None]).past_key_values
print(type(model.model.layers[0].mlp.up_proj).__name__, type(cache).__name__)
"""
WITHOUT = LOAD.replace("cache = ", "raise SystemExit('it loaded') #")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(kvpack.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *arguments],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip


@pytest.mark.parametrize(
    "imports",
    ["import kvpack", "import transformers.quantizers.auto; import kvpack"],
    ids=["kvpack first", "transformers first"],
)
def test_both_import_orders_work(artifact: Path, imports: str) -> None:
    done = python(f"{imports}\n{LOAD}", str(artifact))
    assert done.stdout == "PackedLinear KVPackCache\n", done.stderr


def test_without_kvpack_nothing_pretends_to_load(artifact: Path) -> None:
    done = python(WITHOUT, str(artifact))
    assert done.returncode == 1
    assert "it loaded" not in done.stderr
    assert "OSError" in done.stderr


def test_importing_kvpack_costs_no_torch_and_registers_once() -> None:
    code = (
        "import kvpack, importlib; importlib.reload(kvpack)\n"
        "print(sum('kvpack' in type(f).__module__ for f in sys.meta_path), 'torch' in sys.modules)"
    )
    assert python(code).stdout == "1 False\n"
