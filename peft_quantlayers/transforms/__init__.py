"""Transforms of a float model before it is quantized: it computes what it did, with weights that quantize better."""
