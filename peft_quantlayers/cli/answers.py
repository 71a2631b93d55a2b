"""What a model answers: the messages of a chat in its template, or a text to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from quantlayers_cli.option_names import WrongUsage

from ..calibration.texts import one_split, text_of
from .given_tokenizers import (
    check_ids,
    check_positions,
    long_windows_refused,
    n_positions,
    template_refusals_named,
    too_long,
)
from .models import config_of
from .read_data import is_data_name, load_data
from .refused_values import check_at_least
from .row_forms import question_of
from .rows import check_texts

Question = list[dict[str, str]] | str
# Columns of rows with prompts; of several the first is taken.
ASKED = ("instruction", "conversations", "messages", "prompt", "text")


def add_sampling(parser: ArgumentParser, *, max_new_tokens: int) -> None:
    """``--max_new_tokens`` and ``--temperature``."""
    parser.add_argument(
        "--max_new_tokens",
        type=int | None,
        default=None,
        help=f"tokens of the longest answer; null: {max_new_tokens}, or those for which the model has positions left",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the most likely token")


def check_sampling(settings: Namespace) -> None:
    """Raise WrongUsage for values out of range."""
    check_at_least(settings, 1, "max_new_tokens")
    check_at_least(settings, 0, "temperature")


def check_lengths(settings: Namespace, *names: str | None) -> None:
    """Raise WrongUsage where the longest answer has no room in one of the models ``names``."""
    for name in filter(None, names if settings.max_new_tokens is not None else ()):
        check_positions(settings.max_new_tokens, config_of(name), "max_new_tokens")


def answer(
    model: Any, tokenizer: Any, question: Question, settings: Namespace, *, longest: int, streamer: Any = None
) -> str:
    """What ``model`` answers, by the options of :func:`add_sampling`.

    ``longest``: tokens of the answer where the options leave that open, and positions are left.

    Raises:
        ValueError: nothing is asked; the chat template does not take the messages; a token that the model does not
            know; more tokens than it has positions.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if tokenizer.chat_template is None:  # a base model goes on with the text
        inputs = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    else:
        with template_refusals_named(settings.tokenizer or tokenizer.name_or_path):
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    if not inputs["input_ids"].numel():
        raise ValueError("the message is empty, and there is nothing to answer.")
    check_ids(inputs["input_ids"], model.config)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    n_read = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    most = n_positions(model.config)
    n_new = settings.max_new_tokens or max(1, min(longest, longest if most is None else most - n_read))
    if most is not None and n_read + n_new > most:
        raise too_long(model, n_read + n_new, most)
    with long_windows_refused(model, inputs["input_ids"].shape[1] + n_new):
        ids = model.generate(**inputs.to(model.device), max_new_tokens=n_new, streamer=streamer, **sampling)
    return tokenizer.decode(ids[0, n_read:], skip_special_tokens=True)


def prompts_of(option: str, given: list[str] | str, *, limit: int | None) -> list[Question]:
    """The prompts of ``option``: a list, one text, or those of a file or a dataset, of which ``limit`` are taken.

    Raises:
        FileNotFoundError: no such file.
        WrongUsage: a list that holds none, an empty one, or what is no text.
        ValueError: a file that does; columns or rows that hold none.
    """
    found: list[Question] = []
    if isinstance(given, list) or not is_data_name(given):
        found += [_one_text(option, given)] if isinstance(given, str) else given
    else:
        rows = one_split(load_data(option, given))
        if isinstance(rows, Path):
            found += [line.strip() for line in text_of(rows).splitlines() if line.strip()]
        else:
            columns = [name for name in ASKED if name in rows.column_names][:1]
            if not columns:
                raise ValueError(
                    f"--{option} {given} has the columns {sorted(rows.column_names)}. Rows hold {', '.join(ASKED)}."
                )
            rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
            check_texts(option, given, rows, columns)
            found += map(question_of, rows)
    if not found or not all(found):
        error = WrongUsage if isinstance(given, list) else ValueError
        raise error(f"--{option} {given} holds {'an empty one' if found else 'none'}. Give texts to go on with.")
    return found[:limit]


def _one_text(option: str, given: str) -> str:
    """``given``, unless it is a list with something else than texts in it, which its type has left as it was."""
    try:
        content = yaml.safe_load(given) if given.lstrip().startswith("[") else None
    except yaml.YAMLError:  # a text that begins with a bracket
        return given
    for number, entry in enumerate(content or ()):
        if not isinstance(entry, str):
            raise WrongUsage(
                f"--{option} {given}: entry {number + 1} is {json.dumps(entry, default=str)}, and no text."
            )
    return given
