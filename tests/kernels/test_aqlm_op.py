"""The AQLM operators against their reference, forward and gradients, for many schemes."""

import pytest
import torch
from conftest import FASTEST_AND_PLAIN

from quantlayers_kernels.aqlm import aqlm_dequantize, aqlm_linear, op
from quantlayers_kernels.aqlm.reference import aqlm_linear_reference, dequantize_aqlm_reference, unsigned_codes

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.parametrize("kernels", FASTEST_AND_PLAIN, indirect=True),
]

# (num_codebooks, nbits_per_codebook, out_group_size, in_group_size)
SCHEMES = [(2, 8, 1, 8), (1, 16, 1, 8), (1, 12, 1, 4), (4, 4, 2, 8), (1, 1, 1, 1), (3, 5, 4, 2), (8, 8, 1, 32)]
OUT, IN = 24, 64


def random_weight(scheme, seed: int = 0, dtype: torch.dtype = torch.float32):
    """codes, codebooks, scales with every possible code."""
    num_codebooks, nbits, out_group, in_group = scheme
    generator = torch.Generator().manual_seed(seed)
    size = 2**nbits
    codes = torch.randint(0, size, (OUT // out_group, IN // in_group, num_codebooks), generator=generator)
    stored = torch.where(codes >= size // 2, codes - size, codes).to(torch.int8 if nbits <= 8 else torch.int16)
    codebooks = torch.randn(num_codebooks, size, out_group, in_group, generator=generator).to(dtype)
    scales = (torch.rand(OUT // out_group, 1, 1, 1, generator=generator) + 0.5).to(dtype)
    return stored, codebooks, scales


def close(ours: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor) -> None:
    """At most twice the reference's own error against the float64 truth (and a rounding of its largest value)."""
    floor = 4 * torch.finfo(ours.dtype).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= 2 * (reference.double() - truth).abs().max() + floor


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n_tile_rows", [None, 4], ids=["one tile", "tiles"])
def test_dequantize_matches_the_reference(scheme, n_tile_rows, set_tile_elements):
    if n_tile_rows:
        set_tile_elements(n_tile_rows * IN)
    weight = random_weight(scheme)
    torch.testing.assert_close(aqlm_dequantize(*weight, torch.float32), dequantize_aqlm_reference(*weight))


def test_the_reference_is_the_published_formula():
    codes, codebooks, scales = random_weight((2, 8, 2, 8))
    weight = dequantize_aqlm_reference(codes, codebooks, scales)
    o, a, i, b = 5, 1, 3, 6
    index = [int(code) % 256 for code in codes[o, i]]
    expected = scales[o, 0, 0, 0] * (codebooks[0, index[0], a, b] + codebooks[1, index[1], a, b])
    torch.testing.assert_close(weight[o * 2 + a, i * 8 + b], expected)


@pytest.mark.parametrize("n_tile_rows", [None, 4], ids=["one tile", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_linear_and_its_gradients_match_the_float64_truth(scheme, dtype, n_tile_rows, set_tile_elements):
    if n_tile_rows:
        set_tile_elements(n_tile_rows * IN)
    codes, *floats = random_weight(scheme, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(3, 5, IN, generator=generator).to(dtype), torch.randn(OUT, generator=generator).to(dtype)
    grad = torch.randn(3, 5, OUT, generator=generator)

    def run(function, cast):
        leaves = [cast(tensor).requires_grad_() for tensor in (x, *floats, bias)]
        y = function(leaves[0], codes, *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y, leaves, cast(grad))]

    def true_linear(x, codes, codebooks, scales, bias):
        index = unsigned_codes(codes, codebooks.shape[1].bit_length() - 1)
        total = sum(codebooks[m][index[:, :, m]] for m in range(codebooks.shape[0]))
        return x @ (total * scales).permute(0, 2, 1, 3).reshape(OUT, IN).t() + bias

    ours = run(aqlm_linear, lambda tensor: tensor.to(dtype).clone())
    truth = run(true_linear, lambda tensor: tensor.double().clone())
    reference = run(aqlm_linear_reference, lambda tensor: tensor.to(dtype).clone())
    for our, true, plain in zip(ours, truth, reference, strict=True):
        assert our.dtype == dtype
        close(our, true, plain)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)], ids=str)
def test_any_number_of_tokens_works(shape):
    weight = random_weight((2, 8, 1, 8))
    x = torch.randn(*shape, IN)
    torch.testing.assert_close(aqlm_linear(x, *weight, None), aqlm_linear_reference(x, *weight, None))


def test_every_stored_code_reads_inside_its_codebook():
    """Codes of a stranger's file: any int8 is taken modulo the codebook's size, none reads past its end."""
    codes, codebooks, scales = random_weight((2, 4, 1, 8))
    hostile = torch.randint(-128, 128, codes.shape, dtype=torch.int8)
    tame = (hostile.int() % 16).to(torch.int8)
    assert torch.equal(
        aqlm_dequantize(hostile, codebooks, scales, torch.float32),
        aqlm_dequantize(tame, codebooks, scales, torch.float32),
    )


@pytest.mark.parametrize("wants_grad", [False, True])
def test_the_input_is_saved_only_where_codebooks_or_scales_train(wants_grad):
    codes, codebooks, scales = random_weight((2, 8, 1, 8))
    x = torch.randn(6, IN, requires_grad=True)
    codebooks.requires_grad_(wants_grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        aqlm_linear(x, codes, codebooks, scales, None)
    assert (x.data_ptr() in saved) == wants_grad
    assert len(saved) == 3 + wants_grad


@pytest.mark.parametrize("scheme", [(2, 8, 1, 8), (1, 12, 2, 4)], ids=str)
def test_opcheck_accepts_the_operators(scheme):
    codes, codebooks, scales = random_weight(scheme)
    codebooks.requires_grad_()
    scales.requires_grad_()
    x, bias = torch.randn(3, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
    torch.library.opcheck(aqlm_linear, (x, codes, codebooks, scales, bias))
    torch.library.opcheck(aqlm_linear, (x, codes, codebooks.detach(), scales, bias))
    torch.library.opcheck(aqlm_dequantize, (codes, codebooks, scales, torch.float32))
    weight = (codes, codebooks.detach(), scales.detach())
    torch.library.opcheck(op.aqlm_input_gradient, (torch.randn(3, OUT), *weight))
    torch.library.opcheck(op.aqlm_metadata_gradient, (torch.randn(OUT, IN), *weight))
    torch.library.opcheck(op.aqlm_linear_metadata_gradient, (torch.randn(3, OUT), torch.randn(3, IN), *weight))


@pytest.mark.parametrize("scheme", [(2, 8, 1, 8), (1, 4, 3, 16)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_alone_get_the_gradient_that_they_get_beside_the_codebooks(scheme, has_bias):
    num_codebooks, nbits, out_group, in_group = scheme
    torch.manual_seed(0)
    codes = torch.randint(-4, 4, (10, 6, num_codebooks), dtype=torch.int8)
    codebooks = torch.randn(num_codebooks, 2**nbits, out_group, in_group)
    bias = torch.randn(10 * out_group) if has_bias else None
    x, grad = torch.randn(2, 7, 6 * in_group), torch.randn(2, 7, 10 * out_group)
    grads = []
    for trains_codebooks in (True, False):
        scales = (0.5 + torch.rand(10, 1, 1, 1, generator=torch.Generator().manual_seed(1))).requires_grad_()
        aqlm_linear(x, codes, codebooks.clone().requires_grad_(trains_codebooks), scales, bias).backward(grad)
        grads.append(scales.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
