"""Additive quantization of vectors: codes, codebooks and row scales that minimise the plain squared error.

Pure arithmetic in float32 on one matrix of vectors; no layers, no files, no calibration data. Everything is batched:
the same code runs on a CPU and on a GPU. Source: Egiazarian et al. 2024 (AQLM); where it takes hundreds of Adam steps
for the codebooks, they are solved in closed form here.
"""

import torch
from torch import Generator, Tensor

# Points a centroid that k-means sees; more change nothing that the later rounds would not repair.
POINTS_PER_CENTROID = 64
KMEANS_ITERS = 15
# Vectors that are compared with a codebook at a time: 2**24 distances of float32 are 64 MiB.
MAX_DISTANCES = 1 << 24
# Above this number of entries the normal equations of all codebooks together are not formed.
MAX_JOINT_ENTRIES = 4096


def nearest_entries(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index of the entry closest to each vector.

    Args:
        vectors: (n, d), float32.
        entries: (k, d), float32.

    Returns:
        (n,), int64.
    """
    half_norms = entries.square().sum(1).mul_(-0.5)
    step = max(1, MAX_DISTANCES // entries.shape[0])
    found = [
        torch.addmm(half_norms, vectors[start : start + step], entries.t()).argmax(1)
        for start in range(0, vectors.shape[0], step)
    ]
    return torch.cat(found)


def kmeans(vectors: Tensor, k: int, *, weights: Tensor, generator: Generator) -> Tensor:
    """``k`` centroids of ``vectors`` (n, d), each weighted by ``weights`` (n,); (k, d).

    Starts from random vectors; a centroid that nobody chooses moves to a random one.
    """
    n, d = vectors.shape
    if n <= k:  # an entry for each vector
        return torch.cat([vectors, vectors.new_zeros(k - n, d)])
    if n > k * POINTS_PER_CENTROID:
        sample = torch.randperm(n, generator=generator)[: k * POINTS_PER_CENTROID].to(vectors.device)
        vectors, weights, n = vectors[sample], weights[sample], len(sample)

    def random_vectors(count: int) -> Tensor:
        return vectors[torch.randint(n, (count,), generator=generator).to(vectors.device)]

    centroids = random_vectors(k).clone()
    weighted = vectors * weights[:, None]
    for _ in range(KMEANS_ITERS):
        nearest = nearest_entries(vectors, centroids)
        mass = torch.zeros(k, device=vectors.device).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, weighted)
        is_empty = mass <= 0
        centroids = torch.where(is_empty[:, None], random_vectors(k), sums / mass.clamp(min=1e-30)[:, None])
    return centroids


def reconstruct(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the entries that ``codes`` (n, M) name in ``codebooks`` (M, k, d); (n, d)."""
    total = codebooks[0][codes[:, 0]]
    for m in range(1, codes.shape[1]):
        total = total + codebooks[m][codes[:, m]]
    return total


def initial_codes(
    vectors: Tensor, *, num_codebooks: int, size: int, weights: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Residual k-means: each codebook is fitted to what the ones before it left over.

    Returns:
        codes (n, num_codebooks) int64, codebooks (num_codebooks, size, d).
    """
    residual = vectors
    codes, codebooks = [], []
    for _ in range(num_codebooks):
        codebook = kmeans(residual, size, weights=weights, generator=generator)
        chosen = nearest_entries(residual, codebook)
        residual = residual - codebook[chosen]
        codes.append(chosen)
        codebooks.append(codebook)
    return torch.stack(codes, dim=1), torch.stack(codebooks)


def improved_codes(vectors: Tensor, codes: Tensor, codebooks: Tensor, *, passes: int) -> Tensor:
    """Codes after choosing one codebook's entry at a time with the others held (iterated conditional modes)."""
    if codes.shape[1] == 1:
        return nearest_entries(vectors, codebooks[0])[:, None]
    codes = codes.clone()
    residual = vectors - reconstruct(codes, codebooks)
    for _ in range(passes):
        for m in range(codes.shape[1]):
            residual += codebooks[m][codes[:, m]]
            codes[:, m] = nearest_entries(residual, codebooks[m])
            residual -= codebooks[m][codes[:, m]]
    return codes


def fitted_codebooks(vectors: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor) -> Tensor:
    """Codebooks that minimise the weighted squared error for the given codes; entries nobody chose stay.

    One linear system for all codebooks together, where that is small; else one codebook after the other.
    """
    num_codebooks, size, d = codebooks.shape
    weighted = vectors * weights[:, None]
    mass = torch.stack(
        [torch.zeros(size, device=vectors.device).index_add_(0, codes[:, m], weights) for m in range(num_codebooks)]
    )
    if num_codebooks == 1 or num_codebooks * size > MAX_JOINT_ENTRIES:
        fitted = codebooks.clone()
        for m in range(num_codebooks):
            rest = vectors - reconstruct(codes, fitted) + fitted[m][codes[:, m]]
            sums = torch.zeros_like(fitted[m]).index_add_(0, codes[:, m], rest * weights[:, None])
            is_used = mass[m] > 0
            fitted[m] = torch.where(is_used[:, None], sums / mass[m].clamp(min=1e-30)[:, None], fitted[m])
        return fitted

    n_entries = num_codebooks * size
    gram = torch.zeros(n_entries * n_entries, dtype=torch.float64, device=vectors.device)
    right = torch.zeros(n_entries, d, dtype=torch.float64, device=vectors.device)
    rows = codes + torch.arange(num_codebooks, device=codes.device) * size
    for a in range(num_codebooks):
        right.index_add_(0, rows[:, a], weighted.double())
        for b in range(num_codebooks):
            gram.index_add_(0, rows[:, a] * n_entries + rows[:, b], weights.double())
    gram = gram.view(n_entries, n_entries)
    # The system is singular (a constant can move from one codebook to another): the smallest step that solves it,
    # damped, keeps the entries near where they are and those that nobody chose exactly there.
    current = codebooks.reshape(n_entries, d).double()
    damping = 1e-6 * gram.diagonal().mean().clamp(min=1e-30)
    step = torch.linalg.solve(
        gram + damping * torch.eye(n_entries, dtype=torch.float64, device=gram.device), right - gram @ current
    )
    return (current + step).float().view_as(codebooks)


def fitted_scales(weight_rows: Tensor, sums: Tensor, scales: Tensor) -> Tensor:
    """Row scales that minimise ``|weight - scale * sum|**2``; rows whose sum is zero keep theirs.

    Args:
        weight_rows, sums: (n_rows, row_length).
        scales: (n_rows,).
    """
    energy = sums.square().sum(1)
    fitted = (weight_rows * sums).sum(1) / energy.clamp(min=1e-30)
    return torch.where((energy > 0) & (fitted > 0), fitted, scales)
