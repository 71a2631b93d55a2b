"""Models that are larger than memory: quantized from files to files, a part at a time."""

from .quantize_files import quantize_checkpoint

__all__ = ["quantize_checkpoint"]
