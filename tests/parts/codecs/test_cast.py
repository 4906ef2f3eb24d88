import pytest
import torch

from kvpack.parts.codecs.cast import Cast


@pytest.mark.parametrize(
    ("dtype", "significant", "limit"), [("float8_e4m3fn", 4, 448), ("float8_e5m2", 3, 57344)]
)
def test_error_is_half_a_unit_in_the_last_place(dtype: str, significant: int, limit: float) -> None:
    codec = Cast(dtype=dtype)  # type: ignore[arg-type]  # parametrised over the literals
    x = torch.exp(torch.empty(2, 3, 5, 16).uniform_(-3, 5, generator=torch.Generator().manual_seed(0)))
    decoded = codec.decode(codec.encode(x, {}), {}, torch.float32)
    assert ((decoded - x).abs() <= x * 2.0**-significant).all()
    assert (decoded != x).any()
    beyond = torch.full((1, 1, 1, 8), 1e9)
    assert (codec.decode(codec.encode(-beyond, {}), {}, torch.float32) == -limit).all()


def test_every_representable_number_survives() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()].reshape(1, 1, 1, -1)
    codec = Cast()
    payload = codec.encode(finite, {})
    assert torch.equal(codec.decode(payload, {}, torch.float32), finite)
    assert payload.bits_per_element == 8.0
