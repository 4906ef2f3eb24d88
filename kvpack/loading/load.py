"""From an artifact's folder to a running transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvpack.artifact.reader import Artifact
from kvpack.core.access import CLOSED, Access
from kvpack.core.ahead import in_background
from kvpack.core.errors import ArtifactError
from kvpack.kernels import choice
from kvpack.loading.opened import Opened, handed_over
from kvpack.loading.residency import Wanted, label_packed, settle, unpack_model
from kvpack.models.attention import describe_attention
from kvpack.models.experts import take_apart
from kvpack.models.skeleton import decoder_blocks
from kvpack.models.source import resolve
from kvpack.models.tokenizer import open_tokenizer
from kvpack.runtime.embedding import replace_packed
from kvpack.runtime.install import install
from kvpack.runtime.linear import PackedWeight
from kvpack.runtime.sparse_modules import replace_sparse
from kvpack.runtime.sparsity import start_sparse


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    resident: str | int | Sequence[int] = "raw",
    max_slowdown: float | None = None,
    max_weight_bytes: int | None = None,
) -> PreTrainedModel:
    """Load an artifact as a transformers model, with packed weights and its compressed KV cache.

    Every file's checksum is compared before the model is handed out.

    Args:
        path: the artifact's folder.
        dtype: dtype of what is not packed and of the computation; "auto" is the source's.
        device_map: as in `from_pretrained`.
        attn_implementation: as in `from_pretrained`.
        trust_remote_code: as in `from_pretrained`.
        resident: losslessly coded decoder layers that stay coded in memory and are unpacked one ahead
            as tokens are computed: "raw" none, "compressed" all, or which by number, or how many.
        max_slowdown: choose as many as slow a token down by this share at most (0.05: five per cent),
            as measured here and now.
        max_weight_bytes: choose so that all weights take no more memory than this. What was chosen
            and measured is ``model.kvpack_residency`` (`kvpack.loading.residency.Residency`).

    Raises:
        ArtifactError: the artifact is incomplete, damaged, changed or too new.
        UsageError: a choice of layers that cannot be made.
    """
    wanted = Wanted(resident, max_slowdown, max_weight_bytes)
    folder = Path(path)
    # Clear errors before transformers looks at the folder; the quantizer waits for the hashes of the weights.
    opened = Opened.of(folder)
    in_background(choice.warm_up)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with leave_packed(wanted.anything), handed_over(opened):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if wanted.anything:
        settle(model, wanted)
    return model


_LEAVE_PACKED = ContextVar("_LEAVE_PACKED", default=False)


@contextmanager
def leave_packed(yes: bool) -> Iterator[None]:
    """Whether `finish`, which transformers calls with no word from our caller, unpacks nothing."""
    token = _LEAVE_PACKED.set(yes)
    try:
        yield
    finally:
        _LEAVE_PACKED.reset(token)


def load_source(
    reference: str | Path, access: Access = CLOSED, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Load an uncompressed model, to compare with; in its own dtype, or in `dtype`.

    Raises:
        SourceError: the folder or hub id leads to no model.
    """
    folder, _ = resolve(reference, allow_download=access.allow_download)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=access.trust_remote_code
    )
    return model


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that travels with an artifact, as transformers makes it.

    Raises:
        ArtifactError: there is none, or it is broken.
    """
    return open_tokenizer(Path(path), ArtifactError, trust_remote_code=trust_remote_code)


def prepare(model: Any, artifact: Artifact) -> None:
    """Put packed layers into a model's skeleton, before its weights are loaded.

    Raises:
        ArtifactError: the artifact does not hold exactly the tensors that the model then needs.
    """
    manifest = artifact.manifest
    _check_attention(model, artifact)
    take_apart(model)
    tied = manifest.base_model.tied
    replace_packed(
        model,
        {
            name: PackedWeight(linear.codec, linear.shape, linear.logical, linear.inputs, linear.online)
            for name, linear in manifest.weights.items()
        },
        tied,
    )
    _forget_ties(model, {f"{name}.weight" for name in manifest.weights})
    if manifest.sparsity is not None:
        replace_sparse(model, manifest.sparsity)
    needed = {name for name in model.state_dict() if name not in tied}
    held = set(artifact.tensor_names)
    if odd := sorted(needed ^ held):
        missing = odd[0] in needed
        raise ArtifactError(
            f"tensor {odd[0]!r} is {'missing' if missing else 'not part of the model'}",
            where=str(artifact.path),
            why=f"{len(odd)} tensors differ between the artifact and {type(model).__name__}",
            hint="load it with the transformers version in its manifest, or export it again",
        )


def _forget_ties(model: Any, packed: set[str]) -> None:
    """Leave no pair of names to transformers whose one weight is packed: there is nothing to tie."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        pairs = getattr(model, attribute, None) or {}
        kept = {name: holder for name, holder in pairs.items() if not packed & {name, holder}}
        if len(kept) < len(pairs):
            setattr(model, attribute, kept)


def _check_attention(model: Any, artifact: Artifact) -> None:
    """The cache scheme must be that of the layers which this transformers builds."""
    if not artifact.manifest.kv:
        return
    name, blocks = decoder_blocks(model)
    paths = tuple(f"{name}.{i}" for i in range(len(blocks)))
    built = list(describe_attention(model, model.config.get_text_config(decoder=True), paths))
    stated = [layer.attention for layer in artifact.manifest.kv]
    different = [b.layer for b, s in zip(built, stated, strict=False) if b != s]
    if different or len(built) != len(stated):
        at = different[0] if different else min(len(built), len(stated))
        raise ArtifactError(
            f"attention layer {at} is not the one that the KV-cache scheme was made for",
            where=str(artifact.path),
            why="this version of transformers may build the model differently",
            hint="load it with the transformers version in its manifest, or export it again",
        )


def finish(model: Any, artifact: Artifact, dtype: torch.dtype) -> None:
    """Give a loaded model its computation dtype and its compressed cache."""
    for parameter in model.parameters():
        # Parameters only: rotary frequencies and scales are buffers, and keep their precision.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    label_packed(model)
    if not _LEAVE_PACKED.get():
        unpack_model(model)
    if artifact.manifest.sparsity is not None:
        start_sparse(model)
    if artifact.manifest.kv:
        install(model, artifact.manifest.kv, artifact.kv_state())
