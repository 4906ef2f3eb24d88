from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kvpack.core.errors import UnsupportedModel
from kvpack.core.roles import Transform
from kvpack.core.types import Site, State
from kvpack.models import open_model
from kvpack.models.fold import fold_value
from kvpack.models.weights import SourceReader


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
