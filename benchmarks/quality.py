"""Quality of every bundled recipe beside its source, from one run per model.

    python benchmarks/quality.py                             # the embedded model, offline
    python benchmarks/quality.py --output docs/results/quality \
        --model reference-3m=MODELS/reference-3m:TEXTS/reference_valid.txt \
        --model stories260K=MODELS/stories260K:TEXTS/tinystories_valid.jsonl

Calibration text and evaluation text never overlap: a text of several documents (a .jsonl file,
``builtin:stdlib``) is evaluated on its first half and calibrates on its second; a .txt file is
evaluated as a whole, and ``builtin:stdlib`` calibrates.

``--output NAME`` writes NAME.json and the tables in NAME.md. There a table stands between two
marker comments; text outside of them, such as a reading of the numbers, survives another run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import kvpack
from benchmarks.quality_entries import SECTIONS, TITLES, Entry
from benchmarks.quality_tables import BUILTIN, Row, Subject, markdown, write_blocks, write_json
from kvpack.artifact.reader import read_manifest
from kvpack.calibrate.data import load_text
from kvpack.core.data_files import data_dir
from kvpack.evaluate.protocols import Measured, Protocol, chunks, longest_step, measure
from kvpack.loading.load import load, load_source, load_tokenizer
from kvpack.pipeline import export, make_plan
from kvpack.runtime.install import new_cache

CONTEXT_TOKENS = 1024
DECODE_CONTEXT = 384
"""Tokens per chunk of protocol B, short so that most recipes can go token by token."""
ERROR_PIECES = 4
"""Chunks whose keys are compared one by one."""


def prepare(argument: str, scratch: Path, tokens: int, decode_tokens: int) -> Subject:
    """Read ``NAME=MODEL:TEXT``, split the text, load the source."""
    name, _, rest = argument.partition("=")
    path, _, text = rest.partition(":")
    documents: Sequence[str] = load_text(text).documents
    calibration, calibration_name = BUILTIN, BUILTIN
    shown = text if text.startswith("builtin:") else Path(text).name
    if len(documents) > 1:
        half = len(documents) // 2
        file = scratch / f"{name}.calibration.jsonl"
        file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[half:]))
        calibration, calibration_name = str(file), f"{shown}, second half"
        documents, shown = documents[:half], f"{shown}, first half"
    if not text.endswith(".jsonl"):
        documents = ["\n\n".join(documents)]
    source = load_source(path)
    context = min(CONTEXT_TOKENS, source.config.max_position_embeddings)
    tokenizer = load_tokenizer(path)
    pieces = chunks(documents, tokenizer, context, tokens)
    decode_pieces = _equal(
        chunks(documents, tokenizer, min(context, DECODE_CONTEXT), sys.maxsize), decode_tokens
    )
    return Subject(name, Path(path), shown, calibration, calibration_name, source, pieces, decode_pieces)


def _equal(pieces: Sequence[Tensor], limit_tokens: int) -> list[Tensor]:
    """Only the longest chunks, which decode together in batches; about `limit_tokens` of them."""
    longest = max(len(piece) for piece in pieces)
    return [piece for piece in pieces if len(piece) == longest][: max(1, limit_tokens // longest)]


def measure_entry(subject: Subject, entry: Entry, scratch: Path, decode: bool) -> Iterator[tuple[str, Row]]:
    """Export, load and score one recipe; yields (protocol, row)."""
    text = (f"calibration.data={json.dumps(subject.calibration)}", f"calibration.samples={subject.samples}")
    plan = make_plan(subject.path, entry.recipe, (*entry.overrides, *text))
    path = scratch / "artifact"
    export(plan, path, force=True)
    bits = read_manifest(path).totals.bits_per_weight
    model = load(path)
    for protocol in ("prefill", "decode") if decode else ("prefill",):
        step = longest_step(plan.kv)
        pieces = subject.pieces if protocol == "prefill" else subject.decode_pieces
        found = run(model, subject.source, pieces, protocol, step, cached=bool(plan.kv))
        row = _row(entry, found, bits, step if protocol == "decode" else None)
        if plan.kv and protocol == "prefill":
            row = replace(row, key_error=key_error(model, subject.source, pieces[:ERROR_PIECES]))
        yield protocol, row
    del model
    gc.collect()


def key_error(model: Any, source: Any, pieces: Sequence[Tensor]) -> float:
    """Squared error of stored keys relative to the keys, over all layers.

    Every layer stores the source's own keys, so that errors of one layer do not reach the next.
    """
    error = total = 0.0
    with torch.inference_mode():
        for ids in pieces:
            exact = source(ids[None], use_cache=True, output_hidden_states=True)
            cache = new_cache(model, exact_prefill=False)
            cache.begin(1, len(ids))
            cache.track.locate(torch.arange(len(ids))[None])
            for i, layer in enumerate(cache.layers):
                if layer.plan.policy.needs_hidden:
                    cache.track.hidden[i] = exact.hidden_states[i]
                keys, values = exact.past_key_values.layers[i].keys, exact.past_key_values.layers[i].values
                stored, _ = layer.update(keys, values)
                error += float((stored.float() - keys.float()).square().sum())
                total += float(keys.float().square().sum())
    return error / total


def run(
    model: Any, source: Any, pieces: Sequence[Tensor], protocol: Protocol, step: int, *, cached: bool
) -> Measured:
    """Score `model` beside `source` under one protocol."""
    return measure(
        model,
        source,
        pieces,
        new_cache=(lambda exact: new_cache(model, exact_prefill=exact)) if cached else None,
        protocols=(protocol,),
        step_tokens=step,
        batch=4 if protocol == "prefill" else 16,
    )


def _row(entry: Entry, found: Measured, bits: float, step: int | None) -> Row:
    (scores,) = found.packed.values()
    held = found.kv_bytes > 0
    return Row(
        entry.label,
        entry.overrides,
        scores,
        bits,
        8 * found.kv_bytes / found.kv_elements if held else None,
        found.kv_bytes / found.kv_tokens if held else None,
        step,
    )


def source_rows(subject: Subject) -> Iterator[tuple[str, Row]]:
    """The source by itself, and how far it is from itself in float32: the floor of the KL."""
    config = subject.source.config
    width = 8 * subject.source.dtype.itemsize
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * heads * head_dim * layers * width / 8
    for protocol, pieces in (("prefill", subject.pieces), ("decode", subject.decode_pieces)):
        (scores,) = run(subject.source, subject.source, pieces, "prefill", 1, cached=False).packed.values()
        yield protocol, Row("source", (), scores, width, width, kv_bytes)
    if width < 32:
        wide = load_source(subject.path).float()
        (scores,) = run(wide, subject.source, subject.pieces, "prefill", 1, cached=False).packed.values()
        yield "prefill", Row("source computed in float32", (), scores, width)


def tables(subject: Subject, sections: Sequence[str], scratch: Path) -> dict[str, list[Row]]:
    """All rows of a model by table."""
    rows: dict[str, list[Row]] = {name: [] for name in TITLES if name in sections or name == "decode"}
    for protocol, row in source_rows(subject):
        targets = ["decode"] if protocol == "decode" else [n for n in rows if n != "decode"]
        for name in targets:
            if row.label == "source" or name == "weights":
                rows[name].append(row)
    done: dict[Entry, Row] = {}
    for section in sections:
        for entry in (e.at(subject.group) for e in SECTIONS[section]):
            start = time.perf_counter()
            if entry not in done:
                for protocol, row in measure_entry(subject, entry, scratch, section == "cache"):
                    if protocol == "decode":
                        rows["decode"].append(row)
                    else:
                        done[entry] = row
            rows[section].append(done[entry])
            seconds = time.perf_counter() - start
            shown = done[entry].scores
            print(f"{subject.name}: {entry.label}: {shown} {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows if "cache" in sections else {k: v for k, v in rows.items() if k != "decode"}


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "kvpack": kvpack.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def header(arguments: argparse.Namespace) -> str:
    """Command and versions, without paths of this machine."""
    models = "".join(f" --model {_public(m)}" for m in arguments.model or ())
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"# Quality of the bundled recipes\n\nCommand: `python benchmarks/quality.py{models} "
        f"--tokens {arguments.tokens} --decode-tokens {arguments.decode_tokens}`; {made_with}, CPU. "
        "Calibration draws its samples with seed 0; evaluation uses no random numbers."
    )


def _public(argument: str) -> str:
    name, _, rest = argument.partition("=")
    path, _, text = rest.partition(":")
    return f"{name}={Path(path).name}:{text if text.startswith('builtin:') else Path(text).name}"


def main() -> None:
    """Measure every model and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", metavar="NAME=MODEL:TEXT")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tokens", type=int, default=16384, help="tokens scored with protocol A")
    parser.add_argument("--decode-tokens", type=int, default=8192, help="tokens scored with protocol B")
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.md and NAME.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    blocks, models = {"header": header(arguments)}, {}
    for argument in arguments.model or [f"demo={data_dir('calibration') / 'demo_model'}:{BUILTIN}"]:
        with tempfile.TemporaryDirectory() as scratch:
            subject = prepare(argument, Path(scratch), arguments.tokens, arguments.decode_tokens)
            # Always in this order: a recipe that two sections share is decoded with the cache's.
            sections = [name for name in SECTIONS if name in arguments.sections]
            found = tables(subject, sections, Path(scratch))
        blocks |= {f"{subject.name} {name}": markdown(subject, name, rows) for name, rows in found.items()}
        models[subject.name] = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    print("\n\n".join(blocks.values()))
    if arguments.output:
        write_blocks(arguments.output.with_suffix(".md"), blocks)
        write_json(arguments.output.with_suffix(".json"), versions(), models)


if __name__ == "__main__":
    main()
