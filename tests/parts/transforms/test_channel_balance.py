"""MiKV's balancer (2402.18096): products stay, ranges move."""

import pytest
import torch

from kvpack.core.types import Site
from kvpack.parts.transforms.channel_balance import ChannelBalance
from tests.contracts.discovery import random

SITE = Site(0)


@pytest.mark.parametrize("channels", [8, 48, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 20])
def test_the_balance_is_the_formula_and_products_stay(channels: int, tokens: int) -> None:
    keys, queries = random(2, 3, tokens, channels), 3 * random(2, 3, 2 * tokens, channels, seed=1)
    part = ChannelBalance(least_tokens=1)
    state = part.fit_prompt(keys, queries, None, None)
    for row in range(2):
        for head in range(3):
            expected = (queries[row, head].abs().amax(0) / keys[row, head].abs().amax(0)).double().sqrt()
            expected = expected.clamp(0.01, 100)
            torch.testing.assert_close(state["scale"][row, head].double(), expected, rtol=1e-3, atol=1e-4)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        "scale": ((2, 3, channels), torch.float16)
    }
    assert part.prompt_spec(tuple(keys.shape))["scale"].shape == (2, 3, channels)
    scaled, asked = part.forward(keys, state, SITE), part.dual(queries, state, SITE)
    expected = queries.double() @ keys.double().transpose(2, 3)
    torch.testing.assert_close((asked @ scaled.transpose(2, 3)).double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(part.inverse(scaled, state, SITE), keys, rtol=1e-5, atol=1e-6)
    heads = part.dual(random(2, 6, 5, channels), state, SITE)
    torch.testing.assert_close(
        heads, random(2, 6, 5, channels) / state["scale"].float().repeat_interleave(2, 1)[:, :, None]
    )


def test_zeros_and_extremes() -> None:
    keys, queries = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    keys[..., 0], queries[..., 1], queries[..., 2], keys[..., 3] = 0.0, 0.0, 1e9, 1e9
    state = ChannelBalance(least_tokens=1).fit_prompt(keys, queries, None, None)
    assert state["scale"].flatten().tolist() == pytest.approx([1.0, 1.0, 100.0, 0.01], rel=1e-3)


def test_padding_does_not_count() -> None:
    keys, queries = random(1, 2, 6, 8).bfloat16(), random(1, 2, 12, 8, seed=1).bfloat16()
    valid = torch.tensor([[False, False, True, True, True, True]])
    rows = valid.repeat(1, 2)
    expected = ChannelBalance(least_tokens=1).fit_prompt(keys[:, :, 2:], queries[:, :, rows[0]], None, None)[
        "scale"
    ]
    wild_k, wild_q = keys.clone(), queries.clone()
    wild_k[:, :, :2], wild_q[:, :, ~rows[0]] = 1e4, 1e4
    assert torch.equal(
        ChannelBalance(least_tokens=1).fit_prompt(wild_k, wild_q, valid, rows)["scale"], expected
    )


def test_without_a_prompt_nothing_is_scaled() -> None:
    x = random(1, 2, 3, 8)
    part = ChannelBalance()
    assert torch.equal(part.forward(x, {}, SITE), x)
    assert not part.linear


def test_the_maxima_of_a_few_tokens_are_not_trusted() -> None:
    keys, queries = random(2, 2, 20, 8), 5 * random(2, 2, 20, 8, seed=1)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :5] = False
    scale = ChannelBalance().fit_prompt(keys, queries, valid, valid)["scale"]
    assert (scale[1] == 1).all()
    assert (scale[0] != 1).all()
