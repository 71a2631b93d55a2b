"""LoRA's branch: the numbers of its composed form, double backward, and next to nothing kept."""

import pytest
import torch

from quantlayers_kernels.low_rank import add_low_rank


def composed(y, x, A, B, scaling):
    return (y + (x.to(A.dtype) @ A.t() @ B.t()) * scaling).to(y.dtype)


def operands(dtype, adapter_dtype, shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of):
        return torch.randn(*size, generator=generator).to(of).requires_grad_()

    return (
        draw(*shape, 24, of=dtype), draw(*shape, 16, of=dtype),
        draw(4, 16, of=adapter_dtype), draw(24, 4, of=adapter_dtype),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), ()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.float64, torch.float64, 1e-12),
    ],
)
def test_values_and_gradients_are_those_of_the_composed_form(dtype, adapter_dtype, tolerance, shape):
    mine, theirs = operands(dtype, adapter_dtype, shape), operands(dtype, adapter_dtype, shape)
    result, expected = add_low_rank(*mine, scaling=0.7), composed(*theirs, 0.7)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    torch.manual_seed(0)
    grad = torch.randn(result.shape).to(dtype)
    result.backward(grad)
    expected.backward(grad)
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad.dtype == b.grad.dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=4 * tolerance)


def test_first_and_second_derivatives_are_right():
    inputs = operands(torch.float64, torch.float64, (3,))
    torch.autograd.gradcheck(lambda *args: add_low_rank(*args, scaling=0.5), inputs)
    torch.autograd.gradgradcheck(lambda *args: add_low_rank(*args, scaling=0.5), inputs)


def test_dropout_is_the_same_forward_and_backward_and_right_on_average():
    y, x, A, B = operands(torch.float32, torch.float32, (4000,))
    torch.manual_seed(0)
    result = add_low_rank(y, x, A, B, scaling=1.0, dropout=0.25)
    result.sum().backward()
    # A is as if each dropped input were zero: the branch is linear in what was kept.
    torch.manual_seed(0)
    kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.75)
    torch.testing.assert_close(result, composed(y, x * kept / 0.75, A, B, 1.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(x.grad == 0, ~kept)
    with torch.no_grad():
        mean = torch.stack([add_low_rank(y, x, A, B, scaling=1.0, dropout=0.25).mean(0) for _ in range(20)]).mean(0)
        torch.testing.assert_close(mean, composed(y, x, A, B, 1.0).mean(0), rtol=0.1, atol=0.05)
        assert torch.equal(add_low_rank(y, x, A, B, scaling=1.0, dropout=1.0), y)


def test_inputs_that_are_not_contiguous_are_taken_with_dropout_too():
    y, _, A, B = operands(torch.float32, torch.float32, (3, 5))
    x = torch.randn(5, 3, 16).transpose(0, 1).requires_grad_()
    torch.manual_seed(0)
    result = add_low_rank(y, x, A, B, scaling=1.0, dropout=0.25)
    result.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(add_low_rank(y, x.detach().contiguous(), A, B, scaling=1.0, dropout=0.25), result)
    assert x.grad.shape == x.shape


def test_autocast_gives_its_dtype_to_the_products():
    y, x, A, B = operands(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = add_low_rank(y, x, A, B, scaling=1.0)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert A.grad.dtype == torch.float32
