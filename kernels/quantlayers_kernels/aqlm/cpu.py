"""AQLM on a CPU with the compiled kernels: products with few tokens, and dense rows. See ``csrc/aqlm_kernels.h``.

Entries are read straight from the codebooks, an entry of eight inputs in one load, whatever the size of the codebook;
there is no table of products of the input with every entry.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import native
from ..interface import AQLMChoice, AQLMWeight, DenseRows
from ..native_product import few_tokens_product
from ..prepared import PreparedProduct
from .layout import dense_shape, has_documented_layout

# Above this, dequantized tiles and BLAS are as fast or faster: on one thread the break-even was between 8 and 32
# tokens with AVX2, and between 16 and more than 96 with AVX-512 (weights of 1536 x 576 and 4096 x 4096).
MAX_TOKENS = 16
# Numbers in codebooks that fit the first-level cache as float32: 16 KiB, the size of 2x8.
MAX_CACHED_ENTRIES = 4096
# Entries that the kernel compares at a time, on any instruction set.
PADDED_SIZE = 32
# Largest codebooks of which all pairs of entries are tried, if the beam is as wide: a table of 2**18 float32 is 1 MiB.
MAX_PAIR_SIZE = 512


def can_dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> bool:
    """Whether the kernels read this weight: on a CPU, in the documented layout, floats of a known dtype.

    Tensors in another layout take the plain path, which raises; the kernels trust the shapes.
    """
    return (
        codes.is_cpu
        and codebooks.is_cpu
        and scales.is_cpu
        and codebooks.dtype in native.KINDS
        and scales.dtype in native.KINDS
        and has_documented_layout(codes, codebooks, scales)
        and native.is_available()
    )


def can_use_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear_few_tokens` takes these arguments and is the faster way."""
    return (
        0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        and x.is_cpu
        and x.dtype in native.KINDS
        and can_dequantize(codes, codebooks, scales)
        and x.shape[-1] == codes.shape[1] * codebooks.shape[3]
        and (bias is None or (bias.is_cpu and tuple(bias.shape) == dense_shape(codes, codebooks)[:1]))
    )


def _readable(codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's tensors, contiguous; codebooks as float32 where reading half precision is slow.

    Entries are converted each time they are read, so float32 is also faster if it fits the first-level cache.
    """
    if native.variant() == 0 or codebooks.numel() <= MAX_CACHED_ENTRIES:
        codebooks = codebooks.float()
    return codes.contiguous(), codebooks.contiguous(), scales.contiguous()


def _weight(codes: Tensor, codebooks: Tensor, scales: Tensor) -> AQLMWeight:
    """The kernels' view of contiguous tensors."""
    num_codebooks, size, out_group, in_group = codebooks.shape
    return AQLMWeight(
        codes=codes.data_ptr(),
        codebooks=codebooks.data_ptr(),
        scales=scales.data_ptr(),
        in_groups=codes.shape[1],
        num_codebooks=num_codebooks,
        size=size,
        out_group=out_group,
        in_group=in_group,
        code_bytes=codes.element_size(),
        codebook_kind=native.KINDS[codebooks.dtype],
        scale_kind=native.KINDS[scales.dtype],
    )


def linear_few_tokens(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` from AQLM codes; float32 inside, dtype of ``x`` out."""
    codes, codebooks, scales = _readable(codes, codebooks, scales)
    weight = _weight(codes, codebooks, scales)
    return few_tokens_product("ql_aqlm_linear", weight, x, bias, out_features=dense_shape(codes, codebooks)[0])


def prepared(codes: Tensor, codebooks: Tensor, scales: Tensor) -> PreparedProduct | None:
    """:func:`linear_few_tokens` with this weight, its arguments checked now; None where the kernels do not read it."""
    if not can_dequantize(codes, codebooks, scales):
        return None
    readable = _readable(codes, codebooks, scales)
    if readable[0] is not codes or readable[2] is not scales:  # not contiguous: copies, which nothing would keep
        return None
    out_features, in_features = dense_shape(codes, codebooks)
    return PreparedProduct(
        "ql_aqlm_linear",
        _weight(*readable),
        in_features=in_features,
        out_features=out_features,
        max_tokens=MAX_TOKENS,
        together="ql_aqlm_linears",
        converted=None if readable[1] is codebooks else {"codebooks": readable[1]},
    )


def dequantize_rows(codes: Tensor, codebooks: Tensor, scales: Tensor, *, rows: slice, into: Tensor) -> Tensor:
    """The rows ``rows`` of the weight, written to ``into`` (n, in_features), contiguous, one of ``native.WRITTEN``."""
    codes, codebooks, scales = _readable(codes, codebooks, scales)
    written = DenseRows(
        out=into.data_ptr(), first_row=rows.start, n_rows=rows.stop - rows.start, kind=native.KINDS[into.dtype]
    )
    native.call("ql_aqlm_dequantize", _weight(codes, codebooks, scales), written)
    return into


def can_choose(wanted: Tensor, entries: Tensor) -> bool:
    """Whether :func:`choose` and :func:`best_entries` take these: on a CPU, float32, a power of two entries."""
    size = entries.shape[-2]
    return (
        wanted.device.type == entries.device.type == "cpu"
        and wanted.dtype == entries.dtype == torch.float32
        and size & (size - 1) == 0
        and native.is_available()
    )


def choose(
    correlation: Tensor, codes: Tensor, codebooks: Tensor, hessian: Tensor, *, out_group: int, beam: int
) -> Tensor:
    """As :func:`.choice.chosen_in_columns`. Raises ValueError if the shapes do not fit together."""
    n_out, n_groups, num_codebooks = codes.shape
    size, d = codebooks.shape[1:]
    in_group = d // out_group
    columns = n_groups * in_group
    for name, found, shape in (
        ("correlation", correlation.shape, (n_out * out_group, columns)),
        ("codebooks", codebooks.shape, (num_codebooks, size, out_group * in_group)),
        ("hessian", hessian.shape, (columns, columns)),
    ):
        if tuple(found) != shape:
            raise ValueError(
                f"{name} has the shape {tuple(found)}; it must be {shape} for codes of {tuple(codes.shape)}."
            )
    blocks = hessian.float().view(n_groups, in_group, n_groups, in_group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = codebooks.view(num_codebooks, size, out_group, in_group)
    own = codebooks.new_empty(n_groups, num_codebooks, size)
    pairs = codebooks.new_empty(n_groups, size, size) if num_codebooks == 2 and beam >= size <= MAX_PAIR_SIZE else None
    for group, block in enumerate(blocks):
        weighted = (parts @ block).flatten(2)
        own[group] = (weighted * codebooks).sum(2)
        if pairs is not None:
            torch.mm(2 * weighted[0], codebooks[1].t(), out=pairs[group])
    beam = 1 if num_codebooks == 1 or pairs is not None else min(beam, size)
    return _choose(correlation, codes, codebooks, hessian, own, pairs, out_group=out_group, beam=beam)


def best_entries(wanted: Tensor, entries: Tensor, own: Tensor) -> Tensor:
    """As :func:`.choice.best_entries`. Raises ValueError if the shapes do not fit together."""
    size, d = entries.shape
    if wanted.shape[1] != d or own.shape != (size,):
        raise ValueError(f"{tuple(wanted.shape)}, {tuple(entries.shape)} and {tuple(own.shape)} do not fit together.")
    codes = wanted.new_zeros(len(wanted), 1, 1, dtype=torch.int64)
    # With a Hessian of zeros the code to start from does not matter.
    hessian = entries.new_zeros(d, d)
    return _choose(wanted, codes, entries[None], hessian, own[None, None], None, out_group=1, beam=1).flatten()


def _choose(
    correlation: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    hessian: Tensor,
    own: Tensor,
    pairs: Tensor | None,
    *,
    out_group: int,
    beam: int,
) -> Tensor:
    """Calls the kernel with copies of the tensors that it modifies, and the others padded and contiguous."""
    n_out, n_groups, num_codebooks = codes.shape
    size, d = codebooks.shape[1:]
    width = -(-size // PADDED_SIZE) * PADDED_SIZE
    padding = (0, width - size)
    entries = pad(codebooks.transpose(1, 2), padding).contiguous()
    own = pad(own, padding, value=torch.inf).contiguous()
    if pairs is not None:
        pairs = pad(pairs, padding).view(n_groups, size, -1, PADDED_SIZE).transpose(1, 2).contiguous()
    hessian, codebooks = hessian.float().contiguous(), codebooks.contiguous()
    codes, correlation = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (codes, correlation))
    in_group = d // out_group
    choice = AQLMChoice(
        codes=codes.data_ptr(),
        correlation=correlation.data_ptr(),
        hessian=hessian.data_ptr(),
        codebooks=codebooks.data_ptr(),
        entries=entries.data_ptr(),
        own=own.data_ptr(),
        pairs=None if pairs is None else pairs.data_ptr(),
        n_out=n_out,
        n_groups=n_groups,
        num_codebooks=num_codebooks,
        size=size,
        width=width,
        out_group=out_group,
        in_group=in_group,
        columns=n_groups * in_group,
        beam=beam,
    )
    native.call("ql_aqlm_choose", choice)
    return codes
