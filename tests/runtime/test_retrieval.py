"""Layers whose queries read chosen tokens only."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Codec, Retriever
from kvpack.models.attention_interface import observe, watch
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.codecs.vector import Vector
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.parts.retrievers.top_tokens import TopTokens
from kvpack.parts.transforms.rope_window import RopeWindow
from kvpack.recipe.kv_plan import KVLayerPlan, RetrievalPlan, state_name
from kvpack.recipe.plane_plan import PlanePlan
from kvpack.report import kv_bytes
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import install, new_cache
from kvpack.runtime.retrieval import RetrievalLayer, gathered
from tests.contracts.discovery import random
from tests.runtime.rows import padded
from tests.runtime.schemes import attention_of, logits, tiny

EXACT = Identity()
KIVI_KEYS = Affine(bits=8)
VOCAB = 512
SMALL = TopTokens(fraction=0.1, sink_tokens=2, recent_tokens=6)


def plans(
    model: Any,
    retriever: Retriever = SMALL,
    *,
    residency: str = "model",
    index: Codec = EXACT,
    stored: Codec = EXACT,
    position: int = 30,
) -> tuple[list[KVLayerPlan], dict[str, Tensor]]:
    """Plans with an index over un-rotated keys in every layer without a window, and their states."""
    found, states = [], {}
    for spec in attention_of(model):
        plane = PlanePlan((), False, (stored,), ({},))
        shape = (1, spec.kv_heads, 1, spec.head_dim)
        chain = PlanePlan((RopeWindow(position=position),), False, (index,), ({}, index.state_spec(shape)))
        retrieval = RetrievalPlan(retriever, chain, residency)  # type: ignore[arg-type]
        policy = SinkRecent(sink_tokens=0, recent_tokens=4, inside="in", outside="out")
        plan = KVLayerPlan(spec, plane, plane, policy)
        if spec.window is None:
            plan = replace(plan, retrieval=retrieval)
            for name, tensor in fitted_state(index, spec.kv_heads, spec.head_dim).items():
                states[state_name(spec.layer, "index", 1, name)] = tensor
        found.append(plan)
    return found, states


def fitted_state(codec: Codec, heads: int, channels: int) -> dict[str, Tensor]:
    if not codec.requires():
        return {}
    rows, queries = random(heads, 256, channels, seed=5), random(heads, 256, channels, seed=6)
    return codec.fit({"all_rows": {"rows": rows}, "query.head_gram": {"gram": queries.mT @ queries}})


def installed(family: str = "llama", retriever: Retriever = SMALL, **options: Any) -> Any:
    model = tiny(family, vocab_size=VOCAB)
    made, states = plans(model, retriever, **options)
    install(model, made, states)
    return model


def different(tokens: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Texts without repeated tokens: keys of equal tokens tie in the first layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([3 + torch.randperm(VOCAB - 3, generator=generator)[:tokens] for _ in range(batch)])


def padded_steps(model: Any, ids: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, T, V] of a left-padded batch, given in pieces."""
    cache, at, pieces = new_cache(model), 0, []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for part in ids.split(sizes, 1):
        stop = at + part.shape[1]
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, at:stop]}
        with torch.no_grad():
            pieces.append(model(part, past_key_values=cache, use_cache=True, **given).logits)
        at = stop
    return torch.cat(pieces, 1)


def steps(tokens: int, prompt: int) -> list[int]:
    return [prompt, *[1] * (tokens - prompt)]


FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("residency", ["model", "cpu"])
@pytest.mark.parametrize("everything", [TopTokens(fraction=1.0), TopTokens(fraction=0.0, recent_tokens=500)])
def test_reading_everything_is_dense(family: str, residency: str, everything: TopTokens) -> None:
    ids = different(60)
    with torch.no_grad():
        expected = tiny(family, vocab_size=VOCAB)(ids).logits
    model = installed(family, replace(everything, minimum=0), residency=residency)
    found = logits(model, ids, new_cache(model), steps(60, 40))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [EXACT, Vector(bits=4, sub_vectors=2)], ids=["exact", "vector"])
def test_fetching_equals_masking(family: str, index: Codec) -> None:
    both, mask = padded(different(50), 7)
    found = []
    for residency in ("model", "cpu"):
        model = installed(family, residency=residency, index=index)
        found.append(padded_steps(model, both, mask, [40, 1, 4, 1, 11]))
    valid = mask.bool()
    assert torch.allclose(found[0][valid], found[1][valid], atol=1e-5)


def reference_step(model: Any, ids: Tensor, retriever: TopTokens, position: int) -> Tensor:
    """Logits of the last token when every head attends to its best keys at one distance; slow, dense."""
    base = model.config.rope_parameters["rope_theta"]
    group = model.config.num_attention_heads // model.config.num_key_value_heads

    def turn(x: Tensor, by: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = by[:, None].double() * base ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x.double().split(half, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def choose(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Any:
        length = key.shape[2]
        slots = torch.arange(length)
        allowed = torch.full((1, query.shape[1], length, length), -1e30).triu(1)
        bare = turn(key[0], -slots)
        for head in range(query.shape[1]):
            far = turn(turn(query[0, head, -1:], -slots[-1:]), torch.tensor([position]))
            scores = (far @ bare[head // group].T)[0]
            always = set(range(retriever.sink_tokens)) | set(range(length - retriever.recent_tokens, length))
            others = sorted((i for i in range(length) if i not in always), key=lambda i: -float(scores[i]))
            read = always | set(others[: max(1, int(retriever.fraction * length))])
            allowed[0, head, -1] = torch.tensor([0.0 if i in read else -1e30 for i in range(length)])
        return key, value, allowed

    observe(model)
    with ExitStack() as stack, torch.no_grad():
        for spec in attention_of(model):
            stack.enter_context(watch(model.get_submodule(spec.module), choose))
        return model(ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)], ids=["gqa", "mqa", "mha"])
def test_a_step_equals_the_slow_reference(heads: tuple[int, int]) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": VOCAB}
    ids = different(60)
    expected = reference_step(tiny(**shape), ids, SMALL, 30)
    model = tiny(**shape)
    install(model, *plans(model))
    found = logits(model, ids, new_cache(model), [59, 1])[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    dense = tiny(**shape)(ids).logits[:, -1]
    assert not torch.allclose(found, dense, atol=1e-2)


@pytest.mark.parametrize("stored", [EXACT, KIVI_KEYS], ids=["exact", "affine"])
def test_a_prompt_is_dense_and_exact(stored: Codec) -> None:
    ids = different(100)
    model = installed(stored=stored)
    assert torch.equal(logits(model, ids, new_cache(model)), tiny(vocab_size=VOCAB)(ids).logits)


def test_retrieval_works_over_encoded_keys_and_values() -> None:
    ids = different(60)
    exact, coded = (installed(stored=s) for s in (EXACT, Affine(bits=8, scale_dtype="float32")))
    a, b = (logits(m, ids, new_cache(m), steps(60, 40)) for m in (exact, coded))
    assert torch.allclose(a, b, atol=0.3)
    assert not torch.equal(a, b)


def test_rows_of_one_forward_choose_as_single_steps_do() -> None:
    """Only in the first layer: the others see what the rows before them have read."""
    model = tiny(num_hidden_layers=1, vocab_size=VOCAB)
    install(model, *plans(model))
    ids = different(60)
    together = logits(model, ids, new_cache(model, exact_prefill=False))
    apart = logits(model, ids, new_cache(model), steps(60, 40))
    assert torch.allclose(together[:, 40:], apart[:, 40:], atol=1e-4)


def test_small_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = installed(), different(60, batch=2)
    whole = logits(model, ids, new_cache(model, exact_prefill=False))
    monkeypatch.setattr("kvpack.runtime.index.SCORE_ELEMENTS", 1000)
    assert torch.allclose(logits(model, ids, new_cache(model, exact_prefill=False)), whole, atol=1e-5)


@pytest.mark.parametrize("residency", ["model", "cpu"])
def test_a_padded_row_equals_its_single_run(residency: str) -> None:
    model = installed(residency=residency)
    ids = different(50)
    both, mask = padded(ids, 9)
    alone = padded_steps(model, ids, torch.ones_like(ids), [35, 1, 1, 9, 4])
    batch = padded_steps(model, both, mask, [44, 1, 1, 9, 4])
    torch.testing.assert_close(batch[1:, 9:], alone, rtol=1e-3, atol=1e-3)
    assert model.generate(both, attention_mask=mask, max_new_tokens=4, do_sample=False).shape == (2, 63)


def test_cropping_and_going_on_equals_a_fresh_run() -> None:
    model, ids = installed(), different(70)
    cache = new_cache(model)
    logits(model, ids[:, :60], cache, steps(60, 50))
    cache.crop(-8)
    again = logits(model, ids[:, 40:58], cache, [1] * 18)
    fresh = logits(model, torch.cat((ids[:, :52], ids[:, 40:58]), 1), new_cache(model), [50, *[1] * 20])
    assert torch.allclose(again, fresh[:, 52:], atol=1e-4)


@pytest.mark.parametrize("residency", ["model", "cpu"])
def test_beams_and_repeated_rows(residency: str) -> None:
    model, ids = installed(residency=residency), different(50)
    cache = new_cache(model)
    logits(model, ids, cache, steps(50, 45))
    cache.batch_repeat_interleave(3)
    found = logits(model, ids[:, 3:6].expand(3, -1), cache, [1, 1, 1])
    alone = logits(model, torch.cat((ids, ids[:, 3:6]), 1), new_cache(model), steps(53, 45))[:, 50:]
    assert torch.allclose(found, alone.expand(3, -1, -1), atol=1e-4)
    assert model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False).shape == (1, 55)


def test_a_cache_can_be_used_again_after_reset() -> None:
    model, ids = installed(), different(60)
    cache = new_cache(model)
    first = logits(model, ids, cache, steps(60, 40))
    cache.reset()
    assert torch.equal(logits(model, ids, cache, steps(60, 40)), first)


def test_sliding_layers_are_left_alone() -> None:
    cache = new_cache(installed("gemma3_text"))
    kinds = [isinstance(layer, RetrievalLayer) for layer in cache.layers]
    assert kinds == [not layer.is_sliding for layer in cache.layers]
    assert any(kinds)
    assert not all(kinds)


@pytest.mark.parametrize("residency", ["model", "cpu"])
def test_bytes_are_those_of_the_plan(residency: str) -> None:
    model = tiny(vocab_size=VOCAB)
    made, states = plans(model, index=Vector(bits=4, sub_vectors=2), residency=residency)
    install(model, made, states)
    cache: KVPackCache = model(different(90)).past_key_values
    planned = kv_bytes(made, 90, "float32")
    assert cache.nbytes == planned.total
    assert planned.index == 2 * 2 * 90 * 1  # layers, kv heads, tokens, two codes of 4 bits
    assert cache.device_nbytes == planned.on_device
    positions = 90 * 4
    dense = 2 * 2 * 2 * 90 * 8 * 4
    assert planned.total == dense + planned.index + positions
    assert planned.on_device == planned.index + positions + (dense if residency == "model" else 0)


def test_a_kv_head_fetches_no_more_than_its_heads_chose() -> None:
    tokens, group = 300, 4
    part = TopTokens(fraction=0.05, sink_tokens=8, recent_tokens=64)
    read = part.select(random(2, 2 * group, 1, tokens), torch.ones(2, 1, 1, tokens, dtype=torch.bool))
    key, value = random(2, 2, tokens, 8), random(2, 2, tokens, 8, seed=1)
    query = random(2, 2 * group, 1, 8)
    fetched_keys, fetched_values, mask = gathered(query, key, value, read)
    assert fetched_keys.shape[2] <= group * int(0.05 * tokens) + 64 + 8
    assert (mask == 0).sum(-1).equal(read.sum(-1))
    ours, dense = (
        torch.nn.functional.scaled_dot_product_attention(query, k, v, m, enable_gqa=True)
        for k, v, m in ((fetched_keys, fetched_values, mask), (key, value, read))
    )
    assert torch.allclose(ours, dense, atol=1e-5)


def test_a_needle_is_found_by_the_index_and_lost_without() -> None:
    """One key in 4096 tokens matches the query; random others are not in the window or the sinks."""
    heads, tokens, channels, place = 2, 4096, 64, 1500
    rows, queries = random(heads, 2048, channels, seed=3), random(heads, 2048, channels, seed=4)
    codec = Vector(bits=6)
    state = codec.fit({"all_rows": {"rows": rows}, "query.head_gram": {"gram": queries.mT @ queries}})
    keys = random(1, heads, tokens, channels, seed=8)
    query = random(1, heads, 1, channels, seed=9)
    keys[:, :, place] = 2.5 * query[:, :, 0]
    scores = codec.scores(query, codec.encode(keys, state), state)
    visible = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    part = TopTokens(fraction=0.05)
    assert part.select(scores, visible)[..., place].all()
    assert not replace(part, fraction=0.0, minimum=0).select(scores, visible)[..., place].any()
