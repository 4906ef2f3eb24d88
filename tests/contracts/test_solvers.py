"""What every solver promises."""

import pytest
import torch

from kvpack.core.roles import Solver
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import parts, random, specs, stats_of

SOLVERS = parts("solvers")
CODECS = [
    Affine(bits=4, group=Group("channel", 32), zero="integer"),
    Affine(bits=3, group=Group("channel", 0)),
    Affine(bits=2, group=Group("channel", 24), zero="none"),
]


def inputs(tokens: int, channels: int) -> torch.Tensor:
    """Correlated layer inputs with a few strong channels."""
    x = random(tokens, channels) @ random(channels, channels, seed=1)
    x[:, :3] *= 10
    return x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_payload_is_what_the_codec_announces(solver: Solver, codec: Affine, dtype: torch.dtype) -> None:
    weight = random(20, 72, seed=2).to(dtype)
    payload = solver.solve(weight, codec, stats_of(solver, inputs(200, 72))).payload
    assert specs(payload.tensors) == codec.spec((20, 72))
    assert codec.decode(payload, {}, torch.float32).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_outputs_are_no_worse_than_rounding(solver: Solver, codec: Affine) -> None:
    x, weight = inputs(400, 72), random(20, 72, seed=2)

    def error(payload) -> float:
        return ((codec.decode(payload, {}, torch.float32) - weight) @ x.T).square().mean().item()

    assert error(solver.solve(weight, codec, stats_of(solver, x)).payload) <= error(codec.encode(weight, {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_input_same_bytes(solver: Solver) -> None:
    weight, stats = random(20, 72), stats_of(solver, inputs(200, 72))
    before = weight.clone()
    first, second = (solver.solve(weight, CODECS[0], stats).tensors for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_and_constant_channels(solver: Solver) -> None:
    x, weight = inputs(200, 72), random(20, 72)
    x[:, 5:40] = 0
    weight[:, 60:] = 0.25
    weight[3] = 0
    payload = solver.solve(weight, CODECS[0], stats_of(solver, x)).payload
    assert CODECS[0].decode(payload, {}, torch.float32).isfinite().all()
