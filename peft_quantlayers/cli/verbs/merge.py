"""``merge ADAPTER OUTPUT``: merge an adapter into its quantized base and save one model."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from ...calibration import Calibration
from ...estimate import estimate_merging
from ...merging.strategies import Strategy
from ...model_merge import merge_back, plan_merge_bits
from ...model_merge.merge_costs import config_of_spec
from ...model_merge.refused_merges import refuse_arguments
from ...saving import saved_model
from .. import shared_options as options
from ..given_tokenizers import load_tokenizer, needed_tokenizer, tokenizer_name
from ..in_options import REPORT_FILE, in_options
from ..models import load_model, model_and_adapter, model_on_meta, rank_of, specs_of, with_adapter
from ..read_data import DATA_HELP, token_ids
from ..refused_values import check_at_least, values_refused
from ..result import Result

DESCRIPTION = (
    "Merge an adapter into the quantized model that it was trained on, at the same bits, and save one model. With "
    "--average_bits or --size merged layers get more or fewer bits by what they cost."
)
POSITIONALS = ("adapter", "output")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--adapter", type=str, required=True, help="folder of the adapter, or its name on the Hub")
    options.add_model(parser, required=False)
    options.add_output(parser)
    parser.add_argument(
        "--strategy", type=Strategy, default="auto", help="how the delta gets into the codes; see merge_back"
    )
    parser.add_argument(
        "--tune_epochs",
        type=int,
        default=0,
        help="then train the merged layers' scales on --calibration.data for so many epochs, to predict as unmerged",
    )
    parser.add_argument(
        "--evaluate_on", type=str | None, default=None, help=f"held-out text, to measure what is left: {DATA_HELP}"
    )
    parser.add_argument("--evaluate_tokens", type=int, default=4096, help="tokens of it to use")
    options.add_calibration(parser)
    options.add_budget(parser)


def has_budget(settings: Namespace) -> bool:
    """Whether the merged layers get other bits than they have."""
    return settings.average_bits is not None or settings.size is not None or settings.plan is not None


def check_values(settings: Namespace) -> None:
    """Raise an error where the options contradict each other, or name no plan; no model and no text is read."""
    options.check_calibration(settings)
    with values_refused():
        refuse_arguments(
            settings.strategy, settings.calibration.data, settings.tune_epochs, has_budget=has_budget(settings)
        )
    check_at_least(settings, 2, "evaluate_tokens")
    options.is_to_be_planned(settings)
    options.given_plan(settings)


def read_texts(settings: Namespace, tokenizer: Any) -> tuple[Calibration | None, Tensor | None]:
    """The data of ``--calibration.data`` and the token ids of ``--evaluate_on``; None for what is not given."""
    data, held_out = options.calibration(settings, tokenizer), None
    if settings.evaluate_on is not None:
        held_out = token_ids("evaluate_on", settings.evaluate_on, tokenizer, n_tokens=settings.evaluate_tokens)
    return data, held_out


def run(settings: Namespace) -> Result:
    """Merge, save, and report."""
    check_values(settings)
    name, _ = model_and_adapter(settings.model, settings.adapter)
    options.check_output(settings, inputs=(name,))
    tokenizer_of = tokenizer_name(settings.tokenizer, name, settings.adapter)
    is_to_be_planned = options.is_to_be_planned(settings)
    if settings.choices is not None:
        for spec in specs_of(name):
            options.check_choices(settings, config_of_spec(spec))
    plan = options.given_plan(settings)
    if not settings.dry_run:
        options.refuse_output_in_use(settings)
    is_needed = settings.tokenizer or settings.evaluate_on is not None
    tokenizer = needed_tokenizer(tokenizer_of) if is_needed else load_tokenizer(tokenizer_of)
    data, held_out = read_texts(settings, tokenizer)
    if settings.dry_run:
        costs = estimate_merging(model_on_meta(name), None, rank=rank_of(settings.adapter))
        text = f"{settings.adapter} would be merged into {name} ({settings.strategy}) and saved in {settings.output}"
        text += "; bits are planned for the budget" if is_to_be_planned else ""
        return Result(text=f"{text}\n{costs}", data=costs.to_dict())
    base = load_model(name, dtype=settings.dtype, device=settings.device)
    peft_model = with_adapter(base, settings.adapter)
    if is_to_be_planned:
        plan = plan_merge_bits(peft_model, data, strategy=settings.strategy, **options.budget(settings))
    model: Any
    model, report = merge_back(
        peft_model,
        strategy=settings.strategy,
        calibration=data,
        tokenizer=tokenizer,
        budget=plan,
        tune_epochs=settings.tune_epochs,
        evaluate_on=held_out,
    )
    with saved_model(model, settings.output, tokenizer=tokenizer, overwrite=settings.overwrite) as folder:
        report.save(folder / REPORT_FILE)
        if plan is not None:
            plan.save(folder / options.PLAN_FILE)
    said = "" if plan is None else f"\nplan: {plan}"
    data_of_plan = {} if plan is None else {"plan": options.figures_of(plan)}
    return Result(
        text=f"{in_options(str(report))}{said}\nmerged model in {settings.output}; every layer in its {REPORT_FILE}",
        data=report.to_dict() | data_of_plan,
        output=settings.output,
    )
