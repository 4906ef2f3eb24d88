"""Tiers filled by importance, decided once: ZipCache's schedule against a slow one of our own."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvpack.core.errors import UsageError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.channel_separable import ChannelSeparable
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from kvpack.parts.scorers.normalized_attention import NormalizedAttention
from kvpack.report import kv_bytes
from kvpack.runtime.install import new_cache
from tests.runtime.ranked import (
    Fed,
    Ranked,
    attention,
    check_moved_rows,
    feed,
    separable,
    tokenwise,
    whole,
    zipcache,
)
from tests.runtime.rows import ROW_CHANGES, generated, padded
from tests.runtime.schemes import logits, text, tiny


def snapped(x: Tensor, bits: int, dim: tuple[int, ...]) -> Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round((x - low) / scale) * scale + low


def split(fed_keys: Tensor, fed_values: Tensor, scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """One chunk [K, T, D] as ZipCache stores it: the set of each head by its own scores [K, T]."""
    heads, tokens, channels = fed_keys.shape
    high = int(share * tokens + 1e-9)
    keys, values = torch.empty_like(fed_keys), torch.empty_like(fed_values)
    order = scores.argsort(dim=1, descending=True, stable=True)
    for bits, chosen in ((4, order[:, :high]), (2, order[:, high:])):
        if not chosen.shape[1]:
            continue
        members = torch.stack([row.sort().values for row in chosen])
        pool_k = torch.stack([fed_keys[h, members[h]] for h in range(heads)])
        pool_v = torch.stack([fed_values[h, members[h]] for h in range(heads)])
        c = pool_v.abs().amax(1, keepdim=True).sqrt().half().float()
        flat = (pool_v / c).transpose(0, 1).reshape(chosen.shape[1], heads * channels)
        flat = snapped(flat, bits, (1,)).reshape(chosen.shape[1], heads, channels).transpose(0, 1) * c
        pool_k = snapped(pool_k, bits, (1,))
        for h in range(heads):
            keys[h, members[h]], values[h, members[h]] = pool_k[h], flat[h]
    return keys, values


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [8, 48])
def test_chunks_are_split_and_stored_as_the_card_says(kv_heads: int, head_dim: int) -> None:
    model = zipcache().install(tiny(num_key_value_heads=kv_heads, head_dim=head_dim, num_hidden_layers=1))
    cache, batch = new_cache(model), 2
    steps = [70, *[1] * 30]
    fed: list[Fed] = []
    sums = torch.zeros(batch, kv_heads, 0, dtype=torch.float64)
    counts = torch.zeros(0)
    stored: list[tuple[Tensor, Tensor]] = []
    done = past = 0
    scorer = NormalizedAttention()
    for i, tokens in enumerate(steps):
        fed.append(feed(cache, tokens, batch=batch, seed=i))
        sums = torch.nn.functional.pad(sums, (0, tokens))
        counts = torch.nn.functional.pad(counts, (0, tokens))
        probes = scorer.probes(0, tokens)
        for b in range(batch):
            given = attention(fed[-1].query[b], fed[-1].seen_key[b], past)[:, probes]
            sums[b] += given.sum(1).unflatten(0, (kv_heads, -1)).sum(1)
        visible = torch.arange(past + tokens) <= past + probes[:, None]
        counts += visible.sum(0)
        past += tokens
        leaving = (past - done) // 32 * 32
        if leaving:
            keys, values = (torch.cat([getattr(f, n) for f in fed], 2) for n in ("key", "value"))
            at = slice(done, done + leaving)
            score = sums[:, :, at] / counts[at]
            parts = [split(keys[b, :, at], values[b, :, at], score[b], 0.6) for b in range(batch)]
            stored.append((torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])))
            done += leaving
    assert len(stored) == 2, "64 tokens of the prompt, then 32 more"
    last = feed(cache, 1, batch=batch, seed=99)
    for i, seen in enumerate((last.seen_key, last.seen_value)):
        expected = torch.cat([s[i] for s in stored], 2)
        torch.testing.assert_close(seen[:, :, :done], expected, rtol=1e-5, atol=2e-5)
        exact = torch.cat([(f.key, f.value)[i] for f in fed], 2)
        assert torch.equal(seen[:, :, done:-1], exact[:, :, done:])


@pytest.mark.parametrize("tokens", [1, 31, 32, 40, 64, 150])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_bytes_are_what_the_plan_says(tokens: int, family: str, dtype: torch.dtype, share: float) -> None:
    scheme = zipcache(share)
    model = scheme.install(tiny(family, dtype=dtype))
    cache = new_cache(model)
    found = logits(model, text(tokens), cache)
    name = str(dtype).removeprefix("torch.")
    assert found.isfinite().all()
    assert cache.nbytes == kv_bytes(scheme.plans(model), tokens, name).total


def test_bytes_are_the_card_formula() -> None:
    """Bits per element for one prompt of 2048 tokens; the card counts one set of channel scales."""

    def key(bits: int) -> Affine:
        return Affine(bits=bits, group=Group("token", 0))

    def value(bits: int) -> ChannelSeparable:
        return ChannelSeparable(Affine(bits=bits, group=Group("channel", 0)))

    policy = TopFraction(NormalizedAttention(), share=0.625, interval=128)
    scheme = Ranked((key(4), key(2)), (value(4), value(2)), policy)
    model = tiny(dtype=torch.float16, num_key_value_heads=4, head_dim=64, num_hidden_layers=1)
    planned = kv_bytes(scheme.plans(model), 2048, "float16")
    widths, metadata = 0.625 * 4 + 0.375 * 2, 64 / 2048
    keys, values = widths + metadata, widths + 32 / (4 * 64) + 32 / 2048
    expected = (keys + values) / 2 + 1 / (2 * 64)
    stored = 8 * (planned.coded + planned.ranking) / planned.elements
    assert stored == pytest.approx(expected, rel=1e-6)


def test_everything_important_and_exact_codecs_is_the_dense_cache() -> None:
    for share, codecs in ((1.0, (Identity(), tokenwise(8, 2))), (0.4, (Identity(), Identity()))):
        chosen = TopFraction(NormalizedAttention(), share=share, interval=4)
        model = Ranked(codecs, codecs, chosen).install(tiny(dtype=torch.bfloat16))
        ids, steps = text(40, batch=2), [20, *[1] * 20]
        ours = logits(model, ids, new_cache(model), steps)
        assert torch.equal(ours, logits(model, ids, DynamicCache(config=model.config), steps))


def test_codes_of_earlier_chunks_never_change() -> None:
    model = zipcache().install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    feed(cache, 70)
    before = feed(cache, 1, seed=1)
    counts = [plane.stored_tokens for plane in cache.layers[0]._planes.values()]
    for i in range(60):
        last = feed(cache, 1, seed=2 + i)
        assert torch.equal(last.seen_key[:, :, :64], before.seen_key[:, :, :64])
        assert torch.equal(last.seen_value[:, :, :64], before.seen_value[:, :, :64])
    assert counts == [64, 64]
    assert cache.layers[0].encoded_tokens == 2 * 128
    assert cache.allocated_nbytes >= cache.nbytes


def test_errors_fall_with_the_share() -> None:
    errors = []
    for share in (0.0, 0.3, 0.6, 1.0):
        model = zipcache(share).install(tiny(num_hidden_layers=1))
        cache = new_cache(model)
        given = feed(cache, 128)
        seen = feed(cache, 1, seed=1)
        errors.append(float((seen.seen_value[:, :, :128] - given.value).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("scorer", [NormalizedAttention(), AccumulatedAttention()])
def test_a_padded_row_equals_its_single_run(family: str, scorer: object) -> None:
    """Padding fills a whole interval here, so that chunks end at the same tokens."""
    policy = TopFraction(scorer, share=0.6, interval=16)
    scheme = Ranked((whole(4), whole(2)), (separable(4), separable(2)), policy)
    model = scheme.install(tiny(family))
    ids = text(40)
    expected, _ = generated(model, ids)
    ours, cache = generated(model, *padded(ids, 16))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert cache.stored_tokens > 0


def test_padding_neither_shapes_scales_nor_is_important() -> None:
    model = zipcache(0.5).install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, :11] = 0
    cache.begin(2, 64, mask)
    layer = cache.layers[0]
    keys, values, query = (
        torch.randn(2, n, 64, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 4)
    )
    for x in (keys, values, query):
        x[1, :, :11] = 1e4
    layer.update(keys, values)
    seen = torch.ones(64, 64).tril().bool() & mask[:, None, None].bool()
    layer.attend(query, keys, values, seen, 8**-0.5)
    chunk = layer._ranking.chunks[0]
    assert chunk.high == 32
    assert (chunk.mask().sum(-1) == 32).all()
    assert (chunk.mask()[1, :, 11:].sum(-1) == 53 // 2).all()
    whole_mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    cache.begin(2, 1, whole_mask)
    got, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    assert (got[1, :, 11:64] - keys[1, :, 11:]).abs().max() < 3
    assert got.isfinite().all()


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_can_be_selected_repeated_and_reordered(change: str) -> None:
    check_moved_rows(zipcache(interval=16).install(tiny()), change)


def test_beam_search_and_several_turns_run() -> None:
    model = zipcache(interval=16).install(tiny("mistral"))
    out = model.generate(text(40), num_beams=3, max_new_tokens=30, do_sample=False)
    assert out.shape == (1, 70)
    cache = new_cache(model)
    for turn in range(3):
        found = logits(model, text(37, seed=turn), cache, [20, 16, 1])
        assert found.isfinite().all()
    assert cache.get_seq_length() == 111


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("interval", [4, 12, 32])
def test_sliding_layers_give_up_what_no_token_can_see(family: str, interval: int) -> None:
    """With exact codecs the window's content must be the dense cache's, whatever is dropped."""
    policy = TopFraction(NormalizedAttention(), share=0.5, interval=interval)
    model = Ranked((Identity(), tokenwise(8, 1)), (Identity(), tokenwise(8, 1)), policy).install(tiny(family))
    ids, steps = text(100), [30, *[1] * 40, 25, *[1] * 5]
    ours = logits(model, ids, new_cache(model), steps)
    dense = logits(model, ids, DynamicCache(config=model.config), steps)
    torch.testing.assert_close(ours, dense, rtol=2e-2, atol=2e-2)
    cache = new_cache(model)
    logits(model, ids, cache, steps)
    for layer in cache.layers:
        if layer.sliding_window is not None:
            assert layer._ranking.first <= 100 - layer.sliding_window + 1
            assert layer.stored_tokens["key"] < layer.sliding_window + max(interval, 25)


def test_the_measuring_mode_quantises_the_chunk_itself() -> None:
    model = zipcache().install(tiny(num_hidden_layers=1))
    cache = new_cache(model, exact_prefill=False)
    given = feed(cache, 45)
    assert ((given.key - given.seen_key)[:, :, :44].abs().amax((0, 1, 3)) > 0).any()
    assert torch.equal(given.key[:, :, 44:], given.seen_key[:, :, 44:])
    assert cache.layers[0].stored_tokens == {"key": 44, "value": 44}
    full = zipcache().install(tiny())
    ids = text(64)
    dense = logits(full, ids, DynamicCache())
    assert torch.equal(logits(full, ids, new_cache(full)), dense)
    assert (logits(full, ids, new_cache(full, exact_prefill=False)) - dense).abs().max() > 1e-2


def test_what_cannot_be_exact_is_refused_by_name() -> None:
    model = zipcache().install(tiny(num_hidden_layers=1))
    cache = new_cache(model)
    feed(cache, 40)
    with pytest.raises(UsageError, match="ranks them by importance"):
        cache.crop(-3)
    with pytest.raises(UsageError, match="ranks them by importance"):
        cache.activate_past_recording()
    new = torch.zeros(1, 2, 1, 8)
    cache.begin(1, 1)
    cache.layers[0].update(new, new)
    cache.begin(1, 1)
    with pytest.raises(UsageError, match="not shown how its tokens were attended to"):
        cache.layers[0].update(new, new)
    cache.reset()
    feed(cache, 5)
    assert cache.get_seq_length() == 5


def test_a_foreign_attention_implementation_is_noticed() -> None:
    model = zipcache().install(tiny())
    model.set_attn_implementation("eager")
    cache = new_cache(model)
    logits(model, text(20), cache)
    with pytest.raises(UsageError, match="not shown"):
        logits(model, text(1), cache)


def test_inference_mode_and_plain_mode_mix() -> None:
    model = zipcache(interval=16).install(tiny())
    ids = text(60)
    cache = new_cache(model)
    with torch.inference_mode():
        model(ids[:, :40], past_key_values=cache)
    rest = logits(model, ids[:, 40:], cache, [1] * 20)
    plain = logits(model, ids, new_cache(model), [40, *[1] * 20])
    assert torch.equal(rest, plain[:, 40:])


def test_eager_attention_ranks_alike() -> None:
    ids = text(60)
    found = []
    for implementation in ("sdpa", "eager"):
        model = tiny()
        model.set_attn_implementation(implementation)
        found.append(logits(zipcache(interval=16).install(model), ids, None, [60]))
        cache = new_cache(model)
        found.append(logits(model, ids, cache, [40, *[1] * 20]))
    torch.testing.assert_close(found[1], found[3], rtol=1e-3, atol=1e-3)


def test_a_needle_is_found_by_means_and_not_by_sums() -> None:
    """A late token that the last rows attend to is important by the mean only (ZipCache, figure 3)."""
    tokens = 200
    query = torch.zeros(1, 1, tokens, 4)
    keys = torch.zeros(1, 1, tokens, 4)
    keys[..., 190, 0], query[..., 191:, 0] = 3.9, 1.0
    ranks = {}
    for name, scorer in (("means", NormalizedAttention()), ("sums", AccumulatedAttention())):
        policy = TopFraction(scorer, share=0.05, interval=200)
        scheme = Ranked((whole(4), whole(2)), (separable(4), separable(2)), policy)
        model = scheme.install(tiny(num_hidden_layers=1, num_key_value_heads=1, head_dim=4))
        cache = new_cache(model)
        cache.begin(1, tokens)
        cache.layers[0].update(keys, keys)
        cache.layers[0].attend(query, keys, keys, None, 1.0)
        ranks[name] = bool(cache.layers[0]._ranking.chunks[0].mask()[0, 0, 190])
    assert ranks["means"]
    assert not ranks["sums"]
