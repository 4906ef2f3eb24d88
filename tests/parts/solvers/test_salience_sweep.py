"""Salience, shared classes, and the sweep against a direct float64 computation."""

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.types import Group, Payload
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.column_classes import ColumnClasses
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.solvers.gptq import Gptq
from kvpack.parts.solvers.salience_sweep import SalienceSweep
from tests.contracts.discovery import random

GROUPS = Affine(group=Group("channel", 24), zero="integer", scale_dtype="float32")
CLASSES = ColumnClasses(GROUPS, 3, 0.2, 0.2)


def stats_of(channels: int, *weights: Tensor, tokens: int = 400) -> dict:
    x = random(tokens, channels, seed=3).double() @ random(channels, channels, seed=4).double()
    x *= torch.linspace(0.3, 3, channels)[random(channels, seed=6).argsort()]
    return {
        "gram": {"gram": x.T @ x, "count": torch.tensor(tokens)},
        "consumers.weight": {"weight": torch.cat(weights)},
    }


def damped(stats: dict) -> Tensor:
    gram = stats["gram"]["gram"]
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def best_grid(codec: Affine, x: Tensor, energy: Tensor, steps: int, least: float) -> dict:
    """Every pair of strengths for every row, in float64."""
    strengths = [1 - (1 - least) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    rows = []
    for r in range(len(x)):
        losses = {}
        for gamma in strengths:
            for beta in strengths:
                grid = codec.grid(torch.cat((beta * low, gamma * high), 1)[r : r + 1].float())
                value = codec.value(codec.snap(x[r : r + 1].float(), grid), grid).double()
                losses[gamma, beta] = float(((x[r] - value[0]) ** 2 * energy).sum())
        gamma, beta = min(losses, key=losses.get)
        rows.append(codec.grid(torch.cat((beta * low, gamma * high), 1)[r : r + 1].float()))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def direct(weight: Tensor, codec: ColumnClasses, stats: dict, steps: int) -> Tensor:
    """The card's steps 2 and 4 to 7: rank, sort, fit on reaching a group, round, spread the error."""
    h = damped(stats)
    salience = stats["consumers.weight"]["weight"].double().square().sum(0)
    salience /= torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal() ** 2
    ranked, order = salience.argsort(descending=True, stable=True), []
    for count, _ in codec.classes(weight.shape[1]):
        members, ranked = ranked[:count], ranked[count:]
        order += sorted(members.tolist())
    energy = stats["gram"]["gram"].diagonal()[order]
    h, work = h[order][:, order], weight.double()[:, order].clone()
    start = 0
    for count, part in codec.classes(weight.shape[1]):
        for i in range(start, start + count):
            if (i - start) % part.group_size(count) == 0:
                here = slice(i, min(i + part.group_size(count), start + count))
                grid = best_grid(part, work[:, here], energy[here], steps, 0.7)
            column = work[:, i : i + 1].float()
            rounded = part.value(part.snap(column, grid), grid)[:, 0].double()
            inverse = torch.linalg.inv(h[i:, i:])
            work[:, i:] -= torch.outer((work[:, i] - rounded) / inverse[0, 0], inverse[0])
            work[:, i] = rounded
        start += count
    return work[:, torch.tensor(order).argsort()]


@pytest.mark.parametrize(("bits", "steps", "rows"), [(3, 4, 6), (2, 1, 6), (4, 3, 1)])
def test_matches_the_direct_solution(bits: int, steps: int, rows: int) -> None:
    weight = random(rows, 80, seed=5) / 3  # groups of both signs
    codec, stats = ColumnClasses(GROUPS, bits, 0.2, 0.2), stats_of(80, weight, random(9, 80, seed=7))
    found = SalienceSweep("factor", clip_steps=steps).solve(weight, codec, stats)
    decoded = codec.decode(found.payload, found.state, torch.float32).double()
    expected = direct(weight, codec, stats, steps)
    assert torch.isclose(decoded, expected, atol=1e-4).float().mean() > 0.95


@pytest.mark.parametrize("channels", [48, 64, 80, 172])
def test_without_classes_and_clipping_it_is_gptq(channels: int) -> None:
    weight = random(10, channels, seed=5)
    stats = stats_of(channels, weight)
    plain = Affine(bits=3, group=Group("channel", 128), zero="integer")
    expected = Gptq().solve(weight, plain, stats).tensors
    for codec in (plain, ColumnClasses(plain, 3, 0.0, 0.0)):
        found = SalienceSweep(clip_steps=1).solve(weight, codec, stats).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_with_one_input_share_their_classes() -> None:
    query, key = random(20, 80, seed=1), random(7, 80, seed=2)
    key[:, 11] *= 40
    stats = stats_of(80, query, key)
    states = [SalienceSweep().solve(w, CLASSES, stats).state["classes"] for w in (query, key)]
    assert torch.equal(*states)
    alone = SalienceSweep().solve(query, CLASSES, stats_of(80, query)).state["classes"]
    assert not torch.equal(alone, states[0])


@pytest.mark.parametrize("salience", ["energy", "factor", "inverse"])
def test_salience(salience: str) -> None:
    weight = random(20, 80, seed=1)
    stats = stats_of(80, weight)
    inverse = torch.linalg.inv(damped(stats))
    by_channel = {
        "energy": stats["gram"]["gram"].diagonal().rsqrt(),
        "factor": torch.linalg.cholesky(inverse, upper=True).diagonal(),
        "inverse": inverse.diagonal(),
    }[salience]
    score = (weight.double() ** 2 / by_channel**2).sum(0)
    classes = SalienceSweep(salience).solve(weight, CLASSES, stats).state
    first = CLASSES.order(classes, 80)[:16]
    assert first.tolist() == sorted(score.argsort(descending=True)[:16].tolist())


@pytest.mark.parametrize("metric", ["energy", "factor", "plain"])
def test_clipping_lowers_the_output_error(metric: str) -> None:
    weight, codec = random(60, 172, seed=5), ColumnClasses(GROUPS, 2)
    stats = stats_of(172, weight)

    def error(steps: int) -> float:
        solver = SalienceSweep(clip_steps=steps, clip_metric=metric)
        found = solver.solve(weight, codec, stats)
        lost = codec.decode(found.payload, found.state, torch.float32).double() - weight
        return float(((lost @ stats["gram"]["gram"]) * lost).sum())

    assert error(7) < error(1)


def test_dead_channels_constant_rows_and_bfloat16() -> None:
    weight = random(8, 80, seed=5)
    weight[2], weight[3] = 0, 0.5
    stats = stats_of(80, weight)
    stats["gram"]["gram"][:, 10:30] = 0
    stats["gram"]["gram"][10:30] = 0
    exact = SalienceSweep().solve(weight.bfloat16(), CLASSES, stats)
    decoded = CLASSES.decode(exact.payload, exact.state, torch.float32)
    assert decoded.isfinite().all()
    assert decoded[2].abs().max() == 0
    assert (decoded[:, 10:30] - weight[:, 10:30]).abs().max() < 2, "rounded, not zeroed"


def test_hopeless_gram_falls_back_with_a_warning() -> None:
    weight = random(10, 80)
    stats = stats_of(80, weight)
    stats["gram"]["gram"] = -torch.ones(80, 80) + 0.5 * torch.eye(80)
    with pytest.warns(RuntimeWarning, match="rounded to nearest"):
        found = SalienceSweep().solve(weight, CLASSES, stats)
    expected: Payload = CLASSES.encode(weight, found.state)
    assert torch.equal(found.payload.tensors["codes"], expected.tensors["codes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": {"gram": torch.eye(3)}}, "shape"),
        ({"gram": {"gram": torch.full((80, 80), torch.nan)}}, "NaN"),
        ({"consumers.weight": {"weight": torch.full((5, 80), torch.inf)}}, "infinities"),
        ({"consumers.weight": {"weight": torch.ones(5, 3)}}, "shape"),
    ],
)
def test_bad_statistics_are_refused(change: dict, message: str) -> None:
    weight = random(10, 80)
    with pytest.raises(KvpackError, match=message) as caught:
        SalienceSweep().solve(weight, CLASSES, stats_of(80, weight) | change)
    assert caught.value.hint
    with pytest.raises(KvpackError, match="missing"):
        SalienceSweep().solve(weight, CLASSES, {})


@pytest.mark.parametrize("codec", [Identity(), Affine(group=Group("token", 5))], ids=repr)
def test_codecs_without_channel_grids_are_refused(codec) -> None:
    weight = random(10, 80)
    with pytest.raises(RecipeError, match="salience_sweep"):
        SalienceSweep().solve(weight, codec, stats_of(80, weight))
