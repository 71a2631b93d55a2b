"""Which modules of a model a config selects, checked before anything is changed."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import nn

from ..formats import QuantSpec
from ..integrations.private_experts import is_expert_parallel
from ..methods import QuantConfig
from ..methods.quant_config import matches
from .dense_rules import MISFIT, SKIPPED, DenseRules, StaysDense, declared_embeddings
from .dense_types import dense_shape, dense_type_of, dense_weight
from .embedding import QuantizedEmbedding
from .embedding_tables import Table, asked_specs, embedding_tables, table_spec
from .expert_types import dense_stacks
from .quantized_layers import quantized_layers
from .quantized_storage import QuantizedStorage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a config selects in a model; each module of a registered type (:mod:`.dense_types`), and each fused weight
    of experts (:mod:`.expert_types`), is in one of the three.

    Fields:
        specs: the modules to quantize, each with the spec that it will have.
        dense: the modules that stay dense, and why.
        done: the layers that are quantized already to the spec that the config has for them.
        asked: of each module in ``specs`` whose spec was fitted to its shape, the spec that the config has for it.
        tables: the embedding tables to quantize, by the first of their names, each with the spec that it will have.
        dense_tables: those that stay dense though the config asks for them, and why.
    """

    specs: dict[str, QuantSpec]
    dense: dict[str, StaysDense]
    done: tuple[str, ...]
    asked: dict[str, QuantSpec]
    tables: dict[str, tuple[Table, QuantSpec]]
    dense_tables: dict[str, StaysDense]


def select_modules(model: nn.Module, config: QuantConfig) -> Selection:
    """What ``config`` selects in ``model``, which is not changed.

    These are all modules of a registered type, and all fused weights of experts by the name of their parameter, except
    those that :class:`DenseRules` or ``skip_modules`` leave dense.
    ``on_misfit`` of the config says what becomes of a module whose shape does not fit its spec. Layers that an earlier
    call quantized to the requested spec stay as they are, so that an interrupted run can continue.

    Raises:
        ValueError: a layer is quantized already, to another spec; a shape does not fit its spec, with
            ``on_misfit="refuse"``; a pattern in ``skip_modules`` or ``overrides`` matches no module. Names the first
            five such layers.
    """
    if dense_type_of(model) is not None:
        raise ValueError(
            "the model is a single linear layer. Quantize it with QuantizedLinear.from_linear(layer, spec), or put "
            "it into a module."
        )
    _check_patterns(model, config)
    rules = DenseRules(model, quantize_lm_head=config.quantize_lm_head)
    done_names = tuple(finished_modules(model, config))
    selection = Selection(specs={}, dense={}, done=done_names, asked={}, tables={}, dense_tables={})
    problems: list[str] = []
    done = set(selection.done)
    for name, layer in quantized_layers(model).items():
        if name not in done and not config.is_skipped(name):
            problems.append(f"{name}: the layer is quantized already ({layer.extra_repr()}).")
    for name, module, _ in dense_stacks(model):
        if is_expert_parallel(module) and not config.is_skipped(name):
            problems.append(
                f"{name}: its experts are spread over processes (expert parallelism), and quantized ones are not. "
                "Load the model without ep_size, or leave them dense with skip_modules=['experts']."
            )
    for name, shape, reason in _candidates(model, rules):
        dense = StaysDense(reason=SKIPPED) if config.is_skipped(name) else reason
        if dense is None:
            asked = config.spec_for(name)
            try:
                spec = config.fitted_spec(asked, *shape)
            except ValueError as error:
                problems.append(f"{name}: {error} Or skip it with skip_modules=[{name!r}].")
                continue
            if spec is not None:
                selection.specs[name] = spec
                if spec != asked:
                    selection.asked[name] = asked
                continue
            dense = StaysDense(reason=MISFIT, detail=asked.misfit(*shape))
        selection.dense[name] = dense
    if config.quantize_embeddings is not None:
        _select_tables(model, config, selection, problems)
    if problems:
        shown = problems[:5] + ([f"... and {len(problems) - 5} more."] if len(problems) > 5 else [])
        raise ValueError("the model cannot be quantized, and was not changed:\n  " + "\n  ".join(shown))
    return selection


def _select_tables(model: nn.Module, config: QuantConfig, selection: Selection, problems: list[str]) -> None:
    """Add the embedding tables that ``config`` selects to ``selection``; their heads are no dense modules then."""
    asked = cast(QuantSpec, table_spec(config))
    for table in embedding_tables(model):
        if selection.specs.keys() & set(table.names):  # a head of its own, with quantize_lm_head
            continue
        name, dense = table.names[0], table.stays_dense
        if any(map(config.is_skipped, table.names)):
            dense = StaysDense(reason=SKIPPED)
        spec: QuantSpec | None = asked
        if dense is None and (misfit := asked.misfit(*table.shape)):
            if config.on_misfit == "refuse":
                problems.append(
                    f"{name}: {misfit}, and on_misfit='refuse' leaves tables no other groups. Let them shrink with "
                    f"on_misfit='shrink', or leave it dense with skip_modules=[{name!r}]."
                )
                continue
            spec = config.fitted_spec(asked, *table.shape)
            dense = StaysDense(reason=MISFIT, detail=misfit) if spec is None else None
        if dense is not None or spec is None:
            selection.dense_tables[name] = cast(StaysDense, dense)
            continue
        selection.tables[name] = (table, spec)
        for name in table.names:
            selection.dense.pop(name, None)


def _candidates(model: nn.Module, rules: DenseRules) -> Iterator[tuple[str, tuple[int, int], StaysDense | None]]:
    """Name, (out_features, in_features) and what is against quantizing it of all that could be quantized."""
    for name, module in model.named_modules():
        entry = dense_type_of(module)
        if entry is not None:
            yield name, entry.shape(module), rules.reason(name, module)
    for name, module, fused in dense_stacks(model):
        yield name, fused.shape(module)[1:], rules.reason_of_fused(name, module, fused)


def quantizable_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """Name and spec of every module that ``config`` selects (:func:`select_modules`), with warnings of what may
    surprise: shapes that do not fit, metadata larger than the codes, experts that stay dense.

    Raises:
        ValueError: as :func:`select_modules`; nothing to quantize; a pattern in ``overrides`` matches no module that
            is quantized.
    """
    selection = select_modules(model, config)
    _check_overrides(selection, config)
    _warn_of_dense_experts(model, selection)
    _check_rest(selection)
    _warn_of_dense_tables(selection, config)
    _warn_of_dense_head(model, selection, config)
    _warn_of_misfits(model, selection)
    _warn_of_large_metadata(model, selection)
    return selection.specs


def quantizable_tables(model: nn.Module, config: QuantConfig) -> dict[str, tuple[Table, QuantSpec]]:
    """The embedding tables that ``config`` selects, by the first of their names; raises as :func:`select_modules`."""
    return {} if config.quantize_embeddings is None else select_modules(model, config).tables


def finished_modules(model: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the layers that are already quantized to the spec that ``config`` has for them."""
    heads = {id(module) for module in declared_embeddings(model, "get_output_embeddings")}
    found = []
    for name, layer in quantized_layers(model).items():
        is_table = isinstance(layer, QuantizedEmbedding)
        asked = asked_specs(config, name, is_table=is_table, is_head=id(layer) in heads)
        if not config.is_skipped(name) and any(_has_spec(layer, config, spec) for spec in asked):
            found.append(name)
    return found


def _has_spec(layer: QuantizedStorage, config: QuantConfig, asked: QuantSpec) -> bool:
    try:
        spec = config.fitted_spec(asked, layer.out_features, layer.in_features)
    except ValueError:
        return False
    return spec is not None and layer.spec in spec.stored_forms()


def checked_modules(model: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """:func:`quantizable_modules`, with all weights checked too; ValueError if one is not finite."""
    specs = quantizable_modules(model, config)
    names = [*specs, *quantizable_tables(model, config)]
    not_finite = [name for name in names if not _is_finite(dense_weight(model, name))]
    if not_finite:
        raise ValueError(
            f"the weights of {not_finite[:5]} hold NaN or Inf ({len(not_finite)} layer(s)); the model was not "
            f"changed. Repair the checkpoint, or skip the layers with skip_modules={not_finite[:5]}."
        )
    return specs


def _is_finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_patterns(model: nn.Module, config: QuantConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _, _ in dense_stacks(model)]
    for field in ("skip_modules", "overrides"):
        for pattern in getattr(config, field) or ():
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"{field}: the pattern {pattern!r} matches no module of the model, which was not changed. "
                    f"Names look like {names[len(names) // 2]!r}; a pattern may be the last part of a name, and "
                    "may hold * and ?."
                )


def _check_overrides(selection: Selection, config: QuantConfig) -> None:
    misfits = [name for name, dense in selection.dense.items() if dense.reason == MISFIT]
    names = [*selection.specs, *selection.done, *misfits]
    for pattern in config.overrides or ():
        if names and not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"overrides: the pattern {pattern!r} matches no layer that is quantized; the model was not changed. "
                f"To match all layers inside a module write {pattern + '.*'!r}. The output head is quantized with "
                "quantize_lm_head=True only."
            )


def _check_rest(selection: Selection) -> None:
    """Raise ValueError if nothing is left to quantize; warn if some layers are quantized already."""
    specs, done = selection.specs.keys() | selection.tables.keys(), selection.done
    if done and not specs:
        raise ValueError(
            f"all {len(done)} layers are quantized already as the config says; the model was not changed."
        )
    if not specs:
        said = [f"{name} ({dense.detail or dense.reason})" for name, dense in selection.dense.items()]
        if not said:
            said = ["the model has no nn.Linear, Conv1D or other registered layer type"]
        raise ValueError(f"there is nothing to quantize: {', '.join(said[:5])}. The model was not changed.")
    if done:
        logger.warning(
            "%d of %d layers are quantized already as the config says, and stay as they are.",
            len(done),
            len(done) + len(specs),
        )


def _warn_of_dense_tables(selection: Selection, config: QuantConfig) -> None:
    """Warn if ``quantize_embeddings`` has no effect, or not on all tables."""
    if config.quantize_embeddings is None:
        return
    dense = [f"{name} ({each.detail or each.reason})" for name, each in selection.dense_tables.items()]
    if dense:
        logger.warning("quantize_embeddings: %s stay dense.", ", ".join(dense))
    elif not selection.tables and not selection.done:
        logger.warning("quantize_embeddings has no effect: the model names no input embeddings.")


def _warn_of_dense_head(model: nn.Module, selection: Selection, config: QuantConfig) -> None:
    """Warn if ``quantize_lm_head`` has no effect."""
    heads = DenseRules(model).heads
    in_tables = {name for table, _ in selection.tables.values() for name in table.names}
    if not config.quantize_lm_head or heads & (selection.specs.keys() | in_tables) or (selection.done and not heads):
        return
    reasons = [
        f"{name} stays dense ({selection.dense[name].reason})" for name in sorted(heads) if name in selection.dense
    ]
    logger.warning(
        "quantize_lm_head=True has no effect: %s.", "; ".join(reasons[:3]) or "the model has no output head"
    )


def _warn_of_misfits(model: nn.Module, selection: Selection) -> None:
    """One line that names the layers whose shape does not fit the config's spec, and says what becomes of them."""
    parts: dict[str, list[str]] = {}
    for name, asked in selection.asked.items():
        spec, (out_features, in_features) = selection.specs[name], dense_shape(model, name)[-2:]
        bits = spec.bits_per_weight(out_features, in_features)[1]
        fate = f"take {_difference(asked, spec)}, {bits:.1f} bits per weight"
        parts.setdefault(f"{fate}, since {asked.misfit(out_features, in_features)}", []).append(name)
    for name, dense in selection.dense.items():
        if dense.reason == MISFIT:
            parts.setdefault(f"stay dense, since {dense.detail}", []).append(name)
    if parts:
        logger.warning(
            "%d layer(s) do not fit the config (on_misfit='refuse' raises an error instead): %s.",
            sum(len(names) for names in parts.values()),
            "; ".join(f"{_few(names)} {fate}" for fate, names in parts.items()),
        )


def _difference(asked: QuantSpec, spec: QuantSpec) -> str:
    pairs = [(field.name, getattr(asked, field.name), getattr(spec, field.name)) for field in fields(spec)]
    return ", ".join(f"{name}={new} instead of {old}" for name, old, new in pairs if old != new)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn_of_large_metadata(model: nn.Module, selection: Selection) -> None:
    """Warn if scales and codebooks take more memory than the codes: the layers are too small for the spec.

    Layers whose spec was fitted to their shape have been named with their bits.
    """
    found = []
    for name, spec in selection.specs.items():
        codes, total = spec.bits_per_weight(*dense_shape(model, name)[-2:])
        if total > 2 * codes + 1e-6 and name not in selection.asked:
            found.append((name, codes, total))
    if found:
        name, codes, total = max(found, key=lambda entry: entry[2] / entry[1])
        better = selection.specs[name].smaller_metadata(*dense_shape(model, name)[-2:])
        logger.warning(
            "%d layer(s) take more bits for their metadata than for their codes, for example %s: %.1f bits per "
            "weight, of which codes are %.1f.%s",
            len(found),
            name,
            total,
            codes,
            f" For layers of this size use {better}." if better else "",
        )


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and tensor of the experts of ``model`` that lie in one tensor (experts, ..., ...): no linear layers."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name.split(".")}


def _warn_of_dense_experts(model: nn.Module, selection: Selection) -> None:
    """Warn of experts that cannot be quantized; others stay dense for a reason that is told elsewhere."""
    known = selection.specs.keys() | selection.dense.keys()
    fused = {name: parameter for name, parameter in fused_experts(model).items() if name not in known}
    if fused:
        share = sum(p.numel() for p in fused.values()) / sum(p.numel() for p in model.parameters())
        logger.warning(
            "%.0f %% of the weights lie in fused experts (%s, ...) of a class that is not known here, and stay dense.",
            100 * share,
            next(iter(fused)),
        )
