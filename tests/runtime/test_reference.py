"""The compressed cache equals a slow dense one that follows the papers' schedules by slicing."""

import pytest
import torch
from transformers import DynamicCache

from kvpack.runtime.install import new_cache
from tests.runtime.schemes import KIVI, ROTATE, kivi_reference, logits, rotate_reference, text, tiny
from tests.tiny_models import FAMILIES


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_decoding_equal_the_reference(family: str) -> None:
    model = KIVI.install(tiny(family))
    ids = text(37 + 60, batch=2)
    steps = [37, *[1] * 60]
    ours = logits(model, ids, new_cache(model), steps)
    close(ours, logits(model, ids, kivi_reference(model), steps))
    dense = logits(model, ids, DynamicCache(config=model.config), steps)
    assert (ours[:, 40:] - dense[:, 40:]).abs().max() > 1e-2, "nothing was quantised"


def test_two_hundred_steps_and_many_growths_of_the_buffers() -> None:
    model = KIVI.install(tiny(num_hidden_layers=1))
    ids = text(5 + 200)
    steps = [5, *[1] * 200]
    cache = new_cache(model)
    close(logits(model, ids, cache, steps), logits(model, ids, kivi_reference(model), steps))
    layer = cache.layers[0]
    assert layer.stored_tokens == {"key": 192, "value": 189}
    assert cache.encoded_tokens == cache.stored_tokens == 192 + 189


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rotated_keys_equal_the_reference(family: str, heads: int) -> None:
    model = ROTATE.install(tiny(family, num_key_value_heads=heads))
    ids = text(48)
    steps = [17, 9, *[1] * 22]
    reference = rotate_reference(model, ROTATE.states(model))
    close(logits(model, ids, new_cache(model), steps), logits(model, ids, reference, steps))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_generation_equals_the_reference(family: str) -> None:
    model = ROTATE.install(tiny(family))
    prompt = text(21)
    options = {"max_new_tokens": 40, "do_sample": False}
    reference = rotate_reference(model, ROTATE.states(model))
    expected = model.generate(prompt, past_key_values=reference, **options)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beam_search_equals_the_reference(family: str) -> None:
    model = KIVI.install(tiny(family))
    prompt = text(19, batch=2)
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    expected = model.generate(prompt, past_key_values=kivi_reference(model), **options)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


def test_beam_search_with_protected_tokens_equals_the_reference() -> None:
    model = ROTATE.install(tiny())
    prompt = text(19, batch=2)
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    reference = rotate_reference(model, ROTATE.states(model))
    expected = model.generate(prompt, past_key_values=reference, **options)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_in_chunks_ends_in_the_same_cache(family: str) -> None:
    model = KIVI.install(tiny(family))
    ids = text(75)
    whole, chunked = new_cache(model), new_cache(model)
    # Chunks attend to decoded history, so only the first layer's keys are the same.
    logits(model, ids, whole)
    logits(model, ids, chunked, [7, 30, 1, 1, 20, 16])
    for cache in (whole, chunked):
        cache.begin(1, 1)
    for plane in ("key", "value"):
        a, b = (c.layers[0]._planes[plane] for c in (whole, chunked))
        assert (a.boundary, a.stored_tokens, a.tail.shape) == (b.boundary, b.stored_tokens, b.tail.shape)
    new = torch.zeros(1, 2, 1, 8)
    for a, b in zip(whole.layers[0].update(new, new), chunked.layers[0].update(new, new), strict=True):
        close(a, b)


def test_chunks_equal_the_reference_in_chunks() -> None:
    model = KIVI.install(tiny())
    ids = text(75, batch=2)
    steps = [7, 30, 1, 1, 20, 16]
    close(logits(model, ids, new_cache(model), steps), logits(model, ids, kivi_reference(model), steps))


def test_turns_of_a_conversation_continue_in_one_cache() -> None:
    model = KIVI.install(tiny())
    cache, reference = new_cache(model), kivi_reference(model)
    turns = [text(13, seed=1), text(9, seed=2), text(22, seed=3)]
    ours, expected = turns[0], turns[0]
    for turn in turns[1:]:
        ours = model.generate(ours, past_key_values=cache, max_new_tokens=11, do_sample=False)
        expected = model.generate(expected, past_key_values=reference, max_new_tokens=11, do_sample=False)
        assert ours.tolist() == expected.tolist()
        ours, expected = (torch.cat((ids, turn), 1) for ids in (ours, expected))
