import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvpack.artifact.canonical import table_json
from kvpack.artifact.manifest import Manifest, TensorRecord
from kvpack.artifact.reader import Artifact
from kvpack.artifact.tensor_file import TensorFile, split_shards
from kvpack.artifact.writer import ArtifactWriter
from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.safetensors_header import DTYPES, read_header
from kvpack.core.strict_json import parse_json
from kvpack.core.tensor_io import read_tensor
from kvpack.core.types import TensorSpec
from tests.artifact.conftest import (
    CODEC,
    LINEARS,
    kv_layer,
    kv_state,
    snapshot,
    specs_of,
    tensors,
    write_artifact,
)

NAMES = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.dictionaries(
    NAMES, st.builds(TensorSpec, SHAPES, st.sampled_from(sorted(DTYPES.values()))), max_size=8
)


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    raw = torch.randint(
        0, 2 if spec.dtype == "bool" else 256, (spec.nbytes,), generator=generator, dtype=torch.uint8
    )
    return raw.view(getattr(torch, spec.dtype)).reshape(spec.shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=SPECS, seed=st.integers(0, 1000))
def test_any_tensor_comes_back_and_the_reference_reader_agrees(tmp_path: Path, specs, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = {name: random_tensor(spec, generator) for name, spec in specs.items()}
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    with TensorFile(path, specs) as file:
        for name, tensor in made.items():
            file.write(name, tensor)
        record = file.close()
    header = read_header(path)
    assert record.bytes == path.stat().st_size
    assert list(header.tensors) == sorted(
        specs, key=lambda n: (header.tensors[n].start, header.tensors[n].stop)
    )
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(specs)
        for name, tensor in made.items():
            assert same_bytes(read_tensor(path, header.tensors[name]), tensor)
            assert same_bytes(reference.get_tensor(name), tensor)


@settings(max_examples=50, deadline=None)
@given(specs=SPECS, limit=st.integers(1, 4000))
def test_shards_keep_order_and_limit(specs, limit) -> None:
    shards = split_shards(specs, limit)
    assert [n for shard in shards for n in shard] == list(specs)
    assert all(len(s) == 1 or sum(t.nbytes for t in s.values()) <= limit for s in shards if s)
    assert all(shards) or not specs


def test_everything_that_was_written_is_read(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    assert opened.tensor_names == tuple(tensors())
    for name, tensor in tensors().items():
        assert same_bytes(opened.read(name), tensor)
    weight = torch.randn(LINEARS["blocks.0.up"], generator=torch.Generator().manual_seed(0))
    payload = opened.solution("blocks.0.up").payload
    assert payload.shape == weight.shape
    decoded = opened.manifest.weights["blocks.0.up"].codec.decode(payload, {}, torch.float32)
    assert torch.equal(decoded, CODEC.decode(CODEC.encode(weight, {}), {}, torch.float32))
    assert same_bytes(opened.kv_state()["layers.0.key.0.perm"], kv_state()["layers.0.key.0.perm"])
    assert opened.manifest.kv == (kv_layer(),)
    assert opened.nbytes == sum(p.stat().st_size for p in artifact.iterdir())
    assert sum(1 for p in artifact.glob("kvpack-0*")) > 1


def test_what_is_not_there_is_an_error(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    with pytest.raises(ArtifactError, match="no tensor 'nothing'"):
        opened.read("nothing")
    with pytest.raises(ArtifactError, match="no packed layer 'norm'"):
        opened.solution("norm")


def test_the_manifest_survives_its_own_json(artifact: Path) -> None:
    data = (artifact / "kvpack.json").read_bytes()
    manifest = Manifest.from_json(data)
    assert manifest.to_json() == data
    assert manifest == Artifact.open(artifact).manifest


def test_two_writes_are_byte_identical(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a" / "first")
    write_artifact(tmp_path / "second")
    assert snapshot(tmp_path / "a" / "first") == snapshot(tmp_path / "second")


def test_memory_layout_does_not_reach_the_file(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for name, tensor in (("a", matrix), ("b", matrix.T.contiguous().T)):
        with TensorFile(tmp_path / name, {"x": TensorSpec((3, 4), "float32")}) as file:
            file.write("x", tensor)
            file.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("wrong", ["name", "shape", "dtype", "too many", "too few"])
def test_what_differs_from_the_plan_is_refused_and_leaves_nothing(tmp_path: Path, wrong: str) -> None:
    def write() -> None:
        with ArtifactWriter(tmp_path / "out") as writer:
            writer.begin_weights({"x": TensorSpec((2,), "float32")})
            given = torch.zeros(3 if wrong == "shape" else 2).to(
                torch.int32 if wrong == "dtype" else torch.float32
            )
            if wrong != "too few":
                writer.write_tensor("y" if wrong == "name" else "x", given)
            if wrong == "too many":
                writer.write_tensor("x", given)
            writer.finish(None)

    with pytest.raises(KvpackError, match=r"planned|not complete"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_forgetting_to_finish_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "deep" / "out") as writer:
        writer.begin_weights(specs_of(tensors()))
    assert list(tmp_path.iterdir()) == []


def test_kv_state_must_be_what_was_planned(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer, pytest.raises(KvpackError, match=r"layers\.0"):
        writer.write_kv_state(specs_of(kv_state()), {})


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        NAMES,
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | NAMES,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
            max_leaves=8,
        ),
    )
)
def test_table_json_is_json_of_the_same_data(data) -> None:
    assert parse_json(table_json(data), where="x", error=ArtifactError) == data


def test_record_equality_ignores_the_hash() -> None:
    record = TensorRecord((2, 3), "float16", "00")
    assert record.matches(TensorSpec((2, 3), "float16"))
    assert not record.matches(TensorSpec((3, 2), "float16"))
    assert not record.matches(TensorSpec((2, 3), "bfloat16"))


def test_opening_needs_no_torch(artifact: Path) -> None:
    code = (
        "import sys; from kvpack.artifact.reader import Artifact; "
        f"Artifact.open({str(artifact)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_memory_of_writing_is_one_tensor(tmp_path: Path) -> None:
    code = f"""
import resource, torch
from pathlib import Path
from kvpack.artifact.writer import ArtifactWriter
from kvpack.core.types import TensorSpec
torch.ones(8).view(torch.uint8).numpy()
count, size = 24, 4 << 20
with ArtifactWriter(Path({str(tmp_path / "out")!r})) as writer:
    specs = {{f"t{{i}}": TensorSpec((size,), "uint8") for i in range(count)}}
    writer.begin_weights(specs, shard_bytes=8 * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        writer.write_tensor(f"t{{i}}", torch.full((size,), i, dtype=torch.uint8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 3 * (4 << 10)
