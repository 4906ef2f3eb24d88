"""What the cache promises beyond equality: exact tiers, bytes, cropping, errors."""

import pytest
import torch
from transformers import DynamicCache

from kvpack.core.errors import KvpackError, UsageError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.sink_detect import SinkDetect
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.parts.transforms.hadamard import Hadamard
from kvpack.parts.transforms.unrope import Unrope
from kvpack.report import kv_bytes
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import new_cache
from tests.runtime.schemes import (
    KIVI,
    ROTATE,
    Scheme,
    kivi_reference,
    logits,
    per_channel,
    per_token,
    text,
    tiny,
)
from tests.tiny_models import FAMILIES


def fill(
    cache: KVPackCache, tokens: int, *, batch: int = 1, seed: int = 0, **spans: int
) -> list[torch.Tensor]:
    """Give layer 0 random keys and values in one pass; returns what was given and what came back."""
    generator = torch.Generator().manual_seed(seed)
    attention = cache.layers[0].plan.attention
    shape = (batch, attention.kv_heads, tokens, attention.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    cache.begin(batch, tokens)
    cache.track.locate(torch.arange(cache.track.past, cache.track.length).unsqueeze(0))
    return [keys, values, *cache.layers[0].update(keys, values)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_over_everything_is_the_dense_cache_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = Scheme(policy=SinkRecent(recent_tokens=64)).install(tiny(family, dtype=dtype))
    ids = text(40, batch=2)
    steps = [20, *[1] * 20]
    ours = logits(model, ids, new_cache(model), steps)
    assert torch.equal(ours, logits(model, ids, DynamicCache(config=model.config), steps))


def test_an_exact_codec_returns_the_original_bytes_in_bfloat16() -> None:
    model = Scheme(Identity(), Identity(), SinkRecent(recent_tokens=4)).install(tiny(dtype=torch.bfloat16))
    ids = text(30)
    dense = logits(model, ids, DynamicCache(config=model.config), [9, 10, 11])
    assert torch.equal(logits(model, ids, new_cache(model), [9, 10, 11]), dense)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("head_dim", [8, 80])
def test_multi_query_and_odd_head_sizes(heads: int, head_dim: int) -> None:
    model = Scheme(per_channel(4), per_token(4, 32)).install(
        tiny(num_key_value_heads=heads, head_dim=head_dim, num_hidden_layers=1)
    )
    cache = new_cache(model)
    keys, values, *_ = fill(cache, 40)
    _, _, again_k, again_v = fill(cache, 1, seed=1)
    for exact, stored in ((keys, again_k), (values, again_v)):
        error = (exact - stored[:, :, :40]).abs().amax()
        assert 1e-3 < error < 6 / 15
    assert torch.equal(keys[:, :, 32:], again_k[:, :, 32:40])


def test_a_single_token_and_an_empty_cache() -> None:
    model = KIVI.install(tiny())
    cache = new_cache(model)
    assert (cache.get_seq_length(), cache.nbytes, cache.bits_per_element()) == (0, 0, 0.0)
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    ids = text(1)
    dense = logits(model, ids, DynamicCache())
    assert torch.equal(logits(model, ids, cache), dense)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 1


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50, 64])
@pytest.mark.parametrize("scheme", [KIVI, ROTATE], ids=["kivi", "rotate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_what_the_plan_says(tokens: int, scheme: Scheme, dtype: torch.dtype) -> None:
    model = scheme.install(tiny(dtype=dtype))
    cache = new_cache(model)
    logits(model, text(tokens), cache)
    name = str(dtype).removeprefix("torch.")
    assert cache.nbytes == kv_bytes(scheme.plans(model), tokens, name).total
    assert cache.bits_per_element() == 8 * cache.nbytes / (2 * 2 * 2 * 8 * tokens)


def test_kivi_bytes_are_the_card_formula_within_a_percent() -> None:
    """Bits per element: b + 32/G for stored tokens, 16 for the exact ones (KIVI, fp16)."""
    scheme = Scheme(
        Affine(bits=2, group=Group("token", 32)),
        Affine(bits=2, group=Group("channel", 32)),
        SinkRecent(recent_tokens=128),
    )
    model = scheme.install(tiny(dtype=torch.float16, head_dim=32, max_position_embeddings=4096))
    cache = new_cache(model)
    logits(model, text(1000), cache)
    exact = {"key": 1000 % 128, "value": 128}
    bits = sum((2 + 32 / 32) * (1000 - n) + 16 * n for n in exact.values()) / 2000
    assert (cache.nbytes - cache.track.nbytes) / cache.elements * 8 == pytest.approx(bits, rel=0.01)
    assert cache.allocated_nbytes < 1.15 * cache.nbytes


def test_window_sizes_follow_the_card() -> None:
    model = KIVI.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    for step in [21, *[1] * 40]:
        fill(cache, step)
        total, planes = cache.get_seq_length(), cache.layers[0]._planes
        assert planes["key"].tail.shape[2] == total % 16
        assert planes["value"].tail.shape[2] == min(16, total)


def test_codes_never_change_and_every_token_is_encoded_once() -> None:
    model = KIVI.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    fill(cache, 40)
    store = cache.layers[0]._planes["key"].tiers[0].store
    (before,) = store.pieces(0, 10**6)
    codes = {name: t.clone() for name, t in before.tensors.items()}
    for _ in range(300):
        fill(cache, 1)
    (after,) = store.pieces(0, 10**6)
    for name, tensor in codes.items():
        assert torch.equal(after.tensors[name][:, :, : tensor.shape[2]], tensor)
    assert cache.encoded_tokens == cache.stored_tokens == 340 // 16 * 16 + 340 - 16


@pytest.mark.parametrize("removed", [1, 5, 9])
def test_cropping_the_exact_tail_leaves_no_trace(removed: int) -> None:
    model = Scheme(per_channel(), per_channel()).install(tiny())
    ids = text(80)
    cache, clean = new_cache(model), new_cache(model)
    logits(model, ids[:, :37], cache)
    logits(model, text(removed, seed=9), cache)
    cache.crop(-removed)
    logits(model, ids[:, :37], clean)
    steps = [1] * 43
    assert torch.equal(logits(model, ids[:, 37:], cache, steps), logits(model, ids[:, 37:], clean, steps))
    assert cache.nbytes == clean.nbytes


@pytest.mark.parametrize("scheme", [KIVI, ROTATE], ids=["kivi", "rotate"])
@pytest.mark.parametrize("kept", [0, 1, 8, 29, 32, 36, 40])
def test_cropping_into_stored_blocks_keeps_the_rest(scheme: Scheme, kept: int) -> None:
    model = scheme.install(tiny(num_hidden_layers=1))
    cache, twin = new_cache(model), new_cache(model)
    for c in (cache, twin):
        fill(c, 41)
    expected = fill(twin, 1)[2:]
    encoded = cache.encoded_tokens
    cache.crop(kept - 41)
    assert cache.get_seq_length() == kept == cache.track.length
    assert cache.encoded_tokens == encoded
    assert cache.layers[0].protected_tokens == min(kept, scheme.policy.protected_tokens())
    *_, keys, values = fill(cache, 1)
    assert torch.equal(keys[:, :, :kept], expected[0][:, :, :kept])
    assert torch.equal(values[:, :, :kept], expected[1][:, :, :kept])
    stored = [min(kept, 41 // 16 * 16), min(kept, 41 - 16)] if scheme is KIVI else [kept, kept]
    new = [fill(cache, n, seed=n) for n in (5, 30, 20)]
    *_, keys, values = fill(cache, 1)
    assert torch.equal(keys[:, :, : stored[0]], expected[0][:, :, : stored[0]])
    assert torch.equal(values[:, :, : stored[1]], expected[1][:, :, : stored[1]])
    given = torch.cat([n[0] for n in new], 2)
    assert (keys[:, :, kept + 1 : -1] - given).abs().mean() < 0.5, "tokens moved"


def test_recorded_tokens_can_be_taken_back_although_the_window_overflowed() -> None:
    model = KIVI.install(tiny())
    ids = text(90)
    cache, clean = new_cache(model), new_cache(model)
    logits(model, ids[:, :30], cache)
    cache.activate_past_recording()
    logits(model, text(40, seed=5), cache)
    cache.crop(-40)
    logits(model, ids[:, :30], clean)
    assert cache.stored_tokens == clean.stored_tokens
    assert torch.equal(logits(model, ids[:, 30:60], cache), logits(model, ids[:, 30:60], clean))


def test_prompt_lookup_decoding_equals_greedy_decoding() -> None:
    model = Scheme(per_channel(8), per_token(8)).install(tiny())
    prompt = text(8, seed=4).repeat(1, 5)
    plain = model.generate(prompt, max_new_tokens=24, do_sample=False)
    looked_up = model.generate(prompt, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=4)
    assert looked_up.tolist() == plain.tolist()


def test_the_measuring_mode_quantises_the_chunk_itself() -> None:
    scheme = Scheme(policy=SinkRecent(sink_tokens=3, recent_tokens=128))
    model = scheme.install(tiny(num_hidden_layers=1))
    cache = new_cache(model, exact_prefill=False)
    keys, values, got_k, got_v = fill(cache, 45)
    for exact, got, full in ((keys, got_k, 40), (values, got_v, 45)):
        assert torch.equal(exact[:, :, :3], got[:, :, :3])
        assert ((exact - got)[:, :, 3:full].abs().amax((0, 1, 3)) > 0).all()
        assert torch.equal(exact[:, :, full:], got[:, :, full:])
    assert cache.layers[0].stored_tokens == {"key": 40, "value": 45}
    with pytest.raises(UsageError, match="without a trace"):
        cache.activate_past_recording()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_measuring_mode_shows_in_the_first_forward(family: str) -> None:
    model = KIVI.install(tiny(family))
    ids = text(40)
    dense = logits(model, ids, DynamicCache(config=model.config))
    assert torch.equal(logits(model, ids, new_cache(model)), dense)
    measured = logits(model, ids, new_cache(model, exact_prefill=False))
    assert (measured - dense).abs().max() > 1e-2
    fine = Scheme(per_channel(8, 4), per_token(8, 4)).install(tiny(family))
    nearly = logits(fine, ids, new_cache(fine, exact_prefill=False))
    assert (nearly - dense).abs().max() < 0.1 * (measured - dense).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_un_rope_round_trips_on_every_family(family: str) -> None:
    exact = Scheme(Identity(), Identity(), SinkRecent(recent_tokens=0), (Unrope(), Hadamard()))
    model = exact.install(tiny(family))
    ids = text(40)
    dense = logits(model, ids, DynamicCache(config=model.config), [30, *[1] * 10])
    ours = logits(model, ids, new_cache(model), [30, *[1] * 10])
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)


def test_protected_tokens_do_not_shape_the_groups_they_stand_in() -> None:
    scheme = Scheme(per_channel(4), per_token(4), SinkRecent(sink_tokens=2, recent_tokens=0))
    model = scheme.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    keys = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    keys[:, :, :2] *= 1e3
    cache.begin(1, 16)
    cache.update(keys, keys, 0)
    *_, got, _ = fill(cache, 1)
    assert torch.equal(got[:, :, :2], keys[:, :, :2])
    assert (got[:, :, 2:16] - keys[:, :, 2:]).abs().max() < 5 / 15


@pytest.mark.parametrize("family", FAMILIES)
def test_detected_sinks_stay_exact(family: str) -> None:
    scheme = Scheme(policy=SinkDetect(top_values=3, recent_tokens=0))
    model = scheme.install(tiny(family))
    cache = new_cache(model)
    hidden = {}
    block = model.get_submodule(scheme.plans(model)[1].attention.block)
    block.register_forward_pre_hook(
        lambda m, a, k: hidden.update(x=(a or [k["hidden_states"]])[0]), with_kwargs=True
    )
    logits(model, text(40), cache)
    top = hidden["x"].abs().flatten().topk(3).indices // hidden["x"].shape[-1]
    overlay = cache.layers[1]._overlay
    window = cache.layers[1].sliding_window
    expected = {t for t in top.tolist() if window is None or t >= 40 - window + 1}
    assert set(overlay.slots.tolist()) == expected
    assert not cache.track.hidden


def test_pieces_of_any_size_decode_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROTATE.install(tiny())
    ids = text(70)
    whole = logits(model, ids, new_cache(model), [60, 10])
    monkeypatch.setattr("kvpack.runtime.plane.PIECE_ELEMENTS", 100)
    torch.testing.assert_close(logits(model, ids, new_cache(model), [60, 10]), whole, rtol=1e-5, atol=1e-5)


def test_misuse_is_refused_by_name() -> None:
    model = KIVI.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    new = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UsageError, match="does not know of these tokens"):
        cache.update(new, new, 0)
    fill(cache, 20)
    with pytest.raises(UsageError, match="holds 1 sequences"):
        model(text(2, batch=3), past_key_values=cache)
    with pytest.raises(UsageError, match="mask covers 2 tokens of 22"):
        model(text(2), past_key_values=cache, attention_mask=torch.ones(1, 2))
    with pytest.raises(UsageError, match="negative number"):
        cache.crop(5)
    with pytest.raises(UsageError, match="offload"):
        cache.offload(0)
    with pytest.raises(UsageError, match="offload"):
        cache.prefetch(0)


def test_a_transform_without_positions_is_refused() -> None:
    model = ROTATE.install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    cache.begin(1, 4)
    new = torch.zeros(1, 2, 4, 8)
    with pytest.raises(KvpackError, match="no positions"):
        cache.update(new, new, 0)


def test_reset_and_early_initialisation() -> None:
    model = KIVI.install(tiny())
    cache = new_cache(model)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.batch_size == 2
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    ids = text(40, batch=2)
    first = logits(model, ids, cache, [30, 10])
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.track.length) == (0, 0, 0)
    assert torch.equal(logits(model, ids, cache, [30, 10]), first)


def test_inference_mode_and_plain_mode_mix() -> None:
    model = KIVI.install(tiny())
    ids = text(60)
    cache = new_cache(model)
    with torch.inference_mode():
        first = model(ids[:, :40], past_key_values=cache).logits
    rest = logits(model, ids[:, 40:], cache, [1] * 20)
    steps = [40, *[1] * 20]
    expected = logits(model, ids, kivi_reference(model), steps)
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-4, atol=2e-4)
