"""``evaluate MODEL --text FILE``: perplexity, divergence from a reference, and the tasks of lm-eval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from quantlayers_cli.option_names import WrongUsage

from ...arguments import nearest
from ...estimate import estimate_reading
from ...evaluate import divergence, perplexity
from ...evaluate.perplexity import check_causal
from .. import shared_options as options
from ..answers import Question, add_sampling, answer, check_lengths, check_sampling, prompts_of
from ..given_tokenizers import check_ids, long_windows_refused, needed_tokenizer, tokenizer_name
from ..models import (
    adapter_config,
    config_of,
    load_model,
    model_and_adapter,
    n_parameters,
    refuse_missing_folder,
    weight_bytes,
    with_adapter,
)
from ..read_data import DATA_HELP, token_ids
from ..refused_values import check_at_least
from ..result import Result

DESCRIPTION = (
    "Measure a model: perplexity on a text, divergence from a reference model, tasks of lm-eval, answers to prompts."
)
POSITIONALS = ("model",)
LONGEST = 64
LM_EVAL = "--tasks needs lm-eval: pip install 'peft_quantlayers[evaluate]'."


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    options.add_model(parser, required=False)
    parser.add_argument("--adapter", type=str | None, default=None, help="adapter to put on the model")
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="model, or the folder of an adapter, to compare the predictions with",
    )
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
    parser.add_argument("--limit", type=int | None, default=None, help="examples of each task, and prompts; null: all")
    parser.add_argument(
        "--prompts",
        type=list[str] | str | None,
        default=None,
        help="to be answered, beside the reference's answers if there is one: a list, or a text file with one in each "
        "line, or rows with prompt, instruction, messages or text",
    )
    add_sampling(parser, max_new_tokens=LONGEST)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    options.add_dry_run(parser)


def check_values(settings: Namespace) -> None:
    """Raise an error where there is nothing to measure, or a value is out of range; no model and no text is read."""
    if settings.text is None and settings.tasks is None and settings.prompts is None:
        raise WrongUsage("there is nothing to measure on: give --text FILE, --tasks NAME, or --prompts FILE.")
    if settings.reference is not None and settings.text is None and settings.prompts is None:
        raise WrongUsage("--reference is compared on a text or by answers: give --text FILE, or --prompts FILE.")
    check_sampling(settings)
    check_at_least(settings, 0, "seed", most=2**32 - 1)
    check_at_least(settings, 1, "limit", "n_tokens")
    check_at_least(settings, 2, "window")
    if settings.text is not None and settings.n_tokens < settings.window:
        raise WrongUsage(
            f"--n_tokens {settings.n_tokens} is less than --window {settings.window}, the tokens that are scored "
            "together. Give more, or a smaller window."
        )
    if settings.tasks is not None:
        refuse_missing_folder("include_path", settings.include_path or "")
        if find_spec("lm_eval") is None:
            raise ImportError(LM_EVAL)


def reference_of(settings: Namespace) -> tuple[str | None, str | None]:
    """The names of the model and of the adapter on it that ``--reference`` means, as :func:`model_and_adapter`."""
    if settings.reference is None:
        return None, None
    refuse_missing_folder("reference", settings.reference)
    name, adapter = model_and_adapter(settings.reference, None)
    config_of(name)
    return name, adapter


def read_texts(settings: Namespace, tokenizer: Any, models: Iterable[str]) -> tuple[Tensor | None, list[Question]]:
    """The token ids of ``--text``, which all ``models`` know, None without it; and the questions of ``--prompts``."""
    ids = None
    if settings.text is not None:
        ids = token_ids("text", settings.text, tokenizer, n_tokens=settings.n_tokens)
        if len(ids) < settings.window:
            raise ValueError(
                f"--text {settings.text} has {len(ids)} tokens, and {settings.window} are scored together. Give a "
                "longer text, or a smaller window: --window N."
            )
        for each in models:
            check_ids(ids, config_of(each))
    return ids, [] if settings.prompts is None else prompts_of("prompts", settings.prompts, limit=settings.limit)


def run(settings: Namespace) -> Result:
    """Measure what was asked for."""
    check_values(settings)
    name, adapter = model_and_adapter(settings.model, settings.adapter)
    reference_name, reference_adapter = reference_of(settings)
    if settings.prompts is not None:
        check_lengths(settings, name, reference_name)
    tokenizer = needed_tokenizer(tokenizer_name(settings.tokenizer, name, adapter))
    # Before the model, which takes longer.
    ids, prompts = read_texts(settings, tokenizer, filter(None, (name, reference_name)))
    if settings.tasks is not None:
        known_tasks(task_names(settings), settings.include_path)
    if settings.dry_run:
        n_tokens = 0 if ids is None else len(ids)
        return planned(settings, name, adapter, reference_name, n_tokens=n_tokens, n_prompts=len(prompts))
    load = {"dtype": settings.dtype, "device": settings.device}
    model = with_adapter(load_model(name, **load), adapter)
    found: dict[str, Any] = {"model": name, "adapter": adapter}
    reference = None
    if reference_name is not None:
        reference = with_adapter(load_model(reference_name, option="reference", **load), reference_adapter)
        found["reference"] = settings.reference
    if ids is not None:
        found |= measured(model, reference, ids, window=settings.window)
    if settings.prompts is not None:
        found["answers"] = answers(model, reference, tokenizer, prompts, settings)
    if settings.tasks is not None:
        found["tasks"] = task_scores(
            model, tokenizer, task_names(settings), limit=settings.limit, folder=settings.include_path
        )
    return Result(text=_text(found), data=found, exit_code=int(math.isnan(found.get("perplexity", 0.0))))


def planned(
    settings: Namespace, name: str, adapter: str | None, reference: str | None, *, n_tokens: int, n_prompts: int
) -> Result:
    """What would be measured, and what that takes; ``reference``: the model of ``--reference``."""
    models = {name: name} | ({} if reference is None else {f"{settings.reference}, beside it": reference})
    if adapter is not None:
        adapter_config(adapter)  # refuses what is none
    n_new = n_prompts * (settings.max_new_tokens or LONGEST)
    lines = [f"would measure {name}" + ("" if adapter is None else f" with {adapter}") + ":"]
    lines += [f"  perplexity on {n_tokens:,} tokens, {settings.window} at once"] if n_tokens else []
    lines += [f"  answers to {n_prompts:,} prompts, {n_new:,} tokens at most"] if n_prompts else []
    lines += [f"  tasks of lm-eval: {settings.tasks}"] if settings.tasks is not None else []
    lines += [f"  beside {settings.reference}"] if settings.reference is not None else []
    vocab_size = getattr(config_of(name).get_text_config(), "vocab_size", 0)
    costs = estimate_reading(
        "evaluate",
        weights={what: weight_bytes(each) for what, each in models.items()},
        n_parameters=sum(map(n_parameters, models.values())),
        n_tokens=n_tokens,
        n_new=n_new,
        logits=len(models) * vocab_size * min(settings.window, n_tokens),
        notes=("without the tasks, whose texts are not known here",) if settings.tasks is not None else (),
    )
    return Result(text="\n".join([*lines, str(costs)]), data=costs.to_dict())


def measured(model: Any, reference: Any, ids: Tensor, *, window: int) -> dict[str, Any]:
    """Perplexity, and beside a reference its own and the divergence from it; each model runs once."""
    found: dict[str, Any] = {"n_tokens": len(ids)}
    check_causal(model)
    with long_windows_refused(model, window, option="window"):
        if reference is None:
            return found | {"perplexity": perplexity(model, ids, window=window)}
        with long_windows_refused(reference, window, option="window"):
            compared = divergence(model, reference, ids, window=window)
    return found | {
        "perplexity": compared.perplexity,
        "reference_perplexity": compared.reference_perplexity,
        "kl": compared.kl,
        "top1_agreement": compared.top1_agreement,
    }


def answers(
    model: Any, reference: Any, tokenizer: Any, prompts: list[Question], settings: Namespace
) -> list[dict[str, Any]]:
    """What each model says to each of ``prompts``; each answer is sampled from the same seed."""
    found = []
    for prompt in tqdm(prompts, desc="Answering", unit="prompt"):
        row: dict[str, Any] = {"prompt": prompt}
        for key, each in (("answer", model), ("reference_answer", reference)):
            if each is not None:
                set_seed(settings.seed)
                row[key] = answer(each, tokenizer, prompt, settings, longest=LONGEST)
        found.append(row)
    return found


def task_names(settings: Namespace) -> list[str]:
    """The tasks of ``--tasks``."""
    names = settings.tasks.split(",") if isinstance(settings.tasks, str) else settings.tasks or []
    return [name.strip() for name in names]


def known_tasks(tasks: list[str], folder: str | None) -> Any:
    """lm-eval's manager of all tasks, and of those in ``folder``. Raises ValueError where it does not know one."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError(LM_EVAL) from None
    known = TaskManager(include_path=folder)
    for task in tasks:
        if not known.match_tasks([task]):
            near = nearest(task, known.all_tasks)
            raise ValueError(f"--tasks {task}: lm-eval has no such task{near}. `lm_eval ls tasks` lists them.")
    return known


def task_scores(
    model: PreTrainedModel, tokenizer: Any, tasks: list[str], *, limit: int | None, folder: str | None = None
) -> dict[str, Any]:
    """The scores of lm-eval's ``tasks``, and of those in ``folder``, by task."""
    known = known_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

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
    for row in found.get("answers", []):
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        said = [("prompt", asked), ("answer", row["answer"]), ("reference", row.get("reference_answer"))]
        lines += [f"  {name + ':':10} {_indented(text)}" for name, text in said if text is not None]
    for task, scores in found.get("tasks", {}).items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
        lines.append(f"  {task}: {shown}")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 13)
