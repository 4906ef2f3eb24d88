"""Observed attention computes what it did, and observers see everything it is given."""

import pytest
import torch
from torch import Tensor

from kvpack.core.errors import UnsupportedModel
from kvpack.models.attention_interface import observe, set_observer, visible, watch
from tests.runtime.schemes import attention_of, text, tiny
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_results_are_the_same_and_queries_are_seen(family: str, padded: bool) -> None:
    model = tiny(family)
    ids = text(24, batch=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    before = model(ids, attention_mask=mask, use_cache=False).logits
    observe(model)
    observe(model)  # a second time changes nothing
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, before)
    spec = attention_of(model)[0]
    seen: list[tuple[Tensor, ...]] = []
    with watch(model.get_submodule(spec.module), lambda *given: seen.append(given)):
        after = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(after, before)
    query, key, value, given, scaling = seen[0]
    assert query.shape == (2, spec.heads, 24, spec.head_dim)
    assert key.shape == value.shape == (2, spec.kv_heads, 24, spec.head_dim)
    allowed = visible(given, query, key).expand(2, -1, -1, -1)[:, 0]
    window = spec.window or 24
    rows, columns = torch.arange(24)[:, None], torch.arange(24)
    expected = (columns <= rows) & (columns > rows - window) & mask.bool()[:, None, :]
    real = mask.bool()
    assert torch.equal(allowed[real], expected[real])
    assert scaling > 0
    model(ids, attention_mask=mask, use_cache=False)
    assert len(seen) == 1, "the watch is over"


def test_an_observer_can_replace_what_attention_reads() -> None:
    model = tiny()
    observe(model)
    ids = text(9)
    attention = model.get_submodule(attention_of(model)[0].module)
    plain = model(ids, use_cache=False).logits
    set_observer(attention, lambda q, k, v, mask, scaling: (k, torch.zeros_like(v), mask))
    changed = model(ids, use_cache=False).logits
    set_observer(attention, None)
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_an_implementation_without_general_masks_is_refused() -> None:
    model = tiny()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModel, match="flex_attention"):
        observe(model)
