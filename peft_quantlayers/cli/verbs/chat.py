"""``chat MODEL``: talk with a model in the terminal, with its adapter, or with base and adapter side by side."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from transformers import TextStreamer

from quantlayers_cli.option_names import WrongUsage

from ...estimate import estimate_reading
from .. import shared_options as options
from ..answers import add_sampling, answer, check_lengths, check_sampling
from ..given_tokenizers import needed_tokenizer, tokenizer_name
from ..models import adapter_config, load_model, model_and_adapter, n_parameters, weight_bytes, with_adapter
from ..result import Result

DESCRIPTION = (
    "Talk with a model: a line is a message, an empty line or Ctrl-D ends. --compare answers without the adapter too."
)
POSITIONALS = ("model",)
LONGEST = 256


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    options.add_model(parser, required=False)
    parser.add_argument("--adapter", type=str | None, default=None, help="adapter to put on the model")
    parser.add_argument("--compare", action="store_true", help="answer twice: without the adapter, then with it")
    parser.add_argument(
        "--prompt", type=str | None, default=None, help="one message, answered once; null: a conversation"
    )
    add_sampling(parser, max_new_tokens=LONGEST)
    options.add_dry_run(parser)


def run(settings: Namespace) -> Result:
    """Answer until the input ends."""
    name, adapter = model_and_adapter(settings.model, settings.adapter)
    if settings.compare and adapter is None:
        raise WrongUsage("--compare needs --adapter FOLDER: it answers without the adapter and with it.")
    check_sampling(settings)
    check_lengths(settings, name)
    tokenizer = needed_tokenizer(tokenizer_name(settings.tokenizer, name, adapter))
    if settings.dry_run:
        if adapter is not None:
            adapter_config(adapter)  # refuses what is none
        n_new = (settings.max_new_tokens or LONGEST) * (2 if settings.compare else 1)
        costs = estimate_reading(
            "an answer", weights={name: weight_bytes(name)}, n_parameters=n_parameters(name), n_new=n_new
        )
        with_it = "" if adapter is None else f" with {adapter}"
        return Result(text=f"would talk with {name}{with_it}\n{costs}", data=costs.to_dict())
    model = with_adapter(load_model(name, dtype=settings.dtype, device=settings.device), adapter)
    said = {False: list[dict[str, str]](), True: list[dict[str, str]]()}
    for message in [settings.prompt] if settings.prompt is not None else _lines():
        for is_base in [True, False] if settings.compare else [False]:
            if settings.compare and not settings.json:
                print("without the adapter:" if is_base else "with the adapter:", flush=True)
            said[is_base].append({"role": "user", "content": message})
            with model.disable_adapter() if is_base else nullcontext():
                streamer = (
                    None if settings.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                )
                text = answer(model, tokenizer, said[is_base], settings, longest=LONGEST, streamer=streamer)
            said[is_base].append({"role": "assistant", "content": text})
    return Result(
        text="", data={"messages": said[False], **({"without_adapter": said[True]} if settings.compare else {})}
    )


def _lines() -> Any:
    """What is typed, until an empty line or the end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
