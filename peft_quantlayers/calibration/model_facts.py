"""What a model's config and class say about its inputs. Reads only; works for models of any origin."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Names in configs of the tokens that stand for what is no text.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
                "audio_token_index")  # fmt: skip


def text_config(model: Any) -> Any:
    """The config of the part that reads or writes text; None where the model has no config.

    A composite model (vision and text, speech and text) keeps vocabulary and positions in a config of that part.
    """
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    if get is None:
        return getattr(config, "text_config", config)
    try:
        return get()
    except ValueError:  # a text encoder and a text decoder
        return get(decoder=True)


def vocabulary_size(model: Any) -> int | None:
    """Number of token ids; None where the config names none."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def max_length(model: Any) -> int:
    """The most tokens that ``model`` has positions for, so far as its config says."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else sys.maxsize


def placeholder_ids(model: Any) -> list[int]:
    """Ids of the tokens that stand for what is no text."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return list({each for each in found if isinstance(each, int)})


def main_input(model: Any) -> str | None:
    """The forward keyword of what a transformers model reads first; None for models of other origin."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) else None


def takes_token_ids(model: Any) -> bool | None:
    """Whether the main input is token ids; None where nothing says so."""
    name = main_input(model)
    if name is not None:
        return name == "input_ids"
    return True if vocabulary_size(model) is not None else None


def is_encoder_decoder(model: Any) -> bool:
    """Whether the decoder reads inputs of its own, besides what the encoder makes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at each token are those of the next one, as far as the class says."""
    can_generate = getattr(model, "can_generate", None)
    return not is_encoder_decoder(model) and (can_generate is None or bool(can_generate()))
