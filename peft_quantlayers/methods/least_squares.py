"""Matrix-free least squares, with which the solvers fit scales, zeros and codebooks to codes."""

from collections.abc import Callable

from torch import Tensor

from .any_threads import sum_of_all


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor], residual: Tensor, inverse_diagonal: Tensor, *, iters: int
) -> Tensor:
    """The step ``x`` that approximately solves ``normal(x) = residual``, shaped like ``residual``, float32.

    Jacobi-preconditioned, starting from zero: directions without curvature do not move, and every iteration lowers
    the squared error whose normal equations these are.

    Args:
        normal: a symmetric positive semidefinite map.
        residual: minus half the gradient at the start, any shape.
        inverse_diagonal: reciprocals of the map's diagonal, zero where that is zero; shaped like ``residual``.
        iters: steps at most.

    Source: Hestenes & Stiefel 1952.
    """
    step = residual.new_zeros(residual.shape)
    residual = residual.clone()
    scaled = residual * inverse_diagonal
    direction = scaled
    energy = sum_of_all(residual * scaled)
    first_energy = energy
    for _ in range(iters):
        image = normal(direction)
        curvature = sum_of_all(direction * image)
        # Below the resolution of float32 a further step only adds noise.
        if not (energy > 1e-10 * first_energy and curvature > 0):
            break
        length = energy / curvature
        step += length * direction
        residual -= length * image
        scaled = residual * inverse_diagonal
        last_energy, energy = energy, sum_of_all(residual * scaled)
        direction = scaled + (energy / last_energy) * direction
    return step
