from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpack.core.errors import UnsupportedModel
from kvpack.core.roles import Transform
from kvpack.core.types import Site, State
from kvpack.models import open_model
from kvpack.models.fold import fold_key, fold_names, fold_value
from kvpack.models.rope import rope_of
from kvpack.models.weights import SourceReader
from tests.tiny_models import FAMILIES

ALL = (*FAMILIES, "stablelm", "phi", "glm", "cohere")
NORMED = ("qwen3", "gemma3_text")


@dataclass(frozen=True)
class PerHead(Transform):
    """x -> x A_k, another invertible matrix for every kv head: any mixed-up head shows."""

    def forward(self, x: torch.Tensor, state: State, at: Site) -> torch.Tensor:
        return torch.einsum("bktd,kde->bkte", x.float(), state["matrix"])

    def inverse(self, z: torch.Tensor, state: State, at: Site) -> torch.Tensor:
        return torch.einsum("bktd,kde->bkte", z.float(), torch.linalg.inv(state["matrix"]))

    def dual(self, q: torch.Tensor, state: State, at: Site) -> torch.Tensor:
        partner = torch.linalg.inv(state["matrix"]).transpose(1, 2)
        return torch.einsum("bktd,kde->bkte", q.float(), partner)


class OneHead(Transform):
    def forward(self, x, state, at):
        return x.transpose(1, 2).flatten(2)[:, None]

    def inverse(self, z, state, at):
        raise NotImplementedError


def _states(kv_heads: int, seed: int) -> State:
    noise = torch.randn(kv_heads, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"matrix": torch.eye(16) + 0.3 * noise / 4}


@pytest.mark.parametrize("count", [1, 2])
def test_folding_keeps_the_logits(folder, reference, tokens, count):
    spec = open_model(folder)
    reader = SourceReader.of(spec)
    with torch.no_grad():
        before = reference(tokens).logits
        plain = {}
        for a in spec.attention:
            names = [f"{a.value.linear}.weight", f"{a.output.linear}.weight"]
            names += [n for n in [f"{a.value.linear}.bias"] if n in spec.tensors]
            weights = {n: reader.read(n) for n in names}
            states = [_states(a.kv_heads, 10 * a.layer + i) for i in range(count)]
            folded = fold_value(a, weights, [PerHead()] * count, states)
            assert set(folded) == set(names)
            for name, tensor in folded.items():
                plain[name] = (reference.get_parameter(name).clone(), tensor)
                reference.get_parameter(name).copy_(tensor)
        after = reference(tokens).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert all(not torch.allclose(old, new, atol=1e-3) for old, new in plain.values())


def test_one_tensor_at_a_time_gives_the_same(folder):
    spec = open_model(folder)
    reader, a = SourceReader.of(spec), spec.attention[1]
    names = [f"{a.value.linear}.weight", f"{a.output.linear}.weight"]
    state = [_states(a.kv_heads, 3)]
    whole = fold_value(a, {n: reader.read(n) for n in names}, [PerHead()], state)
    for name in names:
        assert torch.equal(fold_value(a, {name: reader.read(name)}, [PerHead()], state)[name], whole[name])


def test_only_value_rows_of_a_fused_projection_change(checkpoint):
    spec = open_model(checkpoint("phi3"))
    reader, a = SourceReader.of(spec), spec.attention[0]
    name = f"{a.value.linear}.weight"
    old = reader.read(name)
    new = fold_value(a, {name: old}, [PerHead()], [_states(a.kv_heads, 3)])[name]
    changed = (old != new).any(1).nonzero()[:, 0].tolist()
    assert changed == [r for i, j in a.value.heads for r in range(i, j)]


def test_what_cannot_be_folded_is_refused(checkpoint):
    spec = open_model(checkpoint("llama"))
    reader, a = SourceReader.of(spec), spec.attention[0]
    weights = {n: reader.read(n) for n in [f"{a.value.linear}.weight", f"{a.output.linear}.weight"]}
    with pytest.raises(UnsupportedModel, match="changes the layout"):
        fold_value(a, weights, [OneHead()], [{}])
    with pytest.raises(UnsupportedModel, match="norm or gate"):
        fold_value(replace(a, value_linear=False), weights, [PerHead()], [_states(2, 0)])


@dataclass(frozen=True)
class PairScale(PerHead):
    """A diagonal matrix per kv head whose entries RoPE partners share."""

    commutes_with_rope = True


def _scales(a, rope, seed: int) -> State:
    random = torch.randn(a.kv_heads, a.head_dim, generator=torch.Generator().manual_seed(seed))
    factor = (0.5 * random).exp()
    return {"matrix": torch.diag_embed(torch.maximum(factor, factor[:, rope.partners(a.head_dim)]))}


def _key_weights(spec, a):
    reader = SourceReader.of(spec)
    return {n: reader.read(n) for n in fold_names(a, "key") if n in spec.tensors}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", [f for f in ALL if f not in NORMED])
def test_folding_keys_keeps_the_logits(checkpoint, family, tokens, count):
    spec = open_model(checkpoint(family))
    model = AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32).eval()
    with torch.no_grad():
        before, changed = model(tokens).logits, []
        for a in spec.attention:
            rope = rope_of(model, model.get_submodule(a.module))
            states = [_scales(a, rope, 10 * a.layer + i) for i in range(count)]
            weights = _key_weights(spec, a)
            folded = fold_key(a, weights, [PairScale()] * count, states)
            assert set(folded) == set(weights)
            for name, tensor in folded.items():
                changed.append(not torch.allclose(model.get_parameter(name), tensor, atol=1e-3))
                model.get_parameter(name).copy_(tensor)
                one = fold_key(a, {name: weights[name]}, [PairScale()] * count, states)
                assert torch.equal(one[name], tensor)
        after = model(tokens).logits
    assert all(changed)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_keys_and_values_of_a_fused_projection_fold_one_after_the_other(checkpoint):
    spec = open_model(checkpoint("phi3"))
    a = spec.attention[0]
    name, state = f"{a.key.linear}.weight", [_states(a.kv_heads, 3)]
    old = SourceReader.of(spec).read(name)
    key_first = fold_key(a, {name: old}, [PairScale()], state)
    key_first = fold_value(a, key_first, [PairScale()], state)[name]
    value_first = fold_value(a, {name: old}, [PairScale()], state)
    assert torch.equal(key_first, fold_key(a, value_first, [PairScale()], state)[name])
    rows = [*a.query.heads, *a.key.heads, *a.value.heads]
    changed = (old != key_first).any(1).nonzero()[:, 0].tolist()
    assert changed == [r for i, j in rows for r in range(i, j)]


def test_keys_that_cannot_be_folded_are_refused(checkpoint):
    spec = open_model(checkpoint("llama"))
    a = spec.attention[0]
    weights, states = _key_weights(spec, a), [_states(2, 0)]
    with pytest.raises(UnsupportedModel, match="does not commute with RoPE"):
        fold_key(a, weights, [PerHead()], states)
    with pytest.raises(UnsupportedModel, match="normed"):
        fold_key(replace(a, key_norm=True), weights, [PairScale()], states)
