"""Options of `kvpack bench`, and which go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.core.errors import UsageError

OptionalArtifact = Annotated[
    Path | None,
    typer.Argument(metavar="ARTIFACT", help="Folder that kvpack export wrote; not with --synthetic."),
]
BenchSource = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        help="The uncompressed model, measured beside the artifact: folder or hub id. It runs in plain "
        "transformers, with DynamicCache.",
    ),
]
Synthetic = Annotated[
    str | None,
    typer.Option(
        "--synthetic",
        metavar="SHAPE",
        help="Make a model of this shape with random weights, export it with --recipe, measure both: "
        "llama-1b, llama-3b, llama-8b, qwen3-0.6b, tiny.",
    ),
]
Layers = Annotated[
    int | None, typer.Option("--layers", min=1, help="Of --synthetic; by default the shape's own.")
]
Keep = Annotated[
    Path | None,
    typer.Option("--keep", metavar="FOLDER", help="Keep model and artifact of --synthetic here."),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="quantized-cache",
        help="Measure a third thing: the source's weights with transformers' QuantizedCache (fp8).",
    ),
]
Contexts = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        metavar="LIST",
        help="Tokens in the cache when steps are measured, such as 512,4096 (the default); repeatable.",
    ),
]
PromptTokens = Annotated[
    int | None, typer.Option("--prompt-tokens", min=1, help="Of the prompt whose prefill is measured; 512.")
]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated after the prompt.")]
Repeat = Annotated[
    int, typer.Option("--repeat", min=1, help="Rounds of every measurement; each has a turn for every model.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Decode steps per round at every context.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Of the computation; torch's own choice by default.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="Of the computation of all; auto: each model's own.",
    ),
]
Fill = Annotated[
    str,
    typer.Option(
        "--fill",
        metavar="auto|model|random",
        help="How contexts get into the cache: computed by the model, or random keys and values. auto: by "
        "the model up to 2048 tokens.",
    ),
]
Cold = Annotated[
    bool,
    typer.Option(
        "--cold",
        help="Drop the models' files from the system's memory before every loading, as after a start of the "
        "machine; libraries stay. By default all files are read beforehand.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights, tokens, keys and values.")]


def check_choice(
    path: Path | None, source: str | None, synthetic: str | None, of_synthetic: dict[str, Any]
) -> None:
    """Refuse options that contradict each other.

    Args:
        path: the artifact.
        source: its source.
        synthetic: the shape.
        of_synthetic: by option's name what makes sense with a shape only.

    Raises:
        UsageError: an artifact and a shape, neither, or options of the other.
    """
    if (path is None) == (synthetic is None):
        what = "an artifact and --synthetic" if path else "neither an artifact nor --synthetic"
        hint = "kvpack bench ARTIFACT --source MODEL, or kvpack bench --synthetic llama-1b --recipe rtn"
        raise UsageError(f"{what} were given", hint=hint)
    given = [name for name, value in of_synthetic.items() if value]
    if synthetic is None and given:
        raise UsageError(f"{given[0]} belongs to --synthetic", why="the artifact is finished")
    if synthetic is not None and source is not None:
        raise UsageError("--source and --synthetic were given", hint="the shape is its own source")
    if synthetic is not None and not of_synthetic["--recipe"]:
        raise UsageError("--synthetic needs --recipe", hint="for example --recipe rtn")
