"""The append-only store: what was written stays, under cropping, dropping and reordering."""

import pytest
import torch

from kvpack.core.types import TensorSpec
from kvpack.runtime.store import BlockStore

BLOCK = 4
CPU = torch.device("cpu")


class Model:
    """A store beside a plain list of the live tokens' numbers."""

    def __init__(self, batch: int = 1, dtype: str = "uint8") -> None:
        specs = {
            "codes": TensorSpec((batch, 2, BLOCK, 3), dtype),
            "scale": TensorSpec((batch, 2, 1, 5), "float16"),
        }
        self.store = BlockStore(specs, BLOCK, CPU)
        self.live: list[int] = []
        self.next = 0
        self.batch = batch

    def append(self, blocks: int) -> None:
        tokens = torch.arange(self.next, self.next + blocks * BLOCK)
        codes = tokens.reshape(1, 1, -1, 1).expand(self.batch, 2, -1, 3)
        scale = tokens[::BLOCK].reshape(1, 1, -1, 1).expand(self.batch, 2, -1, 5)
        self.store.append({"codes": codes, "scale": scale}, blocks * BLOCK)
        self.live += tokens.tolist()
        self.next += blocks * BLOCK

    def crop(self, tokens: int) -> None:
        self.store.crop(tokens)
        self.live = self.live[: len(self.live) - tokens]

    def drop(self, tokens: int) -> None:
        self.store.drop(tokens)
        self.live = self.live[tokens:]

    def check(self, skip: int = 0, most: int = 1000) -> None:
        assert self.store.tokens == len(self.live)
        found: list[int] = []
        for piece in self.store.pieces(skip, most):
            codes = piece.tensors["codes"][0, 0, :, 0]
            assert len(codes) == piece.tokens
            blocks = piece.tensors["scale"][0, 1, :, 4].repeat_interleave(BLOCK)
            assert (codes.float() // BLOCK * BLOCK).tolist() == blocks.tolist()
            found += codes[piece.start : piece.stop].int().tolist()
        assert found == self.live[skip:]


def test_random_operations_against_a_list() -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(20):
        model = Model()
        while model.next < 200:
            model.append(pick(1, 5))
            if pick(0, 3) == 0:
                model.crop(pick(0, min(14, len(model.live)) + 1))
            if pick(0, 4) == 0:
                model.drop(pick(0, len(model.live) // 2 + 1))
            model.check(skip=pick(0, len(model.live) + 1), most=pick(1, 40))
        assert model.store.encoded_tokens == model.next


def test_a_cropped_block_leaves_a_hole_and_frees_whole_blocks() -> None:
    model = Model()
    model.append(4)
    per_block = model.store.nbytes // 4
    model.crop(6)
    assert model.store.nbytes == 3 * per_block
    model.append(1)
    assert model.store.runs == [(0, 10), (12, 16)]
    model.check()


def test_dropped_blocks_give_their_memory_back() -> None:
    model = Model()
    model.append(20)
    before = model.store.allocated_nbytes
    model.drop(18 * BLOCK + 1)
    assert model.store.allocated_nbytes == before // 10
    assert model.store.nbytes == before // 10
    model.check()
    model.drop(len(model.live))
    assert model.store.nbytes == model.store.allocated_nbytes == 0


def test_a_long_window_takes_bounded_memory() -> None:
    model = Model()
    model.append(10)
    peak = 0
    for _ in range(40):
        model.append(1)
        model.drop(BLOCK)
        peak = max(peak, model.store.allocated_nbytes * 10 // model.store.nbytes)
        model.check()
    assert peak < 10 * 6


def test_buffers_grow_modestly() -> None:
    model = Model()
    model.append(1)
    assert model.store.allocated_nbytes == model.store.nbytes
    moved = set()
    for _ in range(1000):
        if model.next > 200:
            model.next = 0
        model.append(1)
        moved.add(model.store.allocated_nbytes)
    assert model.store.allocated_nbytes < 1.2 * model.store.nbytes
    assert len(moved) < 40


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn", "bfloat16", "int8"])
def test_select_reorders_and_repeats_rows(dtype: str) -> None:
    model = Model(batch=3, dtype=dtype)
    codes = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, BLOCK, 3)
    model.store.append({"codes": codes, "scale": torch.zeros(3, 2, 1, 5)}, BLOCK)
    model.store.select(torch.tensor([2, 0, 0, 1]))
    (piece,) = model.store.pieces(0, 100)
    assert piece.tensors["codes"].dtype == getattr(torch, dtype)
    assert piece.tensors["codes"][:, 0, 0, 0].float().tolist() == [2, 0, 0, 1]


def test_a_store_filled_in_inference_mode_can_be_continued_outside() -> None:
    model = Model()
    with torch.inference_mode():
        model.append(30)
    model.append(1)
    model.append(20)
    model.check()
