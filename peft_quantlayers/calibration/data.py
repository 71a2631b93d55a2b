"""Calibration data: texts, token ids or ready inputs, as batches. No model is run here."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.spec import check_integer, check_number
from ..integrations.private_transformers import name_or_path

logger = logging.getLogger(__name__)

# Fewer tokens say next to nothing about inputs with hundreds of channels.
MIN_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Inputs that are representative of the model's use, and how they are used.

    Fields:
        data: a text or a list of texts; token ids, (n,) or (n_sequences, length), or a list of such; a ``datasets``
            dataset with a column ``input_ids`` or ``text``; or, for a model that takes no token ids, a list of
            floating tensors, each one batch for the model's forward.
        tokenizer: for texts; None for the tokenizer of the model's own name or folder.
        n_tokens: tokens to use; windows are taken evenly from all of ``data``.
        sequence_length: tokens of a window; fewer where the model has fewer positions.
        batch_size: windows that go through a block at a time.
        damping: added to the diagonal of each second moment, as a fraction of the diagonal's mean. A larger value
            relies less on the data.
        shrinkage: fraction by which off-diagonal entries of the second moment are shrunk towards zero. A larger value
            relies less on the data.
        finetune_epochs: after a block is quantized, epochs over the data in which its scales, zeros, codebooks, biases
            and float32 norms are trained to restore the block's original output; 0 for none.
        learning_rate: of that training, relative to the size of each tensor.
        resume_folder: where finished blocks are stored, so that an interrupted run can continue.
    """

    data: Any
    tokenizer: Any = None
    n_tokens: int = 16_384
    sequence_length: int = 512
    batch_size: int = 4
    damping: float = 0.05
    shrinkage: float = 0.3
    finetune_epochs: int = 0
    learning_rate: float = 1e-3
    resume_folder: str | Path | None = None

    def __post_init__(self) -> None:
        check_integer("n_tokens", self.n_tokens, at_least=MIN_TOKENS, at_most=2**40)
        check_integer("sequence_length", self.sequence_length, at_least=1, at_most=2**24)
        check_integer("batch_size", self.batch_size, at_least=1, at_most=2**20)
        check_number("damping", self.damping, above=0.0, at_most=1e6)
        if self.shrinkage != 0:
            check_number("shrinkage", self.shrinkage, above=0.0, at_most=1.0)
        check_integer("finetune_epochs", self.finetune_epochs, at_least=0, at_most=10_000)
        check_number("learning_rate", self.learning_rate, above=0.0, at_most=1.0)

    @classmethod
    def of(cls, calibration: Any, tokenizer: Any = None) -> "Calibration":
        """``calibration`` itself, or one with all defaults around data."""
        if isinstance(calibration, Calibration):
            return calibration
        return cls(data=calibration, tokenizer=tokenizer)

    def batches(self, model: nn.Module) -> list[Tensor]:
        """Inputs for ``model``: (batch, sequence_length) int64 each, or the floating batches as they were given.

        Raises:
            ValueError: no data, too few tokens, or ids beyond the vocabulary.
            TypeError: data of an unknown kind.
        """
        data = self.data
        if isinstance(data, Tensor) and data.is_floating_point():
            data = [data]
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if _is_list_of_tensors(data) and data[0].is_floating_point():
            if vocabulary is not None:
                raise TypeError(f"a language model's calibration data are token ids, integers; got {data[0].dtype}.")
            if not all(torch.isfinite(batch).all() for batch in data):
                raise ValueError("the calibration data holds NaN or Inf.")
            return list(data)
        windows = self._windows(token_sequences(data, self.tokenizer, model), max_length(model))
        low, high = int(windows.min()), int(windows.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"the calibration data holds token ids from {low} to {high}, but the model's vocabulary has "
                f"{vocabulary}. Use the model's own tokenizer."
            )
        return list(windows.split(self.batch_size))

    def _windows(self, sequences: list[Tensor], longest: int) -> Tensor:
        """(n_windows, length): windows of the joined sequences, spread evenly over them."""
        ids = torch.cat(sequences) if sequences else torch.empty(0, dtype=torch.int64)
        if len(ids) < MIN_TOKENS:
            raise ValueError(
                f"the calibration data has {len(ids)} tokens; at least {MIN_TOKENS} are needed, and {self.n_tokens} "
                "are better."
            )
        length = min(self.sequence_length, len(ids), self.n_tokens, longest)
        windows = ids[: len(ids) // length * length].view(-1, length)
        wanted = max(1, self.n_tokens // length)
        if len(windows) < wanted:
            logger.warning(
                "calibrating on %d tokens instead of %d: the data has no more.",
                windows.numel(),
                self.n_tokens,
            )
            return windows
        return windows[torch.linspace(0, len(windows) - 1, wanted).round().long()]


def max_length(model: nn.Module) -> int:
    """The most tokens that ``model`` has positions for, so far as its config says."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else sys.maxsize


def token_sequences(data: Any, tokenizer: Any, model: nn.Module | None) -> list[Tensor]:
    """Token ids of ``data`` of any kind, as one-dimensional int64 tensors. Raises as :meth:`Calibration.batches`."""
    if hasattr(data, "column_names"):  # a datasets.Dataset
        column = _column(data.column_names, "calibration dataset has the columns", "Rename one with rename_column.")
        data = list(data[column])
    if isinstance(data, Mapping):
        data = data[_column(data, "calibration data has the entries", "Rename one.")]
    if isinstance(data, str):
        data = [data]
    if isinstance(data, Tensor):
        if not data.numel():
            raise ValueError("the calibration data is empty.")
        if not data.dim():
            raise ValueError("the calibration data is a single number; give token ids, (n_tokens,) or (n, n_tokens).")
        return [row.long().cpu() for row in _as_ids(data).reshape(-1, data.shape[-1])]
    if not isinstance(data, Sequence) and not isinstance(data, Iterable):
        raise TypeError(
            f"calibration data must be texts, token ids or a dataset, got {type(data).__name__}. See Calibration."
        )
    items = list(data)
    if not items:
        raise ValueError("the calibration data is empty.")
    if all(isinstance(item, Mapping) for item in items):
        items = [item[_column(item, "calibration data has rows with the entries", "Rename one.")] for item in items]
    if all(isinstance(item, str) for item in items):
        encode = tokenizer or _tokenizer_of(model)
        return [torch.tensor(encode(item)["input_ids"], dtype=torch.int64) for item in items if item.strip()]
    if any(isinstance(item, (str, Mapping)) for item in items):
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(f"calibration data must be all texts or all token ids, got a list with {kinds}.")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return [torch.tensor(items, dtype=torch.int64)]
    try:
        return [_as_ids(torch.as_tensor(item)).flatten().long().cpu() for item in items]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"calibration data must be texts, integer token ids or a dataset: {error}") from None


def _column(names: Iterable[str], said: str, remedy: str) -> str:
    """The one of ``names`` that is read: token ids before texts. ValueError where there is neither."""
    names = list(names)
    for column in ("input_ids", "text"):
        if column in names:
            return column
    raise ValueError(f"the {said} {names}; it needs 'input_ids' or 'text'. {remedy}")


def _as_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {ids.dtype}.")
    return ids


def _is_list_of_tensors(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, Tensor) for item in data)


def _tokenizer_of(model: nn.Module | None) -> Any:
    from transformers import AutoTokenizer

    name = name_or_path(model)
    try:
        if not name:
            raise OSError("the model has no name")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration texts need a tokenizer, and none was found for the model ({name!r}). Pass tokenizer=, or "
            "token ids instead of texts."
        ) from error
