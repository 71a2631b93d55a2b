"""AQLM on a GPU with Triton: products with few tokens, and dense rows. See ``triton_kernels.py``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gpu, gpu_tuning
from .layout import dense_shape, has_documented_layout

# Weights that a program reads into memory at a time; of so many rows.
TILE, TILE_ROWS = 8192, 8
# Steps in flight on the tensor cores.
DOT_STAGES = 3
# More stages of more codebooks than these do not fit into the shared memory of consumer GPUs.
MAX_CODEBOOKS_IN_FLIGHT = 2
# Codebooks up to this stay in a multiprocessor's level-1 cache and are read through it. Larger ones are read past it,
# from level 2, and several steps ahead.
LEVEL_1_BYTES = 64 * 1024
# Index arithmetic on codebooks has 32 bits.
MAX_CODEBOOK_ELEMENTS = 1 << 31
# Codebooks are added up in an unrolled loop.
MAX_CODEBOOKS, MAX_IN_GROUP = 16, 64


class Form(NamedTuple):
    """Of a product: rows of a program, inputs of its step, and its warps."""

    rows: int
    inputs: int
    warps: int


TOKEN_FORMS = (Form(8, 1024, 4), Form(4, 1024, 4), Form(4, 512, 2), Form(16, 512, 4), Form(8, 2048, 8))


def dot_forms(n_tokens: int) -> tuple[Form, ...]:
    """Forms on the tensor cores, for so many tokens, at most ``gpu.MAX_DOT_TOKENS`` of them in a tile."""
    warps = gpu.dot_warps(n_tokens)
    forms = (Form(32, 128, warps), Form(16, 128, warps), Form(32, 64, warps), Form(64, 64, 8))
    return (forms[2], *forms[:2], forms[3]) if gpu.has_little_shared_memory() else forms


def can_dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether the kernels read this weight: on a GPU, in the documented layout, floats of a known dtype.

    Tensors in another layout take the plain path, which raises.
    """
    return (
        gpu.can_hold(codes, codebooks, scales)
        and has_documented_layout(codes, codebooks, scales)
        and codebooks.numel() < MAX_CODEBOOK_ELEMENTS
        and codebooks.shape[0] <= MAX_CODEBOOKS
        and codebooks.shape[3] <= MAX_IN_GROUP
    )


def can_use_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear_few_tokens` takes these arguments and is the faster way."""
    n_tokens = x.shape[:-1].numel()
    return (
        0 < n_tokens <= gpu.MAX_TOKENS
        and (n_tokens == 1 or gpu.has_tensor_cores(x))
        and gpu.can_hold(x, codes, *([] if bias is None else [bias]))
        and can_dequantize(codes, codebooks, scales)
        and x.shape[-1] == codes.shape[1] * codebooks.shape[3]
        and (bias is None or tuple(bias.shape) == (dense_shape(codes, codebooks)[0],))
    )


def _is_in_level_1(codebooks: Tensor) -> bool:
    return codebooks.nbytes <= LEVEL_1_BYTES


def _scheme(codebooks: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    num_codebooks, size, out_group, in_group = codebooks.shape
    return {
        "NUM_CODEBOOKS": num_codebooks,
        "SIZE": size,
        "OUT_GROUP": out_group,
        "IN_GROUP": in_group,
        "IN": gpu.power_of_two(in_group),
        "CACHE": "" if _is_in_level_1(codebooks) else ".cg",
    }


def linear_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` from AQLM codes; float32 sums, dtype of ``x`` out.

    One token is multiplied in float32. Several are multiplied with the weight rounded to the dtype of ``x``.
    """
    from . import triton_kernels

    out_features, in_features = dense_shape(codes, codebooks)
    n_in_groups, scheme = codes.shape[1], _scheme(codebooks)
    flat = x.reshape(-1, in_features).contiguous()
    weight = (codes.contiguous(), codebooks.contiguous(), scales.contiguous())
    n_tokens, few_codebooks = flat.shape[0], len(codebooks) <= MAX_CODEBOOKS_IN_FLIGHT

    def product(form: Form) -> Tensor:
        groups = max(1, min(gpu.power_of_two(n_in_groups), form.inputs // scheme["IN"]))
        if n_tokens > 1:
            groups = max(groups, gpu.MIN_DOT // scheme["IN"])

        def one_token(grid: tuple[int, int], written: gpu.Written, n_steps: int) -> None:
            triton_kernels.one_token[grid](
                *(flat, *weight, *written, out_features, n_in_groups, n_steps * groups),
                **scheme,
                GROUPS=groups,
                ROWS=form.rows,
                num_warps=form.warps,
            )

        def few_tokens(grid: tuple[int, int], written: gpu.Written, n_steps: int) -> None:
            tokens = gpu.dot_tokens(n_tokens)
            triton_kernels.few_tokens[*grid, -(-n_tokens // tokens)](
                *(flat, *weight, *written, n_tokens, out_features, n_in_groups, n_steps * groups),
                **scheme,
                GROUPS=groups,
                ROWS=form.rows,
                TOKENS=tokens,
                PRODUCT=gpu.product_type(x.dtype),
                STAGES=1 if _is_in_level_1(codebooks) else DOT_STAGES if few_codebooks else 2,
                num_warps=form.warps,
            )

        launch = one_token if n_tokens == 1 else few_tokens
        n_steps = -(-n_in_groups // groups)
        return gpu.product_in_parts(x, bias, out_features, n_rows=form.rows, n_steps=n_steps, launch=launch)

    facts = (*codebooks.shape, out_features, in_features, x.dtype, codebooks.dtype)
    if n_tokens == 1:
        return product(gpu_tuning.fastest("aqlm one_token", facts, TOKEN_FORMS, product, like=x))
    dot_facts = (*facts, gpu.dot_tokens(n_tokens))
    return product(gpu_tuning.fastest("aqlm few_tokens", dot_facts, dot_forms(n_tokens), product, like=x))


def dequantize_rows(codes: Tensor, codebooks: Tensor, scales: Tensor, *, rows: slice, into: Tensor) -> Tensor:
    """The reference's rows ``rows`` of the weight, written to ``into`` (n, in_features) in its dtype."""
    from . import triton_kernels

    n_rows, n_in_groups, scheme = into.shape[0], codes.shape[1], _scheme(codebooks)
    groups = max(1, min(gpu.power_of_two(n_in_groups), TILE // TILE_ROWS // scheme["IN"]))
    grid = (-(-n_rows // TILE_ROWS), -(-n_in_groups // groups))
    with torch.cuda.device_of(into):
        triton_kernels.dequantize[grid](
            *(codes.contiguous(), codebooks.contiguous(), scales.contiguous(), into),
            *(rows.start, n_rows, n_in_groups),
            **scheme,
            GROUPS=groups,
            ROWS=TILE_ROWS,
        )
    return into
