"""``quantize MODEL OUTPUT``: quantize a model and save it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse import Namespace

from quantlayers_cli.by_module import is_first_process
from quantlayers_cli.option_names import WrongUsage

from ...bit_allocation import BitPlan, plan_bits
from ...bit_allocation.quantizing_under_budget import with_plan
from ...calibration import Calibration
from ...estimate import estimate_quantizing
from ...methods import QuantConfig
from ...model import quantize_model
from ...report import ModelSummary, summary
from ...saving import saved_model
from ...storage import replace_file
from ...streaming import quantize_checkpoint
from ...streaming.assembly import RUN_FILE
from ...streaming.launched_processes import quantize_in_group
from ...streaming.work_folder import HIDDEN
from ...transforms import TRANSFORMS, transform_model
from .. import shared_options as options
from ..given_tokenizers import load_tokenizer, needed_tokenizer
from ..models import check_computing_device, is_quantized_already, load_model, model_on_meta, refuse_missing_folder
from ..parsing import VerbParser
from ..refused_values import check_at_least
from ..result import Result

DESCRIPTION = (
    "Quantize a model and save it, with its tokenizer; with --calibration.data so that the outputs' error is small. "
    "Files are read one tensor or one block at a time, and the same command goes on after an interruption. With "
    "--average_bits or --size the model is in memory, and layers get more or fewer bits by what they cost."
)
POSITIONALS = ("model", "output")
# Options that have the whole model in memory, since what they need is not known of a part, or is replaced as a whole.
IN_MEMORY = ("overwrite", "dtype", "transforms", "tokenizer", "average_bits", "size", "calibration.resume_folder")


def add_arguments(parser: VerbParser) -> None:
    """Options of the verb."""
    options.add_model(parser)
    options.add_output(parser)
    options.add_method(parser)
    options.add_calibration(parser)
    options.add_budget(parser)
    names: Any = GenericAlias(list, Literal[tuple(TRANSFORMS)])
    parser.add_argument(
        "--transforms",
        type=names | None,
        default=None,
        help="changes of the float weights first, in this order, such as [awq_scales]; the model is then in memory",
    )
    parser.add_argument(
        "--resume",
        type=bool,
        default=True,
        help="go on with what an interrupted call has left in --output; false removes that, and starts from scratch. "
        "A finished model is never removed",
    )
    parser.add_argument(
        "--n_processes",
        type=int,
        default=1,
        help="how many share the work, as those of torchrun and accelerate do; 1 with --overwrite",
    )


def run(settings: Namespace) -> Result | None:
    """Quantize, save, and say what became of the model; None in all but the first of several processes."""
    options.check_calibration(settings)
    # Without LOCAL_WORLD_SIZE the other processes of a cluster may do something else.
    n_launched = int(os.environ["WORLD_SIZE"]) if os.environ.get("LOCAL_WORLD_SIZE") else 1
    check_at_least(settings, 1, "n_processes", most=1024)
    _check_launched(settings, n_launched)
    config = options.method_config(settings)
    options.resolve_method(settings, config)
    options.check_choices(settings, config)
    refuse_missing_folder("model", settings.model)
    options.check_place("output", Path(settings.output))
    check_computing_device(settings.device)
    if is_quantized_already(settings.model):
        raise ValueError(f"{settings.model} is quantized already. Give the float model. Nothing was written.")
    is_to_be_planned = options.is_to_be_planned(settings)
    plan = options.given_plan(settings)
    if plan is not None:
        config = with_plan(config, plan)
    if settings.dry_run and not is_first_process():
        return None
    if settings.dry_run:
        found = planned(settings.model, config)
        options.calibration(settings, load_tokenizer(settings.tokenizer or settings.model))  # refuses wrong data
        n_tokens = 0 if settings.calibration.data is None else settings.calibration.n_tokens
        costs = estimate_quantizing(model_on_meta(settings.model), config, calibration_tokens=n_tokens)
        text = f"{settings.output} would hold:\n{found}\n{costs}"
        if is_to_be_planned:
            text += "\nbefore bits are planned for the budget, which takes the model and the data"
        return _result(found, text)
    was_there = False
    if can_be_streamed(settings):
        was_there = (Path(settings.output) / RUN_FILE).is_file()  # of the same run, or it is refused
        planned(settings.model, config)  # refuses a model that cannot be made
        if n_launched > 1:
            shared_out(settings, config, options.calibration(settings, load_tokenizer(settings.model)))
            if not is_first_process():
                return None
        else:
            with kept_is_told(Path(settings.output)):
                quantize_checkpoint(
                    settings.model,
                    settings.output,
                    config,
                    calibration=options.calibration(settings, load_tokenizer(settings.model)),
                    device=settings.device,
                    resume=settings.resume,
                    n_processes=settings.n_processes,
                )
        if plan is not None:
            with replace_file(Path(settings.output) / options.PLAN_FILE) as part:
                plan.save(part)
        found = summary(model_on_meta(settings.output))
    elif not settings.resume:
        raise WrongUsage(
            "--resume false is for what goes from files to files, and with these options nothing is left to resume: "
            f"{_in_memory(settings)}. Leave it out. Nothing was written."
        )
    elif settings.n_processes > 1:
        raise WrongUsage(
            f"--n_processes {settings.n_processes} goes from files to files, which {_in_memory(settings)} does not. "
            "Leave them out. Nothing was written."
        )
    else:
        options.check_output(settings)
        options.refuse_output_in_use(settings)
        found, plan = quantized_in_memory(settings, config, plan)
    where = f"was there already, complete, in {settings.output}" if was_there else f"saved in {settings.output}"
    said = [str(found), *([] if plan is None else [f"plan: {plan}"]), where]
    return _result(found, "\n".join(said), plan=plan, output=settings.output, was_there=was_there)


@contextmanager
def kept_is_told(folder: Path) -> Iterator[None]:
    """While this is open, an interrupt says what is kept in ``folder`` for the next call."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if (folder / HIDDEN).is_dir():
            interrupt.add_note(f"What is finished is kept in {folder / HIDDEN}: the same command goes on.")
        raise


def shared_out(settings: Namespace, config: QuantConfig, calibration: Calibration | None) -> None:
    """Quantize in all processes that torchrun or accelerate has started, each on its own GPU if they have any."""
    own_device = settings.device
    if own_device == "cuda":
        own_device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first process may wait so long for the others
    try:
        quantize_in_group(
            settings.model,
            settings.output,
            config,
            calibration=calibration,
            device=settings.device,
            own_device=own_device,
            resume=settings.resume,
            progress=is_first_process(),
        )
    finally:
        dist.destroy_process_group()


def _check_launched(settings: Namespace, n_launched: int) -> None:
    """Raise WrongUsage where a launcher has started several processes for what goes in one."""
    if n_launched == 1 or settings.dry_run:
        return
    if not can_be_streamed(settings):
        raise WrongUsage(
            f"a launcher has started {n_launched} processes, and with {_in_memory(settings)} the model is in one. "
            "Call it without the launcher; torch uses several threads by itself. Nothing was written."
        )
    if settings.n_processes > 1:
        raise WrongUsage(
            f"the {n_launched} processes that a launcher has started share the work: leave out --n_processes "
            f"{settings.n_processes}, or the launcher. Nothing was written."
        )


def can_be_streamed(settings: Namespace) -> bool:
    """Whether files become files, a part at a time: nothing needs the whole model, and nothing is replaced."""
    return not _in_memory(settings)


def _in_memory(settings: Namespace) -> str:
    """The options that were given of ``IN_MEMORY``."""
    return ", ".join(f"--{name}" for name in IN_MEMORY if settings.get(name) not in (None, False, "auto", []))


def quantized_in_memory(
    settings: Namespace, config: QuantConfig, plan: BitPlan | None
) -> tuple[ModelSummary, BitPlan | None]:
    """Load, plan where that is wanted, quantize and save; what became of the model, and the plan."""
    tokenizer = needed_tokenizer(settings.tokenizer) if settings.tokenizer else load_tokenizer(settings.model)
    data = options.calibration(settings, tokenizer)
    transforms = [TRANSFORMS[name]() for name in settings.transforms or ()]
    load: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    while_loading = data is None and not transforms
    if while_loading:
        load["quantization_config"] = config
    model: Any = load_model(settings.model, **load)
    if transforms:
        transform_model(model, transforms, config=config, calibration=data)
    if options.is_to_be_planned(settings):
        plan = plan_bits(model, data, config=config, **options.budget(settings))
    if not while_loading:
        quantize_model(model, config, calibration=data, budget=plan)
    with saved_model(model, settings.output, tokenizer=tokenizer, overwrite=settings.overwrite) as folder:
        if plan is not None:
            plan.save(folder / options.PLAN_FILE)
    return summary(model), plan


def planned(name: str, config: QuantConfig) -> ModelSummary:
    """What ``config`` would make of the model ``name``, from its config alone."""
    return summary(model_on_meta(name), config)


def _result(
    found: ModelSummary, text: str, *, plan: BitPlan | None = None, output: str | None = None, was_there: bool = False
) -> Result:
    data: dict[str, Any] = {
        "n_parameters": found.n_parameters,
        "nbytes": found.nbytes,
        "fraction_quantized": found.fraction_quantized,
        "quantized": [
            {"spec": group.label, "layers": len(group.names), "bits_per_weight": group.bits_per_weight}
            for group in found.by_spec
        ],
        "dense": [{"reason": group.label, "modules": list(group.names)} for group in found.by_reason],
    }
    if output is not None:
        data["was_there"] = was_there
    if plan is not None:
        data["plan"] = options.figures_of(plan)
    return Result(text=text, output=output, data=data)
