"""``evaluate MODEL --text FILE``: perplexity, divergence from a reference, and the tasks of lm-eval."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from transformers import PreTrainedModel

from ...arguments import nearest
from ...evaluate import divergence, perplexity
from .. import shared_options as options
from ..models import (
    check_ids,
    config_of,
    load_model,
    long_windows_refused,
    model_and_adapter,
    needed_tokenizer,
    refuse_missing_folder,
    tokenizer_name,
    with_adapter,
)
from ..read_data import DATA_HELP, token_ids
from ..result import Result

DESCRIPTION = "Measure a model: perplexity on a text, divergence from a reference model, tasks of lm-eval."
POSITIONALS = ("model",)
LM_EVAL = "--tasks needs lm-eval: pip install 'peft_quantlayers[evaluate]'."


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    options.add_model(parser, required=False)
    parser.add_argument("--adapter", type=str | None, default=None, help="adapter to put on the model")
    parser.add_argument("--reference", type=str | None, default=None, help="model to compare the predictions with")
    parser.add_argument("--text", type=str | None, default=None, help=f"held-out text: {DATA_HELP}")
    parser.add_argument("--n_tokens", type=int, default=16_384, help="tokens of the text to use")
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument(
        "--tasks",
        type=list[str] | str | None,
        default=None,
        help="tasks of lm-eval, which must be installed: names with commas between them, or a list",
    )
    parser.add_argument(
        "--include_path", type=str | None, default=None, help="folder with tasks of your own, as lm-eval takes them"
    )
    parser.add_argument("--limit", type=int | None, default=None, help="examples of each task; null: all")


def run(settings: Namespace) -> Result:
    """Measure what was asked for."""
    if settings.text is None and settings.tasks is None:
        raise ValueError("there is nothing to measure on: give --text FILE, or --tasks NAME.")
    if settings.reference is not None and settings.text is None:
        raise ValueError("--reference is compared on a text: give --text FILE.")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit {settings.limit} must be at least 1.")
    if settings.tasks is not None:
        refuse_missing_folder("include_path", settings.include_path or "")
        if find_spec("lm_eval") is None:
            raise ImportError(LM_EVAL)
    name, adapter = model_and_adapter(settings.model, settings.adapter)
    if settings.reference is not None:
        refuse_missing_folder("reference", settings.reference)
        config_of(settings.reference)
    tokenizer = needed_tokenizer(tokenizer_name(settings.tokenizer, name, adapter))
    if settings.text is not None:  # before the model, which takes longer
        ids = token_ids("text", settings.text, tokenizer, n_tokens=settings.n_tokens)
        for each in filter(None, (name, settings.reference)):
            check_ids(ids, config_of(each))
    load = {"dtype": settings.dtype, "device": settings.device}
    model = with_adapter(load_model(name, **load), adapter)
    found: dict[str, Any] = {"model": name, "adapter": adapter}
    if settings.text is not None:
        with long_windows_refused(model, settings.window, option="window"):
            found["perplexity"] = perplexity(model, ids, window=settings.window)
        found["n_tokens"] = len(ids)
        if settings.reference is not None:
            reference = load_model(settings.reference, option="reference", **load)
            with long_windows_refused(reference, settings.window, option="window"):
                compared = divergence(model, reference, ids, window=settings.window)
            found |= {
                "reference": settings.reference,
                "reference_perplexity": perplexity(reference, ids, window=settings.window),
                "kl": compared.kl,
                "top1_agreement": compared.top1_agreement,
            }
    if settings.tasks is not None:
        names = settings.tasks.split(",") if isinstance(settings.tasks, str) else settings.tasks
        found["tasks"] = task_scores(
            model, tokenizer, [name.strip() for name in names], limit=settings.limit, folder=settings.include_path
        )
    return Result(text=_text(found), data=found, exit_code=int(math.isnan(found.get("perplexity", 0.0))))


def task_scores(
    model: PreTrainedModel, tokenizer: Any, tasks: list[str], *, limit: int | None, folder: str | None = None
) -> dict[str, Any]:
    """The scores of lm-eval's ``tasks``, and of those in ``folder``, by task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError(LM_EVAL) from None
    known = TaskManager(include_path=folder)
    for task in tasks:
        if not known.match_tasks([task]):
            near = nearest(task, known.all_tasks)
            raise ValueError(f"--tasks {task}: lm-eval has no such task{near}. `lm_eval ls tasks` lists them.")
    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, limit=limit, task_manager=known
    )["results"]


def _text(found: dict[str, Any]) -> str:
    lines = [found["model"] + ("" if found["adapter"] is None else f" with {found['adapter']}")]
    if "perplexity" in found:
        lines.append(f"  perplexity {found['perplexity']:.3f} on {found['n_tokens']:,} tokens")
        if math.isnan(found["perplexity"]):
            lines.append("  the model predicts NaN: its weights are damaged, or the training of its adapter failed")
    if "kl" in found:
        lines.append(
            f"  beside {found['reference']} with {found['reference_perplexity']:.3f}: KL {found['kl']:.4f} nats "
            f"a token, the same most likely token {100 * found['top1_agreement']:.1f} % of the time"
        )
    for task, scores in found.get("tasks", {}).items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
        lines.append(f"  {task}: {shown}")
    return "\n".join(lines)
