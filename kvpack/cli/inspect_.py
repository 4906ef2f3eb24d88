"""`kvpack inspect`: what is inside a model, a calibration or an artifact, from headers alone."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.describe import describe, side_text
from kvpack.cli.experts import expert_lines
from kvpack.cli.inspect_calibration import CALIBRATION_FILE, inspect_calibration
from kvpack.cli.reading import reading_data, reading_rows
from kvpack.cli.run import Result, Session
from kvpack.cli.sparsity import sparsity_data, sparsity_lines
from kvpack.core.errors import SourceError
from kvpack.recipe.build import to_mapping
from kvpack.report import human_bytes, kv_bytes_per_token

if TYPE_CHECKING:
    from kvpack.artifact.manifest import Manifest, PackedLinear


def inspect_(
    session: Session,
    path: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of a model, a calibration or an artifact.")
    ],
) -> Result:
    """Show what is inside a model, a calibration or an artifact."""
    from kvpack.artifact.manifest import MANIFEST_FILE

    if not path.is_dir():
        raise SourceError("is not a folder", where=str(path), hint="give a model, calibration or artifact")
    for file, show in (
        (MANIFEST_FILE, _artifact),
        (CALIBRATION_FILE, inspect_calibration),
        ("config.json", _model),
    ):
        if (path / file).is_file():
            return show(path)
    raise SourceError(
        "holds neither a model, nor a calibration, nor an artifact",
        where=str(path),
        hint=f"they have a config.json, a {CALIBRATION_FILE} or a {MANIFEST_FILE}",
    )


def _artifact(path: Path) -> Result:
    from kvpack.artifact.reader import read_manifest

    manifest = read_manifest(path)
    base, totals = manifest.base_model, manifest.totals
    data: dict[str, Any] = {
        "type": "artifact",
        "format_version": manifest.format_version,
        "recipe": {
            "name": manifest.recipe.name,
            "variant": manifest.recipe.variant,
            "overrides": list(manifest.recipe.overrides),
            "sha256": manifest.recipe.sha256,
        },
        "base_model": {
            "architecture": base.architecture,
            "parameters": base.parameters,
            "dtype": base.dtype,
            "repository": base.repository,
            "revision": base.revision,
        },
        "weight_bytes": totals.weight_bytes,
        "bits_per_weight": totals.bits_per_weight,
        "weights": _schemes(manifest),
        "lossless": _lossless(manifest),
        "copied_tensors": len(manifest.copied),
        "dropped": [{"name": d.name, "reason": d.reason} for d in manifest.dropped],
        "sparsity": sparsity_data(manifest.sparsity),
        "kv": _kv(manifest),
        "calibration": manifest.calibration,
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "versions": manifest.versions,
    }
    return Result(data, tuple(_artifact_lines(data, manifest)))


def _artifact_lines(data: dict[str, Any], manifest: Manifest) -> list[Any]:
    base, recipe = data["base_model"], data["recipe"]
    variant = f"@{recipe['variant']}" if recipe["variant"] else ""
    head = [
        ("recipe", " ".join([f"{recipe['name']}{variant}", *recipe["overrides"]])),
        ("base model", f"{base['architecture']}, {base['parameters']:,} parameters, {base['dtype']}"),
        ("files", f"{len(data['files'])}, {human_bytes(manifest.nbytes)}"),
        ("weights", f"{human_bytes(data['weight_bytes'])}, {data['bits_per_weight']:.2f} bits per weight"),
    ]
    if coded := data["lossless"]:
        sizes = f"{human_bytes(coded['bytes'])} for {human_bytes(coded['unpacked_bytes'])}"
        ratio = coded["unpacked_bytes"] / coded["bytes"]
        head.append(("lossless", f"{sizes}, {ratio:.3f}x, {coded['tensors']} tensors coded"))
    lines: list[Any] = [table(("artifact", f"format {manifest.format_version}"), head)]
    if data["weights"]:
        rows = [
            (w["scheme"], w["tensors"], f"{w['bits_per_element']:.2f}", human_bytes(w["bytes"]), _error(w))
            for w in data["weights"]
        ]
        columns = ("packed weights", "tensors", "bits/w", "bytes", "worst error")
        lines += ["", table(columns, rows, right=columns[1:])]
    if found := expert_lines((data["calibration"] or {}).get("experts")):
        lines += ["", *found]
    if sparse := sparsity_lines(data["sparsity"]):
        lines += ["", *sparse]
    if kv := data["kv"]:
        last = manifest.kv[-1]
        about = [
            ("keys", side_text(last, "key")),
            ("values", side_text(last, "value")),
            ("policy", describe(last.policy)),
            *reading_rows(kv["reading"]),
            ("per token", f"{human_bytes(kv['bytes_per_token'])} once it is encoded"),
        ]
        lines += ["", table(("KV cache", f"{kv['layers']} layers"), about)]
    return lines


def _error(scheme: dict[str, Any]) -> str:
    worst = scheme["worst_relative_error"]
    return "" if worst is None else f"{worst:.4f}"


def _schemes(manifest: Manifest) -> list[dict[str, Any]]:
    """Packed layers that share codec and solver, as one row."""
    groups: dict[str, list[PackedLinear]] = defaultdict(list)
    for linear in manifest.weights.values():
        groups[f"{describe(linear.codec)}; {describe(linear.solver)}"].append(linear)
    rows = []
    for scheme, linears in groups.items():
        nbytes = sum(x.nbytes for x in linears)
        errors = [x.relative_error for x in linears if x.relative_error is not None]
        rows.append(
            {
                "scheme": scheme,
                "codec": to_mapping(linears[0].codec),
                "solver": to_mapping(linears[0].solver),
                "tensors": len(linears),
                "bytes": nbytes,
                "bits_per_element": 8 * nbytes / sum(math.prod(x.shape) for x in linears),
                "worst_relative_error": max(errors, default=None),
            }
        )
    return rows


def _lossless(manifest: Manifest) -> dict[str, Any] | None:
    """What lossless coding saves on the tensors that it was used on; None where it was not."""
    coded = [r for linear in manifest.weights.values() for r in linear.tensors.values() if r.packed]
    if not coded:
        return None
    return {
        "tensors": len(coded),
        "bytes": sum(record.nbytes for record in coded),
        "unpacked_bytes": sum(record.logical.nbytes for record in coded),
    }


def _kv(manifest: Manifest) -> dict[str, Any] | None:
    if not manifest.kv:
        return None
    last = manifest.kv[-1]
    sides = {
        name: {
            "transforms": to_mapping(side.transforms),
            "folded": side.folded,
            "codecs": to_mapping(side.codecs),
        }
        for name, side in (("key", last.key), ("value", last.value))
    }
    return {
        "layers": len(manifest.kv),
        **sides,
        "policy": to_mapping(last.policy),
        "reading": reading_data(manifest.kv),
        "bytes_per_token": float(kv_bytes_per_token(manifest.kv, manifest.base_model.dtype)),
    }


def _model(path: Path) -> Result:
    from kvpack.models.source import read_checkpoint, read_json

    config, tensors = read_json(path / "config.json"), read_checkpoint(path)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    data: dict[str, Any] = {
        "type": "model",
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "tensors": len(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sorted(sizes.items())),
        "files": sorted({t.file for t in tensors.values()}),
    }
    rows = [
        ("architecture", data["architecture"]),
        ("parameters", f"{data['parameters']:,} in {data['tensors']} tensors"),
        ("size", ", ".join(f"{human_bytes(n)} {dtype}" for dtype, n in data["bytes_by_dtype"].items())),
        ("files", len(data["files"])),
    ]
    return Result(data, (table(("model", str(path)), rows),))
