"""Pure torch functions: the reference mathematics that parts are made of.

Submodules are imported on first use, so that reading a part's settings does not import torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpack.ops import affine as affine
    from kvpack.ops import affine_encode as affine_encode
    from kvpack.ops import attention_scores as attention_scores
    from kvpack.ops import bits as bits
    from kvpack.ops import block_float as block_float
    from kvpack.ops import byte_planes as byte_planes
    from kvpack.ops import channel_factors as channel_factors
    from kvpack.ops import channel_order as channel_order
    from kvpack.ops import clip_search as clip_search
    from kvpack.ops import codebook as codebook
    from kvpack.ops import entropy as entropy
    from kvpack.ops import fourier as fourier
    from kvpack.ops import gptq as gptq
    from kvpack.ops import gptq_classes as gptq_classes
    from kvpack.ops import gptq_sparse as gptq_sparse
    from kvpack.ops import gptq_vectors as gptq_vectors
    from kvpack.ops import hadamard as hadamard
    from kvpack.ops import half_quadratic as half_quadratic
    from kvpack.ops import kmeans as kmeans
    from kvpack.ops import kmeans_vectors as kmeans_vectors
    from kvpack.ops import knapsack as knapsack
    from kvpack.ops import layer_outputs as layer_outputs
    from kvpack.ops import low_rank as low_rank
    from kvpack.ops import magnitude as magnitude
    from kvpack.ops import masks as masks
    from kvpack.ops import mirrored as mirrored
    from kvpack.ops import outlier_counts as outlier_counts
    from kvpack.ops import outliers as outliers
    from kvpack.ops import packed_affine as packed_affine
    from kvpack.ops import packed_lookup as packed_lookup
    from kvpack.ops import query_metric as query_metric
    from kvpack.ops import rows as rows
    from kvpack.ops import saliency as saliency
    from kvpack.ops import singular as singular
    from kvpack.ops import skipping as skipping
    from kvpack.ops import thresholds as thresholds
    from kvpack.ops import top_tokens as top_tokens
    from kvpack.ops import trits as trits
    from kvpack.ops import two_level as two_level
    from kvpack.ops import window as window


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
