"""Rows: the tokens themselves, bounded and aligned between streams."""

from __future__ import annotations

import pytest
import torch

from kvpack.calibrate.stats import Rows


def tokens(samples: int, length: int, heads: int = 2) -> torch.Tensor:
    """Every number tells its place: head * 1e5 + token."""
    place = torch.arange(samples * length).view(samples, 1, length, 1).float()
    return place + 1e5 * torch.arange(heads).view(1, heads, 1, 1)


def collected(x: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    rows = Rows()
    for part in x.split(batch):
        rows.update(part)
    return rows.state()


def test_all_tokens_in_order_below_the_limit():
    x = tokens(5, 7)
    for batch in (1, 2, 5):
        state = collected(x, batch)
        assert torch.equal(state["rows"][0, :, 0], torch.arange(35).float())
        assert torch.equal(state["rows"][1, :, 0], torch.arange(35) + 1e5)
        assert torch.equal(state["position"].long(), torch.arange(35) % 7)
        assert state["count"] == 35
        assert state["rows"].dtype == torch.float32


@pytest.mark.parametrize("limit", [1, 3, 10, 34, 35])
def test_evenly_strided_above_the_limit(limit, monkeypatch):
    monkeypatch.setattr(Rows, "LIMIT", limit)
    for batch in (1, 2, 5):
        state = collected(tokens(5, 7), batch)
        places = state["rows"][0, :, 0].long()
        stride = 1
        while -(-35 // stride) > limit:
            stride *= 2
        assert torch.equal(places, torch.arange(0, 35, stride))
        assert torch.equal(state["position"].long(), places % 7)
        assert state["count"] == 35


def test_merging_appends(monkeypatch):
    first, second = Rows(), Rows()
    x = tokens(4, 6)
    first.update(x[:1])
    second.update(x[1:])
    first.merge(second)
    assert torch.equal(first.state()["rows"], collected(x, 4)["rows"])
    assert torch.equal(first.state()["position"], collected(x, 4)["position"])
    monkeypatch.setattr(Rows, "LIMIT", 10)
    first.merge(second)
    assert first.state()["rows"].shape[1] == len(first.state()["position"]) <= 10
    assert first.state()["count"] == 42


def test_half_precision_is_widened_and_input_kept():
    x = tokens(1, 5).bfloat16()
    rows = Rows()
    rows.update(x)
    rows.update(x)
    assert torch.equal(rows.state()["rows"][:, :5], x[0, :, :].float())
