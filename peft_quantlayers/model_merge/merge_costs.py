"""What each merged layer costs in each form, measured against the unmerged model, and the plan made of that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bit_allocation import BitPlan
from ..bit_allocation.bit_plan import LayerChoice
from ..bit_allocation.fisher_gradients import LayerSamples
from ..bit_allocation.plan_bits import ROWS, fields_of_choices, samples_of, spec_bytes
from ..calibration import Calibration, InputGroup, Visitor, walk
from ..formats import QuantizedWeight, QuantSpec
from ..layers import QuantizedLinear
from ..merging import MergePlan, MergeSource
from ..merging.calibrated_rule import for_outputs
from ..merging.merge_rules import requantize_as
from ..methods import QuantConfig, get_method
from ..methods.quant_config import config_type
from .active_adapters import only_active
from .merge_targets import MergeTarget


def planned(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    sources: Mapping[str, MergeSource],
    names: list[str],
    calibration: Calibration,
    budget: dict[str, Any],
    *,
    strategy: str,
    choices: Sequence[int | Mapping[str, Any]] | None,
    progress: bool,
) -> BitPlan:
    """The plan for ``sources``, the layers among ``targets`` whose bits may change; see :func:`.plan_merge_bits`."""
    candidates = {name: _candidates(source.quantized_base(), choices) for name, source in sources.items()}
    bases = {name: source.quantized_base() for name, source in sources.items()}
    model = peft_model.get_base_model()
    empty = BitPlan(
        layers={
            name: [
                LayerChoice(fields=fields, n_bytes=spec_bytes(spec, _shape(bases[name])), kl=0.0)
                for fields, spec in each
            ]
            for name, each in candidates.items()
        },
        chosen=dict.fromkeys(sources, 0),
        n_weights=sum(math.prod(_shape(base)) for base in bases.values()),
        other_bytes=_bytes_elsewhere(model, bases.values()),
    )
    empty.with_budget(**budget)  # refuses before anything is computed
    with only_active(peft_model, targets, names):
        samples = samples_of(model, list(sources), calibration)
        costs = _Costs(sources, candidates, samples, calibration, names)
        if strategy == "calibrated":
            walk(model, list(samples), calibration, costs, progress=progress)
        else:
            for name in tqdm(samples, desc="Planning", unit="layer", disable=not progress):
                costs.measure(name, None)
    # What the data does not reach keeps its bits: nothing is known of what others cost.
    unreached = {name: [_own_choice(base)] for name, base in bases.items() if name not in costs.found}
    layers = {name: costs.found.get(name) or unreached[name] for name in sources}
    return dataclasses.replace(empty, layers=layers).with_budget(**budget)


def _shape(base: QuantizedLinear) -> tuple[int, int]:
    return base.out_features, base.in_features


def _own_choice(base: QuantizedLinear) -> LayerChoice:
    return LayerChoice(fields={}, n_bytes=spec_bytes(base.spec, _shape(base)), kl=0.0)


def config_of_spec(spec: QuantSpec) -> QuantConfig:
    """The config whose layers have ``spec``."""
    make: Any = config_type(type(spec))
    return make(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)})


def fitted(base: QuantizedLinear, fields: Mapping[str, Any]) -> QuantSpec | None:
    """The spec of ``base`` with other ``fields``; None if it does not fit the shape."""
    if not fields:
        return base.spec
    config = config_of_spec(base.spec)
    if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(base.spec)}):
        raise ValueError(
            f"{base.layer_name}: the plan names {unknown}, which {base.spec.method} layers do not have: it was "
            "made for another method. The model is left as it was."
        )
    changed = dataclasses.replace(config, overrides={"*": dict(fields)})
    return changed.fitted_spec(changed.spec_for(base.layer_name), *_shape(base))


def _candidates(
    base: QuantizedLinear, choices: Sequence[int | Mapping[str, Any]] | None
) -> list[tuple[dict[str, Any], QuantSpec]]:
    """Fields and spec of the forms that a layer may take; its own where none fits."""
    found = []
    for fields in fields_of_choices(choices, config_of_spec(base.spec)):
        spec = fitted(base, fields)
        if spec is not None:
            found.append((fields, spec))
    return found or [({}, base.spec)]


class _Costs(Visitor):
    """Merges each layer in all its forms, and keeps what that costs; changes nothing."""

    statistics = ("second_moment",)

    def __init__(
        self,
        sources: Mapping[str, MergeSource],
        candidates: Mapping[str, list[tuple[dict[str, Any], QuantSpec]]],
        samples: Mapping[str, LayerSamples],
        calibration: Calibration,
        names: list[str],
    ) -> None:
        self.sources, self.candidates, self.samples = sources, candidates, samples
        self.calibration, self.names = calibration, names
        self.found: dict[str, list[LayerChoice]] = {}

    def visit_group(self, group: InputGroup) -> None:
        hessian = group.hessian(self.calibration)
        for name in group.names:
            self.measure(name, hessian)

    @torch.no_grad()
    def measure(self, name: str, hessian: Tensor | None) -> None:
        """What ``name`` costs in each form, merged for the outputs with ``hessian``, without data if that is None."""
        whole = self.sources[name].plan(self.names)
        plan, rows = _some_rows(whole)
        found = []
        for fields, spec in self.candidates[name]:
            merged = _merged(plan, spec, hessian)
            delta = get_method(merged.spec.method).dequantize(merged) - plan.target
            shape = (whole.weight.out_features, whole.weight.in_features)
            kl = self.samples[name].divergence(delta, rows)
            found.append(LayerChoice(fields=fields, n_bytes=spec_bytes(spec, shape), kl=kl))
        self.found[name] = found


def _merged(plan: MergePlan, spec: QuantSpec, hessian: Tensor | None) -> QuantizedWeight:
    if hessian is not None:
        return for_outputs(plan, spec, hessian)
    return cast(QuantizedWeight, requantize_as(plan, spec).weight)


def _some_rows(plan: MergePlan) -> tuple[MergePlan, slice]:
    """``plan`` of some rows, evenly spread, and which; of all of them where rows depend on each other."""
    n_rows = plan.weight.out_features
    if n_rows <= ROWS or not (plan.method.has_independent_rows and plan.weight.has_rows_of_their_own):
        return plan, slice(None)
    rows = slice(None, None, n_rows // ROWS)
    weight = plan.weight.take_rows(torch.arange(n_rows, device=plan.target.device)[rows])
    left = None if plan.left is None else plan.left[rows]
    return dataclasses.replace(
        plan, weight=weight, before=plan.before[rows], target=plan.target[rows], left=left
    ), rows


def _bytes_elsewhere(model: nn.Module, planned: Iterable[QuantizedLinear]) -> int:
    """Bytes of what the merged model holds beside the weights of the layers ``planned``, shared tensors once."""
    dropped: set[int] = set()
    for module in model.modules():
        if isinstance(cast(object, module), BaseTunerLayer):
            kept: Any = cast(Any, module).get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = module.original_module
        else:
            continue
        dropped |= {id(each) for each in module.modules()} - {id(each) for each in kept.modules()}
    theirs, own = set(), 0
    for base in planned:
        theirs |= {tensor.untyped_storage().data_ptr() for tensor in base.quantized_weight.tensors.values()}
        if base.bias is not None:  # merging gives layers that share one their own
            theirs.add(base.bias.untyped_storage().data_ptr())
            own += base.bias.nbytes
    modules = dict(model.named_modules())
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor
        for key, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and id(modules.get(key.rpartition(".")[0])) not in dropped
    }
    return own + sum(tensor.nbytes for place, tensor in tensors.items() if place not in theirs)
