"""Choosing AQLM codes: the compiled kernel against the definition in torch, and both against trying everything."""

import ctypes
import itertools

import pytest
import torch
from conftest import COMPILED, FASTEST_AND_PLAIN, PLAIN

from quantlayers_kernels import native
from quantlayers_kernels.aqlm.choice import best_entries, chosen_codes, chosen_in_columns, entry_sums, groups_to_matrix

# (num_codebooks, nbits_per_codebook, out_group_size, in_group_size), beam: published schemes, then odd ones
SCHEMES = [
    ((2, 8, 1, 8), 1), ((2, 8, 1, 8), 4), ((2, 8, 1, 8), 256), ((1, 12, 1, 8), 8), ((8, 8, 1, 32), 2),
    ((2, 9, 1, 8), 512), ((4, 4, 2, 8), 5), ((2, 5, 4, 6), 32), ((3, 2, 1, 3), 100), ((2, 1, 1, 1), 2),
    ((1, 1, 1, 1), 1),
]  # fmt: skip
# (output groups, input groups)
GROUPS = [(1, 1), (63, 3), (6, 17)]

every_instruction_set = pytest.mark.parametrize("kernels", COMPILED, indirect=True)
fastest_and_plain = pytest.mark.parametrize("kernels", FASTEST_AND_PLAIN, indirect=True)


def random_problem(scheme, n_out: int, n_in: int, seed: int = 0):
    """correlation, codes, codebooks, hessian"""
    num_codebooks, nbits, out_group, in_group = scheme
    generator = torch.Generator().manual_seed(seed)
    columns = n_in * in_group
    inputs = torch.randn(2 * columns, columns, generator=generator)
    return (
        3 * torch.randn(n_out * out_group, columns, generator=generator),
        torch.randint(0, 2**nbits, (n_out, n_in, num_codebooks), generator=generator),
        torch.randn(num_codebooks, 2**nbits, out_group * in_group, generator=generator),
        inputs.t() @ inputs / len(inputs),
    )


def costs(codes, correlation, before, codebooks, hessian, out_group: int) -> torch.Tensor:
    """By how much each output group's error changes when its codes go from ``before`` to ``codes``, float64."""
    codebooks = codebooks.double()
    moved = groups_to_matrix(entry_sums(codes, codebooks) - entry_sums(before, codebooks), out_group)
    rows = ((moved @ hessian.double() - 2 * correlation.double()) * moved).sum(1)
    return rows.view(-1, out_group).sum(1)


def in_plain_torch(monkeypatch, function, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return function(*arguments, **options)


@every_instruction_set
@pytest.mark.parametrize(("scheme", "beam"), SCHEMES, ids=str)
def test_the_compiled_kernel_chooses_as_plain_torch_does(scheme, beam, kernels, monkeypatch):
    for n_out, n_in in GROUPS:
        correlation, codes, codebooks, hessian = random_problem(scheme, n_out, n_in)
        arguments = (correlation, codes, codebooks, hessian)
        before = [argument.clone() for argument in arguments]
        found = chosen_in_columns(*arguments, out_group=scheme[2], beam=beam)
        plain = in_plain_torch(monkeypatch, chosen_in_columns, *arguments, out_group=scheme[2], beam=beam)
        assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
        # A tie may fall either way, and what follows in that row is another way down.
        is_same_row = (found == plain).flatten(1).all(1)
        assert is_same_row.float().mean() > 0.9
        ours, theirs = (costs(c, correlation, codes, codebooks, hessian, scheme[2]) for c in (found, plain))
        assert ours.sum() <= theirs.sum() + 0.02 * theirs.sum().abs()


@fastest_and_plain
def test_a_beam_as_wide_as_a_codebook_finds_the_best_of_all_pairs(kernels):
    correlation, codes, codebooks, hessian = random_problem((2, 4, 2, 3), 40, 1)
    found = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=2, beam=16)
    pairs = [torch.tensor(pair).expand(40, 1, 2) for pair in itertools.product(range(16), repeat=2)]
    best = torch.stack([costs(pair, correlation, codes, codebooks, hessian, 2) for pair in pairs]).min(0).values
    torch.testing.assert_close(costs(found, correlation, codes, codebooks, hessian, 2), best, rtol=1e-5, atol=1e-4)


@fastest_and_plain
@pytest.mark.parametrize("scheme", [(1, 5, 1, 8), (2, 5, 1, 8), (3, 4, 2, 4)], ids=str)
def test_a_wider_beam_errs_less_and_no_choice_errs_more_than_before(scheme, kernels):
    correlation, codes, codebooks, hessian = random_problem(scheme, 200, 6)
    totals = []
    for beam in (1, 4, 32):
        found = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=scheme[2], beam=beam)
        change = costs(found, correlation, codes, codebooks, hessian, scheme[2])
        assert (change <= 1e-4).all()
        totals.append(float(change.sum()))
    assert totals == sorted(totals, reverse=True)
    assert totals[2] < totals[0] or scheme[0] == 1


@every_instruction_set
@pytest.mark.parametrize("size", [1, 2, 256, 2048])
def test_best_entries_are_the_best(size, kernels):
    generator = torch.Generator().manual_seed(0)
    wanted, entries = torch.randn(77, 5, generator=generator), torch.randn(size, 5, generator=generator)
    own = torch.rand(size, generator=generator)
    scores = own.double() - 2 * wanted.double() @ entries.double().t()
    found = best_entries(wanted, entries, own)
    torch.testing.assert_close(scores.gather(1, found[:, None])[:, 0], scores.min(1).values)


@every_instruction_set
@pytest.mark.parametrize("beam", [1, 3, 256])
def test_codes_that_no_codebook_has_are_read_as_their_low_bits(beam, kernels):
    correlation, codes, codebooks, hessian = random_problem((2, 4, 1, 8), 50, 4)
    expected = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=1, beam=beam)
    wild = codes + 16 * torch.randint(-(2**40), 2**40, codes.shape)
    assert torch.equal(chosen_in_columns(correlation, wild, codebooks, hessian, out_group=1, beam=beam) % 16, expected)


@every_instruction_set
@pytest.mark.parametrize("beam", [1, 3, 256])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_codes_stay_in_their_codebook_where_the_pull_is_no_number(beam, value, kernels):
    correlation, codes, codebooks, hessian = random_problem((2, 8, 1, 8), 50, 4)
    correlation[::2] = value
    found = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=1, beam=beam)
    assert found.min() >= 0
    assert found.max() < 256
    correlation[::2] = 0
    clean = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=1, beam=beam)
    assert torch.equal(found[1::2], clean[1::2])


@every_instruction_set
@pytest.mark.parametrize(("scheme", "beam"), SCHEMES, ids=str)
def test_nothing_beside_the_codes_and_the_correlation_is_written(scheme, beam, kernels, monkeypatch):
    """The kernel gets both in memory between guards."""
    correlation, codes, codebooks, hessian = random_problem(scheme, 7, 3)
    run, guards = native.call, []

    def guarded(name, choice):
        memory = []
        for field, nbytes in (("codes", 8 * codes.numel()), ("correlation", 4 * correlation.numel())):
            buffer, address = torch.full((nbytes + 512,), 0x5A, dtype=torch.uint8), getattr(choice, field)
            ctypes.memmove(buffer.data_ptr() + 256, address, nbytes)
            memory.append((buffer, address, nbytes))
            setattr(choice, field, buffer.data_ptr() + 256)
        run(name, choice)
        for buffer, address, nbytes in memory:
            guards.extend((buffer[:256], buffer[256 + nbytes :]))
            ctypes.memmove(address, buffer.data_ptr() + 256, nbytes)

    expected = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=scheme[2], beam=beam)
    monkeypatch.setattr(native, "call", guarded)
    assert torch.equal(
        chosen_in_columns(correlation, codes, codebooks, hessian, out_group=scheme[2], beam=beam), expected
    )
    assert len(guards) == 4
    assert all((guard == 0x5A).all() for guard in guards)


def test_threads_change_nothing():
    problem = random_problem((2, 8, 1, 8), 203, 5)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append([chosen_in_columns(*problem, out_group=1, beam=beam) for beam in (4, 256)])
    finally:
        torch.set_num_threads(before)
    for codes in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], codes, strict=True))


@fastest_and_plain
def test_tensors_that_lie_in_any_order_are_read_right(kernels):
    correlation, codes, codebooks, hessian = random_problem((2, 4, 1, 8), 20, 4)
    expected = chosen_in_columns(correlation, codes, codebooks, hessian, out_group=1, beam=16)
    turned = [
        correlation.t().contiguous().t(),
        codes.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        codebooks.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(hessian, (3, 3))[:, 3:-3],
    ]
    assert torch.equal(chosen_in_columns(*turned, out_group=1, beam=16), expected)


@fastest_and_plain
def test_without_a_block_the_nearest_sums_are_chosen(kernels):
    correlation, codes, codebooks, _ = random_problem((2, 4, 1, 8), 100, 1)
    found = chosen_codes(correlation, codes[:, 0], codebooks, None, beam=16)
    sums = (codebooks[0][:, None] + codebooks[1]).flatten(0, 1)
    distances = torch.cdist(correlation.double(), sums.double())
    mine = (correlation - entry_sums(found, codebooks)).double().norm(dim=1)
    torch.testing.assert_close(mine, distances.min(1).values)


@pytest.mark.parametrize("kernels", [kernel for kernel in FASTEST_AND_PLAIN if kernel != PLAIN], indirect=True)
def test_shapes_that_contradict_each_other_never_reach_the_kernel(kernels, monkeypatch):
    monkeypatch.setattr(native, "call", lambda *arguments: pytest.fail("the kernel was called"))
    correlation, codes, codebooks, hessian = random_problem((2, 4, 1, 8), 20, 4)
    wrong = [
        (correlation[:19], codes, codebooks, hessian),
        (correlation, codes[:, :3], codebooks, hessian),
        (correlation, codes, codebooks[:1], hessian),
        (correlation, codes, codebooks[:, :, :6], hessian),
        (correlation, codes, codebooks, hessian[:30]),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="shape"):
            chosen_in_columns(*arguments, out_group=1, beam=4)
    with pytest.raises(ValueError, match="do not fit together"):
        best_entries(correlation, codebooks[0], torch.zeros(16))
