"""Which kernels compute is decided by the machine and the environment, and can be seen."""

import os
import subprocess
import sys

import pytest
import torch

from kvpack.core.errors import UsageError
from kvpack.kernels import choice
from kvpack.ops import packed_affine
from tests.kernels.coded_affine import coded

FORCED = """
import torch
from kvpack.kernels import affine, choice
from kvpack.ops import packed_affine
from tests.kernels.coded_affine import coded
print(choice.on_cpu(torch.ones(1)), choice.on_gpu(torch.ones(1)))
x = coded((24, 64), 4, "channel", 32)
query = torch.randn((3, 64), generator=torch.Generator().manual_seed(0))
exact = packed_affine.scores(query, x)
print(bool((affine.scores(query, x) - exact).abs().max() <= 1e-5 * exact.abs().max()))
"""


def test_numba_is_used_where_it_is_installed() -> None:
    pytest.importorskip("numba")
    found = choice.found("cpu")
    assert (found.name, found.used) == ("numba", True)
    assert found.why.startswith("numba ")
    assert choice.on_cpu(torch.ones(1))


def test_reference_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert not choice.found("cpu").used
    assert not choice.found("cuda").used
    assert not choice.on_cpu(torch.ones(1))
    assert choice.VARIABLE in choice.found("cpu").why


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(UsageError, match="fast is no set of kernels"):
        choice.forced()


def test_an_unknown_device_has_no_kernels() -> None:
    assert not choice.found("xla").used


@pytest.mark.parametrize(
    ("forced", "interpret", "expected"),
    [("numba", "0", "True False"), ("reference", "0", "False False"), ("triton", "1", "False True")],
)
def test_a_choice_can_be_forced(forced: str, interpret: str, expected: str) -> None:
    pytest.importorskip("numba" if forced == "numba" else "triton" if forced == "triton" else "torch")
    environment = {**os.environ, choice.VARIABLE: forced, "TRITON_INTERPRET": interpret}
    run = subprocess.run(
        [sys.executable, "-c", FORCED], check=False, capture_output=True, text=True, env=environment
    )
    assert run.stdout.split("\n")[:2] == [expected, "True"], run.stderr


def test_the_reference_is_what_decoding_gives() -> None:
    x = coded((24, 80), 3, "channel", 20)
    query = torch.randn((2, 80), generator=torch.Generator().manual_seed(0))
    dense = packed_affine.dense(x, torch.float32)
    assert torch.equal(packed_affine.scores(query, x), query @ dense.T)
