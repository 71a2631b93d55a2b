"""Integers of 1 to 8 bits, packed into bytes row by row."""

from .packing import SUPPORTED_NBITS, pack, packed_row_bytes, unpack

__all__ = ["SUPPORTED_NBITS", "pack", "packed_row_bytes", "unpack"]
