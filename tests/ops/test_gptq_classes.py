"""A sweep over spans against optimal brain surgery in float64."""

import torch

from kvpack.core.types import Group
from kvpack.ops import gptq, gptq_classes
from kvpack.parts.codecs.affine import Affine
from tests.contracts.discovery import random

WIDE, NARROW = (
    Affine(bits=bits, group=Group("channel", size), zero="integer", scale_dtype="float32")
    for bits, size in ((4, 8), (2, 16))
)


def span(columns: int, codec: Affine) -> gptq_classes.Span:
    size = codec.group_size(columns)
    return gptq_classes.Span(columns, size, codec.grid, codec.snap, codec.value)


def problem(channels: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    x = random(300, channels, seed=3).double() @ random(channels, channels, seed=4).double()
    return random(12, channels, seed=5), x.T @ x


def test_errors_reach_every_later_span() -> None:
    weight, gram = problem()
    spans = [(20, WIDE), (33, NARROW), (7, WIDE)]
    found = gptq_classes.solve(weight, gptq.inverse_factor(gram, 0.01), [span(*s) for s in spans])
    values = torch.cat([c.value(*one) for one, (_, c) in zip(found, spans, strict=True)], 1)

    work = weight.double().clone()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    start = 0
    for columns, codec in spans:
        for i in range(start, start + columns):
            if (i - start) % codec.group_size(columns) == 0:
                stop = min(i + codec.group_size(columns), start + columns)
                grid = codec.grid(work[:, i:stop].float())
            column = work[:, i : i + 1].float()
            rounded = codec.value(codec.snap(column, grid), grid)[:, 0].double()
            inverse = torch.linalg.inv(h[i:, i:])
            lost = (work[:, i] - rounded) / inverse[0, 0]
            work[:, i:] -= torch.outer(lost, inverse[0])
            work[:, i] = rounded
        start += columns
    assert torch.isclose(values.double(), work, atol=1e-4).float().mean() > 0.97
    without = torch.cat([c.value(*gptq_rounded(w, c)) for w, c in parts(weight, spans)], 1)
    assert torch.isclose(without.double(), work, atol=1e-4).float().mean() < 0.8


def gptq_rounded(weight: torch.Tensor, codec: Affine) -> tuple[torch.Tensor, dict]:
    grid = codec.grid(weight)
    return codec.snap(weight, grid), grid


def parts(weight: torch.Tensor, spans: list) -> list:
    return list(zip(weight.split([n for n, _ in spans], 1), [c for _, c in spans], strict=True))


def test_one_span_is_gptq_itself() -> None:
    weight, gram = problem()
    upper = gptq.inverse_factor(gram, 0.01)
    ((codes, grid),) = gptq_classes.solve(weight, upper, [span(60, NARROW)])
    expected, grids = gptq.solve(weight, upper, 16, NARROW.grid, NARROW.snap, NARROW.value)
    assert torch.equal(codes, expected)
    assert all(torch.equal(grid[name], grids[name]) for name in grids)
