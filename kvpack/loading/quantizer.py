"""The seam into transformers: a quantizer registered for ``quant_method: kvpack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvpack.artifact.writer import INDEX_FILE
from kvpack.core.ahead import in_background
from kvpack.core.errors import ArtifactError, UsageError
from kvpack.kernels import choice

METHOD = "kvpack"


class KvpackConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json; all else is in its manifest."""

    def __init__(self, format_version: int = 1, **_: Any) -> None:
        self.quant_method = METHOD
        self.format_version = format_version


class KvpackQuantizer(HfQuantizer):
    """Validates an artifact, puts packed modules into the skeleton, installs the cache."""

    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Take note of the computation dtype: no later step of loading is told of it."""
        self.dtype = dtype
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers at the artifact's shards, which it would not find by their names.

        The name is set here and not in config.json: without kvpack, loading must fail.
        """
        config.transformers_weights = INDEX_FILE
        return config

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Keep the stored dtype: casting scales would change what the codes mean."""
        del converter, param, dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """Let no tensor be renamed or fused: an artifact has the names of the model that `prepare` makes."""
        del weight_conversions, model
        return []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from kvpack.loading.load import prepare
        from kvpack.loading.opened import opened

        if not checkpoint_files:
            raise ArtifactError("no weights were found", hint="give the artifact's folder")
        found = opened(Path(checkpoint_files[0]).parent)
        # What hashing finds is asked for before the model is handed out.
        self.artifact, self.hashing = found.artifact, found.sound
        in_background(choice.warm_up)
        prepare(model, self.artifact)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from kvpack.loading.load import finish

        self.hashing.result()
        del self.hashing  # or models, which keep their quantizer, could not be copied
        finish(model, self.artifact, self.dtype)
        del model.config.transformers_weights
        return model

    def is_serializable(self) -> bool:
        """Never: asked by `save_pretrained`, which would write what cannot be verified.

        Raises:
            UsageError: always; the answer False would become a message that does not help.
        """
        raise UsageError(
            "an artifact cannot be saved by transformers",
            why="its manifest and checksums would be lost",
            hint="copy the artifact's folder as it is, or make another with `kvpack export`",
        )

    @property
    def is_trainable(self) -> bool:
        """Packed weights take no gradients."""
        return False


def register() -> None:
    """Tell transformers about kvpack; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(KvpackConfig)
        register_quantizer(METHOD)(KvpackQuantizer)
