"""Sliding windows: the mask contract, freed memory, and going back."""

import pytest
import torch
from transformers import DynamicCache

from kvpack.core.errors import UsageError
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime.install import new_cache
from tests.runtime.schemes import (
    KIVI,
    WINDOW,
    Scheme,
    kivi_reference,
    logits,
    per_channel,
    per_token,
    text,
    tiny,
)

SMALL = Scheme(per_channel(2, 4), per_token(), SinkRecent(recent_tokens=4))
HYBRID = ["mistral", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("family", HYBRID)
@pytest.mark.parametrize("steps", [[40, *[1] * 60], [3, *[1] * 60], [9, 20, 1, 5, 17, 16, 15, 2]])
def test_sizes_and_shapes_are_those_of_the_dense_cache(family: str, steps: list[int]) -> None:
    model = SMALL.install(tiny(family))
    ours, dense = new_cache(model), DynamicCache(config=model.config)
    assert ours.is_sliding == dense.is_sliding
    assert ours.get_max_length() == dense.get_max_length()
    ids = text(sum(steps))
    for piece in ids.split(steps, 1):
        for layer in range(len(ours)):
            assert ours.get_mask_sizes(piece.shape[1], layer) == dense.get_mask_sizes(piece.shape[1], layer)
        for cache in (ours, dense):
            logits(model, piece, cache)
        assert ours.get_seq_length() == dense.get_seq_length()


@pytest.mark.parametrize("family", HYBRID)
@pytest.mark.parametrize("steps", [[40, *[1] * 60], [3, *[1] * 97], [9, 20, 1, 5, 17, 16, 15, 17]])
def test_logits_equal_the_reference(family: str, steps: list[int]) -> None:
    model = SMALL.install(tiny(family))
    ids = text(100, batch=2)
    reference = kivi_reference(model, window=4, block=4)
    ours = logits(model, ids, new_cache(model), steps)
    torch.testing.assert_close(ours, logits(model, ids, reference, steps), rtol=1e-4, atol=2e-4)


def test_memory_stops_growing() -> None:
    model = SMALL.install(tiny("mistral"))
    cache = new_cache(model)
    sizes = []
    for _ in range(100):
        logits(model, text(1), cache)
        sizes.append((cache.nbytes - cache.track.nbytes, cache.allocated_nbytes - cache.track.nbytes))
    most = max(used for used, _ in sizes[:40])
    assert max(used for used, _ in sizes[40:]) <= most
    for layer in cache.layers:
        assert sum(layer.stored_tokens.values()) <= 2 * (WINDOW - 1)
        assert layer._planes["key"].first == 100 - WINDOW + 1
    dense = 2 * 2 * 2 * 8 * 4 * (WINDOW - 1)
    assert most < 0.8 * dense
    assert max(allocated for _, allocated in sizes) < 6 * dense


def test_a_recent_window_longer_than_the_sliding_one_holds_only_what_is_visible() -> None:
    model = Scheme(policy=SinkRecent(recent_tokens=64)).install(tiny("mistral"))
    cache = new_cache(model)
    ids = text(200)
    steps = [90, *[1] * 110]
    expected = logits(model, ids, kivi_reference(model, window=64), steps)
    torch.testing.assert_close(logits(model, ids, cache, steps), expected, rtol=1e-4, atol=2e-4)
    for layer in cache.layers:
        values = layer._planes["value"]
        assert values.encoded_tokens == 0
        assert values.tail.shape[2] == WINDOW - 1
        assert layer._planes["key"].tail.shape[2] < WINDOW + 8


def test_a_long_prompt_encodes_only_what_stays_visible() -> None:
    model = SMALL.install(tiny("mistral"))
    cache = new_cache(model)
    logits(model, text(300), cache)
    assert cache.encoded_tokens <= 2 * 2 * (WINDOW - 1 + 4)


def test_protected_tokens_leave_with_the_window() -> None:
    scheme = Scheme(per_channel(2, 4), per_token(), SinkRecent(sink_tokens=3, recent_tokens=4))
    model = scheme.install(tiny("mistral"))
    cache = new_cache(model)
    logits(model, text(WINDOW), cache)
    assert [layer.protected_tokens for layer in cache.layers] == [2, 2]
    logits(model, text(2), cache)
    assert [layer.protected_tokens for layer in cache.layers] == [0, 0]


@pytest.mark.parametrize("family", HYBRID)
def test_crop_after_recording_leaves_no_trace(family: str) -> None:
    model = SMALL.install(tiny(family))
    ids = text(80)
    cache, clean = new_cache(model), new_cache(model)
    for start in (0, 50):
        logits(model, ids[:, start : start + 30], cache)
        cache.activate_past_recording()
        logits(model, text(9, seed=7), cache)
        logits(model, text(4, seed=8), cache)
        cache.crop(-13)
        for layer in cache.layers:
            layer.record_past = False
        logits(model, ids[:, start : start + 30], clean)
        assert torch.equal(
            logits(model, ids[:, 30:50], cache, [1] * 20), logits(model, ids[:, 30:50], clean, [1] * 20)
        )
        assert cache.nbytes == clean.nbytes


def test_crop_without_recording_is_refused_once_the_window_is_full() -> None:
    model = SMALL.install(tiny("mistral"))
    cache = new_cache(model)
    logits(model, text(WINDOW - 1), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == WINDOW - 4
    logits(model, text(10), cache)
    with pytest.raises(UsageError, match="left the sliding window"):
        cache.crop(-1)


def test_assisted_generation_on_sliding_layers_equals_greedy() -> None:
    scheme = Scheme(per_channel(8, 4), per_token(8), SinkRecent(recent_tokens=4))
    model = scheme.install(tiny("gemma2"))
    prompt = text(8, seed=4).repeat(1, 4)
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    looked_up = model.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == plain.tolist()


def test_hybrid_kivi_runs_longer_than_its_window() -> None:
    model = KIVI.install(tiny("gemma3_text"))
    out = model.generate(text(70), max_new_tokens=30, do_sample=False)
    reference = model.generate(
        text(70), past_key_values=kivi_reference(model), max_new_tokens=30, do_sample=False
    )
    assert out.tolist() == reference.tolist()
