"""What a model predicts on some data, kept in little room: the teacher of a model that is tuned to predict the same.

Of each token the most likely classes are kept with their log-probabilities; all others count as one class more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_flag, check_integer, check_model
from ..calibration import Calibration
from ..calibration.blocks import Call, evaluating, real_logits
from ..calibration.model_calls import model_calls
from ..storage import replace_file

FORMAT = "peft_quantlayers predictions"
VERSION = 1
DEFAULT_CLASSES = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The batches that a model was given, and what it predicted.

    Fields:
        batches: as the model's forward takes them: keywords to tensors, or a tensor, its main input.
        log_probs: of each batch, of the tokens that are no padding: (n_tokens, n_kept) float32, the most likely first.
        classes: which classes those are, shaped alike, int32.
        n_classes: of the model; all beyond ``n_kept`` are one class.
    """

    batches: list[Tensor | dict[str, Tensor]]
    log_probs: list[Tensor]
    classes: list[Tensor]
    n_classes: int

    @property
    def n_tokens(self) -> int:
        """Predictions of all batches."""
        return sum(len(each) for each in self.log_probs)

    def divergence(self, batch: int, logits: Tensor) -> Tensor:
        """Mean KL divergence of a batch's predictions from these, nats; differentiable in ``logits``.

        At most that of all classes, since the rest is compared as one.

        Args:
            batch: its number.
            logits: (n_tokens, n_classes), of the tokens that are no padding.

        Raises:
            ValueError: another number of classes or tokens.
        """
        kept, classes = (each[batch].to(logits.device) for each in (self.log_probs, self.classes))
        if logits.shape != (len(kept), self.n_classes):
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)}, and the predictions to match are those of "
                f"{len(kept)} tokens and {self.n_classes} classes: they are of a model with another vocabulary."
            )
        ours = logits.float().log_softmax(-1).gather(1, classes.long())
        found = (kept.exp() * (kept - ours)).sum(-1)
        if kept.shape[1] < self.n_classes:
            theirs_rest, ours_rest = _rest(kept), _rest(ours)
            found = found + theirs_rest * (theirs_rest.log() - ours_rest.log())
        return found.mean()

    def save(self, file: str | Path) -> None:
        """Write all to one safetensors file, which :meth:`load` reads."""
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches):
            named = {"": batch} if isinstance(batch, Tensor) else batch
            tensors |= {f"{number}.inputs.{name}": tensor for name, tensor in named.items()}
            tensors |= {f"{number}.log_probs": self.log_probs[number], f"{number}.classes": self.classes[number]}
        about = {"format": FORMAT, "version": VERSION, "n_batches": len(self.batches), "n_classes": self.n_classes}
        with replace_file(Path(file)) as part:
            # Several names of one tensor are none that safetensors writes.
            save_file(
                {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
                part,
                metadata={"about": json.dumps(about)},
            )

    @classmethod
    def load(cls, file: str | Path) -> Predictions:
        """The predictions that :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged.
            FileNotFoundError: there is no such file.
        """
        try:
            with safe_open(Path(file), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["about"])
                if about["format"] != FORMAT or about["version"] > VERSION:
                    raise ValueError(f"it says {about['format']!r}, version {about['version']}")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            numbers = range(about["n_batches"])
            inputs = [
                {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"{number}.inputs.")}
                for number in numbers
            ]
            return cls(
                batches=[named.get("", named) for named in inputs],
                log_probs=[tensors[f"{number}.log_probs"] for number in numbers],
                classes=[tensors[f"{number}.classes"] for number in numbers],
                n_classes=about["n_classes"],
            )
        except FileNotFoundError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{file} holds no predictions that this version reads ({error}). Predictions.save writes them; make "
                "others with record_predictions."
            ) from None


@torch.no_grad()
def record_predictions(
    model: nn.Module,
    calibration: Any,
    *,
    n_kept: int = DEFAULT_CLASSES,
    tokenizer: Any = None,
    progress: bool = True,
) -> Predictions:
    """What ``model`` predicts on ``calibration``; a token takes ``8 * n_kept`` bytes.

    Args:
        model: with logits: a float model, or one with adapters.
        calibration: as in :func:`quantize_model`.
        n_kept: classes of each token that are kept, the most likely ones.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`.
        progress: show a progress bar.

    Raises:
        TypeError: a model without logits; arguments of other kinds.
        ValueError: calibration data that is refused; logits that are not finite.
    """
    check_model("record_predictions", model)
    check_flag("progress", progress)
    check_integer("n_kept", n_kept, at_least=1, at_most=2**24)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    batches: list[Any] = Calibration.of(calibration, tokenizer).batches(base, progress=progress)
    log_probs, classes, n_classes = [], [], 0
    with evaluating(model):
        for call in tqdm(model_calls(base, batches), desc="Recording", unit="batch", disable=not progress):
            logits = logits_of(model, call)
            if not torch.isfinite(logits).all():
                raise ValueError("the model predicts NaN or Inf on the calibration data, which no model can match.")
            n_classes = logits.shape[-1]
            values, places = logits.float().log_softmax(-1).topk(min(n_kept, n_classes))
            log_probs.append(values.cpu())
            classes.append(places.int().cpu())
    return Predictions(batches=batches, log_probs=log_probs, classes=classes, n_classes=n_classes)


def logits_of(model: nn.Module, call: Call) -> Tensor:
    """(n_tokens, n_classes): of the tokens that are no padding. Raises TypeError for a model without logits."""
    way_out = "Take a model with a head, such as AutoModelForCausalLM."
    logits = real_logits(model, call, otherwise=f": scales are tuned by what a model predicts. {way_out}")
    return logits.flatten(0, -2)


def held_out(n_batches: int) -> Sequence[int]:
    """The numbers of batches that training leaves out, to judge it by: every eighth, and of a single one itself."""
    return range(n_batches - 1, -1, -8)


def _rest(log_probs: Tensor) -> Tensor:
    """(n_tokens,): the probability of all classes that are not among ``log_probs``."""
    return (1 - log_probs.exp().sum(-1)).clamp(min=1e-7)
