"""``chat MODEL``: talk with a model in the terminal, with its adapter, or with base and adapter side by side."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from typing import Any

from jinja2.exceptions import TemplateError
from jsonargparse import ArgumentParser, Namespace
from transformers import TextStreamer

from .. import shared_options as options
from ..models import (
    check_ids,
    load_model,
    long_windows_refused,
    model_and_adapter,
    needed_tokenizer,
    tokenizer_name,
    with_adapter,
)
from ..result import Result

DESCRIPTION = (
    "Talk with a model: a line is a message, an empty line or Ctrl-D ends. --compare answers without the adapter too."
)
POSITIONALS = ("model",)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the verb."""
    options.add_model(parser, required=False)
    parser.add_argument("--adapter", type=str | None, default=None, help="adapter to put on the model")
    parser.add_argument("--compare", action="store_true", help="answer twice: without the adapter, then with it")
    parser.add_argument(
        "--prompt", type=str | None, default=None, help="one message, answered once; null: a conversation"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the most likely token")


def run(settings: Namespace) -> Result:
    """Answer until the input ends."""
    name, adapter = model_and_adapter(settings.model, settings.adapter)
    if settings.compare and adapter is None:
        raise ValueError("--compare needs --adapter FOLDER: it answers without the adapter and with it.")
    if settings.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {settings.max_new_tokens} must be at least 1.")
    if not 0 <= settings.temperature < math.inf:
        raise ValueError(f"--temperature {settings.temperature} must be at least 0, and no infinity.")
    tokenizer = needed_tokenizer(tokenizer_name(settings.tokenizer, name, adapter))
    model = with_adapter(load_model(name, dtype=settings.dtype, device=settings.device), adapter)
    said = {False: list[dict[str, str]](), True: list[dict[str, str]]()}
    for message in [settings.prompt] if settings.prompt is not None else _lines():
        for is_base in [True, False] if settings.compare else [False]:
            if settings.compare:
                print("without the adapter:" if is_base else "with the adapter:", flush=True)
            said[is_base].append({"role": "user", "content": message})
            with model.disable_adapter() if is_base else nullcontext():
                text = _answer(model, tokenizer, said[is_base], settings)
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


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], settings: Namespace) -> str:
    if tokenizer.chat_template is None:  # a base model goes on with the text
        inputs = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    else:
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            name = settings.tokenizer or tokenizer.name_or_path
            raise ValueError(f"the chat template of {name} does not take these messages: {error}.") from None
    if not inputs["input_ids"].numel():
        raise ValueError("the message is empty, and there is nothing to answer.")
    check_ids(inputs["input_ids"], model.config)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    streamer = None if settings.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with long_windows_refused(model, inputs["input_ids"].shape[1] + settings.max_new_tokens):
        ids = model.generate(
            **inputs.to(model.device), max_new_tokens=settings.max_new_tokens, streamer=streamer, **sampling
        )
    n_read = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokenizer.decode(ids[0, n_read:], skip_special_tokens=True)
