"""Packed linear layers compute with the decoded weight and never lose their codes."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kvpack.core.errors import UsageError
from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.runtime.linear import PackedLinear, PackedWeight, replace_linears
from tests.runtime.schemes import text, tiny

CODEC = Affine(bits=4, group=Group("channel", 16))
SHAPE = (24, 48)


def packed(codec: Affine = CODEC, *, bias: bool = True) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer and the dense one with the weight it decodes to."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(SHAPE[1], SHAPE[0], bias=bias)
    payload = codec.encode(torch.randn(SHAPE, generator=generator), {})
    layer = PackedLinear(PackedWeight(codec, SHAPE, codec.spec(SHAPE)), dense.bias)
    layer.load_state_dict({**payload.tensors, **({"bias": dense.bias.detach()} if bias else {})})
    with torch.no_grad():
        dense.weight.copy_(codec.decode(payload, {}, torch.float32))
    return layer, dense


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_dense_layer_with_the_decoded_weight(bias: bool) -> None:
    layer, dense = packed(bias=bias)
    x = torch.randn(3, 5, 48)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"codes", "scale", "zero"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16).to("cpu"),
        lambda m: m.to(device="cpu", dtype=torch.bfloat16),
    ],
)
def test_casting_the_model_leaves_codes_and_scales_alone(
    scale_dtype: str, cast: Callable[[nn.Module], nn.Module]
) -> None:
    layer, _ = packed(Affine(bits=3, group=Group("channel", 16), scale_dtype=scale_dtype))  # type: ignore[arg-type]
    before = {name: t.clone() for name, t in layer.stored.items()}
    moved = cast(nn.Sequential(layer))[0]
    assert isinstance(moved, PackedLinear)
    for name, tensor in moved.stored.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    assert moved.bias is not None
    assert moved.bias.dtype != torch.float32
    assert torch.isfinite(moved(torch.randn(2, 48).to(moved.bias.dtype))).all()


def test_it_is_made_on_the_meta_device_and_materialised() -> None:
    source, dense = packed()
    model = nn.Sequential(nn.Linear(48, 24, device="meta"), nn.ReLU())
    replace_linears(model, {"0": PackedWeight(CODEC, SHAPE, CODEC.spec(SHAPE))})
    assert all(t.is_meta for t in model.state_dict().values())
    model.half()
    model.to_empty(device="cpu")
    assert model[0].scale.dtype == torch.float16
    model.float().load_state_dict({f"0.{n}": t for n, t in source.state_dict().items()})
    x = torch.randn(2, 48)
    torch.testing.assert_close(model(x), torch.relu(dense(x)), rtol=1e-5, atol=1e-5)


def test_every_linear_of_a_model_can_be_replaced() -> None:
    model, twin = tiny(), tiny()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    replace_linears(
        model,
        {
            n: PackedWeight(CODEC, s, CODEC.spec(s))
            for n in names
            for s in [tuple(model.get_submodule(n).weight.shape)]
        },
    )
    for name in names:
        weight = twin.get_submodule(name).weight
        payload = CODEC.encode(weight.detach(), {})
        for part, tensor in payload.tensors.items():
            setattr(model.get_submodule(name), part, tensor)
        weight.data = CODEC.decode(payload, {}, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(text(9)).logits, twin(text(9)).logits, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in twin.parameters())


def test_it_says_what_it_is() -> None:
    layer, _ = packed(bias=False)
    assert repr(layer) == "PackedLinear(48, 24, bias=False, bits=6.00)"


@pytest.mark.parametrize(("name", "shape"), [("0", (24, 47)), ("1", SHAPE)])
def test_a_mismatch_is_refused(name: str, shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(48, 24), nn.ReLU())
    with pytest.raises(UsageError, match=f"{name} is"):
        replace_linears(model, {name: PackedWeight(CODEC, shape, CODEC.spec(shape))})


def test_a_copy_multiplies_with_its_own_codes_and_replaced_codes_are_seen() -> None:
    wide = Affine(bits=4, group=Group("channel", 128))
    generator = torch.Generator().manual_seed(1)
    shape = (128, 256)
    layer = PackedLinear(PackedWeight(wide, shape, wide.spec(shape)), None)
    layer.load_state_dict(dict(wide.encode(torch.randn(shape, generator=generator), {}).tensors))
    x = torch.randn(1, 256, generator=generator)
    before = layer(x)
    other = wide.encode(torch.randn(shape, generator=generator), {})
    expected = x @ wide.decode(other, {}, torch.float32).T
    saved = pickle.loads(pickle.dumps(layer))  # noqa: S301 - what was saved a moment ago
    for twin in (copy.deepcopy(layer), saved):
        torch.testing.assert_close(twin(x), before)
        twin.load_state_dict(dict(other.tensors))
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), before)
    layer.load_state_dict(dict(other.tensors), assign=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
