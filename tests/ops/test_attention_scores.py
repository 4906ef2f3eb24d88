"""Attention received per key, against the full matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpack.ops.attention_scores import column_sums, probabilities


def tensors(
    heads: int, kv_heads: int, tokens: int, keys: int, dim: int, batch: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64) * 2
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator, dtype=torch.float64)
    return query, key


def causal(tokens: int, keys: int) -> Tensor:
    return torch.ones(tokens, keys).tril(keys - tokens).bool()[None, None]


def slow(query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """The whole matrix [B, H, T, S], row by row, exponentials written out."""
    batch, heads, tokens, _ = query.shape
    result = torch.zeros(batch, heads, tokens, key.shape[2], dtype=torch.float64)
    visible = visible.expand(batch, heads, tokens, key.shape[2])
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            for i in range(tokens):
                seen = visible[b, h, i].nonzero()[:, 0]
                if len(seen):
                    power = (key[b, kv, seen] @ query[b, h, i] * scaling).exp()
                    result[b, h, i, seen] = power / power.sum()
    return result


@pytest.mark.parametrize("block", [1, 3, 7, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize(("tokens", "keys", "dim"), [(11, 11, 8), (5, 11, 48), (1, 6, 64), (1, 1, 80)])
def test_blocks_equal_the_whole_matrix(
    heads: int, kv_heads: int, tokens: int, keys: int, dim: int, block: int
) -> None:
    query, key = tensors(heads, kv_heads, tokens, keys, dim)
    whole = slow(query, key, causal(tokens, keys), dim**-0.5)
    sums, counts = column_sums(query, key, None, dim**-0.5, block=block)
    grouped = whole.sum(2).reshape(2, kv_heads, heads // kv_heads, keys).sum(2)
    torch.testing.assert_close(sums, grouped, rtol=0, atol=1e-12)
    assert counts.tolist() == [causal(tokens, keys)[0, 0].sum(0).tolist()] * 2
    each, _ = column_sums(query, key, None, dim**-0.5, block=block, per_head=True)
    torch.testing.assert_close(each, whole.sum(2), rtol=0, atol=1e-12)
    given, _ = column_sums(query, key, causal(tokens, keys), dim**-0.5, block=block)
    assert torch.equal(given, sums), "no mask means causal"


def test_float32_keeps_six_digits() -> None:
    query, key = tensors(4, 2, 200, 200, 16)
    exact, _ = column_sums(query, key, None, 0.25)
    rough, _ = column_sums(query.float(), key.float(), None, 0.25, block=32)
    assert ((exact - rough).abs() / 200).max() < 1e-6
    half, _ = column_sums(query.bfloat16(), key.bfloat16(), None, 0.25)
    assert half.dtype == torch.float64
    assert ((exact - half).abs() / 200).max() < 1e-2


def test_a_subset_of_rows() -> None:
    query, key = tensors(4, 2, 12, 12, 8)
    rows = torch.tensor([11, 2, 7])
    whole = slow(query, key, causal(12, 12), 0.3)[:, :, rows].sum(2)
    sums, counts = column_sums(query, key, None, 0.3, rows, block=2, per_head=True)
    torch.testing.assert_close(sums, whole, rtol=0, atol=1e-12)
    assert counts[0].tolist() == [3] * 3 + [2] * 5 + [1] * 4


def test_padding_and_windows() -> None:
    """Row 0 has three padded tokens in front; each query sees four tokens back."""
    query, key = tensors(2, 1, 10, 10, 8)
    distance = torch.arange(10)[:, None] - torch.arange(10)
    visible = ((distance >= 0) & (distance < 4))[None, None].repeat(2, 1, 1, 1)
    visible[0, :, :, :3] = False
    sums, counts = column_sums(query, key, visible, 0.3, block=4, per_head=True)
    whole = slow(query, key, visible, 0.3).sum(2)
    torch.testing.assert_close(sums, whole, rtol=0, atol=1e-12)
    assert sums.isfinite().all()
    assert counts.tolist() == [[0] * 3 + [4] * 4 + [3, 2, 1], [4] * 7 + [3, 2, 1]]
    assert sums[0].sum().item() == pytest.approx(2 * 7), "padded queries add nothing"


def test_score_caps_and_learned_sinks() -> None:
    query, key = tensors(2, 2, 6, 6, 8)
    scores = (query @ key.mT * 0.7).masked_fill(~causal(6, 6), -torch.inf)
    capped = (3 * torch.tanh(scores / 3)).masked_fill(~causal(6, 6), -torch.inf).softmax(-1)
    found = probabilities(query, key, causal(6, 6), 0.7, softcap=3.0)
    torch.testing.assert_close(found, capped, rtol=0, atol=1e-12)
    logits = torch.tensor([1.0, -2.0], dtype=torch.float64)
    power = scores.exp()
    shared = power / (power.sum(-1, keepdim=True) + logits.exp()[None, :, None, None])
    found = probabilities(query, key, causal(6, 6), 0.7, sink_logits=logits)
    torch.testing.assert_close(found, shared, rtol=0, atol=1e-12)


def test_equal_keys_share_evenly() -> None:
    query, key = tensors(2, 1, 5, 5, 8, batch=1)
    sums, _ = column_sums(query, torch.ones_like(key), None, 1.0, per_head=True)
    expected = [sum(1 / i for i in range(k, 6)) for k in range(1, 6)]
    torch.testing.assert_close(sums[0, 0], torch.tensor(expected, dtype=torch.float64))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_matrix_of_all_queries_and_keys_is_made() -> None:
    query, key = tensors(4, 2, 512, 512, 8, batch=1)
    with Largest() as seen:
        column_sums(query, key, None, 1.0, block=16)
    assert seen.elements == 4 * 16 * 512
