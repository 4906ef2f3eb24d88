"""Models whose attention reads codes say what they say when it reads dense keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import UsageError
from kvpack.parts.policies.sink_detect import SinkDetect
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime import layer as layers
from kvpack.runtime.install import new_cache
from tests.runtime.rows import padded
from tests.runtime.schemes import KIVI, ROTATE, Scheme, logits, per_token, text, tiny
from tests.tiny_models import FAMILIES

DETECT = Scheme(per_token(3), per_token(3), SinkDetect(top_values=3))
SCHEMES = {"kivi": KIVI, "rotate": ROTATE, "detect": DETECT}
STEPS = [40, 1, 1, 5, 1]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every read of codes adds its number of queries."""
    found: list[int] = []
    attend = layers.attend

    def counted(call: Any, *args: Any) -> Tensor:
        found.append(call.query.shape[2])
        return attend(call, *args)

    monkeypatch.setattr(layers, "attend", counted)
    return found


def both(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch, steps: list[int] = STEPS, **options: Any
) -> tuple[Tensor, Tensor]:
    """Logits read from codes, and from what they decode to."""
    ours = logits(model, ids, new_cache(model), steps, **options)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "MOST_QUERIES", 0)
        return ours, logits(model, ids, new_cache(model), steps, **options)


def close(ours: Tensor, expected: Tensor) -> None:
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_family(family: str, scheme: str, count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 bounds its scores, windows slide over gemma 2, gemma 3 and mistral."""
    model = SCHEMES[scheme].install(tiny(family))
    close(*both(model, text(sum(STEPS), batch=2), monkeypatch))
    assert {1, 5} <= set(count)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_left_padded_row(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    model.set_attn_implementation(implementation)
    KIVI.install(model)
    ids, mask = padded(text(40), 8)
    ours, expected = both(model, ids, monkeypatch, [40, 1, 6, 1], attention_mask=mask)
    close(ours * mask[..., None], expected * mask[..., None])


def test_scores_without_values(count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = KIVI.install(
        tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=24, rope_parameters=None)
    )
    close(*both(model, text(sum(STEPS)), monkeypatch))
    assert count


@pytest.mark.parametrize("scheme", SCHEMES)
def test_beams_go_the_same_way(scheme: str, count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = SCHEMES[scheme].install(tiny())
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "output_scores": True}
    found = [model.generate(text(30), return_dict_in_generate=True, **options)]
    assert count
    monkeypatch.setattr(layers, "MOST_QUERIES", 0)
    found.append(model.generate(text(30), return_dict_in_generate=True, **options))
    assert found[0].sequences.tolist() == found[1].sequences.tolist()
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_guesses_of_an_assistant(scheme: str, count: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model checks several guesses at once and takes back those that it does not share."""
    model = SCHEMES[scheme].install(tiny())
    helper = SCHEMES[scheme].install(tiny(seed=0, num_hidden_layers=1))
    options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": helper}
    found = model.generate(text(30), **options).tolist()
    assert max(count) > 1
    monkeypatch.setattr(layers, "MOST_QUERIES", 0)
    assert model.generate(text(30), **options).tolist() == found


def test_inference_mode_and_gradients_may_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KIVI.install(tiny())
    ids = text(60)
    expected = logits(model, ids, new_cache(model), [40, *[1] * 20])
    cache, outs = new_cache(model), []
    for i, piece in enumerate(ids.split([40, *[1] * 20], 1)):
        with (torch.inference_mode, torch.no_grad, torch.enable_grad)[i % 3]():
            outs.append(model(piece, past_key_values=cache).logits)
            assert outs[-1].requires_grad == (i % 3 == 2)
    close(torch.cat([out.detach() for out in outs], 1), expected)


@pytest.mark.parametrize("back", [False, True])
def test_another_attention_implementation_reads_dense(back: bool, count: list[int]) -> None:
    model = KIVI.install(tiny())
    ids, before = text(60), model.config._attn_implementation
    expected = logits(model, ids, new_cache(model), [40, *[1] * 20])
    cache = new_cache(model)
    outs = [logits(model, ids[:, :50], cache, [40, *[1] * 10])]
    count.clear()
    model.set_attn_implementation("eager")
    outs.append(logits(model, ids[:, 50:55], cache, [1] * 5))
    assert not count
    model.set_attn_implementation(before if back else "sdpa")
    outs.append(logits(model, ids[:, 55:], cache, [1] * 5))
    assert bool(count) == back
    close(torch.cat(outs, 1), expected)


def test_a_pass_that_breaks_off_is_noticed() -> None:
    """An exception between the cache and attention, and attention that does not ask the cache."""
    model = KIVI.install(tiny())
    cache = new_cache(model)
    logits(model, text(40), cache)
    attention = model.model.layers[1].self_attn
    reader = attention.__dict__["_kvpack_reader"]

    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    attention.__dict__["_kvpack_reader"] = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(model, text(1), cache)
    attention.__dict__["_kvpack_reader"] = reader
    with pytest.raises(UsageError, match="layer 1: attention did not read what the cache holds"):
        logits(model, text(1), cache)
    cache.reset()
    expected = logits(model, text(41), new_cache(model), [40, 1])
    assert torch.equal(logits(model, text(41), cache, [40, 1]), expected)
    attention.__dict__["_kvpack_reader"] = None
    with pytest.raises(UsageError, match="layer 1: attention did not read what the cache holds"):
        logits(model, text(1), cache)


def test_training_and_long_pieces_read_dense(count: list[int]) -> None:
    model = KIVI.install(tiny())
    cache = new_cache(model)
    logits(model, text(40), cache)
    logits(model, text(9), cache)
    model.train()
    logits(model, text(1), cache)
    model.eval()
    model(text(1), past_key_values=cache).logits.sum().backward()
    assert not count
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_cache_is_let_go() -> None:
    """A model does not keep a finished cache alive, whichever attention read it."""
    import gc
    import weakref

    model = Scheme(policy=SinkRecent(recent_tokens=0)).install(tiny())
    for implementation in (model.config._attn_implementation, "eager"):
        model.set_attn_implementation(implementation)
        cache = new_cache(model)
        logits(model, text(20), cache, [16, 1, 3])
        held = weakref.ref(cache.layers[0])
        del cache
        gc.collect()
        assert held() is None
