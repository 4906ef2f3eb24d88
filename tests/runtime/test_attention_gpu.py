"""Attention of a decode step through the GPU's kernel, interpreted on the CPU where there is no GPU."""

import pytest
import torch

from kvpack.core.types import Group
from kvpack.kernels import choice, triton
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime.attention import Call
from kvpack.runtime.cache import KVPackCache, make_scheme
from tests.runtime.schemes import Scheme, tiny

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.interpreting(), reason="Triton's interpreter is not on")


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_one_kernel_gives_what_the_portable_path_gives(
    sinks: int, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(head_dim=16, hidden_size=64)
    scheme = Scheme(
        key=Affine(bits=4, group=Group("token", 8)),
        value=Affine(bits=4, group=Group("channel", 16)),
        policy=SinkRecent(sink_tokens=sinks, recent_tokens=8),
    )
    cache = KVPackCache(make_scheme(scheme.plans(model), {}))
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, 2, 2, 41, 16), generator=generator)
    query = torch.randn((2, 4, 1, 16), generator=generator)
    mask = torch.ones((2, 41), dtype=torch.long)
    mask[0, : 5 * padding] = 0
    visible = mask.bool()[:, None, None] if padding else None
    cache.begin(2, 40, mask[:, :40])
    cache.update(keys[:, :, :40], values[:, :, :40], 0)
    cache.begin(2, 1, mask)
    layer = cache.layers[0]
    layer.routed, layer.record_past = True, True  # nothing is encoded after the step, so it can be repeated
    cache.update(keys[:, :, 40:], values[:, :, 40:], 0)
    unread = layer._unread
    expected = layer.attention(Call(query, visible, 0.25))
    layer._unread = unread
    monkeypatch.setenv(choice.VARIABLE, "triton")
    assert choice.on_gpu(query)
    used = []
    attend = Affine.attend
    monkeypatch.setattr(Affine, "attend", lambda *a: used.append(attend(*a)) or used[-1])
    found = layer.attention(Call(query, visible, 0.25))
    assert used
    assert used[0] is not None
    assert expected is not None
    assert found is not None
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
