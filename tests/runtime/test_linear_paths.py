"""Packed linear layers take the way that was faster on this machine, and both ways agree."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kvpack.core.types import Group
from kvpack.kernels import choice
from kvpack.parts.codecs.affine import Affine
from kvpack.runtime import linear_paths
from kvpack.runtime.linear import PackedLinear, PackedWeight

SHAPE = (96, 256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPACK_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_paths, "_FOUND", {})
    return tmp_path / linear_paths.FILE


def packed(bits: int = 4) -> PackedLinear:
    codec = Affine(bits=bits, group=Group("channel", 64))
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits))
    layer = PackedLinear(PackedWeight(codec, SHAPE, codec.spec(SHAPE)))
    layer.load_state_dict(codec.encode(weight, {}).tensors)
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_both_ways_give_the_same_products(bits: int, dtype: torch.dtype, tolerance: float, rows: int) -> None:
    layer = packed(bits)
    x = torch.randn((rows, SHAPE[1]), generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ layer.dense(torch.float32).double().T
    # Codes are multiplied to within 2^-16; what is left is the rounding of the result to the dtype.
    for found in (layer.products_of_codes(x), layer.products_of_decoded(x)):
        assert found.dtype == dtype
        assert float((found.double() - exact).abs().max() / exact.abs().max()) < tolerance


def test_a_weight_is_decoded_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed()
    x = torch.randn((70, SHAPE[1]), generator=torch.Generator().manual_seed(2))
    whole = layer.products_of_decoded(x)
    monkeypatch.setattr("kvpack.runtime.linear.PIECE_NUMBERS", 7 * SHAPE[1])
    torch.testing.assert_close(layer.products_of_decoded(x), whole, rtol=1e-5, atol=1e-4)


def test_one_row_needs_no_measurement_and_many_rows_are_decoded(own_cache: Path) -> None:
    layer = packed()
    assert linear_paths.on_codes(layer, torch.randn(1, SHAPE[1])) == choice.found("cpu").used
    assert not linear_paths.on_codes(layer, torch.randn(linear_paths.MOST_ROWS + 1, SHAPE[1]))
    assert not linear_paths.on_codes(layer, torch.randn(1, SHAPE[1]).double())
    assert not own_cache.exists()


@pytest.mark.skipif(not choice.found("cpu").used, reason="there are no kernels to choose")
def test_the_switch_is_measured_once_and_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = packed(), torch.randn(8, SHAPE[1])
    monkeypatch.setattr(
        linear_paths, "_seconds", lambda way, rows: float(len(rows)) if "codes" in repr(way) else 5.0
    )
    assert linear_paths._most_rows(layer, x) == 5
    monkeypatch.setattr(linear_paths, "_crossing", lambda *_: pytest.fail("measured again"))
    assert linear_paths._most_rows(layer, x) == 5
    monkeypatch.setattr(linear_paths, "_FOUND", {})
    assert linear_paths._most_rows(layer, x) == 5, "not read from the file"
    (entries,) = json.loads(own_cache.read_text(encoding="utf8")).values()
    assert list(entries.values()) == [5]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_file_is_measured_anew(own_cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.write_text(text, encoding="utf8")
    monkeypatch.setattr(linear_paths, "_crossing", lambda *_: 7)
    assert linear_paths._most_rows(packed(), torch.randn(8, SHAPE[1])) == 7


def test_gradients_pass_through(own_cache: Path) -> None:
    layer = packed()
    x = torch.randn(2, SHAPE[1], requires_grad=True)
    layer(x).sum().backward()
    dense = nn.functional.linear(torch.ones(2, SHAPE[0]), layer.dense(torch.float32).T)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense, rtol=1e-4, atol=1e-4)
