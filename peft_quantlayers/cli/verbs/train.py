"""``train MODEL OUTPUT --data FILE``: train an adapter with TRL's trainers; merge, evaluate and export if asked."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from jsonargparse import Namespace
from peft import PeftConfig
from transformers import PreTrainedModel, set_seed
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations import TensorBoardCallback

from quantlayers_cli.option_names import WrongUsage

from ...layers.quantized_layers import quantized_layers
from ...lora import enable_merge_aware
from ...lora.merge_aware_config import fingerprints_of
from ...report.tensorboard import LayerFiguresCallback
from ...report.training_parts import STATE_FILE, checkpoints
from ...saving import save_model
from ...storage.free_memory import return_large_blocks
from ...training import prepare_model_for_kbit_training
from .. import after_training, pv_training, rehearsed_end, trained_adapter
from .. import shared_options as options
from ..chosen_options import chosen_adapter, chosen_options
from ..given_tokenizers import needed_tokenizer, template_refusals_named, tokenizer_name
from ..half_made import RESUME, half_made_removed
from ..models import is_quantized_already, load_model, refuse_missing_folder
from ..parsing import VerbParser
from ..read_data import DATA_HELP
from ..refused_values import values_refused
from ..rehearsal import rehearse
from ..result import Result
from ..same_run import SettingsInState, check_same_run, is_resumed, kept_settings
from ..trained_base import (
    Rehearsed,
    base_folder,
    plan_of_training,
    quantized_base,
    refuse_options_of_float_models,
)
from ..training_checks import (
    check_checkpoint,
    check_modules_to_save,
    check_something_is_learned,
    check_training,
    given_options_named,
    refuse_diverged,
)
from ..training_rows import load_rows
from ..training_run import shown_batch, trained
from ..trl_trainers import trainer_of

DESCRIPTION = (
    "Train an adapter on a quantized model, or with --adapter_type pv all of an AQLM model; a float one is quantized "
    "first, and saved beside the adapter, where the other verbs find it. The folder of an adapter in the place of the "
    "model has that adapter trained further. Data: rows with `text`, `messages`, `prompt` and `completion`, or "
    "`instruction`, `input` and `output`; for dpo `prompt`, `chosen` and `rejected`."
)
POSITIONALS = ("model", "output")
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
# Of the data, to see whether TRL's trainer takes the options.
ROWS_FOR_OPTIONS = 4
# Fields of the trainers' arguments that other options give.
OF_OURS = {"output_dir", "model_init_kwargs", "ref_model_init_kwargs"}


def add_arguments(parser: VerbParser, arguments: Sequence[str] = ()) -> None:
    """Options of the verb.

    ``--trainer``, on the line or in the file, decides which class ``--training`` fills, ``--adapter`` the defaults of
    ``--lora``.
    """
    chosen = chosen_options("train", arguments, POSITIONALS, trainer="sft", adapter_type="lora")
    arguments_type, _ = trainer_of(chosen["trainer"])
    options.add_model(parser, required=False)
    options.add_output(
        parser, help_text="folder of the adapter, or of the model that pv trains; the Trainer's checkpoints are in it"
    )
    parser.add_argument(
        "--adapter", type=str | None, default=None, help="folder of an adapter to train further; null: a new one"
    )
    parser.add_argument(
        "--trainer", type=Literal["sft", "dpo"], default="sft", help="supervised finetuning, or preferences"
    )
    parser.add_argument("--data", type=str, required=True, help=DATA_HELP)
    parser.add_argument(
        "--eval_data", type=str | None, default=None, help=f"to evaluate on while training: {DATA_HELP}"
    )
    parser.add_argument(
        "--adapter_type",
        type=Literal["lora", "scales", "pv"],
        default="lora",
        help="what is trained; pv: codes, codebooks and scales of an AQLM model by PV-Tuning, which gives a model",
    )
    parser.add_argument("--merge_aware", type=bool, default=False, help="LoRA through the rounding of its merge")
    parser.add_argument(
        "--show_batch", action="store_true", help="print what is read and what is learned; train nothing"
    )
    parser.add_argument(
        "--fsdp_size",
        type=int | None,
        default=None,
        help="processes that the quantized base is sharded over (FSDP2), without resuming; null: each has all of it",
    )
    parser.add_argument(
        "--base_output",
        type=str | None,
        default=None,
        help="folder of the quantized model that a float --model becomes; adapters may share it; null: OUTPUT/base",
    )
    after_training.add_arguments(parser)
    options.add_method(parser, "quantization.")
    trained_adapter.add_arguments(parser, chosen_adapter(chosen))
    parser.add_class_arguments(arguments_type, "training", skip=OF_OURS, fail_untyped=False)
    # TRL asks for bfloat16 on a GPU where it is not told otherwise, and stops where there is none.
    parser.set_defaults({"training.report_to": "none", "training.use_cpu": not torch.accelerator.is_available()})
    pv_training.add_arguments(parser, is_chosen=chosen["adapter_type"] == "pv")


def run(settings: Namespace) -> Result | None:
    """Train, save the adapter, and do what is asked then; None in all but the first of several processes."""
    trained_adapter.resolve_names(settings)
    refuse_missing_folder("model", settings.model)
    processes = PartialState(cpu=settings.training.use_cpu)
    steps, checkpoint = checked_options(settings, processes)
    processes.wait_for_everyone()  # the first one will write there
    if settings.training.use_cpu:
        return_large_blocks()
    tokenizer = needed_tokenizer(tokenizer_name(settings.tokenizer, settings.model, settings.adapter))
    template = settings.training.get("chat_template_path") or ""
    if template.endswith(TEMPLATE_SUFFIXES) and not Path(template).is_file():
        raise FileNotFoundError(f"--training.chat_template_path {template}: there is no such file.")
    rows = load_rows("data", settings, tokenizer)
    eval_rows = None if settings.eval_data is None else load_rows("eval_data", settings, tokenizer)
    config = trained_adapter.config_of(settings)
    with template_refusals_named(template or settings.tokenizer or settings.model):
        rehearsed = rehearse_all(settings, rows, eval_rows, tokenizer)
        rehearsed_end.check_texts(settings, steps, tokenizer)
        set_seed(settings.training.seed)
        if settings.dry_run:
            commands = [step.command for step in steps]
            return plan_of_training(settings, config, commands, n_rows=len(rows), rehearsed=rehearsed)
        data: dict[str, Any] = {"train_dataset": rows, "eval_dataset": eval_rows, "processing_class": tokenizer}
        if settings.show_batch:
            return first_batch(settings, config, **data)
        # The Trainer prints its log, among which a program would not find the result.
        with redirect_stdout(sys.stderr) if settings.json else nullcontext():
            found, told = train_and_save(settings, config, steps, processes, checkpoint, **data)
    return after_training.result_with(settings, steps, found, told) if processes.is_main_process else None


def checked_options(settings: Namespace, processes: PartialState) -> tuple[list[after_training.Step], str | None]:
    """What is to be done at the end, and the checkpoint to go on with, if any.

    Raises an error where the options contradict each other, the model, this machine, or what lies in the folders.
    """
    check_training(settings)
    trained_adapter.check_options(settings)
    rehearsed_end.check_options(settings, n_processes=processes.num_processes)
    steps = after_training.steps_of(settings, processes)
    rehearsed_end.check_values(settings, steps)
    checkpoint = checked_start(settings, processes, steps)
    if is_quantized_already(settings.model):
        refuse_options_of_float_models(settings)
    else:
        pv_training.check_float_model(settings)
    return steps, checkpoint


def rehearse_all(settings: Namespace, rows: Any, eval_rows: Any, tokenizer: Any) -> Rehearsed | None:
    """Make the trainer of a few rows, and of all where hours of quantizing come first, or none follow at all."""
    with values_refused(), given_options_named(settings):  # of the trainer's options, in a moment
        rehearse(settings, rows, eval_rows, tokenizer, n_rows=ROWS_FOR_OPTIONS)
    if settings.dry_run or not (is_quantized_already(settings.model) or settings.show_batch):
        with given_options_named(settings):
            return rehearse(settings, rows, eval_rows, tokenizer)
    return None


def first_batch(settings: Namespace, config: PeftConfig | None, **data: Any) -> Result:
    """What the trainer reads first, and what of it is learned."""
    with tempfile.TemporaryDirectory() as scratch:
        model = prepared(settings, settings.model)
        data["optimizers"] = (pv_training.new_tuner(settings, model), None)
        trainer = new_trainer(settings, model, config, output=scratch, **data)
        return Result(text=shown_batch(next(iter(trainer.get_train_dataloader())), data["processing_class"]))


def train_and_save(
    settings: Namespace,
    config: PeftConfig | None,
    steps: Sequence[after_training.Step],
    processes: PartialState,
    checkpoint: str | None,
    **data: Any,
) -> tuple[dict[str, Any], str]:
    """Train what ``config`` describes, or go on from ``checkpoint``, and save it; what came of it, as data and words.

    Nothing of the model is left when this returns.
    """
    folder, tokenizer = Path(settings.output), data["processing_class"]
    is_float = not is_quantized_already(settings.model)
    base = base_folder(settings) if is_float else None
    with half_made_removed(folder, base=base, is_active=processes.is_main_process):
        name = quantized_base(settings, config, processes) if is_float else settings.model
        # PV-Tuning changes the codes, which no optimizer's state holds: it goes on with the model of the checkpoint.
        model = prepared(settings, checkpoint if checkpoint is not None and config is None else name)
        tuner = pv_training.new_tuner(settings, model)
        with given_options_named(settings):
            trainer = new_trainer(settings, model, config, output=str(folder), optimizers=(tuner, None), **data)
        rehearsed_end.check_on_model(settings, steps, trainer.model, tokenizer)
        with given_options_named(settings):
            found, told = trained(trainer, checkpoint)
            refuse_diverged(trainer.model, n_steps=trainer.state.global_step)
        if tuner is not None:
            tuner.close()
            save_model(trainer.model, folder, tokenizer=tokenizer, overwrite=True)  # beside checkpoints
        else:  # without DPO's reference
            trainer.model.save_pretrained(
                folder, selected_adapters=["default"], is_main_process=processes.is_main_process
            )
        if processes.is_main_process:
            tokenizer.save_pretrained(folder)
            trainer.save_state()  # for the report
    return found, f"{told}; the {'model' if config is None else 'adapter'} is in {folder}"


def checked_start(settings: Namespace, processes: PartialState, steps: Sequence[after_training.Step]) -> str | None:
    """The checkpoint to go on with, if any. Raises an error where the output is in use, or nothing can go on there."""
    resume = is_resumed(settings)
    given = settings.training.resume_from_checkpoint if resume else None
    checkpoint = _checkpoint(given, Path(settings.output))
    check_checkpoint(checkpoint, is_adapter=settings.adapter_type != "pv")
    check_same_run(settings, checkpoint)
    pv_training.check_options(settings, n_processes=processes.num_processes)
    if settings.fsdp_size is not None:
        settings.training.save_only_model = (
            True  # all that transformers saves of a model that was sharded while loading
        )
        if resume:
            raise WrongUsage(
                "a run with --fsdp_size cannot be resumed: its checkpoints hold no state of the optimizer."
            )
        if not 1 <= settings.fsdp_size <= processes.num_processes:
            raise WrongUsage(
                f"--fsdp_size {settings.fsdp_size} must lie between 1 and the number of processes, which is "
                f"{processes.num_processes}: accelerate launch --num_processes N -m peft_quantlayers train ..."
            )
    if not (resume or settings.show_batch):
        options.refuse_output_in_use(settings, way_out=f", or go on with its last checkpoint: {RESUME}")
    if not settings.show_batch:
        rehearsed_end.check_outputs(settings, steps, is_resumed=resume)
    return checkpoint


def new_trainer(settings: Namespace, model: Any, config: PeftConfig | None, *, output: str, **data: Any) -> Any:
    """TRL's trainer of ``model`` with an adapter on it, if any: ``--adapter``, or a new one of ``config``.

    ``data`` is what it takes besides.
    """
    arguments_type, trainer_type = trainer_of(settings.trainer)
    is_there, kept = settings.adapter is not None, kept_settings(settings)
    trainer = trainer_type(
        model=trained_adapter.put_on(model, settings) if is_there else model,
        args=arguments_type(**vars(settings.training), output_dir=output),
        # DPO's reference is then the model without the adapter, or a copy of one that was there.
        peft_config=None if is_there else config,
        **data,
    )
    if is_there and settings.trainer == "dpo":
        trained_adapter.checked_reference(trainer)
    check_something_is_learned(trainer, data=data["train_dataset"], eval_data=data["eval_dataset"])
    if settings.merge_aware and fingerprints_of(config) is None:
        enable_merge_aware(trainer.model)
    trainer.add_callback(SettingsInState(kept))
    if trainer.pop_callback(TensorBoardCallback) is not None:  # --training.report_to tensorboard
        trainer.add_callback(LayerFiguresCallback())
    return trainer


def prepared(settings: Namespace, name: str) -> Any:
    """The quantized model ``name``, prepared for training; for PV-Tuning it keeps the dtype of its files."""
    return prepare_model_for_kbit_training(
        load_quantized(settings, name),
        use_gradient_checkpointing=bool(settings.training.gradient_checkpointing),
        upcast=settings.adapter_type != "pv",
    )


def load_quantized(settings: Namespace, name: str) -> PreTrainedModel:
    """The model, which is quantized while it is loaded unless it is already."""
    load: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    if not is_quantized_already(name):
        load["quantization_config"] = options.method_config(settings.quantization)
    if settings.fsdp_size is not None:
        load["distributed_config"] = DistributedConfig(fsdp_size=settings.fsdp_size)
    model = load_model(name, **load)
    if not quantized_layers(model):
        raise ValueError(f"{name} holds no layer that this package has quantized.")
    check_modules_to_save(model, settings.lora.modules_to_save)
    return model


def _checkpoint(given: str | None, folder: Path) -> str | None:
    """``--training.resume_from_checkpoint`` as a folder: "true" is the last complete one, if there is any by now."""
    if str(given).lower() == "true":
        return next(map(str, checkpoints(folder)), None)
    if given is not None and not (Path(given) / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"--training.resume_from_checkpoint {given}: there is no checkpoint, which holds a {STATE_FILE}. 'true' "
            "takes the last one in the output."
        )
    return given
