"""Save a whole model: all of it or nothing, and only if it can be read again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .integrations.interrupted_save import MODEL_FILES
from .integrations.saved_folder import check_readable
from .layers.codes_parameter import is_sharded
from .layers.quantized_layers import layers_without_copies, quantized_embeddings, quantized_layers, quantized_stacks
from .lora import has_adapters
from .storage import staged_folder

# Beside the weights: config, tokenizer and card.
_OTHER_BYTES = 2**20


def save_model(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False, **kwargs: Any
) -> None:
    """Save a quantized model, all of it or nothing, with a model card that says how to load it.

    Everything is written to a hidden folder first (beside ``folder``, or inside it if it is there), read back as far
    as its headers, and then moved. Whatever interrupts this leaves the old model or the new one: if the process is
    killed within the few milliseconds in which files are moved, the next load or save finishes by bringing back the
    old one. (Until then a program that does not import this package refuses the folder.)

    Args:
        model: a transformers model; a dense one (``merge_back(strategy="dense")``) is saved without a card.
        folder: must not exist, or be empty, unless ``overwrite``. Links and ``..`` are resolved, parents are made. It
            may be a mount point.
        tokenizer: saved with the model, if given.
        overwrite: replace the model in ``folder``: files of the same names, and its ``model*.safetensors``. Others
            stay. The old files are kept until the new ones are complete, so the disk must hold both.
        kwargs: for transformers' ``save_pretrained``, for example ``max_shard_size="2GB"``.

    Raises:
        FileExistsError: ``folder`` holds files, an adapter, or is being written by another process.
        OSError: no permission, a read-only or full disk.
        TypeError: ``model`` is not a transformers model.
        ValueError: the model carries adapters, or is sharded; or what was written could not be read again.
    """
    with saved_model(model, folder, tokenizer=tokenizer, overwrite=overwrite, **kwargs):
        pass


@contextmanager
def saved_model(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False, **kwargs: Any
) -> Iterator[Path]:
    """As :func:`save_model`; gives the hidden folder, whose files move at the end, to write more files to."""
    _check_arguments(model, folder, tokenizer)
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise FileExistsError(
            f"{folder} holds an adapter (adapter_config.json), which would be loaded onto the model in the same "
            "folder; nothing was written. Choose another folder."
        )
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", folder.resolve().name)
    with staged_folder(folder, MODEL_FILES, overwrite=overwrite, n_bytes=_stored_bytes(model)) as written:
        model.save_pretrained(written, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        if quantized_layers(model):
            (written / "README.md").write_text(model_card(model))
        try:
            check_readable(written, model)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"the model would not load again, so it was not saved: {error}") from error
        yield written


def _check_arguments(model: Any, folder: Any, tokenizer: Any) -> None:
    if isinstance(model, str | Path) and isinstance(folder, nn.Module):
        raise TypeError("the arguments are swapped: save_model(model, folder). Nothing was written.")
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}. Nothing was written.")
    if isinstance(model, nn.Module) and has_adapters(model):
        raise ValueError(
            "the model carries PEFT adapters, which would not be saved; nothing was written. Merge them "
            "first (peft_quantlayers.merge_back), or save the adapter with its own save_pretrained."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_model saves transformers models, which from_pretrained loads; got {type(model).__name__}. "
            "Nothing was written. If there is one inside, pass that; for any other module use "
            "torch.save(model.state_dict(), file), and load_state_dict on a model that was quantized the same way."
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded over processes, of which one writes; nothing was written. Call "
            "model.save_pretrained(folder, is_main_process=rank == 0) in each of them, or save_model on the model "
            "loaded in one process."
        )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"tokenizer must be a tokenizer, got {type(tokenizer).__name__}. Nothing was written. From a name or "
            "folder: AutoTokenizer.from_pretrained(...)."
        )


def _stored_bytes(model: nn.Module) -> int:
    """About what the files of ``model`` take; tied weights count once."""
    sizes = {(tensor.data_ptr() or id(tensor)): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(sizes.values()) + _OTHER_BYTES


def model_card(model: PreTrainedModel) -> str:
    """The README.md of a quantized model: how to load it, and what it is quantized to."""
    layers, stacks, tables = layers_without_copies(model), quantized_stacks(model), quantized_embeddings(model)
    sizes = {
        name: math.prod((*layer.leading, layer.out_features, layer.in_features)) for name, layer in layers.items()
    }
    weights = sum(sizes.values())
    bits = sum(layer.bits_per_weight * sizes[name] for name, layer in layers.items()) / max(1, weights)
    n_tables = sum(name in tables for name in layers)
    n_linear = len(layers) - len(stacks) - n_tables
    kinds = [f"{n_linear} linear layers"] if n_linear else []
    if n_tables:
        kinds.append("the embeddings" if n_tables == 1 else f"{n_tables} embedding tables")
    if stacks:
        n_experts = sum(stack.n_experts for stack in stacks.values())
        kinds.append(f"{len(stacks)} stacks of experts with {n_experts} matrices")
    specs = sorted({str(layer.spec) for layer in layers.values()})
    return "\n".join(
        [
            "---",
            "library_name: peft_quantlayers",
            "tags: [quantized, quantlayers]",
            "---",
            "",
            "**Load this model with `peft_quantlayers`: without that import, transformers stops with a size mismatch.",
            "Other programs: `peft-quantlayers run PROGRAM ...` imports it for them.**",
            "",
            "```python",
            "import peft_quantlayers",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/or/name")',
            "```",
            "",
            f"{', '.join(kinds)}, {weights:,} weights at {bits:.2f} bits each, metadata included:",
            "",
            *[f"- `{spec}`" for spec in specs],
            "",
        ]
    )
