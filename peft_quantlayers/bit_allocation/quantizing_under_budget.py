"""Quantizing under a budget: the plan, its config, and the divergence measured beside the predicted one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..calibration.blocks import Call, evaluating
from ..calibration.model_calls import model_calls
from ..layers.selection import checked_modules
from ..methods import QuantConfig
from .bit_plan import BitPlan
from .plan_bits import check_budget, plan_bits

logger = logging.getLogger(__name__)

# Windows and predictions that are compared; the float model's are kept in memory.
WINDOWS = 4
PREDICTIONS = 512


def plan_of(
    model: nn.Module, config: QuantConfig, budget: Any, calibration: Calibration | None, *, progress: bool
) -> BitPlan:
    """``budget`` itself if it is a plan or the file of one, or a plan for that many bits per weight or that size.

    Raises:
        TypeError: no budget of these kinds.
        ValueError: a number or size without calibration data, or as :func:`plan_bits`. The model was not changed.
    """
    if (plan := given_plan(budget)) is not None:
        return plan
    wanted = wanted_budget(budget, is_calibrated=calibration is not None)
    return plan_bits(model, calibration, config=config, progress=progress, **wanted)


def refuse_budget(model: nn.Module, config: QuantConfig, budget: Any, calibration: Calibration | None) -> None:
    """Raise what :func:`plan_of`, or quantizing with a plan that is given, would raise; computes nothing."""
    if (plan := given_plan(budget)) is not None:
        checked_modules(model, with_plan(config, plan))
    else:
        check_budget(model, config, **wanted_budget(budget, is_calibrated=calibration is not None))


def wanted_budget(budget: Any, *, is_calibrated: bool) -> dict[str, Any]:
    """``budget``, no plan, as the argument ``average`` or ``size`` of a planner. Raises as :func:`plan_of`."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(
            f"budget must be stored bits per weight (3.5), a size ('4GB'), a BitPlan or its file, got "
            f"{type(budget).__name__}. The model was not changed."
        )
    if not is_calibrated:
        raise ValueError(
            f"budget={budget!r} needs calibration data, on which bits are planned: give calibration=, or a plan that "
            "was made before. The model was not changed."
        )
    return {"size": budget} if isinstance(budget, str) else {"average": float(budget)}


def given_plan(budget: Any) -> BitPlan | None:
    """The plan that ``budget`` is, or that the file of this name holds (a ``Path``, or text that ends in ``.json``).

    None for a number or a size, of which a plan is still to be made.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is no such file.
    """
    if isinstance(budget, Path) or (isinstance(budget, str) and budget.endswith(".json")):
        return BitPlan.load(budget)
    return budget if isinstance(budget, BitPlan) else None


def with_plan(config: QuantConfig, plan: BitPlan) -> QuantConfig:
    """``config`` with what the plan says of each layer."""
    return dataclasses.replace(config, overrides={**(config.overrides or {}), **plan.overrides} or None)


@contextmanager
def measured(model: nn.Module, plan: BitPlan, calibration: Calibration | None) -> Iterator[None]:
    """Set ``plan.measured_kl`` from the model before and after what is done inside, and log both figures."""
    if calibration is None:
        yield
        return
    few = dataclasses.replace(calibration, batch_size=1)
    calls = model_calls(model, few.batches(model))
    calls = calls[:: max(1, len(calls) // WINDOWS)][:WINDOWS]
    before = _log_probs(model, calls)
    yield
    after = _log_probs(model, calls)
    plan.measured_kl = float((before.exp() * (before - after)).sum(-1).double().mean())
    logger.info("%s", plan)


@torch.no_grad()
def _log_probs(model: nn.Module, calls: Sequence[Call]) -> Tensor:
    """Of ``PREDICTIONS`` tokens spread evenly over all calls, (n, n_classes) float32."""
    found = []
    with evaluating(model):
        for call in calls:
            logits = call.real_tokens(call.run(model).logits).flatten(0, -2)
            n_kept = min(len(logits), max(1, PREDICTIONS // len(calls)))
            chosen = torch.linspace(0, len(logits) - 1, n_kept).long()
            found.append(logits[chosen].float().log_softmax(-1))
    return torch.cat(found)
