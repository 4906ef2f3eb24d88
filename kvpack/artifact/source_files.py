"""Which files of a source model travel along: tokenizer, templates, generation settings, licence."""

from __future__ import annotations

from pathlib import Path

from kvpack.artifact.paths import check_name, contained, visible_files
from kvpack.core.errors import SourceError

_TEXT = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm"})
_LEGAL = ("license", "licence", "notice", "copying", "copyright", "use_policy")
_FOLDERS = frozenset({"additional_chat_templates"})
"""The only folder that tokenizers are loaded from."""

_NOT_COPIED = frozenset(
    {
        "config.json",  # written anew
        "quantize_config.json",
        "quant_config.json",
        "quantization_config.json",
        "hf_quant_config.json",
        "recipe.json",
        "kvpack.json",
        "adapter_config.json",
        "trainer_state.json",
        "training_args.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
    }
)


def sidecar_files(source: Path) -> dict[str, Path]:
    """Files to copy unchanged, by the name they keep.

    Everything textual that loading a tokenizer or processor may read, and legal texts; not
    weights, their indices, quantisation settings, training logs, the model card (a new one is
    written), pickles or code.

    Raises:
        SourceError: a link leads out of the folder (the hub cache's own links are followed).
    """
    chosen = {}
    for name in visible_files(source):
        if not _travels(name):
            continue
        path = source / check_name(name, where=str(source), error=SourceError)
        if not contained(source, path):
            raise SourceError(
                f"{name} is a link out of the folder", where=str(source), hint="replace it by the file itself"
            )
        if path.is_file():
            chosen[name] = path
    return chosen


def _travels(name: str) -> bool:
    folder, _, file = name.lower().rpartition("/")
    if folder and folder not in _FOLDERS:
        return False
    if file in _NOT_COPIED or file.endswith(".index.json"):
        return False
    return file.startswith(_LEGAL) or Path(file).suffix in _TEXT
