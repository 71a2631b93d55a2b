"""Checks of the text that models are measured on."""

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integer

MAX_INTEGER = 2**62


def check_token_ids(token_ids: Any, *, window: Any, max_windows: Any) -> int:
    """The number of windows in ``token_ids``, at most ``max_windows``.

    Raises:
        TypeError: no tensor of integers, or the other two are no integers.
        ValueError: the text is not a vector of at least one window, or a number is too small.
    """
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"token_ids must be a tensor of integers, (n_tokens,), got {type(token_ids).__name__}. Encode a text with "
            'the model\'s tokenizer: tokenizer(text, return_tensors="pt")["input_ids"][0].'
        )
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"token_ids must be integers, got {token_ids.dtype}.")
    check_integer("window", window, at_least=-MAX_INTEGER, at_most=MAX_INTEGER)
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: the first token of a window is not scored.")
    if max_windows is not None:
        check_integer("max_windows", max_windows, at_least=-MAX_INTEGER, at_most=MAX_INTEGER)
        if max_windows < 1:
            raise ValueError(f"max_windows={max_windows} must be at least 1, or None for all.")
    if token_ids.dim() != 1 or token_ids.numel() < window:
        raise ValueError(
            f"token_ids of shape {tuple(token_ids.shape)} ({token_ids.numel()} tokens) must be a vector of at least "
            f"one window of {window} tokens. Give a longer text, or a smaller window."
        )
    n_windows = token_ids.numel() // window
    return min(n_windows, max_windows or n_windows)
