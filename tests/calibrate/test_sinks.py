"""Attention sinks: the metric on hand-made matrices, in a whole model, and what protection is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvpack
from kvpack import pipeline
from kvpack.calibrate.sinks import LayerSinks, SinkSettings, measure_sinks, sink_report
from kvpack.calibrate.store import Calibration
from kvpack.core.errors import ArtifactError
from kvpack.evaluate.protocols import measure
from kvpack.models import open_model
from kvpack.runtime.install import new_cache
from tests.evaluate.conftest import affine, kv_recipe
from tests.tiny_models import VOCAB, make_model

TOKENS = 64


def judged(attention: Tensor, epsilon: float = 0.3) -> LayerSinks:
    """What the metric makes of a causal matrix [T, T]; one sample, one head."""
    tokens = len(attention)
    found = LayerSinks(1, tokens, epsilon)
    counts = torch.arange(tokens, 0, -1)[None]
    found.add_attention(attention.sum(0)[None, None], counts, torch.arange(tokens)[None])
    return found


def formula(attention: Tensor) -> Tensor:
    """alpha_k = sum over i >= k of A_ik / (T - k + 1), k from 1, as the paper writes it."""
    tokens = len(attention)
    return torch.stack(
        [
            sum(attention[i, k] for i in range(k, tokens)) / (tokens - k)  # type: ignore[misc]  # sum starts at an int
            for k in range(tokens)
        ]
    )


def test_all_attention_on_the_first_token() -> None:
    attention = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    attention[:, 0] = 1
    found = judged(attention)
    assert found.found[0].tolist() == [1] + [0] * (TOKENS // 2 - 1)
    assert found.attention[0].tolist() == [1] + [0] * (TOKENS // 2 - 1)


def test_uniform_attention_has_no_sink() -> None:
    attention = torch.ones(TOKENS, TOKENS, dtype=torch.float64).tril()
    attention /= attention.sum(1, keepdim=True)
    found = judged(attention)
    assert found.attention[0, 0].item() == pytest.approx(sum(1 / i for i in range(1, 65)) / 64)
    assert found.attention[0, 0].item() == pytest.approx(0.074, abs=5e-4)
    assert not found.found.any()


def test_the_last_position_of_a_diagonal_is_no_sink() -> None:
    """It would be by the formula: one query sees it, and gives it everything."""
    attention = torch.eye(TOKENS, dtype=torch.float64)
    assert formula(attention)[-1] == 1
    found = judged(attention)
    assert found.attention[0, 0].item() == pytest.approx(1 / 64)
    assert found.positions == TOKENS // 2
    assert not found.found.any()


def test_fewer_sinks_at_a_larger_epsilon() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(TOKENS, TOKENS, generator=generator).mul(3).double()
    attention = attention.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf).softmax(-1)
    totals = [judged(attention, e).found.sum().item() for e in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == TOKENS // 2
    assert totals[-1] == 0


def eager_attention(folder: Path, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All attention matrices [L, N, H, T, T] and inputs of the layers, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    with torch.no_grad():
        out = model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    return torch.stack(out.attentions).double(), out.hidden_states


def random_tokens(samples: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCAB, (samples, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox"])
def test_the_stream_equals_the_formula(family: str, checkpoint: Any) -> None:
    """Windows of 24 tokens in gemma: the mean is over the queries that see a position."""
    folder, tokens = checkpoint(family), random_tokens(5, 40)
    report = measure_sinks(open_model(folder), tokens, SinkSettings(epsilon=0.06, batch=2, block=7))
    attention, hidden = eager_attention(folder, tokens)
    seen = (attention[:, 0, 0] > 0).sum(1)  # [L, T]
    alpha = (attention.sum(3) / seen[:, None, None])[..., :20]
    if all(w is None for w in (a.window for a in open_model(folder).attention)):
        expected = torch.stack([formula(a) for a in attention[:, 0, 0]])[:, :20]
        torch.testing.assert_close(alpha[:, 0, 0], expected, rtol=0, atol=1e-12)
    for layer, entry in enumerate(report["layers"]):
        got = torch.tensor(entry["attention"], dtype=torch.float64)
        torch.testing.assert_close(got, alpha[layer].mean(0), rtol=1e-4, atol=1e-6)
        rate = (alpha[layer] > 0.06).double().mean(0)
        torch.testing.assert_close(
            torch.tensor(entry["sink_rate"], dtype=torch.float64), rate, rtol=1e-4, atol=0
        )
        norm = hidden[layer].double().norm(dim=-1).mean(0)[:20]
        torch.testing.assert_close(torch.tensor(entry["hidden_norm"]).double(), norm, rtol=1e-4, atol=1e-6)
    total = (alpha > 0.06).double().mean((0, 1, 2))
    assert 0 < total.mean() < 1
    torch.testing.assert_close(torch.tensor(report["sink_rate"]).double(), total, rtol=1e-4, atol=0)
    assert (report["tokens"], report["samples"]) == (40, 5)


def test_accumulators_keep_six_digits_before_rounding(checkpoint: Any) -> None:
    """Float32 scores, float64 sums: the report's rounding is not where precision would be lost."""
    from kvpack.ops.attention_scores import column_sums

    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, h, TOKENS, 16, generator=generator) for h in (4, 2))
    found = LayerSinks(4, TOKENS, 0.3)
    tokens = random_tokens(2, TOKENS)
    for row in range(2):
        sums, counts = column_sums(
            query[row : row + 1], key[row : row + 1], None, 0.25, block=5, per_head=True
        )
        found.add_attention(sums, counts, tokens[row : row + 1])
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.25
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf).softmax(-1)
    expected = torch.stack([torch.stack([formula(a) for a in row]) for row in scores])
    got = found.attention / found.samples
    assert (got - expected.mean(0)[:, : TOKENS // 2]).abs().max() < 1e-6


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose every query looks for a direction that only the key of token 0 has.

    The direction is the slowest RoPE channel, so that distance does not matter.
    """
    path = make_model(tmp_path_factory.mktemp("planted") / "model", attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[0, 0] = 8
        for block in model.model.layers:
            attention = block.self_attn
            for linear in (attention.o_proj, block.mlp.down_proj):
                linear.weight[0] = 0
            attention.o_proj.bias[0] = 0
            attention.k_proj.weight[:, 0] = 0
            attention.k_proj.weight[7::16, 0] = 1
            attention.q_proj.bias[7::16] = 6
    model.save_pretrained(path)
    return path


def beginning_with_zero(samples: int, tokens: int) -> Tensor:
    ids = random_tokens(samples, tokens)
    ids[:, 0] = 0
    return ids


def test_a_planted_sink_is_found(planted: Path) -> None:
    report = measure_sinks(open_model(planted), beginning_with_zero(6, TOKENS), SinkSettings())
    assert report["sink_rate"][0] > 0.95
    assert (report["positions"], report["n_sink"], report["later_tokens"]) == ([0], 1, [])
    for entry in report["layers"]:
        assert entry["hidden_norm_ratio"] > 1.5
        assert entry["key_norm_ratio"] > 1.5
        for head in entry["key_channel_max"]:
            assert head.index(max(head)) == 7


def test_a_sink_in_the_middle_is_named(planted: Path) -> None:
    tokens = random_tokens(6, TOKENS)
    tokens[:, 10] = 0
    report = measure_sinks(open_model(planted), tokens, SinkSettings())
    assert report["positions"] == [10]
    assert report["n_sink"] == 11
    assert report["later_tokens"][0]["token"] == 0


def kl_of(planted: Path, out: Path, sinks: int, recent: int = 8, tokens: int = TOKENS) -> float:
    """KL of a two-bit cache from the source."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(kv_recipe(affine(2, "token"), affine(2, "channel"), recent))
    plan = pipeline.make_plan(planted, str(recipe), [f"kv_cache.policy.sink_tokens={sinks}"])
    pipeline.export(plan, out)
    model, source = kvpack.load(out), AutoModelForCausalLM.from_pretrained(planted)
    cache = lambda exact: new_cache(model, exact_prefill=exact)  # noqa: E731
    pieces = list(beginning_with_zero(4, tokens))
    found = measure(model, source, pieces, new_cache=cache, protocols=("prefill",))
    assert found.packed["prefill"].kl is not None
    return found.packed["prefill"].kl


def test_protecting_the_sink_lowers_the_error_of_two_bits(planted: Path, tmp_path: Path) -> None:
    bare, guarded = (kl_of(planted, tmp_path / str(n), n) for n in (0, 1))
    assert guarded < 0.8 * bare


def test_protecting_everything_is_exact(planted: Path, tmp_path: Path) -> None:
    assert abs(kl_of(planted, tmp_path / "all", TOKENS)) < 1e-9


def test_the_report_is_a_file_of_the_calibration(planted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All this text is there to be long enough for the samples of both passes. " * 80)
    plan = pipeline.make_plan(planted, "fragments/measure", [f"calibration.data={text}"])
    made = pipeline.calibrate(plan, tmp_path / "calibration", sinks=True)
    assert "sinks.json" in made.manifest["files"]
    report = json.loads((made.path / "sinks.json").read_text())
    assert report["long"]["tokens"] == 512, "no longer than the model reads"
    assert len(report["layers"]) == 2
    entry = report["layers"][0]
    assert [len(x) for x in entry["sink_rate"]] == [32] * 4
    assert [len(x) for x in entry["key_channel_max"]] == [16] * 2
    assert Calibration.open(made.path).manifest["files"].keys() == {"sinks.json"}
    (made.path / "sinks.json").unlink()
    with pytest.raises(ArtifactError, match=r"sinks\.json is missing"):
        Calibration.open(made.path)


def test_what_is_asked_of_the_text(checkpoint: Any) -> None:
    asked = []

    def draw(samples: int, tokens: int) -> Tensor:
        asked.append((samples, tokens))
        return random_tokens(2, 16)

    settings = SinkSettings(tokens=16, samples=2, long_tokens=9999, long_samples=1)
    report = sink_report(open_model(checkpoint("llama")), draw, settings)
    assert asked == [(2, 16), (1, 512)]
    assert report["long"].keys() == {"tokens", "samples", "positions", "n_sink", "later_tokens"}
