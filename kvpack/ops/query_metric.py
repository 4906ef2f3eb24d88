"""The metric in which an error of a key is the expected squared error of its scores.

For queries q with second moment H = mean of q^T q, the expected squared error of a score is
``E[(q.(k - c))^2] = (k - c) H (k - c)^T = ||k L - c L||^2`` with H = L L^T. So Euclidean methods
applied to ``k L`` work for scores. Source: A2ATS, arXiv 2502.12665, query-aware vector quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-4
"""Added to the diagonal of H, as a share of the diagonal's mean."""


def factor(gram: Tensor) -> Tensor:
    """L, lower triangular, with L L^T = H / rms(H) + damping.

    Args:
        gram: sum of q^T q [..., D, D], in any scale; all zero gives a multiple of the identity.

    Returns:
        float32 [..., D, D].
    """
    gram = gram.float()
    rms = gram.square().mean((-2, -1), keepdim=True).sqrt()
    normal = gram / rms.clamp(min=torch.finfo(torch.float32).tiny)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    # The mean of the diagonal is at least the rms of the whole, that is one, unless all is zero.
    extra = DAMPING * diagonal.mean(-1, keepdim=True).clamp(min=1.0)
    chol: Tensor = torch.linalg.cholesky(normal + torch.diag_embed(extra.expand_as(diagonal)))
    return chol


def leave(z: Tensor, chol: Tensor) -> Tensor:
    """``z L^-1``: vectors [..., N, D] back from the metric's space."""
    found: Tensor = torch.linalg.solve_triangular(chol, z, upper=False, left=False)
    return found


def queries(q: Tensor, chol: Tensor) -> Tensor:
    """Queries [..., R, D] for products with vectors in the metric's space: ``q L^-T``."""
    found: Tensor = torch.linalg.solve_triangular(chol, q.mT, upper=False)
    return found.mT
