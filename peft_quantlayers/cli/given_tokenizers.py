"""Loading the tokenizer that a verb is given, and what it or its model cannot read: ids, windows, templates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from quantlayers_cli.option_names import WrongUsage

from .models import name_of

# Files of which a tokenizer has one at least.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_name(given: str | None, model: str, adapter: str | None) -> str:
    """Whose tokenizer to take: what was ``given``, else the adapter's, if its folder has one, else the model's."""
    if given is None and adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        return adapter
    return given or model


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or of a model on the Hub; None where there is none.

    Raises:
        ValueError: there is one in the folder, and it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of any kind: a dozen formats of vocabularies, some read by other packages
        found = [file for file in TOKENIZER_FILES if (Path(name).expanduser() / file).is_file()]
        if not found:
            return None
        raise ValueError(
            f"{name}: its tokenizer ({', '.join(found)}) cannot be read: {str(error) or type(error).__name__}. Name "
            "another: --tokenizer FOLDER_OR_NAME."
        ) from None


def needed_tokenizer(name: str) -> Any:
    """As :func:`load_tokenizer`. Raises FileNotFoundError where there is no such model, ValueError without one."""
    tokenizer = load_tokenizer(name)
    if tokenizer is None and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"{name}: there is no such folder here, and the Hub has no tokenizer of that name or cannot be reached."
        )
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which is needed here. Name one: --tokenizer FOLDER_OR_NAME.")
    return tokenizer


def check_ids(ids: Tensor, config: PreTrainedConfig) -> None:
    """Raise ValueError where ``ids`` holds a token that a model of ``config`` does not know."""
    n_known = getattr(config.get_text_config(), "vocab_size", None)
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if n_known is not None and (low < 0 or high >= n_known):
        raise ValueError(
            f"the text has token ids from {low} to {high}, and the model {config.name_or_path} knows {n_known}: they "
            "do not belong together. Name the model's tokenizer: --tokenizer FOLDER_OR_NAME."
        )


def n_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model of ``config`` is for at once, by scaled rotary embeddings too; None: it does not say."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    return max(most, *(int(most * (each.get("factor") or 1)) for each in scalings))


def check_positions(n_tokens: int, config: PreTrainedConfig, option: str) -> None:
    """Raise WrongUsage where the value of ``option`` is more than the positions of a model of ``config``."""
    most = n_positions(config)
    if most is not None and n_tokens > most:
        raise WrongUsage(f"--{option} {n_tokens} must be at most {most}: {config.name_or_path} has so many positions.")


@contextmanager
def long_windows_refused(model: Any, n_tokens: int | None, *, option: str = "") -> Iterator[None]:
    """While this is open, a model that has no position for each of ``n_tokens``, those of ``option``, is a ValueError.

    An IndexError with fewer tokens than the config says is left as it is.
    """
    try:
        yield
    except IndexError:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is None or (n_tokens is not None and n_tokens <= most):
            raise
        raise too_long(model, n_tokens, most, option=option) from None


def too_long(model: Any, n_tokens: int | None, most: int, *, option: str = "") -> ValueError:
    """The error for ``n_tokens`` at once, None for any number, those of ``option``, where ``most`` have positions."""
    many = "rows of any length" if n_tokens is None else f"{n_tokens} tokens at once"
    way_out = f"Lower --{option}." if option else "Give less, or lower --max_new_tokens."
    return ValueError(f"{name_of(model)} cannot read {many}: it has {most} positions. {way_out}")


@contextmanager
def template_refusals_named(name: str) -> Iterator[None]:
    """While this is open, an error of the chat template of ``name``, a tokenizer or a file, is a ValueError."""
    try:
        yield
    except TemplateError as error:
        refused = ValueError(f"the chat template of {name} does not take these messages: {error}.")
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from None
