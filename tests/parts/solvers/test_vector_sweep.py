"""Swept vectors: better outputs than nearest ones, and than scalar codes of as many stored bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.roles import Codec
from kvpack.core.types import Group, Solution
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.shared_vectors import SharedVectors
from kvpack.parts.solvers.gptq import Gptq
from kvpack.parts.solvers.vector_sweep import VectorSweep
from tests.contracts.discovery import random


def inputs(channels: int, tokens: int = 600) -> Tensor:
    x = random(tokens, channels) @ random(channels, channels, seed=1) / channels**0.5
    x[:, : channels // 8] *= 5
    return x


def stats(x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"gram": {"gram": x.T @ x}}


def loss(codec: Codec, found: Solution, weight: Tensor, x: Tensor) -> float:
    decoded = codec.decode(found.payload, found.state, torch.float32)
    return float(((decoded - weight.float()) @ x.T).square().sum() / (weight.float() @ x.T).square().sum())


def nearest(codec: SharedVectors, weight: Tensor) -> Solution:
    """Plain k-means and nearest assignment, which knows no inputs."""
    state = codec.fit({"all_rows": {"rows": weight.float()[None]}})
    return Solution(codec.encode(weight, state), state)


@pytest.mark.parametrize("channels", [48, 64, 80, 172])
@pytest.mark.parametrize(
    "codec", [SharedVectors(bits=4), SharedVectors(size=2, bits=4, columns=32)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_better_than_with_nearest_vectors(
    channels: int, codec: SharedVectors, dtype: torch.dtype
) -> None:
    x, weight = inputs(channels), random(96, channels, seed=2).to(dtype)
    found = VectorSweep().solve(weight, codec, stats(x))
    assert loss(codec, found, weight, x) < 0.8 * loss(codec, nearest(codec, weight), weight, x)


def test_every_step_helps() -> None:
    codec, x, weight = SharedVectors(bits=4), inputs(64), random(128, 64, seed=2)
    swept, moved, again = (
        loss(codec, VectorSweep(steps=s, rounds=r).solve(weight, codec, stats(x)), weight, x)
        for s, r in ((0, 1), (5, 1), (5, 3))
    )
    assert again < moved < swept < loss(codec, nearest(codec, weight), weight, x)


def test_it_beats_scalar_codes_that_take_more_bits() -> None:
    vectors = SharedVectors(bits=8, codebook_dtype="float8_e4m3fn")
    numbers = Affine(bits=2, group=Group("channel", 64))
    x, weight = inputs(128), random(192, 128, seed=2)
    found, scalar = VectorSweep().solve(weight, vectors, stats(x)), Gptq().solve(weight, numbers, stats(x))
    bits = [
        8 * sum(t.numel() * t.element_size() for t in s.tensors.values()) / weight.numel()
        for s in (found, scalar)
    ]
    assert bits[0] <= bits[1] == 2.5
    assert loss(vectors, found, weight, x) < 0.6 * loss(numbers, scalar, weight, x)


def test_dead_channels_constant_weights_and_a_single_row() -> None:
    codec, x = SharedVectors(bits=3), inputs(64)
    x[:, 10:30] = 0
    for weight in (torch.zeros(8, 64), torch.full((8, 64), 0.25), random(1, 64)):
        found = VectorSweep().solve(weight, codec, stats(x))
        decoded = codec.decode(found.payload, found.state, torch.float32)
        assert decoded.isfinite().all()
        assert weight.any() or not decoded.any()
    found = VectorSweep().solve(random(64, 64), codec, stats(torch.zeros(4, 64)))
    assert codec.decode(found.payload, found.state, torch.float32).isfinite().all()


def test_a_matrix_that_cannot_be_inverted_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.gptq, "inverse_factor", lambda gram, damp: None)
    weight, x, codec = random(32, 64), inputs(64), SharedVectors(bits=4)
    with pytest.warns(RuntimeWarning, match="nearest code"):
        found = VectorSweep(steps=0).solve(weight, codec, stats(x))
    assert torch.equal(found.tensors["codes"], codec.encode(weight, found.state).tensors["codes"])


def test_what_it_needs_is_asked_for_by_name() -> None:
    weight = random(8, 64)
    with pytest.raises(RecipeError, match="vector_sweep cannot choose codes for Affine"):
        VectorSweep().solve(weight, Affine(), stats(inputs(64)))
    with pytest.raises(KvpackError, match="it is missing"):
        VectorSweep().solve(weight, SharedVectors(bits=4), {})
    with pytest.raises(KvpackError, match="infinities or NaN"):
        VectorSweep().solve(
            weight, SharedVectors(bits=4), {"gram": {"gram": torch.full((64, 64), torch.inf)}}
        )
