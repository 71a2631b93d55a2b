import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlayers_kernels.bitpack import SUPPORTED_NBITS, pack, packed_row_bytes, unpack
from quantlayers_kernels.bitpack.reference import pack_reference, unpack_reference

nbits_s = st.sampled_from(SUPPORTED_NBITS)
rows_s = st.sampled_from([1, 2, 3, 5, 8])
columns_s = st.one_of(st.sampled_from([1, 7, 8, 63, 64, 100]), st.integers(1, 130))


def random_codes(rows: int, columns: int, nbits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**nbits, (rows, columns), dtype=torch.uint8, generator=generator)


def non_contiguous(codes: torch.Tensor) -> torch.Tensor:
    wide = torch.full((codes.shape[1], 2 * codes.shape[0]), 255, dtype=torch.uint8)
    wide[:, ::2] = codes.t()
    return wide[:, ::2].t()


def test_the_supported_widths_are_one_to_eight_bits_without_seven():
    assert SUPPORTED_NBITS == (1, 2, 3, 4, 5, 6, 8)


@settings(max_examples=80, deadline=None)
@given(rows=rows_s, columns=columns_s, nbits=nbits_s, seed=st.integers(0, 99), is_contiguous=st.booleans())
def test_pack_matches_the_reference_and_unpack_inverts_it(rows, columns, nbits, seed, is_contiguous):
    codes = random_codes(rows, columns, nbits, seed)
    given_codes = codes if is_contiguous else non_contiguous(codes)
    assert torch.equal(given_codes, codes)
    packed = pack(given_codes, nbits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_row_bytes(columns, nbits))
    assert torch.equal(packed, pack_reference(codes, nbits))
    given_packed = packed if is_contiguous else non_contiguous(packed)
    assert torch.equal(unpack(given_packed, nbits, columns), codes)
    assert torch.equal(unpack_reference(packed, nbits, columns), codes)


@settings(max_examples=40, deadline=None)
@given(rows=rows_s, columns=columns_s, nbits=nbits_s, seed=st.integers(0, 99))
def test_rows_are_independent(rows, columns, nbits, seed):
    codes = random_codes(rows, columns, nbits, seed)
    together = pack(codes, nbits)
    assert torch.equal(together, torch.cat([pack(codes[row : row + 1], nbits) for row in range(rows)]))
    separately = [unpack(together[row : row + 1], nbits, columns) for row in range(rows)]
    assert torch.equal(torch.cat(separately), codes)


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
@pytest.mark.parametrize("columns", [8, 64, 104, 4096])
def test_a_row_takes_exactly_nbits_bits_a_code_where_eight_divides_the_columns(nbits, columns):
    assert packed_row_bytes(columns, nbits) * 8 == columns * nbits


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_a_ragged_row_wastes_less_than_a_byte_for_each_plane(nbits):
    planes = 1 if nbits in (1, 2, 4, 8) else 2
    for columns in range(1, 50):
        waste = packed_row_bytes(columns, nbits) * 8 - columns * nbits
        assert 0 <= waste < 8 * planes


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_bits_above_nbits_are_not_looked_at(nbits):
    codes = random_codes(3, 63, nbits)
    dirty = codes | torch.tensor((0xFF << nbits) & 0xFF, dtype=torch.uint8)
    assert torch.equal(pack(dirty, nbits), pack(codes, nbits))


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_packing_writes_into_neither_its_input_nor_a_view_of_it(nbits):
    codes = random_codes(2, 7, nbits)
    before = codes.clone()
    packed = pack(codes, nbits)
    packed.fill_(0)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("nbits", [0, 7, 9, -1])
def test_an_unsupported_width_is_refused(nbits):
    with pytest.raises(ValueError, match="not supported"):
        packed_row_bytes(8, nbits)
    with pytest.raises(ValueError, match="not supported"):
        pack(random_codes(2, 8, 1), nbits)
    with pytest.raises(ValueError, match="not supported"):
        unpack(random_codes(2, 8, 1), nbits, 8)


@pytest.mark.parametrize("columns", [0, -8])
def test_a_row_without_columns_is_refused(columns):
    with pytest.raises(ValueError, match="must be positive"):
        packed_row_bytes(columns, 4)


@pytest.mark.parametrize("codes", [torch.zeros(2, 8), torch.zeros(8, dtype=torch.uint8), torch.zeros(2, 8).int()])
def test_codes_that_are_no_uint8_matrix_are_refused(codes):
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(codes, 4)


@pytest.mark.parametrize("packed", [torch.zeros(2, 8), torch.zeros(8, dtype=torch.uint8), torch.zeros(2, 8).int()])
def test_packed_rows_that_are_no_uint8_matrix_are_refused(packed):
    with pytest.raises(ValueError, match="uint8 matrix"):
        unpack(packed, 4, 16)


@pytest.mark.parametrize(("nbits", "columns"), [(4, 15), (4, 18), (8, 9), (3, 9)])
def test_packed_rows_of_another_width_are_refused(nbits, columns):
    packed = torch.zeros(2, 8, dtype=torch.uint8)
    if nbits == 4 and columns == 15:  # 15 codes of 4 bits take 8 bytes as well: the last half byte is padding
        assert unpack(packed, nbits, columns).shape == (2, 15)
    else:
        with pytest.raises(ValueError, match="bytes"):
            unpack(packed, nbits, columns)
