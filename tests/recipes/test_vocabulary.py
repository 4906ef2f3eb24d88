"""Packed embeddings and heads: tied ones are one tensor, only the rows that are asked for are decoded."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kvpack
from kvpack import pipeline
from kvpack.artifact.reader import Artifact
from kvpack.runtime.embedding import PackedEmbedding
from kvpack.runtime.linear import PackedLinear
from kvpack.verify import verify
from tests.recipes.checks import check_everything, check_logits, same_bits
from tests.recipes.conftest import SMALL, Made, Make, MakeSource

CODEC = "{kind: affine, bits: %d, group: {axis: channel, size: 32}, zero: float}"
ALL = "kvpack: 1\nname: t\nweights:\n" + "".join(
    f"  - {{match: '{match}', codec: {CODEC % bits}, solver: {{kind: {solver}}}}}\n"
    for match, bits, solver in (("@vocabulary", 8, "rtn"), ("@linear", 4, "rtn"))
)


def _made(source: Path, text: str, folder: Path) -> Made:
    folder.mkdir()
    recipe = folder / "t.yaml"
    recipe.write_text(text)
    plan = pipeline.make_plan(source, str(recipe), SMALL)
    return Made(source, plan, pipeline.export(plan, folder / "out").path)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen3", True), ("gemma3_text", True), ("gpt_neox", False), ("gpt_neox", True)],
)
def test_everything_holds(
    family: str, tied: bool, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    made = _made(make_source(family, tied=tied), ALL, tmp_path / "made")
    check_everything(made, prompt)
    names = {
        n.rpartition(".")[0] for n in made.artifact.tensor_names if n.startswith(("lm_head", "gpt_neox.e"))
    }
    embedding = {"gpt_neox.embed_in"} if family == "gpt_neox" else set()
    assert names == embedding | (set() if tied else {"lm_head"})


def test_a_tied_weight_is_in_memory_once(make: Make) -> None:
    made = make("w4@all", tied=True)
    model = made.load()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert not list(head.parameters()) + list(head.buffers())
    assert head.stored["codes"].data_ptr() == table.stored["codes"].data_ptr()
    assert same_bits(head.dense(torch.float32), table.dense(torch.float32))
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *table.stored.values()))
    packed = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if isinstance(m, PackedLinear) and m is not head
        for t in m.stored.values()
    )
    assert held + packed == made.artifact.manifest.totals.weight_bytes
    twin = copy.deepcopy(model)
    assert twin.lm_head.stored["codes"].data_ptr() == twin.model.embed_tokens.stored["codes"].data_ptr()
    assert twin.lm_head.stored["codes"].data_ptr() != table.stored["codes"].data_ptr()


def test_transformers_loads_ties_and_casts_it(make: Make, prompt: torch.Tensor) -> None:
    made = make("w4@all", "gemma3_text", tied=True)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    model.tie_weights()
    half = kvpack.load(made.path, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = made.load()(prompt, use_cache=False).logits
        assert same_bits(model(prompt, use_cache=False).logits, expected)
        found = half(prompt, use_cache=False).logits
        assert half.get_input_embeddings()(prompt).dtype == found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.05 * expected.norm()
        later = model.to(torch.bfloat16).get_input_embeddings()(prompt)
    assert later.dtype == torch.bfloat16
    scale = made.artifact.solution("model.embed_tokens").tensors["scale"]
    assert same_bits(half.model.embed_tokens.get_buffer("scale"), scale)


@pytest.mark.parametrize("rule", ["@embedding", "@lm_head", "lm_head"])
def test_the_first_rule_that_matches_either_holds_for_both(
    rule: str, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    first = f"  - {{match: '{rule}', codec: {CODEC % 3}, solver: {{kind: rtn}}}}\n"
    made = _made(
        make_source("llama", tied=True), ALL.replace("weights:\n", f"weights:\n{first}"), tmp_path / "m"
    )
    assert "lm_head" not in made.plan.weights
    assert made.artifact.manifest.weights["model.embed_tokens"].bits == 3
    assert "lm_head is tied to model.embed_tokens: one packed tensor" in made.plan.notes[0]
    check_logits(made, made.load(), prompt)


def test_kept_when_the_first_rule_keeps_it(make_source: MakeSource, tmp_path: Path) -> None:
    text = ALL.replace("weights:\n", "weights:\n  - {match: lm_head, keep: true}\n")
    (tmp_path / "t.yaml").write_text(text)
    plan = pipeline.make_plan(make_source("llama", tied=True), str(tmp_path / "t.yaml"))
    assert "model.embed_tokens.weight" in plan.copied


@pytest.mark.parametrize("tied", [False, True])
def test_gptq_chooses_codes_for_the_head_by_what_it_is_given(
    tied: bool, make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    text = ALL.replace("@vocabulary", "@lm_head").replace("{kind: rtn}", "{kind: gptq}", 1)
    made = _made(make_source("llama", tied=tied), text, tmp_path / "made")
    check_everything(made, prompt)
    name = "model.embed_tokens" if tied else "lm_head"
    plain = _made(make_source("llama", tied=tied), ALL, tmp_path / "plain")
    assert not torch.equal(*(m.artifact.solution(name).payload.tensors["codes"] for m in (made, plain)))


def test_later_blocks_are_calibrated_on_the_packed_embedding(make_source: MakeSource, tmp_path: Path) -> None:
    """GPTQ of block 0 sees other inputs when the embedding has 2 bits."""
    gptq = "{kind: gptq}".join(ALL.rsplit("{kind: rtn}", 1))
    coarse = _made(make_source("llama"), gptq.replace("bits: 8", "bits: 2"), tmp_path / "coarse")
    fine = _made(make_source("llama"), gptq, tmp_path / "fine")
    codes = [m.artifact.solution("model.layers.0.self_attn.q_proj").tensors["codes"] for m in (coarse, fine)]
    assert not torch.equal(*codes)


def test_a_checkpoint_that_holds_the_head_only(
    make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_source("llama", tied=True), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    made = _made(source, ALL, tmp_path / "head")
    once = _made(make_source("llama", tied=True), ALL, tmp_path / "embedding")
    assert made.artifact.manifest.totals == once.artifact.manifest.totals
    with torch.inference_mode():
        a, b = (m.load()(prompt, use_cache=False).logits for m in (made, once))
    assert same_bits(a, b)


def test_only_the_rows_that_are_asked_for_are_decoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make("w4@all").load().get_input_embeddings()
    whole = table.dense(torch.float32)
    seen: list[int] = []
    codec = type(table.packed.codec)
    decode = codec.decode

    def counted(self: object, payload: object, state: object, dtype: torch.dtype) -> torch.Tensor:
        seen.append(payload.shape[-2])  # type: ignore[attr-defined]
        return decode(self, payload, state, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(codec, "decode", counted)
    ids = torch.tensor([[3, 255, 0], [7, 7, 2]])
    assert same_bits(table(ids), whole[ids])
    assert seen == [6]
    assert table(ids[:, :0]).shape == (2, 0, 64)
    with pytest.raises(IndexError):
        table(torch.tensor([256]))


def test_rows_of_a_token_group_come_with_their_block(
    make_source: MakeSource, tmp_path: Path, prompt: torch.Tensor
) -> None:
    text = ALL.replace("{axis: channel, size: 32}", "{axis: token, size: 8}", 1)
    made = _made(make_source("llama", tied=True), text, tmp_path / "made")
    check_logits(made, made.load(), prompt)
    table = made.load().get_input_embeddings()
    ids = torch.tensor([9, 8, 255])
    assert same_bits(table(ids), table.dense(torch.float32)[ids])


def test_artifacts_say_how_the_embedding_is_packed(make: Make) -> None:
    manifest = Artifact.open(make("w4@all", tied=True).path).manifest
    packed = manifest.weights["model.embed_tokens"]
    assert (packed.role, packed.shape, packed.layer) == ("embedding", (256, 64), None)
    assert 0 < (packed.relative_error or 0) < 0.01
    assert [d.reason for d in manifest.dropped] == []


def test_it_is_verified_against_its_source(make: Make) -> None:
    made = make("w4@all", tied=True)
    assert all(check.passed for check in verify(made.path, made.source).checks)
