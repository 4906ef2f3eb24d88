"""What every solver promises."""

import pytest
import torch

from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec, Solver
from kvpack.core.types import Group
from kvpack.core.weight_code import stored_spec
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import cases, parts, random, specs, stats_of

SOLVERS = parts("solvers")
CODECS = [
    Affine(bits=4, group=Group("channel", 32), zero="integer"),
    Affine(bits=3, group=Group("channel", 0)),
    Affine(bits=2, group=Group("channel", 24), zero="none"),
]


def codecs_of(solver: Solver) -> list[Codec]:
    """The codecs that a solver is tried with: its own, where its cases file names some."""
    return list(getattr(cases("solvers", kind_of(solver)), "CODECS", CODECS))


PAIRS = [
    pytest.param(param.values[0], codec, id=f"{param.id}-{codec}")
    for param in SOLVERS
    for codec in codecs_of(param.values[0])
]


def inputs(tokens: int, channels: int) -> torch.Tensor:
    """Correlated layer inputs with a few strong channels."""
    x = random(tokens, channels) @ random(channels, channels, seed=1)
    x[:, :3] *= 10
    return x


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_payload_is_what_the_codec_announces(solver: Solver, codec: Codec, dtype: torch.dtype) -> None:
    weight = random(20, 72, seed=2).to(dtype)
    found = solver.solve(weight, codec, stats_of(solver, inputs(200, 72)))
    assert specs(found.tensors) == stored_spec(codec, (20, 72), str(dtype).removeprefix("torch."))
    assert codec.decode(found.payload, found.state, torch.float32).isfinite().all()


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_outputs_are_no_worse_than_rounding(solver: Solver, codec: Codec) -> None:
    x, weight = inputs(400, 72), random(20, 72, seed=2)

    found = solver.solve(weight, codec, stats_of(solver, x))

    def error(payload) -> float:
        return ((codec.decode(payload, found.state, torch.float32) - weight) @ x.T).square().mean().item()

    allowed = (
        getattr(cases("solvers", kind_of(solver)), "ALLOWED", 0.0) * (weight @ x.T).square().mean().item()
    )
    assert error(found.payload) <= max(allowed, error(codec.encode(weight, found.state)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_input_same_bytes(solver: Solver) -> None:
    weight, stats = random(20, 72), stats_of(solver, inputs(200, 72))
    before, codec = weight.clone(), codecs_of(solver)[0]
    first, second = (solver.solve(weight, codec, stats).tensors for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_and_constant_channels(solver: Solver) -> None:
    x, weight = inputs(200, 72), random(20, 72)
    x[:, 5:40] = 0
    weight[:, 60:] = 0.25
    weight[3] = 0
    codec = codecs_of(solver)[0]
    found = solver.solve(weight, codec, stats_of(solver, x))
    assert codec.decode(found.payload, found.state, torch.float32).isfinite().all()
