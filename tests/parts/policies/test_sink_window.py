"""Sinks and a window, and nothing else: the cache of `sink_window`, against masks written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import RecipeError, UsageError
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.sink_window import SinkWindow
from kvpack.report import kv_bytes
from kvpack.runtime.install import new_cache
from tests.runtime.schemes import WINDOW, Scheme, attention_of, logits, per_channel, per_token, text, tiny

POLICY = SinkWindow(sink_tokens=3, window_tokens=20, recent_tokens=4)
EXACT = Scheme(Identity(), Identity(), POLICY)
CODED = Scheme(per_channel(4, 4), per_token(4), POLICY)
STEPS = [[90], [70, *[1] * 20], [1] * 90, [9, 30, 1, 5, 17, 16, 12]]


def lambda_mask(tokens: int, sinks: int, window: int, native: int | None = None) -> Tensor:
    """0 where query q reads key k, -inf elsewhere, one entry after the other, [1, 1, T, T]."""
    mask = torch.full((1, 1, tokens, tokens), -math.inf)
    for q in range(tokens):
        for k in range(q + 1):
            if (k < sinks or q - k < window) and (native is None or q - k < native):
                mask[0, 0, q, k] = 0.0
    return mask


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_lambda_mask(steps: list[int], implementation: str) -> None:
    plain, ours = tiny(), tiny()
    ours.set_attn_implementation(implementation)
    EXACT.install(ours)
    ids = text(90, batch=2)
    with torch.no_grad():
        expected = plain(ids, attention_mask=lambda_mask(90, 3, 20), use_cache=False).logits
        dense = plain(ids, use_cache=False).logits
    found = logits(ours, ids, new_cache(ours), steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - dense).abs().max() > 0.1, "the mask matters"


@pytest.mark.parametrize(("family", "window"), [("mistral", 10), ("gemma3_text", 20), ("gemma2", 10)])
def test_the_smaller_of_two_windows_counts(family: str, window: int) -> None:
    plain, ours = tiny(family), tiny(family)
    replace(EXACT, policy=replace(POLICY, window_tokens=window)).install(ours)
    ids = text(60)
    full, sliding = lambda_mask(60, 3, window), lambda_mask(60, 3, window, WINDOW)
    masks = {"full_attention": full, "sliding_attention": sliding}
    if window > WINDOW:
        masks["sliding_attention"] = lambda_mask(60, 0, WINDOW)
    with torch.no_grad():
        given = sliding if family == "mistral" else masks
        expected = plain(ids, attention_mask=given, use_cache=False).logits
    for steps in ([60], [30, *[1] * 30]):
        found = logits(ours, ids, new_cache(ours), steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [[64], [50, *[1] * 14], [30, 34]], ids=str)
def test_padding_changes_nothing(steps: list[int]) -> None:
    model = CODED.install(tiny())
    ids = text(64, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :24] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, padded, at = new_cache(model), [], 0
    for n in steps:
        with torch.no_grad():
            out = model(
                ids[:, at : at + n],
                attention_mask=mask[:, : at + n],
                position_ids=positions[:, at : at + n],
                past_key_values=cache,
            )
        padded.append(out.logits)
        at += n
    policy = Scheme(Identity(), Identity(), POLICY)
    assert torch.cat(padded, 1)[1].isfinite().all()
    exact = policy.install(tiny())
    alone = logits(exact, ids[:1, 24:], new_cache(exact), [40])
    cache = new_cache(exact)
    with torch.no_grad():
        both = exact(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        more = exact(
            ids[:, :1],
            attention_mask=torch.ones(2, 65).masked_fill(torch.arange(65) < torch.tensor([[24], [0]]), 0),
            position_ids=torch.tensor([[40], [64]]),
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(both[:1, 24:], alone, rtol=1e-4, atol=1e-4)
    longer = logits(exact, torch.cat((ids[:1, 24:], ids[:1, :1]), 1), new_cache(exact), [41])
    torch.testing.assert_close(more[:1], longer[:, -1:], rtol=1e-4, atol=1e-4)


def test_memory_is_constant_and_what_is_reported() -> None:
    model = CODED.install(tiny())
    plans, cache, sizes = CODED.plans(model), new_cache(model), []
    for _ in range(100):
        logits(model, text(1), cache)
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    assert max(sizes[40:]) == max(sizes[32:40]), "the same every four tokens, the keys' block"
    assert cache.get_seq_length() == 100
    for tokens in (3, 19, 20, 21, 50, 90):
        cache = new_cache(model)
        logits(model, text(tokens), cache)
        planned = kv_bytes(plans, tokens, "float32")
        assert cache.nbytes == planned.total
        assert cache.elements == planned.elements == 2 * tokens * 2 * 2 * 8, "what a dense cache would hold"


def test_beams_crops_and_resets() -> None:
    model = CODED.install(tiny())
    ids = text(50, batch=3)
    cache = new_cache(model)
    logits(model, ids, cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after = logits(model, ids[[2, 0, 0], :4], cache, [1] * 4)
    fresh = new_cache(model)
    logits(model, ids[[2, 0, 0]], fresh)
    torch.testing.assert_close(after, logits(model, ids[[2, 0, 0], :4], fresh, [1] * 4))
    with pytest.raises(UsageError, match="left the sliding window"):
        cache.crop(-3)
    cache.reset()
    again = logits(model, ids, cache)
    torch.testing.assert_close(again, logits(model, ids, new_cache(model)))


def test_recorded_tokens_can_be_taken_back() -> None:
    model = EXACT.install(tiny())
    ids = text(60)
    cache = new_cache(model)
    logits(model, ids[:, :40], cache)
    cache.activate_past_recording()
    logits(model, text(25, seed=3), cache)
    cache.crop(-25)
    expected = logits(model, ids, new_cache(model))[:, 40:]
    torch.testing.assert_close(logits(model, ids[:, 40:], cache, [1] * 20), expected, rtol=1e-4, atol=1e-4)


def test_generation_goes_beyond_the_window() -> None:
    model = CODED.install(tiny())
    out = model.generate(text(30, batch=2), max_new_tokens=40, num_beams=2, do_sample=False)
    assert out.shape == (2, 70)


def test_a_cache_that_is_not_asked_says_so() -> None:
    model = CODED.install(tiny())
    cache = new_cache(model)
    cache.begin(1, 4)
    key = torch.zeros(1, 2, 4, 8)
    cache.update(key, key, 0)
    cache.begin(1, 4)
    with pytest.raises(UsageError, match="did not ask"):
        cache.update(key, key, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="do not fit"):
        SinkWindow(window_tokens=16, recent_tokens=32)
    assert attention_of(tiny())[0].window is None
