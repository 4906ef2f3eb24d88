"""Packed linears on GPUs, or through Triton's interpreter: coded inputs times coded weights."""

from __future__ import annotations

import pytest
import torch

from kvpack.core import weight_code
from kvpack.core.types import Group
from kvpack.kernels import choice
from kvpack.kernels.triton import available
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.transforms.hadamard import Hadamard
from kvpack.runtime.linear import PackedLinear, PackedWeight
from tests.kernels.triton.coded import DEVICE

if not available():
    pytest.skip("triton, with a GPU or its interpreter, is needed", allow_module_level=True)

from kvpack.kernels.triton import int8_matmul

SHAPE = (48, 128)
WHOLE = Group("channel", 0)
WEIGHT = Affine(bits=8, group=WHOLE, zero="none", scale_dtype="float16")
INPUTS = Affine(bits=8, group=WHOLE, zero="none", scale_dtype="float32")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "triton")


def layer(weight: Affine, inputs: Affine) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer whose inputs are rotated and coded, and its decoded weight."""
    generator = torch.Generator().manual_seed(0)
    payload = weight.encode(torch.randn(SHAPE, generator=generator), {})
    packed = PackedWeight(weight, SHAPE, weight.spec(SHAPE), inputs, (Hadamard(),))
    made = PackedLinear(packed, torch.nn.Parameter(torch.randn(48, generator=generator)))
    made.load_state_dict({**payload.tensors, "bias": made.bias})
    return made.to(DEVICE), weight.decode(payload, {}, torch.float32).to(DEVICE)


@pytest.mark.parametrize(
    ("weight", "inputs", "together"),
    [
        (WEIGHT, INPUTS, True),
        (Affine(bits=8, group=Group("channel", 32), zero="none"), INPUTS, True),
        (Affine(bits=4, group=Group("channel", 32), zero="none"), INPUTS, False),
        (WEIGHT, Affine(bits=8, group=WHOLE, zero="float"), False),
        (WEIGHT, Affine(bits=8, group=Group("channel", 32), zero="none"), False),
        (WEIGHT, Affine(bits=4, group=WHOLE, zero="none"), False),
    ],
)
def test_eight_bits_times_eight_bits_are_summed_as_integers(
    weight: Affine, inputs: Affine, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, multiply = [], int8_matmul.int8_matmul
    monkeypatch.setattr(int8_matmul, "int8_matmul", lambda *a, **k: calls.append(1) or multiply(*a, **k))
    made, dense = layer(weight, inputs)
    x = torch.randn((2, 3, 128), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        found = made(x)
    expected = weight_code.prepare_input(x, (Hadamard(),), inputs) @ dense.T + made.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert bool(calls) == together


def test_what_needs_gradients_is_multiplied_in_floats() -> None:
    made, _ = layer(WEIGHT, INPUTS)
    x = torch.randn((1, 128), device=DEVICE, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
