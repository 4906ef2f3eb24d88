"""What a harness for compressed caches must fulfil before its numbers mean anything."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvpack
from kvpack.core.data_files import data_dir
from kvpack.core.errors import UsageError
from kvpack.evaluate.artifact import EvaluationSettings, evaluate
from kvpack.evaluate.protocols import PROTOCOLS, Measured, longest_step, measure
from kvpack.evaluate.scores import Evaluation
from kvpack.pipeline import make_plan
from kvpack.runtime.install import new_cache
from tests.evaluate.conftest import IDENTITY, Packed, affine, kv_recipe
from tests.tiny_models import VOCAB, make_model


def scores(path: Path, source: Path | None, text: str, **settings: object) -> Evaluation:
    options = {"context_tokens": 96, "max_tokens": 384, "step_tokens": 16, **settings}
    return evaluate(path, source, EvaluationSettings(data=text, **options))


def blocks(bits: int) -> str:
    """Both planes in blocks of eight tokens, a window of sixteen."""
    codec = affine(bits, "token")
    return kv_recipe(codec, codec, 16)


def kivi(bits: int) -> str:
    return kv_recipe(affine(bits, "token"), affine(bits, "channel"), 32)


def plain_perplexity(source: Path, pieces: list[torch.Tensor]) -> float:
    """Perplexity by transformers' own loss, no code of the harness involved."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.inference_mode():
        losses = [model(p[None], labels=p[None], use_cache=False).loss.item() * (len(p) - 1) for p in pieces]
    return math.exp(sum(losses) / sum(len(p) - 1 for p in pieces))


def random_pieces(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def measured(path: Path, source: Path | None, pieces: list[torch.Tensor], **options: object) -> Measured:
    model = kvpack.load(path)
    reference = None if source is None else AutoModelForCausalLM.from_pretrained(source)
    cache = lambda exact: new_cache(model, exact_prefill=exact)  # noqa: E731
    return measure(model, reference, pieces, new_cache=cache, **options)


def test_without_compression_every_protocol_is_a_plain_forward(packed: Packed, source: Path) -> None:
    pieces = random_pieces([70, 70, 70, 33, 90])
    found = measured(packed(kv_recipe(IDENTITY, IDENTITY, 8)), source, pieces, step_tokens=7)
    expected = plain_perplexity(source, pieces)
    assert found.source is not None
    assert found.source.perplexity == pytest.approx(expected, abs=1e-3)
    assert found.packed.keys() == set(PROTOCOLS)
    for result in found.packed.values():
        assert result.perplexity == pytest.approx(expected, abs=1e-3)
        assert abs(result.kl) < 1e-6
        assert result.top1 == 1


def test_weights_alone_are_one_plain_forward(packed: Packed, source: Path, text_file: str) -> None:
    found = scores(packed("w8"), source, text_file)
    assert found.packed.keys() == {"weights"}
    assert 0 < found.packed["weights"].kl < 0.01
    assert found.kv_bits_per_element is None
    assert found.kv_bytes_per_token is None


def test_more_bits_are_closer(packed: Packed, source: Path, text_file: str) -> None:
    by_bits = {bits: scores(packed(kivi(bits)), source, text_file) for bits in (2, 4, 8)}
    for protocol in PROTOCOLS:
        kl = {bits: found.packed[protocol].kl for bits, found in by_bits.items()}
        assert kl[8] < 1e-3
        assert kl[8] < kl[4] / 10
        assert kl[4] < kl[2] / 4
        assert kl[2] > 0.01
        assert by_bits[8].metrics(protocol)["ppl_ratio"] == pytest.approx(1, abs=0.005)
    bits = [found.kv_bits_per_element for found in by_bits.values()]
    assert bits == sorted(bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_an_exact_window_never_hurts(packed: Packed, source: Path, text_file: str, bits: int) -> None:
    found = scores(packed(kivi(bits)), source, text_file)
    assert 0 < found.packed["decode"].kl < found.packed["prefill"].kl


@pytest.mark.parametrize("step", [16, 8, 4])
def test_steps_do_not_matter_where_blocks_end_together(
    packed: Packed, source: Path, text_file: str, step: int
) -> None:
    one = scores(packed(blocks(2)), source, text_file, step_tokens=1, protocols=("decode",))
    many = scores(packed(blocks(2)), source, text_file, step_tokens=step, protocols=("decode",))
    assert many.packed["decode"].perplexity == pytest.approx(one.packed["decode"].perplexity, abs=1e-3)
    assert many.packed["decode"].kl == pytest.approx(one.packed["decode"].kl, abs=1e-5)
    assert one.packed["decode"].kl > 0.01, "the cache takes part"


def test_a_step_past_the_window_flatters(packed: Packed, source: Path, text_file: str) -> None:
    """Why the step is reported: one forward of everything through a real cache measures nothing."""
    steps = {
        step: scores(packed(blocks(2)), source, text_file, step_tokens=step, protocols=("decode",))
        for step in (16, 48, 96)
    }
    kl = {step: found.packed["decode"].kl for step, found in steps.items()}
    assert kl[16] > kl[48] > kl[96]
    assert abs(kl[96]) < 1e-6
    assert steps[96].step_tokens == 96


def test_a_model_beside_itself_agrees(packed: Packed, source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    found = measure(model, model, random_pieces([40, 40]), new_cache=None)
    assert found.packed["weights"].kl == 0
    assert found.packed["weights"].top1 == 1
    assert found.packed["weights"].perplexity == found.source.perplexity


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = measure(model, None, random_pieces([64, 31]), new_cache=None)
    assert found.packed["weights"].perplexity == pytest.approx(VOCAB, rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batching_does_not_show(packed: Packed, source: Path, text_file: str, protocol: str) -> None:
    results = [
        scores(packed(kivi(2)), source, text_file, batch=batch, protocols=(protocol,)) for batch in (1, 4)
    ]
    alone, together = (found.packed[protocol] for found in results)
    assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-4)
    assert together.kl == pytest.approx(alone.kl, rel=1e-3)
    shared = results[0].kv_bytes_per_token - results[1].kv_bytes_per_token
    assert 0 <= shared <= 4, "rows share the list of positions and nothing else"


def test_cache_size_is_that_of_the_stored_tensors(packed: Packed, source: Path) -> None:
    """64 tokens are eight blocks of codes and nothing exact; layers 2, heads 2, channels 16."""
    codec = affine(4, "token")
    found = measured(packed(kv_recipe(codec, codec, 8)), None, random_pieces([64, 64]), batch=2)
    numbers = 2 * 2 * 2 * 16 * 64
    codes, scales = numbers // 2, numbers // 8 * (2 + 2)
    assert found.kv_tokens == 128
    assert found.kv_elements == 2 * numbers
    assert codes + scales <= found.kv_bytes / 2 < codes + scales + 64 * 8 * 4


def test_chunks_never_exceed_what_the_model_was_made_for(packed: Packed, text_file: str) -> None:
    found = scores(packed(blocks(2)), None, text_file, context_tokens=100_000, protocols=("decode",))
    assert found.context_tokens == 512
    assert found.tokens == 511
    assert found.source is None
    assert found.packed["decode"].kl is None


def test_a_source_with_another_vocabulary_is_refused(packed: Packed, text_file: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", layers=1, vocab_size=300)
    with pytest.raises(UsageError, match="knows 300 tokens, the artifact 256"):
        scores(packed(blocks(2)), other, text_file)


@pytest.mark.parametrize(
    ("recipe", "step"), [("kivi", 32), ("kivi@2bit-per-token", 32), ("rotatekv", 1), ("fp8", 1)]
)
def test_steps_are_as_long_as_the_scheme_allows(recipe: str, step: int) -> None:
    plan = make_plan(data_dir("calibration") / "demo_model", recipe)
    assert longest_step(plan.kv) == step


@pytest.mark.parametrize(("window", "step"), [(0, 16), (24, 32), (32, 32), (48, 16)])
def test_the_step_divides_windows_of_whole_blocks(window: int, step: int) -> None:
    """Blocks of 16 tokens on both sides; a window is rounded up to whole blocks, at least one."""
    codec = "{kind: affine, group: {axis: token, size: 16}}"
    sides = [f"kv_cache.tiers.old.{side}={codec}" for side in ("key", "value")]
    settings = [*sides, f"kv_cache.policy.recent_tokens={window}"]
    plan = make_plan(data_dir("calibration") / "demo_model", "kivi", settings)
    assert longest_step(plan.kv) == step
