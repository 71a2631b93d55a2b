"""Temporary."""

import torch


def tiled_linear(x, tensors, dequantize_rows, bias, *, out_features):
    w = dequantize_rows(tensors, slice(0, out_features), x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
