"""Layers that stay losslessly coded in memory: equal logits, bounded memory, errors that surface."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvpack
from kvpack import pipeline
from kvpack.core.errors import ArtifactError, UsageError
from kvpack.loading.residency import Residency, Wanted
from kvpack.models.skeleton import decoder_blocks
from kvpack.runtime.linear import PackedTensors
from kvpack.runtime.unpacking import packed_modules
from tests.tiny_models import make_model

TOKENS = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(0))
LAYERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("residency") / "source", "llama", dtype="bfloat16", layers=LAYERS
    )


@pytest.fixture(scope="module")
def coded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("residency") / "coded"
    pipeline.export(pipeline.make_plan(source, "lossless"), out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def unpacked_layers(model: Any) -> list[int]:
    """Layers that hold their tensors unpacked now, though they may be packed."""
    layers = decoder_blocks(model)[1]
    return [i for i, layer in enumerate(layers) if any(m.lent is not None for m in packed_modules(layer))]


CHOICES: list[dict[str, Any]] = [
    {},
    {"resident": "compressed"},
    {"resident": 3},
    {"resident": [0, 2, 3, 5]},
    {"resident": [4]},
    {"max_slowdown": 1000.0},
    {"max_slowdown": 0.0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_logits_are_the_source_s_bit_for_bit_wherever_weights_are(
    source: Path, coded: Path, choice: dict[str, Any]
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    model = kvpack.load(coded, **choice)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    made = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False), made)


def test_transformers_alone_unpacks_at_loading(source: Path, coded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(coded)
    assert not any(m.blobs for m in model.modules() if isinstance(m, PackedTensors))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto")))


def held(model: Any) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("resident", "packed"), [("compressed", range(6)), (3, (1, 3, 5)), ((2, 0), (0, 2))])
def test_memory_saved_is_the_sum_over_the_layers_less_two_unpacked(
    coded: Path, resident: Any, packed: Any
) -> None:
    raw = kvpack.load(coded)
    model = kvpack.load(coded, resident=resident)
    found: Residency = model.kvpack_residency
    assert found.packed == tuple(packed)
    assert found.raw_bytes == held(raw)
    unpacked = [
        sum(s.nbytes for m in packed_modules(x) for s in m.blobs.values()) for x in decoder_blocks(model)[1]
    ]
    two = sum(sorted((unpacked[i] for i in packed), reverse=True)[:2])
    assert found.saved_bytes == held(raw) - held(model) - two
    seen = []
    for layer in decoder_blocks(model)[1]:
        layer.register_forward_hook(lambda *_: seen.append(len(unpacked_layers(model))))
    logits(model)
    assert max(seen) == (1 if len(found.packed) > 2 else 2)  # the other slot is being filled


def test_a_choice_that_was_measured_says_what_it_predicted(coded: Path) -> None:
    found: Residency = kvpack.load(coded, max_slowdown=1000.0).kvpack_residency
    assert found.base_seconds is not None
    assert found.predicted_seconds is not None
    assert found.measured_seconds is not None
    assert min(found.base_seconds, found.predicted_seconds, found.measured_seconds) > 0
    assert found.layers == LAYERS


def test_limits_that_cannot_be_kept_and_contradictions_are_refused(
    source: Path, coded: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="bytes at least"):
        kvpack.load(coded, max_weight_bytes=1000)
    with pytest.raises(UsageError, match="layer 9 is not there"):
        kvpack.load(coded, resident=[0, 9])
    pipeline.export(pipeline.make_plan(source, "w4@rtn"), tmp_path / "plain")
    with pytest.raises(UsageError, match="no decoder layer of this artifact"):
        kvpack.load(tmp_path / "plain", resident="compressed")
    with pytest.raises(UsageError, match="in different ways"):
        Wanted("compressed", max_slowdown=0.1)
    with pytest.raises(UsageError, match="cannot be 'half'"):
        Wanted("half")


def damage(model: Any, layer: int) -> PackedTensors:
    module = packed_modules(decoder_blocks(model)[1][layer])[0]
    name, spec = next(iter(module.blobs.items()))
    module.get_buffer(name)[sum(spec.sizes) - 1] ^= 1
    return module


def test_errors_of_the_worker_surface_and_can_be_recovered_from(coded: Path) -> None:
    model = kvpack.load(coded, resident="compressed")
    expected = logits(model)
    module = damage(model, 3)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"layers\.3\..*values, block 0 of 1"):
            logits(model)
    name, spec = next(iter(module.blobs.items()))
    module.get_buffer(name)[sum(spec.sizes) - 1] ^= 1
    assert torch.equal(logits(model), expected)


def test_two_threads_and_a_copy_compute_the_same(coded: Path) -> None:
    model = kvpack.load(coded, resident="compressed")
    expected, found = logits(model), []
    threads = [
        threading.Thread(target=lambda: found.extend(logits(model) for _ in range(4))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(x, expected) for x in found)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_a_layer_called_on_its_own_unpacks_on_the_spot(coded: Path) -> None:
    model = kvpack.load(coded, resident="compressed")
    module = packed_modules(decoder_blocks(model)[1][2])[0]
    x = torch.randn(2, module.packed.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(module(x), torch.nn.functional.linear(x, module.dense(torch.bfloat16)))
    assert "bits=" in repr(module)
    before = module.get_buffer("values").clone()
    assert torch.equal(module.half().get_buffer("values"), before)
