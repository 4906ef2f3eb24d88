"""`--target-bpw` and `--target-size`: a budget for the weights, and where its bits go."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.console import table
from kvpack.cli.options import byte_count
from kvpack.core.errors import UsageError
from kvpack.core.types import TensorSpec
from kvpack.evaluate.frontier import Axis
from kvpack.recipe.budget import Options
from kvpack.recipe.plan import Plan
from kvpack.report import human_bytes

TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        min=0.05,
        metavar="BITS",
        help="Choose every layer's bits so that the weights take at most this many per parameter, scales, "
        "zeros and all that is copied counted; lands within 1 % below.",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", metavar="SIZE", help="The same for all weights, e.g. 700MB or 1.2GiB."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Where measured sensitivities are kept for the next target; by default $KVPACK_CACHE, or a "
        "folder in the user's caches.",
    ),
]


_FRESH = ("budget.counts=all", "budget.bits=")


def with_target(overrides: list[str], bpw: float | None, size: str | None) -> list[str]:
    """Overrides, then what the flags say: a target replaces the recipe's, and widths found for it.

    Raises:
        UsageError: both flags, or no size.
    """
    if bpw is not None and size is not None:
        raise UsageError("--target-bpw and --target-size are both given", hint="leave one of them out")
    if size is not None:
        count = byte_count(size)
        return [*overrides, "budget.target_bpw=", f"budget.target_bytes={count}", *_FRESH]
    if bpw is not None:
        return [*overrides, "budget.target_bytes=", f"budget.target_bpw={bpw:g}", *_FRESH]
    return overrides


def compared_bits(
    axis: str, target_bpw: str | None, packed_bpw: str | None, recall: bool
) -> tuple[Axis, tuple[float, ...]]:
    """What `kvpack compare` puts on its axis, and the targets that its recipes are made for.

    Raises:
        UsageError: options that contradict each other, or a list of anything but widths.
    """
    if axis not in ("kv", "weights"):
        raise UsageError(f"--axis cannot be {axis!r}", hint="use kv or weights")
    if axis == "kv":
        if target_bpw or packed_bpw:
            raise UsageError("targets of bits per weight need --axis weights")
        return "kv", ()
    if recall:
        raise UsageError("--axis weights scores text", hint="leave out --task recall")
    if target_bpw and packed_bpw:
        raise UsageError("--target-bpw and --packed-bpw are both given", hint="leave one of them out")
    return "all" if target_bpw else "packed", _widths(target_bpw or packed_bpw)


def _widths(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < bits <= 32 for bits in found):
        raise UsageError(f"{text!r} is no list of bits per weight", hint="for example 2.5,3,4,8")
    return found


def budget_data(made: Plan) -> dict[str, Any] | None:
    """Where the bits of a plan with a budget go, as JSON data; None without one."""
    budget = made.recipe.recipe.budget
    if budget is None or budget.bits is None:
        return None
    options = Options.of(made, budget)
    return {
        "target_bytes": options.target,
        "bytes": options.used,
        "share": None if options.target is None else options.used / options.target,
        "counts": budget.counts,
        "bits_per_weight": 8 * options.used / options.elements,
        "by_role": _by_role(made),
        "by_layer": {name: budget.bits[name] for name in options.sizes if name in budget.bits},
    }


def _by_role(made: Plan) -> list[dict[str, Any]]:
    """One entry per role of packed layers, then per kind of copied tensor."""
    packed = defaultdict(list)
    for weight in made.weights.values():
        packed[weight.linear.role].append(weight)
    rows = []
    for role, weights in packed.items():
        elements = sum(w.linear.shape[0] * w.linear.shape[1] for w in weights)
        widths = Counter(getattr(w.codec, "bits", 0) for w in weights)
        nbytes = sum(w.nbytes for w in weights)
        rows.append(_role(role, len(weights), elements, nbytes, dict(sorted(widths.items()))))
    copied: dict[str, list[TensorSpec]] = defaultdict(list)
    for name, spec in made.copied.items():
        copied[_kind(made, name, spec)].append(spec)
    for kind, specs in sorted(copied.items()):
        rows.append(_role(kind, len(specs), sum(s.elements for s in specs), sum(s.nbytes for s in specs), {}))
    return rows


def _role(role: str, tensors: int, elements: int, nbytes: int, widths: dict[int, int]) -> dict[str, Any]:
    bits = 8 * nbytes / elements if elements else 0.0
    return {"role": role, "tensors": tensors, "bytes": nbytes, "bits_per_element": bits, "widths": widths}


def _kind(made: Plan, name: str, spec: TensorSpec) -> str:
    if name == made.model.embedding:
        return "embedding, copied"
    if any(linear.weight == name for linear in made.model.linears):
        role = next(linear.role for linear in made.model.linears if linear.weight == name)
        return f"{role}, copied"
    return "norms and biases" if len(spec.shape) == 1 else "other tensors"


def budget_lines(data: dict[str, Any]) -> Iterator[Any]:
    """The same for people: a row per role with a histogram of its widths, and the distance to the target."""
    widths = sorted({bits for row in data["by_role"] for bits in row["widths"]})
    heads = [f"{bits} bit" for bits in widths]
    rows = [
        (
            row["role"],
            row["tensors"],
            *(row["widths"].get(bits, "") for bits in widths),
            f"{row['bits_per_element']:.2f}",
            human_bytes(row["bytes"]),
        )
        for row in data["by_role"]
    ]
    columns = ("where the bits go", "tensors", *heads, "bits/w", "bytes")
    yield table(columns, rows, right=columns[1:])
    if data["target_bytes"] is not None:
        what = "all weights" if data["counts"] == "all" else "packed layers"
        yield (
            f"budget for {what}: {data['bytes']:,} of {data['target_bytes']:,} bytes, "
            f"{1 - data['share']:.2%} below the target; {data['bits_per_weight']:.3f} bits per weight"
        )
