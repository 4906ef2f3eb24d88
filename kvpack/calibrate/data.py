"""Calibration text: where it comes from, and how it becomes samples."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvpack.calibrate.identity import data_name
from kvpack.calibrate.recall_text import filler_count, read_spec, recall_samples, words_of
from kvpack.core.errors import UsageError
from kvpack.recipe.recipe import CalibrationRecipe

if TYPE_CHECKING:
    from torch import Tensor

_FIELDS = ("text", "content", "prompt")
_PIECE_CHARACTERS = 4_096
_SHORTEST_DOCSTRING = 200

# Modules with long docstrings, present in every supported Python. Changing the list changes the
# default calibration text.
_MODULES = (
    "argparse.py", "ast.py", "bisect.py", "calendar.py", "cmd.py", "codecs.py", "collections/__init__.py",
    "configparser.py", "contextlib.py", "copy.py", "csv.py", "dataclasses.py", "difflib.py", "doctest.py",
    "email/message.py", "enum.py", "filecmp.py", "fractions.py", "ftplib.py", "functools.py", "gettext.py",
    "glob.py", "hashlib.py", "heapq.py", "http/client.py", "http/cookiejar.py", "inspect.py",
    "ipaddress.py", "json/__init__.py", "locale.py", "logging/__init__.py", "logging/handlers.py",
    "mailbox.py", "mimetypes.py", "optparse.py", "os.py", "pickle.py", "pickletools.py", "pprint.py",
    "profile.py", "random.py", "reprlib.py", "sched.py", "shelve.py", "shutil.py", "smtplib.py",
    "socket.py", "statistics.py", "string.py", "subprocess.py", "tarfile.py", "tempfile.py",
    "textwrap.py", "threading.py", "timeit.py", "tokenize.py", "trace.py", "traceback.py", "typing.py",
    "unittest/case.py", "urllib/parse.py", "urllib/request.py", "uuid.py", "weakref.py",
    "xml/dom/minidom.py", "zipfile.py",
)  # fmt: skip


class Tokenizer(Protocol):
    """What sampling asks of a tokenizer."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that every sample starts with (usually the beginning-of-text token)."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""


class ModelTokenizer(Tokenizer, Protocol):
    """A tokenizer whose words can be asked for, too."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers makes it."""


@dataclass(frozen=True)
class CalibrationText:
    """Documents, with the name they were asked for by and the hash of what they say."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of all documents, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            raw = document.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.hexdigest()


def load_text(spec: str, *, allow_download: bool = False) -> CalibrationText:
    """Load calibration text.

    Args:
        spec: ``builtin:stdlib`` (prose that every Python carries, offline), a ``.txt``, ``.jsonl``
            or ``.parquet`` file, or ``hf:dataset[:config][:split][:field]``.
        allow_download: whether ``hf:`` may use the network.

    Raises:
        UsageError: unknown, unreadable, empty, or not permitted.
    """
    if spec.startswith("recall:"):
        raise UsageError("is text for calibration only", where=spec, hint="to score it, use --task recall")
    if spec.startswith("hf:"):
        documents: Iterable[str] = _hub(spec, allow_download)
    elif spec.startswith("builtin:"):
        documents = _builtin(spec)
    else:
        documents = _file(Path(spec).expanduser())
    kept = tuple(d for d in documents if d.strip())
    if not kept:
        raise UsageError("holds no text", where=spec, hint="calibration needs text to measure on")
    return CalibrationText(data_name(spec), kept)


def make_samples(
    text: CalibrationText, tokenizer: Tokenizer, samples: int, sample_tokens: int, seed: int
) -> Tensor:
    """Cut text into samples of equal length, in an order that `seed` decides.

    Returns:
        Token ids, int64 [samples, sample_tokens].

    Raises:
        UsageError: there is too little text.
    """
    import torch

    pieces = [p for document in text.documents for p in _pieces(document)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    body = sample_tokens - len(tokenizer.prefix)
    stream: list[int] = []
    for index in order:
        if len(stream) >= samples * body:
            break
        stream += tokenizer.encode(pieces[index])
    if len(stream) < samples * body:
        raise UsageError(
            f"{text.name} has {len(stream)} tokens, enough for {len(stream) // body} samples of "
            f"{sample_tokens}; {samples} are asked for",
            hint="give more text, or set calibration.samples or calibration.sample_tokens lower",
        )
    rows = torch.tensor(stream[: samples * body], dtype=torch.int64).view(samples, body)
    prefix = torch.tensor(tokenizer.prefix, dtype=torch.int64).expand(samples, -1)
    return torch.cat([prefix, rows], dim=1)


@dataclass(frozen=True)
class Samples:
    """Token ids [N, T] with their origin."""

    tokens: Tensor
    data: str
    data_sha256: str

    @property
    def tokens_sha256(self) -> str:
        """Hash of the token ids: the same text through another tokenizer is another calibration."""
        return fingerprint(self.tokens)


Sampler = Callable[[int, int, int], Samples]
"""(samples, tokens of each, seed) -> samples."""


def open_data(spec: str, tokenizer: ModelTokenizer, *, allow_download: bool = False) -> Sampler:
    """Calibration data by name: a text, see `load_text`, or ``recall:TOKENS[:FACTS]``.

    Raises:
        UsageError: it cannot be had, or the model does not know its words.
    """
    if not spec.startswith("recall:"):
        text = load_text(spec, allow_download=allow_download)
        return lambda *amount: Samples(make_samples(text, tokenizer, *amount), text.name, text.sha256)
    settings, words = read_spec(spec), words_of(tokenizer.tokenizer, str(tokenizer.tokenizer.name_or_path))
    filler_count(settings, words)  # what cannot be made is refused here

    def sampler(samples: int, sample_tokens: int, seed: int) -> Samples:
        tokens = recall_samples(settings, words, samples, sample_tokens, seed)
        return Samples(tokens, data_name(spec), fingerprint(tokens))

    return sampler


def draw(recipe: CalibrationRecipe, tokenizer: ModelTokenizer, *, allow_download: bool = False) -> Samples:
    """The samples that a recipe asks for.

    Raises:
        UsageError: the data cannot be had, is too short, or is in words that the model does not know.
    """
    sampler = open_data(recipe.data, tokenizer, allow_download=allow_download)
    return sampler(recipe.samples, recipe.sample_tokens, recipe.seed)


def fingerprint(samples: Tensor) -> str:
    """Hash of token ids."""
    return hashlib.sha256(samples.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _pieces(document: str) -> Iterator[str]:
    """Cut a long document at line ends, so that samples come from all over it."""
    start = 0
    while start < len(document):
        stop = start + _PIECE_CHARACTERS
        newline = document.rfind("\n", start, stop)
        stop = newline + 1 if newline >= 0 and stop < len(document) else stop
        yield document[start:stop]
        start = stop


@functools.cache
def _builtin(spec: str) -> tuple[str, ...]:
    if spec != "builtin:stdlib":
        raise UsageError(f"no calibration set is called {spec!r}", hint="builtin sets: builtin:stdlib")
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [topics[name] for name in sorted(topics)]
    for module in _MODULES:
        file = root / module
        # A module may have become a package since.
        file = file if file.is_file() else file.with_suffix("") / "__init__.py"
        if file.is_file():
            documents.append(_docstrings(file))
    return tuple(documents)


def _docstrings(file: Path) -> str:
    """Docstrings of a module, parsed and never imported; short ones are not prose."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(inspect.cleandoc(d) for d in found if len(d) >= _SHORTEST_DOCSTRING)


def _file(path: Path) -> Iterable[str]:
    readers: dict[str, Callable[[Path], Iterable[str]]] = {
        ".txt": lambda p: [p.read_text(encoding="utf-8")],
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            "is no calibration text",
            where=str(path),
            hint="use builtin:stdlib, a .txt, .jsonl or .parquet file, hf:dataset or recall:tokens",
        )
    try:
        return list(reader(path))
    except FileNotFoundError as error:
        raise UsageError("does not exist", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot be read", where=str(path), why=str(error)) from error


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError("is not JSON", where=f"{path}:{number}", why=error.msg) from error
            yield _row_text(row, f"{path}:{number}")


def _row_text(row: Any, where: str) -> str:
    if isinstance(row, Mapping):
        for field in _FIELDS:
            if isinstance(row.get(field), str):
                return str(row[field])
        messages = row.get("messages")
        if isinstance(messages, list):
            contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
            return "\n\n".join(c for c in contents if isinstance(c, str))
    raise UsageError("has no text", where=where, hint=f"expected a field {', '.join(_FIELDS)} or messages")


def _parquet(path: Path) -> Iterator[str]:
    parquet = _extra("pyarrow.parquet")
    file = parquet.ParquetFile(path)
    field = next((f for f in _FIELDS if f in file.schema_arrow.names), None)
    if field is None:
        raise UsageError("has no text column", where=str(path), hint=f"expected one of {', '.join(_FIELDS)}")
    for batch in file.iter_batches(columns=[field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _hub(spec: str, allow_download: bool) -> Iterator[str]:
    """``hf:dataset[:config][:split][:field]``; empty parts take their defaults."""
    if not allow_download:
        raise UsageError("needs the network", where=spec, hint="pass --allow-download")
    datasets = _extra("datasets")
    name, config, split, field = [*spec.split(":")[1:], "", "", ""][:4]
    rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    for row in rows:
        yield str(row[field]) if field else _row_text(row, spec)


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this needs {module.partition('.')[0]}, which is not installed",
            hint="pip install 'kvpack[data]'",
        ) from error
