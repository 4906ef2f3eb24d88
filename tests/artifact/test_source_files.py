from pathlib import Path

import pytest

from kvpack.artifact.source_files import sidecar_files
from kvpack.artifact.writer import ArtifactWriter
from kvpack.core.errors import SourceError
from tests.artifact.conftest import snapshot

TRAVELS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.md",
    "Notice.txt",
    "USE_POLICY.md",
]
STAYS = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "weights.gguf",
    "quantize_config.json",
    "hf_quant_config.json",
    "training_args.bin",
    "trainer_state.json",
    "modeling_custom.py",
    "README.md",
    "figure.png",
    ".gitattributes",
    ".git/config.json",
    "original/params.json",
    "onnx/tokenizer.json",
    "state.pkl",
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_what_travels_and_what_stays(tmp_path: Path) -> None:
    fill(tmp_path, TRAVELS + STAYS)
    assert sorted(sidecar_files(tmp_path)) == sorted(TRAVELS)


def test_copies_are_exact_and_in_place(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, TRAVELS)
    (source / "tokenizer.json").write_bytes(bytes(range(256)) * 50_000)
    with ArtifactWriter(tmp_path / "out") as writer:
        for name, path in sidecar_files(source).items():
            writer.copy_file(path, name)
        (scratch,) = tmp_path.glob(".out.partial")
        assert snapshot(scratch) == snapshot(source)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, ["vocab.json"])
    (tmp_path / "secret").write_text("x")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"tokenizer\.json is a link out of the folder"):
        sidecar_files(source)


def test_links_within_the_folder_and_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot_folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    fill(snapshot_folder, ["vocab.json"])
    fill(tmp_path / "models--a--b" / "blobs", ["abc"])
    (snapshot_folder / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot_folder / "merges.txt").symlink_to("vocab.json")
    found = sidecar_files(snapshot_folder)
    assert sorted(found) == ["merges.txt", "tokenizer.json", "vocab.json"]
    assert found["tokenizer.json"].read_text() == "abc"


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer, pytest.raises(SourceError, match="cannot be read"):
        writer.copy_file(tmp_path / "nothing")
