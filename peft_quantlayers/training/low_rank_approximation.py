"""The best low-rank approximation of a matrix, of itself or of the outputs that it makes. Pure maths."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_approximation(matrix: Tensor, rank: int, *, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product of a tall and a wide factor that is nearest to ``matrix``.

    With ``hessian``, the second moment ``H`` of inputs, its outputs are: ``U`` are the first eigenvectors of
    ``R H R.T``, and ``U @ (U.T @ R)`` is the best matrix of its rank, without an inverse of ``H``. Without it, ``H``
    is the identity. Of ``R`` and ``R.T`` the smaller Gram matrix is taken, which takes at most half the time of a
    singular value decomposition.

    Args:
        matrix: ``R``, (out_features, in_features), float32.
        rank: at most the smaller side.
        hessian: (in_features, in_features), float32, positive definite.

    Returns:
        (out_features, rank) and (rank, in_features), of equal norms column by row.

    Source: the closed form is that of Zhang et al. 2024 (QERA), Deng et al. 2025 (CLoQ) and Liu et al. 2024 (EoRA),
    which go through a root of ``H`` and its inverse.
    """
    out_features, in_features = matrix.shape
    if out_features <= in_features:
        weighted = matrix if hessian is None else matrix @ hessian
        left = _first_eigenvectors(weighted @ matrix.t(), rank)
    else:
        # R H R.T = (R L) (R L).T with H = L L.T: its eigenvectors from those of the smaller (R L).T (R L).
        rooted = matrix if hessian is None else matrix @ torch.linalg.cholesky(hessian)
        left = torch.linalg.qr(rooted @ _first_eigenvectors(rooted.t() @ rooted, rank)).Q
    right = left.t() @ matrix
    root = right.norm(dim=1).sqrt()
    return left * root, right / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]


def _first_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """(n, rank): of the largest eigenvalues of a symmetric (n, n)."""
    return torch.linalg.eigh((symmetric + symmetric.t()) / 2).eigenvectors[:, -rank:]


def output_norm(matrix: Tensor, hessian: Tensor | None) -> float:
    """The norm of ``matrix``, or root mean square norm of its outputs for inputs with this second moment."""
    if hessian is None:
        return float(matrix.norm())
    return max(0.0, float((matrix @ hessian).mul_(matrix).sum())) ** 0.5
