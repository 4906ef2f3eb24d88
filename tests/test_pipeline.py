"""The main job as a whole: determinism, one calibration for many exports, and interruption."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvpack
from kvpack import pipeline
from kvpack.artifact.reader import Artifact
from kvpack.core.errors import UsageError
from tests.tiny_models import make_model

SMALL = ["calibration.samples=4", "calibration.sample_tokens=32"]
RECIPE = "rotatekv-w4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("pipeline") / "model", dtype="bfloat16", shard_size="60KB")


@pytest.fixture(scope="module")
def first(source: Path) -> Path:
    return pipeline.export(pipeline.make_plan(source, RECIPE, SMALL), source.parent / "first").path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_exports_are_byte_identical(source: Path, first: Path, tmp_path: Path) -> None:
    second = pipeline.export(pipeline.make_plan(source, RECIPE, SMALL), tmp_path / "second").path
    assert contents(second) == contents(first)
    assert len(contents(first)) > 5


def test_another_process_and_another_place_give_the_same_bytes(
    source: Path, first: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(source, tmp_path / "elsewhere" / "under another name")
    words = ["export", str(moved), "-r", RECIPE, "-o", str(tmp_path / "out")]
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "kvpack", *words, *overrides],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert contents(tmp_path / "out") == contents(first)


def test_a_calibration_made_beforehand_gives_the_same_bytes(
    source: Path, first: Path, tmp_path: Path
) -> None:
    plan = pipeline.make_plan(source, RECIPE, SMALL)
    pipeline.calibrate(plan, tmp_path / "calibration")
    pipeline.calibrate(plan, tmp_path / "again")
    assert contents(tmp_path / "calibration") == contents(tmp_path / "again")
    made = pipeline.export(plan, tmp_path / "out", calibration=tmp_path / "calibration")
    assert contents(made.path) == contents(first)


def test_one_calibration_serves_every_bit_width(source: Path, tmp_path: Path) -> None:
    """What is calibrated does not depend on the cache's codec."""
    plan = pipeline.make_plan(source, RECIPE, SMALL)
    pipeline.calibrate(plan, tmp_path / "calibration")
    other = pipeline.make_plan(source, f"{RECIPE}@4bit", SMALL)
    reused = pipeline.export(other, tmp_path / "reused", calibration=tmp_path / "calibration")
    fresh = pipeline.export(other, tmp_path / "fresh")
    assert contents(reused.path) == contents(fresh.path)


def test_the_source_is_only_read(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    pipeline.export(pipeline.make_plan(source, RECIPE, SMALL), tmp_path / "out")
    assert contents(source) == before
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_reported_is_what_is_there(source: Path, tmp_path: Path) -> None:
    stages: dict[str, list[tuple[int, int | None]]] = {}

    def progress(stage: str, done: int, total: int | None = None, detail: str = "") -> None:
        stages.setdefault(stage, []).append((done, total))

    plan = pipeline.make_plan(source, RECIPE, SMALL)
    made = pipeline.export(plan, tmp_path / "out", progress=progress)
    assert made.nbytes == sum(len(data) for data in contents(made.path).values())
    assert Artifact.open(made.path).manifest == made.manifest
    assert {"check", "export"} < set(stages)
    for steps in stages.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


def test_everything_a_tokenizer_needs_travels_along(first: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(first)
    ids = tokenizer("kvpack", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "kvpack"
    assert kvpack.load(first).generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]
    assert "kvpack.load" in (first / "README.md").read_text()


@pytest.mark.parametrize("stage", ["check", "calibrate", "export"])
def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(name: str, done: int, total: int | None = None, detail: str = "") -> None:
        if name == stage and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.export(
            pipeline.make_plan(source, RECIPE, SMALL), tmp_path / "deep" / "out", progress=interrupt
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["calibrate", "export"])
def test_the_next_export_clears_up_after_a_killed_one(
    source: Path, first: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from kvpack import pipeline\n"
        "def kill(stage, done, total=None, detail=''):\n"
        f"    if stage == {stage!r} and done == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"plan = pipeline.make_plan({str(source)!r}, {RECIPE!r}, {SMALL!r})\n"
        f"pipeline.export(plan, Path({str(out)!r}), progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) != []
    assert not out.exists()
    made = pipeline.export(pipeline.make_plan(source, RECIPE, SMALL), out)
    assert contents(made.path) == contents(first)
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_an_artifact_is_all_or_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.export(pipeline.make_plan(source, "w8"), out)
    before = contents(out)

    def interrupt(name: str, done: int, total: int | None = None, detail: str = "") -> None:
        if name == "export" and done == 10:
            raise KeyboardInterrupt

    plan = pipeline.make_plan(source, "w4@rtn")
    with pytest.raises(UsageError, match="exists"):
        pipeline.export(plan, out)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(plan, out, force=True, progress=interrupt)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]
    pipeline.export(plan, out, force=True)
    assert contents(out) != before
    assert os.listdir(tmp_path) == ["out"]


def test_padding_in_a_batch_changes_nothing(source: Path, first: Path) -> None:
    """Left padding, through the model's own seams: positions, mask and hidden states."""
    model = kvpack.load(first, dtype=torch.float32)
    tokens = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :15], tokens[0, :15] = 0, 2
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(tokens, attention_mask=mask, **options)
    alone = model.generate(tokens[:1, 15:], **options)
    assert torch.equal(batch[0, 15:], alone[0])


def test_without_kvpack_transformers_refuses(first: Path) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        f"try:\n    AutoModelForCausalLM.from_pretrained({str(first)!r})\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "else:\n    print('loaded')\n"
        "print('kvpack' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["OSError", "False"]


def test_importing_kvpack_first_is_enough(first: Path) -> None:
    code = (
        "import kvpack, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(first)!r})\n"
        "print(type(model(torch.arange(3, 9)[None], use_cache=True).past_key_values).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["KVPackCache"]
