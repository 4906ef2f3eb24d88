"""What the interpreter cannot say: whether the kernels compile, and whether the benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpack.kernels.triton import available

ROOT = Path(__file__).parents[3]

if not available():
    pytest.skip("triton, with a GPU or its interpreter, is needed", allow_module_level=True)


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=240,
        check=False,
    )


def test_kernels_have_the_types_a_gpu_compiler_wants(tmp_path: Path) -> None:
    """The interpreter runs what Triton's language refuses; no GPU is needed to ask."""
    done = _run(
        ["-m", "tests.kernels.triton.compile_kernels"], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr


def test_the_benchmark_checks_what_it_would_time(tmp_path: Path) -> None:
    done = _run(["benchmarks/gpu_kernels.py", "--dry-run", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert len(record["rows"]) == 6
    assert "| W4A16, 1 inputs |" in (tmp_path / "gpu_kernels.md").read_text()


def test_without_a_gpu_the_benchmark_says_so() -> None:
    done = _run(["benchmarks/gpu_kernels.py"], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
