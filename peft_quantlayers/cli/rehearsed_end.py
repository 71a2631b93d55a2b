"""What of the end of a training can be tried before it starts: a long run must not end in an error that was there.

In three steps, as early as each can be: the options alone, with the texts that they name, with the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jsonargparse import Namespace
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from quantlayers_cli.option_names import WrongUsage

from ..calibration import Calibration
from ..exports import export_formats
from ..exports.formats.format_base import LayerFacts
from ..exports.refused_exports import refuse_adapters, refuse_arguments, refuse_later_misfits
from ..merging.merge_rules import extended_spec
from ..merging.strategies import STRATEGIES
from ..methods import get_method
from ..model_merge.merge_budget import refuse_budget
from ..model_merge.prepared_merge import prepared_merge
from . import shared_options as options
from .after_training import MAIN_OPTIONS, OF_RUN, VERBS, Step, read_record
from .given_tokenizers import long_windows_refused, needed_tokenizer
from .in_options import in_options
from .models import config_of, is_quantized_already, model_on_meta, refuse_missing_folder
from .refused_values import values_refused
from .trained_base import base_folder
from .work import verb_parser

METAVARS = {"merge": "STRATEGY", "evaluate": "FILE", "export": "FORMAT"}


def is_asked(settings: Namespace, verb: str) -> bool:
    """Whether the verb is to be run at the end."""
    return settings[verb] not in (None, False)


@contextmanager
def named_as_in_train(verb: str) -> Iterator[None]:
    """While this is open, an error that names options of ``verb`` names those of ``train`` that stand for them."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if len(error.args) == 1:
            names = verb_parser(verb, VERBS[verb]).names() - OF_RUN
            text = in_options(str(error.args[0]))
            pattern = rf"--({'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})(?![\w.])"
            error.args = (re.sub(pattern, lambda found: _own_name(verb, found[1]), text),)
        raise


def _own_name(verb: str, name: str) -> str:
    return f"--{verb}" if name == MAIN_OPTIONS[verb] else f"--{verb}_options.{name}"


# ---- the options alone


def check_options(settings: Namespace, *, n_processes: int) -> None:
    """Raise an error where the options of the end contradict each other, or what is trained; nothing is read."""
    for verb, module in VERBS.items():
        if not is_asked(settings, verb):
            _refuse_unused(settings, verb, module)
        elif settings.fsdp_size is not None:
            raise WrongUsage(
                f"--{verb} needs the whole base in one process: leave out --fsdp_size, or {verb} afterwards."
            )
    if is_asked(settings, "evaluate") and n_processes > 1 and settings.evaluate_options.tasks is not None:
        raise WrongUsage("--evaluate_options.tasks is for one process: leave it out, or evaluate afterwards.")
    if settings.merge is not None:
        _check_strategy(settings)
    if settings.export is not None:
        _check_format(settings)


def _refuse_unused(settings: Namespace, verb: str, module: Any) -> None:
    """Raise WrongUsage for options of a verb that is not asked for, which would be ignored."""
    place = {"merge": "merged_output", "export": "export_output"}.get(verb)
    if place is not None and settings[place] is not None:
        raise WrongUsage(f"--{place} is for --{verb} {METAVARS[verb]}, which is not given.")
    parser, given = verb_parser(verb, module), settings[f"{verb}_options"]
    for name in sorted(parser.names()):
        if name in given and given[name] != parser.get_default(name):
            raise WrongUsage(f"--{verb}_options.{name} is for --{verb} {METAVARS[verb]}, which is not given.")


def check_values(settings: Namespace, steps: Sequence[Step]) -> None:
    """Raise an error for what each verb refuses of its options whatever the files hold."""
    for step in steps:
        if step.verb == "evaluate" and settings.evaluate is True and settings.eval_data is None:
            of_evaluate = step.settings
            if of_evaluate.tasks is None and of_evaluate.prompts is None:
                raise WrongUsage(
                    "--evaluate true measures on --eval_data, which is not given. Give that, or a text: --evaluate "
                    "FILE."
                )
        with named_as_in_train(step.verb):
            VERBS[step.verb].check_values(step.settings)


def _check_strategy(settings: Namespace) -> None:
    """Raise an error for a strategy that does not fit what will be trained, as far as the options say it."""
    strategy, later = settings.merge, f"or merge afterwards: peft-quantlayers merge {settings.output} MERGED"
    if settings.adapter_type == "scales" and not STRATEGIES[strategy].supports("exact weight"):
        possible = [name for name, each in STRATEGIES.items() if each.supports("exact weight")]
        raise WrongUsage(f"--merge {strategy} is for LoRA, and tuned scales merge exactly: one of {possible}.")
    if settings.adapter_type == "lora" and strategy == "exact" and not settings.lora.use_qalora:
        raise WrongUsage(
            "--merge exact needs an adapter that is constant in each group: --lora.use_qalora true with "
            f"--lora.qalora_group_size. Choose another, {later}."
        )
    if strategy == "aware" and not settings.merge_aware:
        raise WrongUsage(f"--merge aware needs --merge_aware true. Give that too, or choose another, {later}.")
    if not is_quantized_already(settings.model):
        spec = options.method_config(settings.quantization).spec_for("")
        if strategy == "append":
            try:
                extended_spec(spec)
            except NotImplementedError as error:
                raise WrongUsage(
                    f"--merge append: {in_options(str(error)).replace('--strategy', '--merge')}"
                ) from None
        method = get_method(spec.method)
        if strategy == "calibrated" and not method.can_use_hessian(spec):
            raise WrongUsage(f"--merge calibrated is not possible for {spec}. {method.calibration_requirement}")


def _check_format(settings: Namespace) -> None:
    """Raise an error for a format that cannot be written here, or of such an adapter, whatever the layers are."""
    given = settings.export_options
    with named_as_in_train("export"):
        VERBS["export"].check_values(Namespace(**vars(given), format=settings.export))
        target = export_formats()[settings.export]
        has_data = given.calibration.data is not None or given.float_model is not None
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        with values_refused():
            refuse_arguments(target, approximate=given.approximate, dtype=dtype, has_data=has_data)
        is_adapter = settings.merge is None and settings.adapter_type != "pv"
        if target.adapter_form is None and (is_adapter or settings.merge == "keep"):
            refuse_adapters(target, has_adapter=is_adapter, has_branches=settings.merge == "keep")
        target.check_installation()
        if given.float_model is not None:
            refuse_missing_folder("float_model", given.float_model)
            config_of(given.float_model)


def check_outputs(settings: Namespace, steps: Sequence[Step], *, is_resumed: bool) -> None:
    """Raise FileExistsError where a folder of the end holds files that no earlier call of this run wrote."""
    own = read_record(settings) if is_resumed else {}
    for step in steps:
        option = {"merge": "merged_output", "export": "export_output"}.get(step.verb)
        if option is None or (own.get(step.verb) or {}).get("command") == step.command:
            continue
        is_inside = Path(settings.output).resolve() in step.place.resolve().parents
        if not (is_resumed and is_inside):
            options.refuse_output_in_use(
                Namespace(**{option: step.place, "overwrite": settings.overwrite}), option=option
            )


# ---- with the texts


def check_texts(settings: Namespace, steps: Sequence[Step], tokenizer: Any) -> None:
    """Raise an error for texts that the steps could not read."""
    if not steps:
        return
    tokenizer = _with_template(settings, tokenizer)
    for step in steps:
        with named_as_in_train(step.verb):
            if step.verb == "merge":
                data, _ = VERBS["merge"].read_texts(step.settings, tokenizer)
                if data is not None and not is_quantized_already(settings.model):
                    _check_calibration(settings, data, model_on_meta(settings.model))
            elif step.verb == "evaluate":
                _check_evaluation(settings, step.settings, tokenizer)
            elif step.settings.text is not None:
                VERBS["export"].read_text(step.settings, tokenizer, settings.model)


def _check_evaluation(settings: Namespace, given: Namespace, tokenizer: Any) -> None:
    """Raise an error for texts that neither model reads, a reference that is not there, and unknown tasks."""
    models = [settings.model]
    if settings.evaluate_options.reference is not None:  # else it is what this run makes, or its base
        models.append(VERBS["evaluate"].reference_of(given)[0])
    VERBS["evaluate"].read_texts(given, tokenizer, models)
    if given.tasks is not None:
        VERBS["evaluate"].known_tasks(VERBS["evaluate"].task_names(given), given.include_path)


def _with_template(settings: Namespace, tokenizer: Any) -> Any:
    """The tokenizer as the trainer leaves it, with ``--training.chat_template_path``."""
    template = settings.training.get("chat_template_path")
    if not template:
        return tokenizer
    changed, file = copy.deepcopy(tokenizer), Path(template)
    changed.chat_template = file.read_text() if file.is_file() else needed_tokenizer(template).chat_template
    return changed


def _check_calibration(settings: Namespace, data: Calibration, model: Any) -> None:
    """Raise ValueError where a merge could not calibrate on ``data``; where that is the training's, with another."""
    try:
        data.batches(model)
    except (TypeError, ValueError) as error:
        if settings.merge_options.calibration.data is None:
            error.add_note(f"It is --data {settings.data}: give other text, --merge_options.calibration.data FILE.")
        raise


# ---- with the model


def check_on_model(settings: Namespace, steps: Sequence[Step], model: Any, tokenizer: Any) -> None:
    """Raise what the steps would refuse of the model with its untrained adapter, and of the layers of its base."""
    was_training = model.training
    model.eval()  # dropout would move the random numbers of the training
    for step in steps:
        with named_as_in_train(step.verb):
            if step.verb == "merge":
                _check_merge(settings, step.settings, model, tokenizer)
            elif step.verb == "evaluate":
                _check_window(step.settings, model, tokenizer)
            else:
                _check_layers(settings, step.settings, model)
    model.train(was_training)


def _check_merge(settings: Namespace, given: Namespace, model: PeftModel, tokenizer: Any) -> None:
    data, held_out = VERBS["merge"].read_texts(given, tokenizer)
    if data is not None:
        _check_calibration(settings, data, model.get_base_model())
    prepared = prepared_merge(
        model,
        strategy=given.strategy,
        adapters=["default"],
        calibration=data,
        tokenizer=tokenizer,
        budget=options.given_plan(given),
        tune_epochs=given.tune_epochs,
        evaluate_on=held_out,
        metric=None,
        unload=True,
        progress=False,
    )
    if options.is_to_be_planned(given):
        refuse_budget(model, prepared.targets, prepared.names, given.strategy)


def _check_window(given: Namespace, model: Any, tokenizer: Any) -> None:
    """Read one window, as long as those that are measured."""
    ids, _ = VERBS["evaluate"].read_texts(given, tokenizer, [])
    if ids is not None:
        with long_windows_refused(model, given.window, option="window"), torch.no_grad():
            model(ids[None, : given.window].to(model.device))


def _check_layers(settings: Namespace, given: Namespace, model: Any) -> None:
    """Raise what the export refuses of the layers of the base, as the merge will leave them."""
    if settings.merge is not None and VERBS["merge"].has_budget(settings.merge_options):
        return  # their bits are not known yet
    base = Path(settings.model) if is_quantized_already(settings.model) else base_folder(settings)
    if settings.merge is not None and not base.is_dir():  # of the Hub, which has been read
        base = Path(snapshot_download(settings.model, local_files_only=True))
    target = export_formats()[given.format]
    refuse_later_misfits(target, base, given.approximate, _merged_facts(settings, model))


def _merged_facts(settings: Namespace, model: Any) -> Callable[[str, LayerFacts], LayerFacts | None]:
    """What the merge makes of a layer of ``model``, by its name and its facts; None where it is dense then."""
    strategy = settings.merge
    if strategy is None:
        return lambda name, facts: facts
    merged = {name for name, each in model.get_base_model().named_modules() if isinstance(each, BaseTunerLayer)}
    moves_zeros = strategy == "exact" or (strategy == "auto" and settings.lora.use_qalora)
    if settings.adapter_type == "scales":
        moves_zeros = "zeros" in (settings.scales.train or ())

    def after(name: str, facts: LayerFacts) -> LayerFacts | None:
        if name not in merged:
            return facts
        if strategy == "dense":
            return None
        if strategy == "append":
            return replace(facts, spec=facts.spec.extended())
        return replace(facts, has_code_zeros=False, is_symmetric=False) if moves_zeros else facts

    return after
