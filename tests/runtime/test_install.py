"""A model uses its compressed cache by itself, and steps back when the caller brings another."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvpack.core.errors import UsageError
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import install, new_cache
from tests.runtime.schemes import KIVI, ROTATE, logits, text, tiny
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_generate_make_a_compressed_cache(family: str) -> None:
    model = KIVI.install(tiny(family))
    ids = text(40)
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, KVPackCache)
        assert isinstance(model(ids, use_cache=True).past_key_values, KVPackCache)
        assert isinstance(model.base_model(ids).past_key_values, KVPackCache)
        assert isinstance(model(inputs_embeds=model.get_input_embeddings()(ids)).past_key_values, KVPackCache)
        assert model(ids, use_cache=False).past_key_values is None
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, KVPackCache)
    assert cache.get_seq_length() == 42
    assert cache.stored_tokens > 0
    assert cache.track.positions is not None
    assert cache.track.positions.tolist() == [list(range(42))]


def test_every_call_starts_afresh() -> None:
    model = KIVI.install(tiny())
    first, second = (model(text(20)).past_key_values for _ in range(2))
    assert first is not second
    assert second.get_seq_length() == 20


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_callers_cache_is_used_as_it_is(family: str) -> None:
    plain, model = tiny(family), KIVI.install(tiny(family))
    ids = text(40)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    expected = plain.generate(ids, **options).sequences.tolist()
    dense = DynamicCache(config=model.config)
    out = model.generate(ids, past_key_values=dense, **options)
    assert out.past_key_values is dense
    assert out.sequences.tolist() == expected
    out = model.generate(ids, cache_implementation="static", **options)
    assert isinstance(out.past_key_values, StaticCache)
    assert out.sequences.tolist() == expected
    assert model.generate(ids, use_cache=False, **options).sequences.tolist() == expected
    assert model(ids, past_key_values=DynamicCache()).past_key_values.__class__ is DynamicCache


def test_a_cache_named_by_the_checkpoint_does_not_win() -> None:
    model = tiny()
    model.generation_config.cache_implementation = "static"
    KIVI.install(model)
    out = model.generate(text(9), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, KVPackCache)


def test_the_class_stays_what_it_was_to_transformers() -> None:
    plain = tiny()
    original = type(plain)
    model = KIVI.install(plain)
    assert isinstance(model, original)
    assert type(model).__name__ == original.__name__
    assert type(tiny()) is original


def test_generation_in_prefill_chunks() -> None:
    model = KIVI.install(tiny())
    ids = text(50)
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=16, return_dict_in_generate=True
    )
    assert out.past_key_values.get_seq_length() == 53


@pytest.mark.parametrize("returned", [1, 3])
def test_several_samples_per_prompt(returned: int) -> None:
    model = ROTATE.install(tiny())
    torch.manual_seed(0)
    out = model.generate(text(20), max_new_tokens=12, do_sample=True, num_return_sequences=returned)
    assert out.shape == (returned, 32)


def test_gradients_flow_through_the_first_pass() -> None:
    model = KIVI.install(tiny())
    ids = text(40)
    model(ids, labels=ids).loss.backward()
    plain = tiny()
    plain(ids, labels=ids).loss.backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_the_cache_follows_an_explicit_position_offset() -> None:
    model = ROTATE.install(tiny())
    ids = text(30)
    cache = new_cache(model)
    logits(model, ids, cache, position_ids=torch.arange(100, 130).unsqueeze(0))
    assert cache.track.positions is not None
    assert cache.track.positions.tolist() == [list(range(100, 130))]
    shifted = logits(model, text(5, seed=2), cache, position_ids=torch.arange(130, 135).unsqueeze(0))
    plain = new_cache(model)
    logits(model, ids, plain)
    torch.testing.assert_close(shifted, logits(model, text(5, seed=2), plain), rtol=1e-3, atol=1e-3)


def test_installing_wrongly_is_refused() -> None:
    model = tiny()
    with pytest.raises(UsageError, match="no KV-cache scheme"):
        new_cache(model)
    with pytest.raises(UsageError, match=r"layers \[1\]"):
        install(model, KIVI.plans(model)[1:], {})
    with pytest.raises(UsageError, match=r"'layers.0.key.2.perm' of the KV scheme is missing"):
        install(model, ROTATE.plans(model), {})
    KIVI.install(model)
    with pytest.raises(UsageError, match="already"):
        KIVI.install(model)
