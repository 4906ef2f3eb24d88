"""Broken input: one clear error of the right kind, and a disk as it was."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import kvpack
from kvpack import pipeline
from kvpack.artifact.reader import Artifact
from kvpack.cli import entry
from kvpack.core.errors import (
    ArtifactError,
    CalibrationMismatch,
    KvpackError,
    RecipeError,
    ResourceError,
    SourceError,
    UnsupportedModel,
    UsageError,
)
from kvpack.verify import verify
from tests.recipes.conftest import SMALL, Made, Make, MakeSource
from tests.tiny_models import make_model, make_tokenizer

Change = Callable[[dict[str, torch.Tensor]], None]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextmanager
def refused(kind: type[KvpackError], *, match: str, untouched: Path, code: int = 0) -> Iterator[None]:
    """Exactly this error, with a hint or a reason, and nothing changed below `untouched`."""
    before = listing(untouched)
    with pytest.raises(kind, match=match) as found:
        yield
    assert type(found.value) is kind or issubclass(type(found.value), RecipeError)
    assert found.value.exit_code == (code or kind.exit_code)
    assert listing(untouched) == before


@pytest.fixture
def source(make_source: MakeSource, tmp_path: Path) -> Path:
    """A checkpoint of three shards that a test may damage."""
    return shutil.copytree(make_source("llama", shard_size="60KB"), tmp_path / "source")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def export(source: Path, recipe: str, out: Path, **options: object) -> None:
    pipeline.export(pipeline.make_plan(source, recipe, SMALL), out, **options)


# Recipes.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("recent_tokens", "recent_tokns"), r"mine\.yaml:9:.*recent_tokns.*recent_tokens"),
        (("bits: 2", "bits: 20"), r"mine\.yaml:8:.*bits.*20"),
        (("kind: affine", "kind: afine"), r"(?s)mine\.yaml:8:.*afine.*affine"),
        (("kvpack: 1", "kvpack: 99"), r"mine\.yaml:1:"),
        (("{kind: sink_recent", "{kind: [sink_recent"), r"mine\.yaml:9:"),
    ],
)
def test_wrong_recipe(change: tuple[str, str], match: str, source: Path, work: Path) -> None:
    text = """kvpack: 1
name: mine
kv_cache:
  key:
    transforms: []
  tiers:
    recent: {codec: {kind: identity}}
    old: {codec: {kind: affine, bits: 2, group: {axis: channel, size: 32}}}
  policy: {kind: sink_recent, recent_tokens: 8, inside: recent, outside: old}
"""
    recipe = work / "mine.yaml"
    recipe.write_text(text)
    pipeline.make_plan(source, str(recipe))
    recipe.write_text(text.replace(*change))
    with refused(RecipeError, match=match, untouched=work):
        export(source, str(recipe), work / "out")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("weights.0.match=layers.*.attn.q_proj",), r"layers\.\*\.attn\.q_proj.*no linear layer"),
        (("weights.0.solver.kind=gtpq",), "gtpq"),
        (("wights.0.solver.kind=gptq",), "wights"),
        (("weights.0.codec.group={axis: token, size: 7}",), "groups of 7"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    overrides: tuple[str, ...], match: str, source: Path, work: Path
) -> None:
    with refused(RecipeError, match=match, untouched=work):
        pipeline.make_plan(source, "w4", overrides)


@pytest.mark.parametrize("match", ["@embedding", "@all", "embed_tokens"])
def test_measuring_an_untied_embedding_is_refused(match: str, make_source: MakeSource, work: Path) -> None:
    with refused(RecipeError, match="'gptq' cannot choose codes for model.embed_tokens", untouched=work):
        pipeline.make_plan(make_source("llama"), "w4", [f"weights.0.match={match}"])


def test_undoing_rope_that_changes_with_the_context_is_refused(tmp_path: Path, work: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(tmp_path / "dynamic", "llama", rope_parameters=rope)
    with refused(RecipeError, match=r"rotatekv\.yaml:.*unrope.*llama.*dynamic", untouched=work):
        export(model, "rotatekv", work / "out")
    export(model, "kivi", work / "out")


def test_folding_into_keys_is_refused(source: Path, work: Path) -> None:
    with refused(RecipeError, match=r"kv_cache.*RoPE is applied between", untouched=work):
        pipeline.make_plan(source, "rotatekv", ["kv_cache.key.fold=true"])


# Sources.


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("model-*.safetensors"))


def rewrite(file: Path, change: Change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("keep", [0, 5, 2_000, -1])
def test_truncated_shard(keep: int, source: Path, work: Path) -> None:
    shard = shards(source)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with refused(SourceError, match=shard.name, untouched=work):
        export(source, "w8", work / "out")


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_shard_truncated_after_planning(recipe: str, source: Path, work: Path) -> None:
    plan = pipeline.make_plan(source, recipe, SMALL)
    shard = shards(source)[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with refused(SourceError, match=shard.name, untouched=work):
        pipeline.export(plan, work / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(name: str, value: float, source: Path, work: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name].view(-1)[5] = value

    for shard in shards(source):
        rewrite(shard, poison)
    for recipe in ("w8", "rotatekv"):
        with refused(SourceError, match=f"{name} holds 1 NaN or Inf.*index 5", untouched=work):
            export(source, recipe, work / "out")
    with refused(SourceError, match=name, untouched=work):
        pipeline.calibrate(pipeline.make_plan(source, "w4", SMALL), work / "calibration")


def test_missing_shard_and_missing_tensor(source: Path, work: Path) -> None:
    shard = shards(source)[0]
    data = shard.read_bytes()
    shard.unlink()
    with refused(SourceError, match=f"{shard.name} is missing", untouched=work):
        export(source, "w8", work / "out")
    shard.write_bytes(data)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[sorted(tensors)[0]]

    rewrite(shard, drop)
    with refused(SourceError, match="is not in", untouched=work):
        export(source, "w8", work / "out")


def test_unknown_tensor_is_not_dropped_silently(make_source: MakeSource, tmp_path: Path, work: Path) -> None:
    model = shutil.copytree(make_source("llama"), tmp_path / "model")
    rewrite(model / "model.safetensors", lambda tensors: tensors.update(extra=torch.ones(3)))
    with refused(UnsupportedModel, match="extra.*not part of LlamaForCausalLM", untouched=work):
        export(model, "w8", work / "out")


def _family(folder: Path, family: str, auto: type, **settings: object) -> Path:
    config = AutoConfig.for_model(family, **settings)
    auto.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


UNSUPPORTED: dict[str, tuple[type, dict[str, object], str]] = {
    "mamba": (
        AutoModelForCausalLM,
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4},
        "state-space|decoder blocks|cache",
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 32, "num_layers": 1, "d_ff": 32, "num_heads": 2, "d_kv": 16, "vocab_size": 64},
        "encoder-decoder",
    ),
    "deepseek_v3": (
        AutoModelForCausalLM,
        {
            "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32,
            "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
        r"latent attention \(MLA\)",
    ),
    "bert": (
        AutoModelForCausalLM,
        {
            "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32,
            "num_attention_heads": 2,
        },
        "bert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_family_is_named(family: str, tmp_path: Path, work: Path) -> None:
    auto, settings, match = UNSUPPORTED[family]
    model = _family(tmp_path / family, family, auto, **settings)
    with refused(UnsupportedModel, match=match, untouched=work):
        export(model, "kivi", work / "out")


def test_source_that_is_packed_already(make: Make, work: Path) -> None:
    with refused(UnsupportedModel, match="quantised already", untouched=work):
        export(make("w8").path, "kivi", work / "out")


def test_pickled_weights_are_not_opened(source: Path, work: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"anything")
    with refused(UnsupportedModel, match="pickle", untouched=work):
        export(source, "kivi", work / "out")


def test_missing_configuration(source: Path, work: Path) -> None:
    (source / "config.json").unlink()
    with refused(SourceError, match=r"config\.json is missing", untouched=work):
        export(source, "kivi", work / "out")
    (source / "config.json").write_text("{")
    with refused(SourceError, match=r"config\.json|JSON", untouched=work):
        export(source, "kivi", work / "out")


def test_no_tokenizer_for_a_recipe_that_calibrates(source: Path, work: Path) -> None:
    for file in source.glob("tokenizer*"):
        file.unlink()
    with refused(SourceError, match="tokenizer", untouched=work):
        export(source, "w4", work / "out")
    export(source, "w8", work / "out")


# Places to write to.


def test_existing_output_is_not_touched(source: Path, work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("precious")
    for force, match in ((False, "exists already"), (True, "not made by kvpack")):
        with refused(UsageError, match=match, untouched=work):
            export(source, "w4", work / "out", force=force)
        with refused(UsageError, match=match, untouched=work):
            plan = pipeline.make_plan(source, "w4", SMALL)
            pipeline.calibrate(plan, work / "out", force=force)


def test_output_inside_a_file_or_a_closed_folder(source: Path, work: Path) -> None:
    (work / "file").write_text("")
    with refused(UsageError, match="cannot be written", untouched=work):
        export(source, "w8", work / "file" / "out")


@contextmanager
def disk_full_after(nbytes: int) -> Iterator[None]:
    """No file may grow beyond `nbytes`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [100, 3_000, 8_000, 20_000, 60_000])
@pytest.mark.parametrize("recipe", ["w4@rtn", "w4", "rotatekv"])
def test_full_disk(recipe: str, nbytes: int, source: Path, work: Path) -> None:
    """The limit hits the calibration, a shard, or a small file, wherever it comes first."""
    plan = pipeline.make_plan(source, recipe, SMALL)
    with refused(ResourceError, match="disk does not take it", untouched=work), disk_full_after(nbytes):
        pipeline.export(plan, work / "out", shard_bytes=4_000_000)


def test_full_disk_while_calibrating(source: Path, work: Path) -> None:
    plan = pipeline.make_plan(source, "w4", SMALL)
    for nbytes in (0, 3_000):
        with refused(ResourceError, match="disk does not take it", untouched=work), disk_full_after(nbytes):
            pipeline.calibrate(plan, work / "calibration")


def test_full_disk_while_replacing(source: Path, work: Path) -> None:
    export(source, "w8", work / "out")
    plan = pipeline.make_plan(source, "w4@rtn")
    with refused(ResourceError, match="disk does not take it", untouched=work), disk_full_after(20_000):
        pipeline.export(plan, work / "out", force=True)


# Calibrations.


@pytest.fixture
def calibration(source: Path, tmp_path: Path) -> Path:
    pipeline.calibrate(pipeline.make_plan(source, "rotatekv-w4", SMALL), tmp_path / "calibration")
    return tmp_path / "calibration"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("calibration.seed=1", "seed"),
        ("calibration.samples=5", "samples"),
        ("calibration.sample_tokens=40", "sample_tokens"),
        ("weights.0.codec.bits=3", "weight parts"),
        ("weights.0.solver.damp=0.1", "weight parts"),
        ('weights.0.match="@attention"', "weight parts"),
        ("kv_cache.key.transforms.1.heads=1", "kv_cache transforms"),
        ("kv_cache.value.fold=false", "kv_cache transforms"),
    ],
)
def test_calibration_of_another_recipe(
    override: str, field: str, calibration: Path, source: Path, work: Path
) -> None:
    def idle(stage: str, *_: object) -> None:
        pytest.fail(f"work had begun: {stage}")

    plan = pipeline.make_plan(source, "rotatekv-w4", [*SMALL, override])
    with refused(CalibrationMismatch, match=rf"other values of: {field} \(", untouched=work):
        pipeline.export(plan, work / "out", calibration=calibration, progress=idle)


def test_calibration_of_another_model(calibration: Path, make_source: MakeSource, work: Path) -> None:
    plan = pipeline.make_plan(make_source("llama", shard_size="60KB", seed=1), "rotatekv-w4", SMALL)
    with refused(CalibrationMismatch, match="model files", untouched=work):
        pipeline.export(plan, work / "out", calibration=calibration)


def test_damaged_calibration(calibration: Path, source: Path, work: Path) -> None:
    plan = pipeline.make_plan(source, "rotatekv-w4", SMALL)
    for file in sorted(calibration.iterdir()):
        data = file.read_bytes()
        for damaged in (data[:-20], b"", flipped(data, len(data) // 2)):
            file.write_bytes(damaged)
            with refused(ArtifactError, match=file.name, untouched=work):
                pipeline.export(plan, work / "out", calibration=calibration)
        file.write_bytes(data)
    pipeline.export(plan, work / "out", calibration=calibration)


# Artifacts.


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.fixture(scope="module")
def artifact(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with every kind of file, that tests damage and repair."""
    made: Made = make("rotatekv-w4", shard_bytes=60_000)
    return shutil.copytree(made.path, tmp_path_factory.mktemp("damaged") / "artifact")


@contextmanager
def damaged(file: Path, data: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def test_a_flipped_bit_in_any_file_is_found(artifact: Path) -> None:
    files = sorted(p for p in artifact.iterdir() if p.is_file())
    assert {"kvpack.json", "config.json", "README.md", "kvpack-kv.safetensors"} < {f.name for f in files}
    for file in files:
        data = file.read_bytes()
        for position in {0, 7, len(data) // 3, len(data) - 1}:
            with damaged(file, flipped(data, position, position % 8)):
                with refused(ArtifactError, match=".", untouched=artifact):
                    kvpack.load(artifact)
                with refused(ArtifactError, match=".", untouched=artifact):
                    Artifact.open(artifact)
                assert not verify(artifact).passed
    assert verify(artifact).passed


def test_damage_anywhere_in_the_configuration_is_found(artifact: Path) -> None:
    """transformers reads config.json first, so damage there must be found before."""
    file = artifact / "config.json"
    data = file.read_bytes()
    for position in range(0, len(data), 5):
        with damaged(file, flipped(data, position, position % 7)), pytest.raises(ArtifactError):
            kvpack.load(artifact)


def test_missing_and_additional_files(artifact: Path) -> None:
    for file in sorted(p for p in artifact.iterdir() if p.is_file()):
        moved = file.rename(artifact.parent / file.name)
        with refused(ArtifactError, match=file.name, untouched=artifact):
            kvpack.load(artifact)
        moved.rename(file)
    added = artifact / "model.safetensors"
    added.write_bytes(b"")
    with refused(ArtifactError, match=r"model\.safetensors is not in the manifest", untouched=artifact):
        kvpack.load(artifact)
    added.unlink()


def test_newer_format(artifact: Path) -> None:
    file = artifact / "kvpack.json"
    content = json.loads(file.read_bytes())
    newer = json.dumps({**content, "format_version": 2, "something": "unknown today"}).encode()
    with damaged(file, newer):
        with refused(ArtifactError, match="format version 2.*reads versions up to 1", untouched=artifact):
            kvpack.load(artifact)
        checks = verify(artifact).checks
        assert [c.passed for c in checks] == [False]
        assert "upgrade" in checks[0].hint


def test_what_is_not_an_artifact(make_source: MakeSource, tmp_path: Path) -> None:
    for folder in (make_source("llama"), tmp_path / "nowhere"):
        with refused(ArtifactError, match=r"kvpack\.json", untouched=tmp_path):
            kvpack.load(folder)


# The command line says the same, with its exit codes.


WORDS = {
    "wrong key": (["export", "{source}", "-r", "w8", "-o", "{work}/out", "--set", "wights=1"], 2),
    "output exists": (["export", "{source}", "-r", "w8", "-o", "{work}"], 2),
    "disk full": (["export", "{source}", "-r", "w4", "-o", "{work}/out", "--set", SMALL[0]], 3),
    "no model": (["export", "{work}", "-r", "w8", "-o", "{work}/out"], 4),
    "no artifact": (["generate", "{source}", "-p", "x"], 4),
}


@pytest.mark.parametrize("case", WORDS)
def test_exit_codes(case: str, source: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, code = WORDS[case]
    (work / "thesis.txt").write_text("precious")
    before = listing(work)
    with disk_full_after(3_000 if case == "disk full" else resource.RLIM_INFINITY):
        assert entry.run([word.format(source=source, work=work) for word in words]) == code
    said = capsys.readouterr()
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.err
    assert listing(work) == before


def test_exit_code_of_a_damaged_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = artifact / "kvpack-kv.safetensors"
    data = file.read_bytes()
    with damaged(file, flipped(data, len(data) // 2)):
        assert entry.run(["verify", str(artifact)]) == 1
    assert "kvpack-kv.safetensors is damaged" in capsys.readouterr().err
    assert entry.run(["verify", str(artifact)]) == 0
