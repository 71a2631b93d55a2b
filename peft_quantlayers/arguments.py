"""Checks of what users pass, shared by all public functions. Each raises a sentence that names the way out.

Lies below all packages: imports torch and a function of text, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlayers_cli.spelling import nearest


def check_integer(name: str, value: Any, *, at_least: int, at_most: int) -> None:
    """Raise unless ``value`` is an integer (no bool) between the bounds, both included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if not at_least <= value <= at_most:
        raise ValueError(f"{name}={value} must lie between {at_least} and {at_most}.")


def check_number(name: str, value: Any, *, above: float, at_most: float) -> None:
    """Raise unless ``value`` is a real number in (above, at_most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not above < value <= at_most:
        raise ValueError(f"{name}={value} must lie above {above} and not above {at_most}.")


def check_choice(name: str, value: Any, choices: tuple, *, remedy: str = "") -> None:
    """Raise unless ``value`` is one of ``choices``, of the very type that the choice has."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return
    raise ValueError(
        f"{name}={value!r} is not supported{nearest(value, choices)}; choose one of {choices}."
        + (f" {remedy}" if remedy else "")
    )


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")


def check_callable(name: str, value: Any, takes: str) -> None:
    """Raise unless ``value`` is None or can be called; ``takes`` names its argument."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function of {takes}, got {type(value).__name__} {value!r}.")


def check_fields(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError for the fields of ``name`` that are not ``known``, with the nearest known ones."""
    unknown = [field for field in given if field not in known]
    if unknown:
        raise TypeError(f"{name} has no field {sorted(unknown)}{nearest(unknown[0], known)}; it has {sorted(known)}.")


def check_keywords_only(name: str, positional: Sequence[Any], example: str) -> None:
    """Raise TypeError where ``name`` was given anything without a keyword."""
    if positional:
        kind = type(positional[0]).__name__
        raise TypeError(f"{name} takes its fields by keyword, got a {kind} without one; write {example}.")


def check_names(name: str, value: Any, example: str) -> None:
    """Raise TypeError unless ``value`` is None, or a list or tuple of strings."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a list of names, got {value!r}; write [{value!r}].")
    is_list = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if value is not None and not is_list:
        raise TypeError(f"{name} must be a list of names, got {type(value).__name__} {value!r}; write [{example!r}].")


def check_model(function: str, model: Any) -> None:
    """Raise TypeError unless ``model`` is a module; says how to get one from what was given instead."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, (str, Path)):
        name = repr(str(model))
        what = f"got the name or folder {name}. Load it first: AutoModelForCausalLM.from_pretrained({name})"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        what = f"got the class {model.__name__}. Load one first: {model.__name__}.from_pretrained(name)"
    elif isinstance(model, tuple) and model and isinstance(model[0], nn.Module):
        what = "got a tuple that begins with one. merge_back returns (model, report): pass the model, result.model"
    elif hasattr(model, "apply_chat_template") or hasattr(model, "decode"):
        what = f"got a {type(model).__name__}. Pass the model first, and the tokenizer as tokenizer="
    elif model is None:
        what = "got None. Load one first: AutoModelForCausalLM.from_pretrained(name)"
    else:
        what = f"got a {type(model).__name__}. The model is the first argument"
    raise TypeError(f"{function} takes a model, a torch.nn.Module, and {what}. Nothing was changed.")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError unless ``tokenizer`` is None or can be called with a text."""
    if tokenizer is None or (callable(tokenizer) and not isinstance(tokenizer, (type, nn.Module))):
        return
    load = f"AutoTokenizer.from_pretrained({str(tokenizer)!r})" if isinstance(tokenizer, (str, Path)) else (
        "AutoTokenizer.from_pretrained(name)"
    )  # fmt: skip
    shown = repr(tokenizer) if isinstance(tokenizer, str) else f"a {type(tokenizer).__name__}"
    raise TypeError(f"tokenizer must be a tokenizer, or a function of a text, got {shown}. Write tokenizer={load}.")


def check_device(name: str, device: Any) -> None:
    """Raise unless ``device`` is None, or a device on which this machine can make a tensor."""
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"{name} must be a device such as 'cuda' or torch.device('cpu'), got {device!r}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}={device!r} cannot be used here: {reason}. Nothing was changed.") from None


def check_dtype(name: str, dtype: Any) -> None:
    """Raise TypeError unless ``dtype`` is None or a floating ``torch.dtype``."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
    example = f"torch.{str(dtype).removeprefix('torch.')}" if known else "torch.bfloat16"
    raise TypeError(f"{name} must be a floating torch.dtype, got {dtype!r}; write {name}={example}.")
