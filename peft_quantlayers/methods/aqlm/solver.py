"""Additive quantization of a matrix: codes, codebooks and row scales, by coordinate descent and least squares.

Pure arithmetic in float32; no layers, no files. A weight is split into groups (n_out, n_in, d): ``d = og * ig``
weights of ``og`` outputs and ``ig`` inputs each. A group is ``scale[o] * sum_m codebooks[m, codes[o, i, m]]``. The
solver minimises ``tr(D H D.T)`` for the difference ``D`` (out_features, in_features) and the Hessian ``H``, the second
moment of the inputs; without a Hessian, the plain squared error.

Source: Egiazarian et al. 2024 (AQLM). Differences: codebooks are fitted by conjugate gradients and scales in closed
form instead of hundreds of Adam steps; choosing a code updates only the residual that it affects, in blocks of
columns, instead of rebuilding the matrix; the initial k-means weights each input by its second moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from quantlayers_kernels.aqlm.choice import (
    best_entries,
    chosen_codes,
    chosen_in_columns,
    entry_sums,
    groups_to_matrix,
    matrix_to_groups,
)

from ..least_squares import conjugate_gradient

# Points per centroid that k-means sees; the later iterations make up for a smaller sample.
POINTS_PER_CENTROID = 64
KMEANS_ITERS = 15
# Columns whose residual correlation is updated while their codes are chosen; one matrix product updates the others.
BLOCK_COLUMNS = 128
# With 2 steps the held-out error was the same as with 16 on layers of SmolLM2, since the next iteration continues.
CODEBOOK_ITERS = 3
# Weights per number in the codebooks that these are fitted to. Sampling the rows raises the error by a fraction of
# about the reciprocal.
WEIGHTS_PER_NUMBER = 512
# Weights that are processed together, so that no buffer grows with the number of outputs.
TILE_WEIGHTS = 1 << 22
TILE_WEIGHTS_OF_GPU = 1 << 26


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

    def rows(self, which: slice) -> "Additive":
        """Some of the output groups."""
        return replace(self, codes=self.codes[which], scales=self.scales[which])


@dataclass(frozen=True)
class Problem:
    """The weight to approximate, and the Hessian of its error.

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

    def rows(self, which: slice) -> "Problem":
        """Some of the output groups; they do not depend on the others."""
        return replace(self, target=self.target[which])

    def tiles(self) -> Iterator[slice]:
        """Ranges of output groups that are processed together."""
        n_out, n_in, d = self.target.shape
        n_weights = TILE_WEIGHTS if self.target.device.type == "cpu" else TILE_WEIGHTS_OF_GPU
        step = max(1, n_weights // (n_in * d))
        return (slice(start, start + step) for start in range(0, n_out, step))

    def sample(self, n_weights: int) -> slice:
        """Evenly spread output groups that hold about ``n_weights`` weights, or all output groups."""
        return slice(None, None, max(1, self.target.numel() // n_weights))

    def weighted(self, groups: Tensor) -> Tensor:
        """``groups`` as a matrix times the Hessian, as groups."""
        if self.hessian is None:
            return groups
        matrix = groups_to_matrix(groups, self.out_group) @ self.hessian
        return matrix_to_groups(matrix, self.out_group, self.in_group)

    def importance(self) -> Tensor | None:
        """The Hessian's diagonal for each weight of each group, (n_in, d); None for the plain error."""
        if self.hessian is None:
            return None
        return self.hessian.diagonal().view(-1, 1, self.in_group).expand(-1, self.out_group, -1).flatten(1)

    def error(self, found: Additive) -> float:
        """The weighted squared error of ``found``."""
        total = 0.0
        for tile in self.tiles():
            difference = self.target[tile] - found.rows(tile).groups()
            total += float((self.weighted(difference) * difference).sum())
        return total


def nearest_entries(vectors: Tensor, entries: Tensor, importance: Tensor | None = None) -> Tensor:
    """Index of the entry closest to each vector, with ``importance[:, j]`` as the weight of component ``j``.

    Args:
        vectors: (n, d), float32.
        entries: (size, d), float32.
        importance: (n, d), float32, or None.

    Returns:
        (n,), int64.
    """
    if importance is None:
        return best_entries(vectors, entries, entries.square().sum(1))
    features = torch.cat([importance * vectors, importance.mul(-0.5)], dim=1)
    return best_entries(features, torch.cat([entries, entries.square()], dim=1), entries.new_zeros(len(entries)))


def kmeans(
    vectors: Tensor, size: int, *, weights: Tensor, importance: Tensor | None = None, generator: Generator
) -> Tensor:
    """``size`` centroids (size, d) of ``vectors`` (n, d), each weighted by ``weights`` (n,) and ``importance`` (n, d).

    Starts from random vectors; a centroid without any vectors is replaced by a random vector.
    """
    n, d = vectors.shape
    if n <= size:  # an entry for each vector
        return torch.cat([vectors, vectors.new_zeros(size - n, d)])

    def random_vectors() -> Tensor:
        return vectors[torch.randint(n, (size,), generator=generator, device="cpu").to(vectors.device)]

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
    """Rows scaled to norm 1, and codebooks of ``size`` entries for them: see :func:`extended_solution`."""
    n_out, n_in, d = problem.target.shape
    empty = Additive(
        codes=torch.empty(n_out, n_in, 0, dtype=torch.int64, device=problem.target.device),
        codebooks=problem.target.new_empty(0, size, d),
        scales=problem.target.new_zeros(n_out),
    )
    return extended_solution(problem, empty, num_codebooks=num_codebooks, generator=generator)


def extended_solution(problem: Problem, found: Additive, *, num_codebooks: int, generator: Generator) -> Additive:
    """``found`` with more codebooks, each fitted by k-means to the residual of those before it.

    A row whose scale is not positive gets the norm of its target as its scale: otherwise new codebooks could not
    contribute to it.
    """
    if len(found.codebooks) == num_codebooks:
        return found
    norms = problem.target.square().mean((1, 2)).sqrt()
    usable = torch.where(norms > 0, norms, torch.ones_like(norms))
    found = replace(found, scales=torch.where(found.scales > 0, found.scales, usable))
    n_out, n_in, d = problem.target.shape
    size, scales, device = found.codebooks.shape[1], found.scales, problem.target.device
    residual = problem.target / scales[:, None, None] - (found.sums() if len(found.codebooks) else 0.0)
    importance = problem.importance()
    codes, codebooks = [found.codes], [found.codebooks]
    for _ in range(len(found.codebooks), num_codebooks):
        chosen = torch.randperm(n_out * n_in, generator=generator, device="cpu")[: size * POINTS_PER_CENTROID].to(
            device
        )
        codebook = kmeans(
            residual.view(-1, d)[chosen],
            size,
            weights=scales[chosen // n_in].square(),
            importance=None if importance is None else importance[chosen % n_in],
            generator=generator,
        )
        added = codes[0].new_empty(n_out, n_in, 1)
        for tile in problem.tiles():
            vectors = residual[tile].reshape(-1, d)
            here = None if importance is None else importance.repeat(len(vectors) // n_in, 1)
            nearest = nearest_entries(vectors, codebook, here).view(-1, n_in)
            residual[tile] -= codebook[nearest]
            added[tile, :, 0] = nearest
        codes.append(added)
        codebooks.append(codebook[None])
    return Additive(torch.cat(codes, dim=2), torch.cat(codebooks), scales)


def improved_codes(problem: Problem, found: Additive, *, beam: int) -> Additive:
    """Codes chosen group by group with all others fixed, so that the error falls with every group."""
    codes = [_improved_rows(problem.rows(tile), found.rows(tile), beam) for tile in problem.tiles()]
    return replace(found, codes=torch.cat(codes))


def _improved_rows(problem: Problem, found: Additive, beam: int) -> Tensor:
    """The codes of :func:`improved_codes`.

    The residual correlation ``(target - current) @ H`` is computed for a block of columns at a time, and updated
    within the block. Without a Hessian the groups are independent, and all are chosen at once.
    """
    n_in, d = problem.target.shape[1:]
    # In codebook units no scale is needed: it only multiplies a row's error as a whole.
    target = problem.target / found.scales[:, None, None]
    codes, codebooks = found.codes.clone(), found.codebooks
    hessian = problem.hessian
    if hessian is None:
        return chosen_codes(target.view(-1, d), codes.flatten(0, 1), codebooks, None, beam=beam).view_as(codes)

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
    return codes


def fitted_codebooks(problem: Problem, found: Additive, *, iters: int = CODEBOOK_ITERS) -> Additive:
    """Codebooks with a lower error for the given codes and scales; entries that no code names stay.

    If there are far more weights than numbers in the codebooks, they are fitted to a sample of the rows.
    """
    chosen = problem.sample(WEIGHTS_PER_NUMBER * found.codebooks.numel())
    problem, sampled = problem.rows(chosen), found.rows(chosen)
    tiles = [(problem.rows(tile), sampled.rows(tile)) for tile in problem.tiles()]
    num_codebooks, size, d = found.codebooks.shape
    offsets = torch.arange(num_codebooks, device=found.codes.device) * size

    def gathered(part: Additive, groups: Tensor, total: Tensor) -> Tensor:
        """``total`` plus, for each entry, the sum over the groups that use it: the adjoint of ``Additive.groups``."""
        flat = (groups * part.scales[:, None, None]).reshape(-1, d)
        for index in (part.codes.flatten(0, 1) + offsets).unbind(1):
            total.view(-1, d).index_add_(0, index, flat)
        return total

    def normal(codebooks: Tensor) -> Tensor:
        total = torch.zeros_like(codebooks)
        for tile, part in tiles:
            gathered(part, tile.weighted(replace(part, codebooks=codebooks).groups()), total)
        return total

    diagonal, residual = torch.zeros_like(found.codebooks), torch.zeros_like(found.codebooks)
    importance = problem.importance()
    for tile, part in tiles:
        weights = torch.ones_like(tile.target) if importance is None else importance.expand_as(tile.target)
        gathered(part, weights * part.scales[:, None, None], diagonal)
        gathered(part, tile.weighted(tile.target - part.groups()), residual)
    inverse = torch.where(diagonal > 0, diagonal.clamp(min=1e-30).reciprocal(), 0.0)
    return replace(found, codebooks=found.codebooks + conjugate_gradient(normal, residual, inverse, iters=iters))


def fitted_scales(problem: Problem, found: Additive) -> Additive:
    """Scales of lowest error for the given codes and codebooks; a row keeps its scale if the fit is not positive."""
    fitted = []
    for tile in problem.tiles():
        part = found.rows(tile)
        sums = part.sums()
        weighted = problem.weighted(sums)
        energy = (weighted * sums).sum((1, 2))
        scales = (weighted * problem.target[tile]).sum((1, 2)) / energy.clamp(min=1e-30)
        fitted.append(torch.where((energy > 0) & (scales > 0), scales, part.scales))
    return replace(found, scales=torch.cat(fitted))
