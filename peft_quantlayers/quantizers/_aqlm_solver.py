"""Additive quantization of a matrix: codes, codebooks and row scales, by coordinate descent and least squares.

Pure arithmetic in float32; no layers, no files. The weight is seen as groups (n_out, n_in, d): ``d = og * ig`` weights
of ``og`` outputs and ``ig`` inputs each, and stands for ``scale[o] * sum_m codebooks[m, codes[o, i, m]]``. The error
that is lowered is ``tr(D H D.T)`` for the difference ``D`` (out_features, in_features) and the inputs' second moment
``H``; without one, the plain squared error.

Source: Egiazarian et al. 2024 (AQLM). Where it differs: codebooks are fitted by conjugate gradients and scales in
closed form instead of hundreds of Adam steps; choosing a code changes only what it touches, in blocks of columns,
instead of rebuilding the matrix; the initial k-means weighs each input by its second moment.
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from quantlayers_kernels.aqlm.choice import (
    MAX_SCORES,
    chosen_codes,
    chosen_in_columns,
    entry_sums,
    groups_to_matrix,
    matrix_to_groups,
)

from ._least_squares import conjugate_gradient

# Points a centroid that k-means sees; more change nothing that the later rounds would not repair.
POINTS_PER_CENTROID = 64
KMEANS_ITERS = 15
# Columns whose pull is kept up to date while their codes are chosen; the others wait for one matrix product.
BLOCK_COLUMNS = 128
CODEBOOK_ITERS = 8


@dataclass(frozen=True)
class Additive:
    """Codes (n_out, n_in, num_codebooks) int64, codebooks (num_codebooks, size, d) and scales (n_out,), float32."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def sums(self) -> Tensor:
        """The groups in codebook units, (n_out, n_in, d)."""
        return entry_sums(self.codes, self.codebooks)

    def groups(self) -> Tensor:
        """The groups in weight units, (n_out, n_in, d)."""
        return self.sums() * self.scales[:, None, None]


@dataclass(frozen=True)
class Problem:
    """The weight to be matched, and how an error in it counts.

    Fields:
        target: (n_out, n_in, d), float32.
        hessian: (in_features, in_features), float32, symmetric; None for the plain error.
        out_group: outputs of a group.
    """

    target: Tensor
    hessian: Tensor | None
    out_group: int

    @property
    def in_group(self) -> int:
        return self.target.shape[2] // self.out_group

    def weighted(self, groups: Tensor) -> Tensor:
        """``groups`` as a matrix times the Hessian, as groups."""
        if self.hessian is None:
            return groups
        matrix = groups_to_matrix(groups, self.out_group) @ self.hessian
        return matrix_to_groups(matrix, self.out_group, self.in_group)

    def importance(self) -> Tensor | None:
        """The Hessian's diagonal for each place in each group, (n_in, d); None for the plain error."""
        if self.hessian is None:
            return None
        return self.hessian.diagonal().view(-1, 1, self.in_group).expand(-1, self.out_group, -1).flatten(1)

    def error(self, found: Additive) -> float:
        """The weighted squared error of ``found``."""
        difference = self.target - found.groups()
        return float((self.weighted(difference) * difference).sum())


def nearest_entries(vectors: Tensor, entries: Tensor, importance: Tensor | None = None) -> Tensor:
    """Index of the entry closest to each vector, where place ``j`` counts ``importance[:, j]``.

    Args:
        vectors: (n, d), float32.
        entries: (size, d), float32.
        importance: (n, d), float32, or None.

    Returns:
        (n,), int64.
    """
    step = max(1, MAX_SCORES // entries.shape[0])
    found = []
    for start in range(0, vectors.shape[0], step):
        part = vectors[start : start + step]
        if importance is None:
            scores = torch.addmm(entries.square().sum(1).mul_(-0.5), part, entries.t())
        else:
            here = importance[start : start + step]
            features = torch.cat([here * part, here.mul(-0.5)], dim=1)
            scores = features @ torch.cat([entries, entries.square()], dim=1).t()
        found.append(scores.argmax(1))
    return torch.cat(found)


def kmeans(
    vectors: Tensor, size: int, *, weights: Tensor, importance: Tensor | None = None, generator: Generator
) -> Tensor:
    """``size`` centroids (size, d) of ``vectors`` (n, d), each weighted by ``weights`` (n,) and ``importance`` (n, d).

    Starts from random vectors; a centroid that nobody chooses moves to a random one.
    """
    n, d = vectors.shape
    if n <= size:  # an entry for each vector
        return torch.cat([vectors, vectors.new_zeros(size - n, d)])
    if n > size * POINTS_PER_CENTROID:
        sample = torch.randperm(n, generator=generator)[: size * POINTS_PER_CENTROID].to(vectors.device)
        vectors, weights, n = vectors[sample], weights[sample], len(sample)
        importance = None if importance is None else importance[sample]

    def random_vectors() -> Tensor:
        return vectors[torch.randint(n, (size,), generator=generator).to(vectors.device)]

    weights = weights[:, None].expand(-1, d) if importance is None else importance * weights[:, None]
    weighted = vectors * weights
    centroids = random_vectors()
    for _ in range(KMEANS_ITERS):
        nearest = nearest_entries(vectors, centroids, importance)
        mass = torch.zeros_like(centroids).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, weighted)
        centroids = torch.where(mass > 0, sums / mass.clamp(min=1e-30), random_vectors())
    return centroids


def initial_solution(problem: Problem, *, num_codebooks: int, size: int, generator: Generator) -> Additive:
    """Residual k-means on rows of norm 1: each codebook is fitted to what the ones before it left over."""
    n_out, n_in, d = problem.target.shape
    scales = problem.target.square().mean((1, 2)).sqrt()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    residual = problem.target / scales[:, None, None]
    row_weights = scales.square().repeat_interleave(n_in)
    importance = problem.importance()
    if importance is not None:
        importance = importance.expand(n_out, -1, -1).reshape(-1, d)
    codes, codebooks = [], []
    for _ in range(num_codebooks):
        vectors = residual.view(-1, d)
        codebook = kmeans(vectors, size, weights=row_weights, importance=importance, generator=generator)
        chosen = nearest_entries(vectors, codebook, importance).view(n_out, n_in)
        residual = residual - codebook[chosen]
        codes.append(chosen)
        codebooks.append(codebook)
    return Additive(torch.stack(codes, dim=2), torch.stack(codebooks), scales)


def improved_codes(problem: Problem, found: Additive, *, beam: int) -> Additive:
    """Codes chosen group by group with all others held, so that the error falls with every group.

    ``(target - current) @ H`` is the pull on a group. It is formed for a block of columns at a time, and kept up to
    date within it; without a Hessian groups do not meet, and all are chosen at once.
    """
    n_out, n_in, d = problem.target.shape
    # In codebook units the scales are gone from all that follows: a row's error is scaled as a whole.
    target = problem.target / found.scales[:, None, None]
    codes, codebooks = found.codes.clone(), found.codebooks
    hessian = problem.hessian
    if hessian is None:
        flat = chosen_codes(target.view(-1, d), codes.view(n_out * n_in, -1), codebooks, None, beam=beam)
        return replace(found, codes=flat.view_as(codes))

    out_group, in_group = problem.out_group, problem.in_group
    residual = groups_to_matrix(target - entry_sums(codes, codebooks), out_group)
    block_groups = max(1, BLOCK_COLUMNS // in_group)
    for first in range(0, n_in, block_groups):
        groups = slice(first, min(first + block_groups, n_in))
        columns = slice(groups.start * in_group, groups.stop * in_group)
        codes[:, groups] = chosen_in_columns(
            residual @ hessian[:, columns],
            codes[:, groups],
            codebooks,
            hessian[columns, columns],
            out_group=out_group,
            beam=beam,
        )
        residual[:, columns] = groups_to_matrix(target[:, groups] - entry_sums(codes[:, groups], codebooks), out_group)
    return replace(found, codes=codes)


def fitted_codebooks(problem: Problem, found: Additive, *, iters: int = CODEBOOK_ITERS) -> Additive:
    """Codebooks of less error for the given codes and scales; entries that nobody chose stay."""
    codes, scales = found.codes, found.scales[:, None, None]
    num_codebooks, size, d = found.codebooks.shape
    index = (codes + torch.arange(num_codebooks, device=codes.device) * size).view(-1, num_codebooks)

    def gathered(groups: Tensor) -> Tensor:
        """For each entry the sum over the groups that use it, in codebook units: the adjoint of ``sums``."""
        flat = (groups * scales).reshape(-1, d)
        total = flat.new_zeros(num_codebooks * size, d)
        for m in range(num_codebooks):
            total.index_add_(0, index[:, m], flat)
        return total.view(num_codebooks, size, d)

    def normal(codebooks: Tensor) -> Tensor:
        return gathered(problem.weighted(entry_sums(codes, codebooks) * scales))

    importance = problem.importance()
    weights = torch.ones_like(problem.target) if importance is None else importance.expand_as(problem.target)
    diagonal = gathered(weights * scales)
    inverse = torch.where(diagonal > 0, diagonal.clamp(min=1e-30).reciprocal(), 0.0)
    residual = gathered(problem.weighted(problem.target - found.groups()))
    return replace(found, codebooks=found.codebooks + conjugate_gradient(normal, residual, inverse, iters=iters))


def fitted_scales(problem: Problem, found: Additive) -> Additive:
    """Scales of least error for the given codes and codebooks; a row whose fit is not positive keeps its own."""
    sums = found.sums()
    weighted = problem.weighted(sums)
    energy = (weighted * sums).sum((1, 2))
    fitted = (weighted * problem.target).sum((1, 2)) / energy.clamp(min=1e-30)
    return replace(found, scales=torch.where((energy > 0) & (fitted > 0), fitted, found.scales))
