"""Caches that store layer inputs: exact where nothing is rounded, and as the papers say where it is."""

import pytest
import torch
from transformers import DynamicCache

from kvpack.core.errors import UnsupportedModel, UsageError
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime.cache import KVPackCache, make_scheme
from kvpack.runtime.install import new_cache
from tests.runtime.input_schemes import (
    GROUP,
    InputScheme,
    chained_change,
    change_inputs,
    per_channel,
    per_token,
    plain_change,
    svd_change,
)
from tests.runtime.rows import generated, padded
from tests.runtime.schemes import logits, text, tiny
from tests.tiny_models import FAMILIES

FULL = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox")
SEPARATE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
PLAIN, SVD = InputScheme(), InputScheme(svd=True)
RESIDUAL = InputScheme(residual=True)
CHAIN, CHAIN_SVD = InputScheme(base_layers=1), InputScheme(base_layers=1, svd=True)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [PLAIN, SVD, RESIDUAL], ids=["plain", "svd", "residual"])
@pytest.mark.parametrize("steps", [[20, 1, 1, 7, 3], [1] * 32], ids=["pieces", "tokens"])
def test_without_rounding_it_is_the_dense_cache(family: str, scheme: InputScheme, steps: list[int]) -> None:
    ids = text(32)
    expected = logits(tiny(family), ids, DynamicCache(config=tiny(family).config), steps)
    model = scheme.install(tiny(family))
    cache = new_cache(model)
    close(logits(model, ids, cache, steps), expected)
    assert cache.stored_tokens > 0


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("scheme", [CHAIN, CHAIN_SVD], ids=["plain", "svd"])
@pytest.mark.parametrize("recent", [0, 6])
def test_differences_without_rounding_are_the_dense_cache(
    family: str, scheme: InputScheme, recent: int
) -> None:
    ids, steps = text(32), [20, 1, 1, 7, 3]
    deep = {"num_hidden_layers": 4}
    expected = logits(tiny(family, **deep), ids, DynamicCache(), steps)
    scheme = InputScheme(svd=scheme.svd, base_layers=1, policy=SinkRecent(recent_tokens=recent))
    model = scheme.install(tiny(family, **deep))
    close(logits(model, ids, new_cache(model), steps), expected)


@pytest.mark.parametrize("scheme", [PLAIN, SVD, CHAIN, CHAIN_SVD], ids=["plain", "svd", "chain", "both"])
def test_protocol_a_without_rounding_is_the_dense_model(scheme: InputScheme) -> None:
    ids = text(30)
    expected = logits(tiny(), ids, DynamicCache(), [20, 10])
    model = scheme.install(tiny())
    close(logits(model, ids, new_cache(model, exact_prefill=False), [20, 10]), expected)


@pytest.mark.parametrize("family", SEPARATE)
def test_stored_inputs_are_rounded_per_token(family: str) -> None:
    ids = text(40)
    expected = logits(change_inputs(tiny(family), plain_change(3)), ids, None)
    model = InputScheme(value=per_token(3)).install(tiny(family))
    close(logits(model, ids, new_cache(model, exact_prefill=False)), expected)


@pytest.mark.parametrize("family", SEPARATE)
def test_latent_keys_are_rounded_per_channel_and_latent_values_per_token(family: str) -> None:
    ids = text(5 * GROUP + 3)
    reference = tiny(family)
    expected = logits(change_inputs(reference, svd_change(reference, 3)), ids, None)
    model = InputScheme(svd=True, key=per_channel(3), value=per_token(3)).install(tiny(family))
    close(logits(model, ids, new_cache(model, exact_prefill=False)), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("base_layers", [1, 2, 5])
def test_differences_are_rounded_against_what_was_reconstructed(family: str, base_layers: int) -> None:
    ids, deep = text(40), {"num_hidden_layers": 4}
    expected = logits(change_inputs(tiny(family, **deep), chained_change(3, 4, base_layers)), ids, None)
    scheme = InputScheme(value=per_token(3), base=per_token(4), base_layers=base_layers)
    model = scheme.install(tiny(family, **deep))
    close(logits(model, ids, new_cache(model, exact_prefill=False)), expected)


@pytest.mark.parametrize("link", [0, 1])
def test_new_tokens_are_exact_and_old_ones_as_stored(link: int) -> None:
    """A prompt in two pieces: the second piece sees the first as stored, and itself exactly."""
    ids, seen = text(36), {}
    deep = {"num_hidden_layers": 3}
    scheme = InputScheme(value=per_token(2), base=per_token(4), base_layers=link)
    model = scheme.install(tiny(**deep))
    plain = tiny(**deep)
    cache = new_cache(model)
    for index, layer in enumerate(cache.layers):
        layer.update = _recorded(layer.update, seen, index)
    inputs: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(_inputs(inputs, index), with_kwargs=True)
    logits(model, ids[:, :20], cache)
    first = dict(inputs)
    logits(model, ids[:, 20:], cache)
    change = chained_change(2, 4, link) if link else plain_change(2)
    positions = torch.arange(20)[None]
    cos, sin = plain.model.rotary_emb(torch.empty(0), positions)
    for index, block in enumerate(plain.model.layers):
        x = change(index, "k", first[index].double()).float()
        keys = block.self_attn.k_proj(x).view(1, 20, 2, 8).transpose(1, 2)
        half = torch.cat((-keys[..., 4:], keys[..., :4]), -1)
        given, held = seen[index][0][0], seen[index][1][0]
        close(held[:, :, :20], keys * cos + half * sin)
        assert torch.equal(held[:, :, 20:], given)
        values = block.self_attn.v_proj(x).view(1, 20, 2, 8).transpose(1, 2)
        close(seen[index][1][1][:, :, :20], values)


def _recorded(update, seen, index):
    def record(key, value, *args, **kwargs):
        held = update(key, value, *args, **kwargs)
        seen[index] = ((key, value), held)
        return held

    return record


def _inputs(found, index):
    def hook(module, args, kwargs):
        found[index] = args[0] if args else kwargs["hidden_states"]

    return hook


@pytest.mark.parametrize("scheme", [PLAIN, SVD, CHAIN], ids=["plain", "svd", "chain"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_left_padded_row_equals_its_single_run(family: str, scheme: InputScheme) -> None:
    """Keys are made again at their own positions: two rows of different length."""
    ids = text(20)
    expected, _ = generated(tiny(family), ids, tokens=6)
    ours, cache = generated(scheme.install(tiny(family)), *padded(ids, 7), tokens=6)
    assert isinstance(cache, KVPackCache)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", [PLAIN, SVD, CHAIN], ids=["plain", "svd", "chain"])
def test_beams_are_those_of_the_dense_cache(scheme: InputScheme) -> None:
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "min_new_tokens": 8}
    ids = text(12)
    expected = tiny().generate(ids, **options)
    assert torch.equal(scheme.install(tiny()).generate(ids, **options), expected)


@pytest.mark.parametrize("scheme", [PLAIN, SVD, CHAIN, CHAIN_SVD], ids=["plain", "svd", "chain", "both"])
@pytest.mark.parametrize("recording", [False, True])
def test_cropping_is_as_if_the_tokens_had_never_been(scheme: InputScheme, recording: bool) -> None:
    ids = text(30)
    model = scheme.install(tiny())
    cache = new_cache(model)
    logits(model, ids[:, :15], cache)
    if recording:
        for layer in cache.layers:
            layer.activate_past_recording()
    logits(model, text(6, seed=4), cache)
    cache.crop(-6)
    ours = logits(model, ids[:, 15:], cache)
    close(ours, logits(tiny(), ids, DynamicCache())[:, 15:])


def test_recorded_differences_are_encoded_on_cropping() -> None:
    """Encoded by `crop`, outside of a forward pass, they are those of a pass."""
    ids = text(24)
    scheme = InputScheme(value=per_token(3), base=per_token(4), base_layers=1)
    model = scheme.install(tiny(num_hidden_layers=3))
    direct, recorded = new_cache(model), new_cache(model)
    logits(model, ids, direct)
    logits(model, ids[:, :1], recorded)
    recorded.reset()
    for layer in recorded.layers:
        layer.record_past = True
    logits(model, ids, recorded)
    assert recorded.stored_tokens == 0
    recorded.crop(0)
    assert recorded.stored_tokens == direct.stored_tokens > 0
    last = text(1, seed=5)
    close(logits(model, last, recorded), logits(model, last, direct))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scheme", ["plain", "svd", "chain"])
def test_bytes_are_those_of_the_formula(scheme: str, bits: int) -> None:
    """C channels of b bits, and per group of 8 two float32; the positions beside it."""
    tokens, layers = 40, 2
    made = InputScheme(
        svd=scheme == "svd",
        key=per_channel(bits),
        value=per_token(bits),
        base=per_token(8),
        base_layers=scheme == "chain",
    )
    model = made.install(tiny())
    cache = new_cache(model)
    logits(model, text(tokens), cache)
    x = tokens * (32 * bits // 8 + 32 // 8 * 8)
    latent = tokens * (16 * bits // 8 + 16 // 8 * 8) + tokens * 16 * bits // 8 + tokens // 8 * 16 * 8
    base = tokens * (32 + 32 // 8 * 8)
    expected = {"plain": layers * x, "svd": layers * latent, "chain": base + x}
    assert cache.nbytes == expected[scheme] + 4 * tokens
    assert cache.elements == layers * tokens * 2 * 2 * 8


def test_the_closed_loop_never_loses_more_than_half_a_step_however_deep() -> None:
    deep, tokens = 8, 24
    scheme = InputScheme(value=per_token(3), base=per_token(3), base_layers=1)
    model = scheme.install(tiny(num_hidden_layers=deep))
    exact: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(_inputs(exact, index), with_kwargs=True)
    cache = new_cache(model, exact_prefill=False)
    made: dict[int, torch.Tensor] = {}
    put = cache.reconstruction.put

    def watch(layer, start, x):
        made[layer] = x.clone()
        put(layer, start, x)

    cache.reconstruction.put = watch
    logits(model, text(tokens), cache)
    assert len(made) == deep
    open_loop = chained_change(3, 3, 1, closed=False)
    growth = [(open_loop(i, "k", exact[i].double()) - exact[i]).norm() / exact[i].norm() for i in range(deep)]
    for layer in range(deep):
        before = made[layer - 1] if layer else torch.zeros_like(exact[0])
        groups = (exact[layer] - before).unflatten(-1, (-1, GROUP))
        half = (groups.amax(-1) - groups.amin(-1)) / 7 / 2
        error = (made[layer] - exact[layer]).unflatten(-1, (-1, GROUP)).abs().amax(-1)
        assert bool((error <= half * 1.001 + 1e-6).all())
    errors = [float((made[i] - exact[i]).norm() / exact[i].norm()) for i in range(deep)]
    assert errors[-1] < 1.5 * errors[1] < growth[-1]


def test_before_the_norm_the_residual_stream_is_rounded() -> None:
    """Two layers, the second one stored as a difference of residual streams."""
    ids, made = text(24), {}
    scheme = InputScheme(value=per_token(3), base=per_token(4), base_layers=1, residual=True)
    model, reference = scheme.install(tiny()), tiny()
    chain = chained_change(3, 4, 1)

    def enter(index):
        def hook(module, args, kwargs):
            made[index] = module.input_layernorm(chain(index, "k", args[0].double()).float())

        return hook

    for index, block in enumerate(reference.model.layers):
        block.register_forward_pre_hook(enter(index), with_kwargs=True)
        for projection in (block.self_attn.k_proj, block.self_attn.v_proj):
            projection.register_forward_pre_hook(lambda module, args, i=index: (made[i],))
    expected = logits(reference, ids, None)
    close(logits(model, ids, new_cache(model, exact_prefill=False)), expected)


def test_nothing_is_left_between_passes() -> None:
    model = CHAIN.install(tiny())
    cache = new_cache(model)
    logits(model, text(20), cache, [10, 10])
    assert cache.reconstruction._written == {}


@pytest.mark.parametrize("scheme", [InputScheme(value=per_token(2)), SVD], ids=["plain", "svd"])
def test_protected_tokens_are_exact_keys_and_values(scheme: InputScheme) -> None:
    scheme = InputScheme(
        svd=scheme.svd, key=scheme.key, value=scheme.value, policy=SinkRecent(sink_tokens=3, recent_tokens=0)
    )
    model = scheme.install(tiny(num_hidden_layers=1))
    cache = new_cache(model, exact_prefill=False)
    seen: dict[int, tuple] = {}
    cache.layers[0].update = _recorded(cache.layers[0].update, seen, 0)
    logits(model, text(20), cache)
    for given, held in zip(*seen[0], strict=True):
        assert torch.equal(held[:, :, :3], given[:, :, :3])


def test_bfloat16_models_run() -> None:
    model = InputScheme(value=per_token(8)).install(tiny(dtype=torch.bfloat16))
    ids = text(24)
    ours = logits(model, ids, new_cache(model), [16, 8])
    expected = logits(tiny(dtype=torch.bfloat16), ids, DynamicCache(), [16, 8])
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).float().norm() < 0.1 * expected.float().norm()


def test_a_model_that_does_more_than_to_project_is_refused() -> None:
    model = PLAIN.install(tiny())

    def louder(module, args, kwargs):
        return args, {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    model.model.layers[1].self_attn.register_forward_pre_hook(louder, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="layer 1 do not follow from its input"):
        logits(model, text(8), new_cache(model))


def test_a_layer_that_was_not_shown_its_input_says_so() -> None:
    model = PLAIN.install(tiny())
    cache = new_cache(model)
    cache.begin(1, 4)
    with pytest.raises(UsageError, match="was not shown"):
        cache.layers[0].update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))


def test_a_scheme_without_what_makes_keys_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing makes the keys"):
        make_scheme(PLAIN.plans(tiny()), {})
