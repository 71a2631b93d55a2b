"""The arithmetic of AWQ: scales for input channels, and clipped weights, of the lowest output error after rounding.

Tensors in, tensors out. Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization". Instead of running a
block for each candidate, the error of a layer's outputs is computed from the second moment of its inputs, which is the
same sum over the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A channel that no token uses would get a scale of zero.
SMALLEST = 1e-5
# Fractions of the largest weight of a group that a clipped one keeps. Source: AWQ, which tries down to one half.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)

Rounding = Callable[[Tensor], Tensor]
"""What a weight (out_features, in_features) becomes when it is quantized and dequantized."""


class Reader(NamedTuple):
    """One weight that reads the scaled channels.

    Fields:
        weight: (out_features, in_features) float32.
        second_moment: of its inputs, (in_features, in_features) float32.
        rounding: its quantizer.
    """

    weight: Tensor
    second_moment: Tensor
    rounding: Rounding


def scale_candidates(mean_abs: Tensor, relative_weights: Tensor, n_grid: int) -> Iterator[Tensor]:
    """Scales for the channels, (n_channels,) float32 each, the ones of no effect first.

    ``x ** a`` and ``x ** a / w ** (1 - a)`` for ``n_grid`` values of ``a``, each normalised so that the largest and
    the smallest scale are inverse to each other.

    Args:
        mean_abs: of the inputs of each channel, ``x``, (n_channels,).
        relative_weights: of each channel, the mean of ``abs(weight)`` relative to the largest of its group, ``w``.
        n_grid: number of exponents from 0 to 1.
    """
    x, w = mean_abs.float().clamp(min=SMALLEST * mean_abs.max()), relative_weights.float().clamp(min=SMALLEST)
    yield torch.ones_like(x)
    for step in range(n_grid):
        exponent = (step + 1) / n_grid
        for scale in (x**exponent, x**exponent / w ** (1 - exponent)):
            yield scale / (scale.max() * scale.min()).sqrt()
            if exponent == 1:
                break  # both are the same


def relative_weights(weights: Sequence[Tensor], group_sizes: Sequence[int]) -> Tensor:
    """Of each input, the mean of ``abs(weight)`` relative to the largest of its row's group, (in_features,).

    Args:
        weights: (out_features, in_features) each.
        group_sizes: of each, the inputs of a group; the whole row where they do not divide it.
    """
    total, n_rows = weights[0].new_zeros(weights[0].shape[1], dtype=torch.float32), 0
    for weight, size in zip(weights, group_sizes, strict=True):
        size = size if size and weight.shape[1] % size == 0 else weight.shape[1]
        grouped = weight.float().abs().unflatten(1, (-1, size))
        total += (grouped / grouped.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).flatten(1).sum(0)
        n_rows += len(weight)
    return total / n_rows


def output_error(readers: Sequence[Reader], scale: Tensor) -> float:
    """Sum of the squared errors of all outputs, for each token, if the inputs are divided by ``scale`` (in_features,)
    and the weights multiplied by it before they are rounded."""
    total = 0.0
    for weight, second_moment, rounding in readers:
        delta = rounding(weight * scale) / scale - weight
        total += float(((delta @ second_moment) * delta).sum())
    return total


def best_scale(
    readers: Sequence[Reader],
    candidates: Iterator[Tensor],
    for_inputs: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float, float]:
    """The candidate with the lowest output error, (n_channels,), that error, and the first candidate's.

    ``for_inputs`` gives the scales of the readers' inputs for those of the channels.
    """
    best, least, first = None, float("inf"), None
    for scale in candidates:
        error = output_error(readers, for_inputs(scale))
        first = error if first is None else first
        if error < least or best is None:
            best, least = scale, error
    if best is None or first is None:
        raise ValueError("no candidate for a scale was given.")
    return best, least, first


def clip_limits(reader: Reader, group_size: int) -> Tensor:
    """For each group of each row the largest ``abs(weight)`` to keep, (out_features, n_groups): of ``CLIP_RATIOS``
    of the group's largest the one with the lowest error of that group's part of the output."""
    weight, second_moment, rounding = reader
    grouped = weight.unflatten(1, (-1, group_size))
    largest = grouped.abs().amax(2)
    blocks = torch.stack(
        [
            second_moment[start : start + group_size, start : start + group_size]
            for start in range(0, weight.shape[1], group_size)
        ]
    )
    best, least = largest.clone(), torch.full_like(largest, float("inf"))
    for ratio in CLIP_RATIOS:
        limits = ratio * largest
        delta = rounding(clipped(weight, limits)).unflatten(1, (-1, group_size)) - grouped
        error = (torch.einsum("ogi,gij->ogj", delta, blocks) * delta).sum(2)
        is_better = error < least
        best, least = torch.where(is_better, limits, best), torch.where(is_better, error, least)
    return best


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """``weight`` (out_features, in_features) with each group's values within plus and minus its limit."""
    grouped = weight.unflatten(1, (limits.shape[1], -1))
    return grouped.clamp(-limits[:, :, None], limits[:, :, None]).flatten(1)
