"""What every codec promises."""

import pytest
import torch

from kvpack.core.roles import Codec, GridCodec
from kvpack.core.types import Payload
from tests.contracts.discovery import fitted, parts, random, specs, through_safetensors

CODECS = parts("codecs")
GRID_CODECS = [p for p in CODECS if isinstance(p.values[0], GridCodec)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def plane(codec: Codec, blocks: int = 3, channels: int = 40, seed: int = 0) -> torch.Tensor:
    tokens = blocks * max(codec.token_block, 4)
    return random(2, 3, tokens, channels, seed=seed)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [8, 40, 64])
def test_spec_is_the_payload(codec: Codec, dtype: torch.dtype, channels: int) -> None:
    for x in (plane(codec, channels=channels), plane(codec, channels=channels)[0, 0]):
        payload = codec.encode(x.to(dtype), fitted(codec, x))
        expected = codec.spec(tuple(x.shape), str(dtype).removeprefix("torch."))
        assert specs(payload.tensors) == expected
        assert payload.shape == tuple(x.shape)
        assert payload.nbytes == sum(s.nbytes for s in expected.values())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_restores_shape_and_dtype(codec: Codec, dtype: torch.dtype) -> None:
    x = plane(codec).to(dtype)
    state = fitted(codec, x)
    y = codec.decode(codec.encode(x, state), state, dtype)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    similarity = torch.cosine_similarity(x.float().flatten(), y.float().flatten(), 0)
    assert similarity > 0.7, "the approximation resembles its original"


@pytest.mark.parametrize("codec", [p for p in CODECS if not p.values[0].segment])
def test_appending_equals_encoding_together(codec: Codec) -> None:
    x = plane(codec, blocks=6)
    step = x.shape[2] // 6
    state = fitted(codec, x)
    whole = codec.encode(x, state)
    pieces = [codec.encode(part, state) for part in x.split([step, 3 * step, 2 * step], 2)]
    joined = {n: torch.cat([p.tensors[n] for p in pieces], -2) for n in whole.tensors}
    for name, tensor in whole.tensors.items():
        assert torch.equal(joined[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    decoded = codec.decode(Payload(joined, whole.shape), state, torch.float32)
    assert torch.equal(decoded, codec.decode(whole, state, torch.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_invalid_tokens_do_not_shape_statistics(codec: Codec) -> None:
    x = plane(codec)
    valid = torch.ones(2, x.shape[2], dtype=torch.bool)
    valid[0, :5] = False
    valid[1, -1] = False
    mask = valid[:, None, :, None]
    results, state = [], fitted(codec, x)
    for factor in (1.0, 100.0, torch.nan):
        payload = codec.encode(torch.where(mask, x, x * factor), state, valid)
        results.append(codec.decode(payload, state, torch.float32).masked_fill(~mask, 0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_without_valid_tokens_is_finite(codec: Codec) -> None:
    x = plane(codec, blocks=1)
    state = fitted(codec, x)
    payload = codec.encode(x, state, torch.zeros(2, x.shape[2], dtype=torch.bool))
    assert codec.decode(payload, state, torch.float32).isfinite().all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("number", [0.0, 1e-8, -1e-8, 1e-30, 3e4, 1e6, -1e6, 1e30])
def test_extreme_numbers_decode_to_finite_ones(codec: Codec, number: float) -> None:
    x = plane(codec, blocks=1)
    state = fitted(codec, x)
    x[0] = number
    x[1] *= number
    assert codec.decode(codec.encode(x, state), state, torch.float32).isfinite().all()


@pytest.mark.parametrize("codec", CODECS)
def test_payload_survives_safetensors(codec: Codec) -> None:
    x = plane(codec)
    state = fitted(codec, x)
    payload = codec.encode(x, state)
    loaded = Payload(through_safetensors(payload.tensors), payload.shape)
    same = (codec.decode(p, state, torch.float32) for p in (loaded, payload))
    assert torch.equal(*same)


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_leaves_its_input_alone(codec: Codec) -> None:
    x = plane(codec)
    before, state = x.clone(), fitted(codec, x)
    codec.decode(codec.encode(x, state), state, torch.float32)
    assert torch.equal(x, before)


@pytest.mark.parametrize("codec", CODECS)
def test_state_is_the_announced_one(codec: Codec) -> None:
    x = plane(codec)
    assert specs(fitted(codec, x)) == codec.state_spec(tuple(x.shape))


@pytest.mark.parametrize("codec", GRID_CODECS)
def test_encode_is_snap_on_the_grid(codec: GridCodec) -> None:
    x = plane(codec)
    grid = codec.grid(x)
    codes = codec.snap(x, grid)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    payload = codec.encode(x, {})
    for name, tensor in codec.assemble(codes, grid).tensors.items():
        assert torch.equal(tensor.view(torch.uint8), payload.tensors[name].view(torch.uint8)), name
    assert torch.equal(codec.value(codes, grid), codec.decode(payload, {}, torch.float32))


@pytest.mark.parametrize("codec", GRID_CODECS)
def test_values_on_the_grid_keep_their_codes(codec: GridCodec) -> None:
    x = plane(codec)
    grid = codec.grid(x)
    codes = codec.snap(x, grid)
    assert torch.equal(codec.snap(codec.value(codes, grid), grid), codes)


@pytest.mark.parametrize("codec", GRID_CODECS)
@pytest.mark.parametrize("channels", [8, 72])
def test_groups_can_be_fitted_one_by_one(codec: GridCodec, channels: int) -> None:
    weight = plane(codec, channels=channels)[0, 0]
    size = codec.group_size(channels)
    whole = codec.grid(weight)
    each = [codec.grid(part) for part in weight.split(size, 1)]
    for name, tensor in whole.items():
        joined = torch.cat([g[name] for g in each], -1)
        assert torch.equal(joined.view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    first = {name: tensor[..., :1] for name, tensor in whole.items()}
    assert torch.equal(codec.snap(weight[:, :1], first), codec.snap(weight, whole)[:, :1])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "channels"), [(32, 80), (96, 360)])
def test_products_are_those_of_a_linear_layer(codec: Codec, rows: int, channels: int) -> None:
    weight = random(rows, channels)
    state = fitted(codec, weight)
    payload = codec.encode(weight, state)
    dense = codec.decode(payload, state, torch.float32).double()
    for count in (1, 3, 8):
        x, weights = random(count, channels, seed=1), random(count, rows, seed=2)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
            for found, expected in (
                (codec.scores(x.to(dtype), payload, state), x.to(dtype).double() @ dense.mT),
                (codec.mix(weights.to(dtype), payload, state), weights.to(dtype).double() @ dense),
            ):
                assert (found.dtype, found.shape) == (torch.float32, expected.shape)
                assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_decode_the_bits_of_the_reference(
    codec: Codec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = plane(codec, channels=80)
    state = fitted(codec, x)
    payload = codec.encode(x, state)
    found = codec.decode(payload, state, dtype)
    monkeypatch.setenv("KVPACK_KERNELS", "reference")
    assert torch.equal(found, codec.decode(payload, state, dtype))
