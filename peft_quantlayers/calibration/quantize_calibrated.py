"""Quantize a model on calibration data, block by block, with the error of each layer; resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..formats.quantized_weight import stored_bytes
from ..layers import QuantizedLinear
from ..layers.dense_types import dense_weight
from ..layers.replace import linear_of, place_layer, quantize_module
from ..layers.stack import QuantizedStack
from ..methods import QuantConfig, get_method
from .asymmetric_targets import chosen_dampings, target_with
from .calibration_data import Calibration
from .finetune import finetune_block
from .initial_codes import chosen_initial_codes
from .model_calls import batch_tensors
from .process_group import ALONE, Processes
from .resume_folder import ResumeFolder
from .statistics import Statistic
from .walk import BlockWork, InputGroup, Visitor, walk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """The errors of one quantized layer.

    Fields:
        name: of the module.
        bits_per_weight: stored bits, metadata included.
        weight_error: squared norm of the weight's error over that of the weight.
        output_error: the same for the outputs on the calibration inputs, with asymmetric targets of the error to the
            target; None if no input reached the layer.
        seconds: time to quantize it, without the collection of inputs.
    """

    name: str
    bits_per_weight: float
    weight_error: float
    output_error: float | None
    seconds: float


def quantize_calibrated(
    model: nn.Module,
    specs: dict[str, QuantSpec],
    config: QuantConfig,
    calibration: Calibration,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    on_layer: Callable[[LayerResult], None] | None = None,
) -> None:
    """Replace the modules ``specs`` by quantized layers, in place; see :func:`walk`.

    Raises:
        ValueError, TypeError: the calibration data is refused, a spec cannot use it, or a resume folder belongs to
            another run or is damaged; the model is as it was.
        OSError: the resume folder cannot be written, or another process uses it; the model is as it was.
    """
    check_can_calibrate(specs, calibration)
    calibration = calibration.of_float_model()
    visitor = QuantizeVisitor(model, specs, config, calibration, device, on_layer)
    try:
        walk(model, list(specs), calibration, visitor, device=device, progress=progress)
    finally:
        if visitor.folder is not None:
            visitor.folder.close()


def check_can_calibrate(specs: Mapping[str, QuantSpec], calibration: Calibration) -> None:
    """Raise ValueError if there is a layer, by name, whose method makes no use of ``calibration``."""
    wanted = calibration.initial_codes
    for name, spec in specs.items():
        known = get_method(spec.method).initial_codes
        if wanted != "best" and wanted not in known:
            raise ValueError(
                f"{name}: initial_codes={wanted!r} is not possible for {spec.method}, whose codes begin with "
                f'{list(known)}. Use initial_codes="best", which takes what each layer can. The model was not changed.'
            )
    unfit = [name for name, spec in specs.items() if not get_method(spec.method).can_use_hessian(spec)]
    if unfit:
        raise ValueError(
            f"{unfit[0]}: calibration is not possible for {specs[unfit[0]]} ({len(unfit)} layer(s)). "
            f"{get_method(specs[unfit[0]].method).calibration_requirement} Or quantize without calibration. The model "
            "was not changed."
        )


class QuantizeVisitor(Visitor):
    """Quantizes each layer that the walk comes to, with the statistics of its inputs."""

    def __init__(
        self,
        model: nn.Module,
        specs: dict[str, QuantSpec],
        config: QuantConfig,
        calibration: Calibration,
        device: torch.device | str | None,
        on_layer: Callable[[LayerResult], None] | None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.specs, self.config, self.calibration = model, specs, config, calibration
        self.device, self.on_layer, self.processes = device, on_layer, processes
        self.folder: ResumeFolder | None = None
        self.needs_targets = calibration.finetune_epochs > 0
        self.statistics = wanted_statistics(calibration, specs.values())

    def begin(self, batches: Sequence[Tensor | Mapping[str, Any]]) -> None:
        folder = self.calibration.resume_folder
        if folder is not None:
            fingerprint = _fingerprint(self.model, self.specs, self.config, self.calibration, batches)
            self.folder = ResumeFolder(Path(folder), fingerprint, self.model, self.specs)

    def restore_block(self, block: str, names: list[str]) -> bool:
        return self.folder is not None and self.folder.restore(self.model, block, self.config)

    def visit_group(self, group: InputGroup) -> None:
        if group.experts is not None:
            return self._quantize_stack(group)
        names = group.names
        costs = [self._weight(name).numel() for name in names]
        # No name for the weights, which are released one by one.
        dampings = chosen_dampings([self._weight(name) for name in names], group.statistics, processes=self.processes)
        if group.statistics is not None and group.statistics.first_half is not None:
            group.statistics.first_half.drop("deviation_moment")

        def quantized(at: int) -> tuple[QuantizedWeight, torch.dtype, LayerResult]:
            return self._quantize(names[at], group, dampings[at])

        found = self.processes.shared_out(costs, quantized)
        for name, (weight, compute_dtype, result) in zip(names, found, strict=True):
            if not isinstance(self.model.get_submodule(name), QuantizedLinear):  # another process has made it
                place_layer(self.model, name, weight, compute_dtype=compute_dtype)
            self._tell(result)
        return None

    def _quantize_stack(self, group: InputGroup) -> None:
        """One expert after the other, each with the second moment that it has."""
        (name,) = group.names
        weight = dense_weight(self.model, name).detach()
        start = time.perf_counter()
        stack = cast(
            QuantizedStack,
            quantize_module(
                self.model,
                name,
                self.specs[name],
                compute_dtype=self.config.compute_dtype,
                device=self.device,
                hessian_of=lambda expert: group.hessian_of_expert(expert, self.calibration),
                in_turns=self.processes.in_turns,
            ),
        )
        seconds = time.perf_counter() - start

        def errors_of(expert: int) -> _Errors:
            return _Errors.of(
                weight[expert],
                stack.dequantize_expert(expert, torch.float32),
                group.hessian_of_expert(expert, self.calibration),
            )

        errors = _Errors()
        for found in self.processes.in_turns(stack.n_experts, errors_of):
            errors.add(found)
        self._tell(errors.result(name, stack.quantized_weight.bits_per_weight, seconds))

    def _tell(self, result: LayerResult) -> None:
        if self.processes.is_first:
            logger.info("%s", result)
        if self.on_layer is not None:
            self.on_layer(result)

    def _weight(self, name: str) -> Tensor:
        return linear_of(self.model, name)[0].detach()

    def _quantize(
        self, name: str, group: InputGroup, damping: float | None
    ) -> tuple[QuantizedWeight, torch.dtype, LayerResult]:
        """Of one layer of ``group``; if it is the only one, moments go as soon as they are not needed."""
        statistics = group.statistics

        def drop(name: Statistic) -> None:
            if statistics is not None and len(group.names) == 1:
                statistics.drop(name)

        weight = self._weight(name).clone()
        start = time.perf_counter()
        target = target_with(damping, weight, statistics)
        drop("deviation_moment")
        initial_codes = chosen_initial_codes(
            weight if target is None else target,
            self.specs[name],
            statistics,
            self.calibration,
            layer_name=name,
        )
        drop("first_half")
        hessian = group.hessian(self.calibration)
        drop("second_moment")
        layer = cast(
            QuantizedLinear,
            quantize_module(
                self.model,
                name,
                self.specs[name],
                compute_dtype=self.config.compute_dtype,
                device=self.device,
                target=target,
                hessian=hessian,
                initial_codes=initial_codes,
            ),
        )
        seconds = time.perf_counter() - start
        errors = _Errors.of(weight, layer.dequantize(torch.float32), hessian, target=target)
        quantized = layer.quantized_weight
        return quantized, layer.compute_dtype, errors.result(name, quantized.bits_per_weight, seconds)

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
        is_finetuned = bool(self.calibration.finetune_epochs and names)
        if is_finetuned:
            before, after = finetune_block(
                work, epochs=self.calibration.finetune_epochs, learning_rate=self.calibration.learning_rate
            )
            logger.info("%s: finetuned, output error %.5f to %.5f", block, before, after)
        if self.folder is not None:
            self.folder.keep(self.model, block, names)
        return is_finetuned


class _Errors:
    """Sums over one weight, or over the weights of a stack, from which the errors of a :class:`LayerResult` follow."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.has_outputs = False

    @classmethod
    def of(cls, weight: Tensor, quantized: Tensor, hessian: Tensor | None, *, target: Tensor | None = None) -> _Errors:
        """Of one weight and its quantized values, (out_features, in_features), with its inputs' second moment.

        ``target``: what the outputs should be those of, in place of ``weight``.
        """
        found = cls()
        weights = (
            [weight.float()] if hessian is None else [weight.float(), (weight if target is None else target).float()]
        )
        for at, aim in enumerate(weights):
            for into, part in enumerate((quantized.to(aim.device) - aim, aim)):
                weighted = part if at == 0 or hessian is None else part @ hessian.to(aim.device)
                found.sums[2 * at + into] = float((weighted * part).sum())
        found.has_outputs = hessian is not None
        return found

    def add(self, other: _Errors) -> None:
        """Add those of another weight."""
        self.sums = [total + part for total, part in zip(self.sums, other.sums, strict=True)]
        self.has_outputs |= other.has_outputs

    def result(self, name: str, bits_per_weight: float, seconds: float) -> LayerResult:
        """The errors relative to the weights' and to the outputs' energy."""
        weight_error, output_error = (self.sums[at] / max(self.sums[at + 1], 1e-30) for at in (0, 2))
        return LayerResult(
            name=name,
            bits_per_weight=bits_per_weight,
            weight_error=weight_error,
            output_error=output_error if self.has_outputs else None,
            seconds=seconds,
        )


def wanted_statistics(calibration: Calibration, specs: Iterable[QuantSpec] = ()) -> tuple[Statistic, ...]:
    """What is collected of the inputs of layers that are quantized to ``specs``, or merged."""
    has_choice = any(len(get_method(spec.method).initial_codes) > 1 for spec in specs)
    wanted: tuple[Statistic, ...] = ("second_moment",)
    if calibration.asymmetric_targets:
        wanted += ("deviation_moment",)
    if calibration.asymmetric_targets or (calibration.initial_codes == "best" and has_choice):
        wanted += ("first_half",)
    return wanted


# Options that came later, with the value that means what was done before: runs that began then can go on.
LATER_OPTIONS = {"asymmetric_targets": False, "initial_codes": "nearest"}


def calibration_options(calibration: Calibration) -> dict[str, Any]:
    """How the data is used: all fields that determine the result, but for the data."""
    options = {
        field.name: getattr(calibration, field.name)
        for field in dataclasses.fields(calibration)
        if field.name not in ("data", "tokenizer", "resume_folder")
    }
    return {name: value for name, value in options.items() if LATER_OPTIONS.get(name, ...) != value}


def _fingerprint(
    model: nn.Module,
    specs: dict[str, QuantSpec],
    config: QuantConfig,
    calibration: Calibration,
    batches: Sequence[Tensor | Mapping[str, Any]],
) -> str:
    """A digest of all that determines the result: weights, specs, data, and how the data is used."""
    digest = hashlib.sha256()
    options = calibration_options(calibration)
    described: dict[str, Any] = {
        "specs": {name: spec.to_dict() for name, spec in specs.items()},
        "options": options,
    }
    if config.compute_dtype is not None:
        described["compute_dtype"] = str(config.compute_dtype)
    digest.update(json.dumps(described, sort_keys=True).encode())
    for batch in batches:
        if isinstance(batch, Mapping):  # of any other the options say the shapes
            described_tensors = {name: (str(t.dtype), t.shape) for name, t in batch.items() if isinstance(t, Tensor)}
            digest.update(json.dumps(described_tensors, sort_keys=True).encode())
        for tensor in batch_tensors([batch]):
            digest.update(stored_bytes(tensor))
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(stored_bytes(parameter.data.reshape(-1)))
    return digest.hexdigest()
