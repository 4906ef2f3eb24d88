"""GPTQ with kvpack and with GPTQModel: time of calibration and export, and perplexity afterwards.

    python benchmarks/gptq_peer.py --peer-python PEER/bin/python --layers 4 --samples 16
    python benchmarks/gptq_peer.py --peer-python PEER/bin/python  # the stated size: 24 layers, 128 x 512
    python benchmarks/gptq_peer.py --peer-python PEER/bin/python --model MODEL --text TEXT --group 64

The peer's environment needs `torch==2.13.0` (first), `gptqmodel==7.6.0`, `transformers==5.23.0` and
`numpy==2.2.*`; it does not need kvpack. Without `--model` a synthetic Llama checkpoint of the stated
shape is made (random bf16 weights: good for time, meaningless for quality).

Both programs get the same checkpoint, the same token ids, as many threads, and the same settings:
integer zeros, damping 0.01, columns in their own order, every layer measured behind the packed ones
before it (true sequential, the default of both) or, with `--at-once`, all layers of a block measured
in the unpacked block. Every run is a process of its own, and the programs take turns; each packs a
small model first, and compiles what it compiles.
Seconds are those from before the weights are read until the result is on the disk, imports left out;
kvpack's include its checks of the source and the reading of the text, the peer is given token ids.
On a machine that others use as well, only the processor's seconds mean something. Perplexity is that
of the packed model in transformers, bf16, over the same windows of `--text`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
WINDOW, WINDOWS = 512, 24
SMALL = {"layers": 1, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2, "vocabulary": 512}
SMALL |= {"samples": 4, "tokens": 64}
CHANGES = ["calibration.samples=4", "calibration.sample_tokens=64", "weights.0.codec.group.size=32"]
"""A first job that is not timed: both programs compile something when they run for the first time."""
Job = dict[str, Any]


def perplexity(model: Any, windows: list[list[int]]) -> float:
    """Exponential of the mean cross entropy of next tokens over windows of token ids."""
    import torch

    losses = []
    with torch.no_grad():
        for window in torch.tensor(windows):
            scores = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(scores, window[1:]).double())
    return math.exp(float(torch.stack(losses).mean()))


def timed(work: Callable[[], None], version: str) -> Job:
    """Seconds of the wall clock and of the processor that all threads of some work took."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "version": version,
    }


def _scored(found: Job, job: Job, load: Any) -> Job:
    return {**found, "perplexity": perplexity(load(), job["windows"])} if job["windows"] else found


def prepare(job: Job) -> Job:
    """Make the checkpoint where none is given; the ids that both programs see."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.synthetic_source import Shape, write_source
    from kvpack import pipeline

    torch.set_num_threads(job["threads"])
    if job["shape"]:
        write_source(Path(job["source"]), Shape(**job["shape"]))
    samples = pipeline._samples(
        pipeline.make_plan(Path(job["source"]), "w4", job["changes"]), pipeline.CLOSED
    )
    windows = []
    if job["text"]:
        text = Path(job["text"]).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(job["source"])(text, verbose=False)["input_ids"]
        windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(min(WINDOWS, len(ids) // WINDOW))]
    return {"ids": samples.tokens.tolist(), "windows": windows}


def run_kvpack(job: Job) -> Job:
    """Calibrate and export."""
    import torch

    import kvpack
    from kvpack import pipeline

    for module in ("calibrate.sequential", "artifact.writer", "packing", "models.tokenizer", "kernels.gptq"):
        importlib.import_module(f"kvpack.{module}")
    torch.set_num_threads(job["threads"])

    def work() -> None:
        plan = pipeline.make_plan(Path(job["source"]), "w4", job["changes"])
        pipeline.export(plan, Path(job["out"]))

    found = timed(work, f"kvpack {kvpack.__version__}")
    return _scored(found, job, lambda: kvpack.load(job["out"], dtype=torch.bfloat16))


def run_peer(job: Job) -> Job:
    """Load, quantise, save."""
    import gptqmodel
    import torch

    torch.set_num_threads(job["threads"])
    settings = gptqmodel.QuantizeConfig(
        bits=4,
        group_size=job["group"],
        sym=False,
        desc_act=False,
        act_group_aware=False,
        damp_percent=0.01,
        true_sequential=job["sequential"],
        offload_to_disk=False,
        device="cpu",
    )
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["ids"]]
    dtype = getattr(torch, job["dtype"])

    def work() -> None:
        model = gptqmodel.GPTQModel.load(job["source"], settings, dtype=dtype)
        model.quantize(samples, batch_size=job["batch"])
        model.save(job["out"])

    found = timed(work, f"GPTQModel {gptqmodel.__version__}")

    def load() -> Any:
        backend = gptqmodel.BACKEND.GPTQ_TORCH
        return gptqmodel.GPTQModel.load(job["out"], device="cpu", backend=backend, dtype=torch.bfloat16).model

    return _scored(found, job, load)


ROLES = {"prepare": prepare, "kvpack": run_kvpack, "peer": run_peer}


def spoken(python: str, role: str, job: Job, scratch: Path) -> Job:
    """The answer of a process of its own; what it prints goes to standard error."""
    question, answer = scratch / "question.json", scratch / "answer.json"
    question.write_text(json.dumps(job))
    threads = str(job["threads"])
    workers = str(max(2, job["threads"]))  # the peer refuses to work with one
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": workers}
    environment |= {"HF_HUB_OFFLINE": "1", "KVPACK_BENCHMARK_ROLE": role}
    command = [python, str(HERE), str(question), str(answer)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    found: Job = json.loads(answer.read_text())
    return found


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, list[Job]]:
    """All runs, by program."""
    order = ["calibration.sequential=false"] if arguments.at_once else []
    names = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocabulary", "samples", "tokens")
    job: Job = {
        "source": str(arguments.model or scratch / "source"),
        "shape": None if arguments.model else {name: getattr(arguments, name) for name in names},
        "changes": [
            f"calibration.samples={arguments.samples}",
            f"calibration.sample_tokens={arguments.tokens}",
            f"weights.0.codec.group.size={arguments.group}",
            *order,
        ],
        "text": str(arguments.text or ""),
        "threads": arguments.threads,
        "group": arguments.group,
        "dtype": arguments.peer_dtype,
        "batch": arguments.peer_batch,
        "sequential": not arguments.at_once,
    }
    pythons = {"peer": arguments.peer_python, "kvpack": sys.executable}
    small = {
        **job,
        "source": str(scratch / "small"),
        "shape": SMALL,
        "changes": [*CHANGES, *order],
        "text": "",
        "group": 32,
    }
    for each in (small, job):
        if each["shape"]:
            Path(each["source"]).mkdir()
        each.update(spoken(sys.executable, "prepare", each, scratch))
    runs: dict[str, list[Job]] = {"peer": [], "kvpack": []}
    for number in range(arguments.repeat + 1):
        for role, python in pythons.items():
            given = {**(job if number else small), "out": str(scratch / f"{role}-{number}")}
            found = spoken(python, role, given, scratch)
            if number:
                print(role, found, file=sys.stderr)
                runs[role].append(found)
    return runs


def report(arguments: argparse.Namespace, runs: dict[str, list[Job]]) -> str:
    """A table of both programs."""
    what = "the model given" if arguments.model else f"{arguments.layers} layers, hidden {arguments.hidden}"
    order = "all layers of a block measured at once" if arguments.at_once else "true sequential"
    lines = [
        f"# GPTQ, calibration and export: {what}, {arguments.samples} x {arguments.tokens} tokens",
        "",
        f"W4, groups of {arguments.group}; {arguments.threads} threads, load {os.getloadavg()[0]:.1f} at the "
        f"end, {platform.machine()}, Python {platform.python_version()}; peer in {arguments.peer_dtype}, "
        f"batches of {arguments.peer_batch}. Both: {order}.",
        "",
        "| program | s, median | least | most | s of the processor | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for found in runs.values():
        seconds = [run["seconds"] for run in found]
        score = f"{found[0]['perplexity']:.3f}" if "perplexity" in found[0] else "not measured"
        times = f"{statistics.median(seconds):.1f} | {min(seconds):.1f} | {max(seconds):.1f}"
        processor = statistics.median(run["processor"] for run in found)
        lines.append(f"| {found[0]['version']} | {times} | {processor:.1f} | {score} |")
    pairs = list(zip(runs["peer"], runs["kvpack"], strict=True))
    wall, processor = (statistics.median(a[x] / b[x] for a, b in pairs) for x in ("seconds", "processor"))
    lines += ["", f"kvpack is {wall:.2f} times as fast; by seconds of the processor {processor:.2f} times."]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="interpreter of the peer's environment")
    parser.add_argument("--peer-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--peer-batch", type=int, default=8, help="samples per forward")
    parser.add_argument("--at-once", action="store_true", help="measure the layers of a block together")
    parser.add_argument("--model", type=Path, help="checkpoint; by default one is made")
    parser.add_argument("--text", type=Path, help="text that perplexity is measured on")
    sizes = {"layers": 24, "hidden": 1024, "ffn": 2816, "heads": 16, "kv-heads": 8, "vocabulary": 32000}
    sizes |= {"samples": 128, "tokens": 512, "group": 128, "threads": 2, "repeat": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, or answer as one of the processes."""
    if role := os.environ.get("KVPACK_BENCHMARK_ROLE"):
        question, answer = map(Path, sys.argv[1:])
        answer.write_text(json.dumps(ROLES[role](json.loads(question.read_text()))))
        return
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        text = report(arguments, measure(arguments, Path(scratch)))
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    main()
