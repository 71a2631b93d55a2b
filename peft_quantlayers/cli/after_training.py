"""What ``train`` does once all is trained, if asked: merge, evaluate, export, each as the verb of that name does it.

``--merge``, ``--evaluate`` and ``--export`` take the main option of their verb, and ``--merge_options.NAME``,
``--evaluate_options.NAME`` and ``--export_options.NAME`` all others, but for those that the run gives itself. Each
verb loads what was saved, and not the model that was trained, which is prepared for training (float32 norms) and has
the trainer's memory beside it: so the end gives the files that the verbs give by hand. What can fail of it is tried
before the training, by ``rehearsed_end.py``.
"""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from quantlayers_cli.options import PROGRAM

from ..merging.strategies import Strategy
from ..report.training_parts import checkpoints
from ..storage import replace_file
from ..storage.free_memory import return_free_memory
from . import work
from .half_made import RESUME
from .models import is_quantized_already
from .parsing import VerbParser, yaml_text
from .result import Result
from .same_run import file_checksum, is_resumed
from .saved_settings import save_settings
from .trained_base import base_folder
from .verbs import evaluate, export, merge

# In the order in which they are run, and the option of each that ``train`` has under the verb's own name.
VERBS: dict[str, ModuleType] = {"merge": merge, "evaluate": evaluate, "export": export}
MAIN_OPTIONS = {"merge": "strategy", "evaluate": "text", "export": "format"}
# What the run itself gives to each verb.
OF_RUN = {"model", "adapter", "tokenizer", "dtype", "device", "output", "overwrite", "dry_run"}
EVALUATION = "evaluation.json"
# What of the end is done, in the folder of the adapter.
RECORD = "after_training.json"


class _Group:
    """A parser's group of the options that another verb declares, all but some."""

    def __init__(self, parser: VerbParser, verb: str) -> None:
        self._group = parser.add_argument_group(f"--{verb}_options: those of {verb}", name=f"{verb}_options")
        self._verb, self._left_out = verb, OF_RUN | {MAIN_OPTIONS[verb]}

    def add_argument(self, name: str, **options: Any) -> None:
        """As a parser's."""
        own = name.removeprefix("--")
        if own not in self._left_out:
            self._group.add_argument(f"--{self._verb}_options.{own}", **options)


def add_arguments(parser: VerbParser) -> None:
    """``--merge``, ``--evaluate``, ``--export``, their folders and their options."""
    parser.add_argument("--merge", type=Strategy | None, default=None, help="merge at the end by this strategy")
    parser.add_argument(
        "--merged_output", type=str | None, default=None, help="folder of the merged model; null: OUTPUT/merged"
    )
    parser.add_argument(
        "--evaluate",
        type=bool | str | None,
        default=None,
        help="then measure the result on this text (true: on --eval_data) beside the unmerged model, or beside the "
        f"base where nothing is merged; the figures are in OUTPUT/{EVALUATION}",
    )
    parser.add_argument(
        "--export", type=str | None, default=None, help="then write the result in this format of the verb export"
    )
    parser.add_argument(
        "--export_output", type=str | None, default=None, help="folder of the export; null: OUTPUT/exported"
    )
    for verb, module in VERBS.items():
        module.add_arguments(_Group(parser, verb))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One verb that is run at the end.

    Fields:
        verb: its name.
        parser: of the verb.
        settings: what the verb is given.
        place: a file, or the folder of a model, that is there when it is done.
    """

    verb: str
    parser: VerbParser
    settings: Namespace
    place: Path

    @property
    def command(self) -> str:
        """What does the same by hand."""
        positionals = VERBS[self.verb].POSITIONALS
        words = [PROGRAM, self.verb, *(str(self.settings[name]) for name in positionals)]
        for name in sorted(self.parser.names() - {*positionals, "overwrite"}):
            value = self.settings.get(name)
            if value != self.parser.get_default(name):
                words += [f"--{name}", value if isinstance(value, str) else yaml_text(value)]
        return shlex.join(words)


def steps_of(settings: Namespace, processes: PartialState) -> list[Step]:
    """What is to be done at the end, in this order."""
    output, found = Path(settings.output), []
    device = settings.device if settings.device or settings.training.use_cpu else str(processes.device)
    common = {"dtype": settings.dtype, "device": device}
    result, before = settings.output, _base(settings)
    if settings.merge is not None:
        merged = settings.merged_output or str(output / "merged")
        own = {"adapter": result, "output": merged, "strategy": settings.merge, **common}
        found.append(_step("merge", settings, own, Path(merged)))
        result, before = merged, result
    if settings.evaluate not in (None, False):
        text = settings.eval_data if settings.evaluate is True else settings.evaluate
        own = {"model": result, "text": text, **common}
        found.append(_step("evaluate", settings, own, output / EVALUATION))
        of_evaluate = found[-1].settings
        if of_evaluate.reference is None and (text or of_evaluate.prompts):
            of_evaluate.reference = before
    if settings.export is not None:
        exported = settings.export_output or str(output / "exported")
        own = {"model": result, "output": exported, "format": settings.export, "dtype": settings.dtype}
        found.append(_step("export", settings, own, Path(exported)))
    return found


def _base(settings: Namespace) -> str:
    return settings.model if is_quantized_already(settings.model) else str(base_folder(settings))


def _step(verb: str, settings: Namespace, own: dict[str, Any], place: Path) -> Step:
    parser = work.verb_parser(verb, VERBS[verb])
    given = parser.get_defaults(skip_validation=True)
    given.update(settings[f"{verb}_options"].clone())
    given.update(Namespace(own))
    if verb == "merge" and given.calibration.data is None and _needs_data(given):
        given.calibration.data = settings.data
    return Step(verb=verb, parser=parser, settings=given, place=place)


def _needs_data(given: Namespace) -> bool:
    is_to_be_planned = given.average_bits is not None or given.size is not None
    return given.strategy == "calibrated" or bool(given.tune_epochs) or is_to_be_planned


def result_with(settings: Namespace, steps: Sequence[Step], found: dict[str, Any], told: str) -> Result:
    """The result of a training that came to ``found``, in words ``told``, with those of the steps, which are run.

    Any error says that what was trained is complete, and what goes on from there.
    """
    lines, exit_code = [told], 0
    for step, result in _done(settings, steps) if steps else ():
        if result is None:
            lines.append(f"{step.verb}: {step.place} had been written")
            continue
        lines.append(result.text)
        if step.verb == "merge" and "--" in result.text:
            lines.append(f"such options are those of {PROGRAM} merge {settings.output} MERGED")
        found[step.verb] = result.data
        exit_code = max(exit_code, result.exit_code)
    return Result(text="\n".join(lines), data=found, exit_code=exit_code, output=settings.output)


def _done(settings: Namespace, steps: Sequence[Step]) -> list[tuple[Step, Result | None]]:
    """Run the steps, each in a model that it loads itself; None for those that an earlier call has done."""
    gc.collect()  # the trainer and its model hold each other
    return_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trained = file_checksum(*sorted(Path(settings.output).glob("*.safetensors")))
    goes_on = is_resumed(settings)
    record = read_record(settings) if goes_on else {}
    results: list[tuple[Step, Result | None]] = []
    for position, step in enumerate(steps):
        own = {"command": step.command, "of": trained, "is_done": False}
        is_done = record.get(step.verb) == own | {"is_done": True} and _is_there(step.place)
        if is_done and all(result is None for _, result in results):
            results.append((step, None))
            continue
        _write_record(settings, record := record | {step.verb: own})
        try:
            # A run that was killed here, and is resumed, replaces what it wrote.
            step.settings.overwrite = settings.overwrite or goes_on
            result = VERBS[step.verb].run(step.settings)
            step.settings.overwrite = False
            if step.verb == "evaluate":
                with replace_file(step.place) as part:
                    part.write_text(json.dumps(result.data, indent=2) + "\n")
            elif result.output is not None:
                save_settings(step.verb, step.parser, step.settings, step.place)
        except BaseException as error:
            error.add_note(_way_on(settings, steps[position:]))
            raise
        _write_record(settings, record := record | {step.verb: own | {"is_done": True}})
        results.append((step, result))
    return results


def _way_on(settings: Namespace, left: Sequence[Step]) -> str:
    commands = "; ".join(step.command for step in left)
    is_model = settings.adapter_type == "pv"
    complete = "The model is complete, in" if is_model else "The adapter is complete, in"
    resumed = f"go on with {RESUME}, or by hand" if any(checkpoints(Path(settings.output))) else "go on by hand"
    return f"{complete} {settings.output}: {resumed}: {commands}."


def _is_there(place: Path) -> bool:
    return place.is_file() or (place.is_dir() and any(place.iterdir()))


def read_record(settings: Namespace) -> dict[str, Any]:
    """What earlier runs have begun and done at the end, by verb; empty where there is no record."""
    try:
        found = json.loads((Path(settings.output) / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_record(settings: Namespace, record: dict[str, Any]) -> None:
    with replace_file(Path(settings.output) / RECORD) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
