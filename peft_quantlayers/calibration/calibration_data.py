"""What a user says of calibration: the data, made into batches, and how it is used. No model is run here."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..arguments import (
    check_choice,
    check_fields,
    check_flag,
    check_integer,
    check_keywords_only,
    check_number,
    check_tokenizer,
)
from .forward_batches import forward_batches
from .model_facts import main_input, max_length, takes_token_ids, vocabulary_size
from .texts import token_sequences

logger = logging.getLogger(__name__)

# Fewer tokens say next to nothing about inputs with hundreds of channels.
MIN_TOKENS = 128
SHRINKAGE, MERGE_SHRINKAGE = 0.5, 0.3


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Inputs that are representative of the model's use, and how they are used.

    Fields:
        data: a text or a list of texts; the ``pathlib.Path`` of a text file; chats, lists of ``{"role", "content"}``,
            written as text by the tokenizer's chat template; token ids, (n,) or (n_sequences, length), or a list of
            such; a ``datasets`` dataset with a column ``input_ids``, ``text``, ``messages`` or ``conversations``, or
            a DatasetDict, of which "train" is taken. Or batches for the model's forward: mappings of its keywords
            (``input_ids``, ``attention_mask``, ``pixel_values``, ``input_features``, ``decoder_input_ids``, ...) to
            tensors, a list of such, or a ``DataLoader`` that gives them; for a model that takes no token ids also a
            list of floating tensors, each one batch of its main input. Tokens that ``attention_mask`` hides do not
            count. Blocks that the data does not reach (a vision tower without images) are quantized without
            calibration. An encoder-decoder whose batches hold token ids only reads them in its decoder too: shifted
            as the model shifts labels; with ``labels`` it reads those.
        tokenizer: for texts and chats; None for the tokenizer of the model's own name or folder.
        n_tokens: tokens to use; windows are taken evenly from all of ``data``. A list of batches is used as a whole,
            a ``DataLoader`` or another iterator is read until it has given so many.
        sequence_length: tokens of a window; fewer where the model has fewer positions.
        batch_size: windows that go through a block at a time, and sequences of a given batch.
        damping: added to the diagonal of each second moment, as a fraction of the diagonal's mean. A larger value
            relies less on the data.
        shrinkage: fraction by which off-diagonal entries of the second moment are shrunk towards zero. A larger value
            relies less on the data. None for 0.5, with which the error on text of another kind is lower; and
            for 0.3 where an adapter is merged, which retains more of what it learned.
        asymmetric_targets: quantize each weight of a block to give the float model's outputs from the inputs that the
            quantized blocks before it make, which makes up for part of their error. The float model runs beside, with
            a second copy of one block in memory, and calibration takes up to 1.8 times as long. Experts and layers
            outside of the blocks are as without. None for True where a float model is quantized, and False where one
            is merged, or is quantized in part already.
        initial_codes: what the sweeps over the codes begin with, for HQQ and NF4: the nearest codes; rounding with
            error feedback, as in GPTQ, by columns; the same with the columns of large inputs first; or, with "best",
            for each layer the one of these with the lowest error on held-out tokens. Experts begin with the nearest.
        finetune_epochs: after a block is quantized, epochs over the data in which its scales, zeros, codebooks, biases
            and float32 norms are trained to restore the block's original output; 0 for none.
        learning_rate: of that training, and of a merge's with ``tune_epochs``, relative to the size of each tensor.
        resume_folder: where finished blocks are stored, so that an interrupted run can continue.
    """

    data: Any
    tokenizer: Any = None
    n_tokens: int = 16_384
    sequence_length: int = 512
    batch_size: int = 4
    damping: float = 0.05
    shrinkage: float | None = None
    asymmetric_targets: bool | None = None
    initial_codes: Literal["nearest", "error_feedback", "act_order", "best"] = "nearest"
    finetune_epochs: int = 0
    learning_rate: float = 1e-3
    resume_folder: str | Path | None = None

    def __new__(cls, *positional: Any, **fields: Any) -> Self:
        """Raise TypeError for an unknown field, and list the known ones."""
        check_keywords_only("Calibration", positional, "Calibration(data=...)")
        check_fields("Calibration", fields, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.data is None:
            raise TypeError("data=None: a Calibration needs texts, token ids, a dataset, or batches for the model.")
        if isinstance(self.data, Iterator):
            object.__setattr__(self, "data", ReadOnce(self.data))
        check_tokenizer(self.tokenizer)
        check_integer("n_tokens", self.n_tokens, at_least=MIN_TOKENS, at_most=2**40)
        check_integer("sequence_length", self.sequence_length, at_least=1, at_most=2**24)
        check_integer("batch_size", self.batch_size, at_least=1, at_most=2**20)
        check_number("damping", self.damping, above=0.0, at_most=1e6)
        if self.shrinkage is not None and self.shrinkage != 0:
            check_number("shrinkage", self.shrinkage, above=0.0, at_most=1.0)
        if self.asymmetric_targets is not None:
            check_flag("asymmetric_targets", self.asymmetric_targets)
        check_choice("initial_codes", self.initial_codes, ("nearest", "error_feedback", "act_order", "best"))
        check_integer("finetune_epochs", self.finetune_epochs, at_least=0, at_most=10_000)
        check_number("learning_rate", self.learning_rate, above=0.0, at_most=1.0)
        if self.resume_folder is not None and not isinstance(self.resume_folder, (str, Path)):
            raise TypeError(f"resume_folder must be the path of a folder, got {self.resume_folder!r}.")

    @classmethod
    def of(cls, calibration: Any, tokenizer: Any = None) -> "Calibration":
        """``calibration`` itself, or one with all defaults around data; ``tokenizer`` is used if it has none."""
        check_tokenizer(tokenizer)
        if not isinstance(calibration, Calibration):
            return cls(data=calibration, tokenizer=tokenizer)
        if tokenizer is not None and calibration.tokenizer is None:
            return dataclasses.replace(calibration, tokenizer=tokenizer)
        return calibration

    @property
    def used_shrinkage(self) -> float:
        """``shrinkage``, or its default for all but merges."""
        return SHRINKAGE if self.shrinkage is None else self.shrinkage

    def of_float_model(self, *, is_whole: bool = True) -> "Calibration":
        """As it is used to quantize, with asymmetric targets unless they are refused or the model is float in part."""
        targets = is_whole if self.asymmetric_targets is None else self.asymmetric_targets
        return dataclasses.replace(self, asymmetric_targets=targets, shrinkage=self.used_shrinkage)

    def of_merge(self) -> "Calibration":
        """As it is used to merge an adapter."""
        return dataclasses.replace(self, shrinkage=MERGE_SHRINKAGE) if self.shrinkage is None else self

    def batches(self, model: nn.Module, *, progress: bool = False) -> list[Tensor | dict[str, Any]]:
        """Inputs for ``model``: (batch, sequence_length) int64 each, or the batches that ``data`` holds.

        Raises:
            ValueError: no data, too few tokens, or ids beyond the vocabulary.
            TypeError: data of an unknown kind, or of another one than the model takes.
        """
        given, data = forward_batches(self.data, model, n_tokens=self.n_tokens, batch_size=self.batch_size)
        if given is not None:
            return list(given)
        if isinstance(data, Tensor) and data.is_floating_point():
            data = [data]
        takes_ids = takes_token_ids(model)
        if _is_list_of_tensors(data) and data[0].is_floating_point():
            if takes_ids:
                raise TypeError(f"a language model's calibration data are token ids, integers; got {data[0].dtype}.")
            if not all(torch.isfinite(batch).all() for batch in data):
                raise ValueError("the calibration data holds NaN or Inf.")
            return list(data)
        if takes_ids is False:
            name = main_input(model)
            raise TypeError(
                f"{type(model).__name__} reads {name!r}, not token ids: give batches of its processor, for example "
                f"data=[{{{name!r}: tensor}}]. See Calibration."
            )
        sequences = token_sequences(data, self.tokenizer, model, n_tokens=self.n_tokens, progress=progress)
        windows = self._windows(sequences, max_length(model))
        low, high = int(windows.min()), int(windows.max())
        vocabulary = vocabulary_size(model)
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


class ReadOnce:
    """An iterator that can be gone through several times: what was read is kept, and more is read where needed."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator, self._read = iterator, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            if number == len(self._read):
                try:
                    self._read.append(next(self._iterator))
                except StopIteration:
                    return
            yield self._read[number]


def _is_list_of_tensors(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, Tensor) for item in data)
