"""Finished blocks of a calibrated quantization, on disk: written all at once, checked before the model is touched."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..formats import QuantizedWeight, QuantSpec
from ..formats.checksums import are_checksums_used, checksums, find_damage, to_metadata
from ..layers.dense_types import dense_key, dense_shape, dense_weight
from ..layers.quantized_layers import quantized_layers
from ..layers.replace import place_empty_layer
from ..methods import QuantConfig, spec_from_dict
from ..storage import locked_folder, replace_file, says_full


class ResumeFolder:
    """A safetensors file for each finished block, with the fingerprint of the run that it belongs to.

    Opening it takes its lock and checks every file to the last value; :meth:`close` releases the lock.

    Raises:
        FileExistsError: another process uses it, or it is a file.
        OSError: it cannot be written.
        ValueError: a file belongs to another run, or is damaged; says which. In each case the model is as it was.
    """

    def __init__(self, folder: Path, fingerprint: str, model: nn.Module, specs: Mapping[str, QuantSpec]) -> None:
        self.folder, self.fingerprint, self.specs = folder, fingerprint, specs
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"resume_folder={folder} is a file, not a folder. Nothing was quantized.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"resume_folder={folder} cannot be made ({error.strerror}). Nothing was quantized."
            raise OSError(error.errno, reason) from None
        with ExitStack() as stack:
            stack.enter_context(locked_folder(folder, inside=True))
            for part in folder.glob("*.part"):  # of a writer that was killed: no other process has the lock
                part.unlink()
            for file in sorted(folder.glob("*.safetensors")):
                self._read(file, model)
            self._lock = stack.pop_all()

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    def keep(self, model: nn.Module, block: str, names: Sequence[str]) -> None:
        """Store the block as it is now, with ``names``, its quantized layers.

        Raises:
            OSError: the disk is full; blocks that were stored before are kept.
        """
        layers = quantized_layers(model)
        specs = {name: layers[name].spec.to_dict() for name in names}
        tensors = {key: value.contiguous() for key, value in model.get_submodule(block).state_dict().items()}
        for name in names:  # codes as files have them, whatever the layer registers
            codes_name = layers[name].spec.codes_name
            key = f"{name.removeprefix(f'{block}.')}.{codes_name}"
            tensors[key] = layers[name].quantized_weight.tensors[codes_name].contiguous()
        metadata = {"fingerprint": self.fingerprint, "specs": json.dumps(specs)}
        if are_checksums_used():
            metadata |= to_metadata(checksums(tensors))
        try:
            with replace_file(self._file(block)) as part:
                save_file(tensors, part, metadata=metadata)
        except (OSError, SafetensorError) as error:
            if not says_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk of resume_folder={self.folder} is full. Finished blocks are kept in it; free some "
                "space, and call the same again to go on",
            ) from error

    def restore(self, model: nn.Module, block: str, config: QuantConfig) -> bool:
        """Put the stored block in the place of the one in ``model``. False if it is not stored."""
        file = self._file(block)
        if not file.exists():
            return False
        specs, tensors = self._read(file, model)
        for name, spec in specs.items():
            device = dense_weight(model, name).device
            place_empty_layer(model, name, spec, compute_dtype=config.compute_dtype, device=device)
        model.get_submodule(block).load_state_dict(tensors)
        return True

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def _read(self, file: Path, model: nn.Module) -> tuple[dict[str, QuantSpec], dict[str, Tensor]]:
        """Specs and tensors of a block that is still dense in ``model``, all checked."""
        if not file.is_file():
            raise ValueError(self._refusal(file, "is not a regular file"))
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    raise _OtherRunError(
                        f"{file} belongs to another run: another model, config or calibration. Choose another "
                        "resume_folder, or delete this one. Nothing was quantized."
                    )
                damage = find_damage({str(file): opened}) if are_checksums_used() else []
                if damage:
                    raise ValueError(f"{damage[0].name or 'it'} {damage[0].reason}")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            specs = self._read_specs(metadata, file.name.removesuffix(".safetensors"))
            _check_tensors(tensors, specs, model, file.name.removesuffix(".safetensors"))
        except _OtherRunError:
            raise
        except SafetensorError as error:
            raise ValueError(self._refusal(file, f"is damaged or incomplete ({error})")) from None
        except (ValueError, TypeError, OSError, AttributeError, RecursionError) as error:
            raise ValueError(self._refusal(file, f"is damaged ({str(error).rstrip('.')})")) from None
        return specs, tensors

    def _read_specs(self, metadata: Mapping[str, str], block: str) -> dict[str, QuantSpec]:
        planned = {name: spec for name, spec in self.specs.items() if name.startswith(f"{block}.")}
        stored: Any = json.loads(metadata.get("specs", "null"))
        if not isinstance(stored, Mapping) or set(stored) != set(planned):
            raise ValueError(f"its specs do not name the layers of the block {block!r}")
        specs = {name: spec_from_dict(fields) for name, fields in stored.items()}
        for name, spec in specs.items():
            if spec not in planned[name].stored_forms():
                raise ValueError(f"{name} is stored as {spec}, and this run quantizes it to {planned[name]}")
        return specs

    @staticmethod
    def _refusal(file: Path, reason: str) -> str:
        return (
            f"{file} {reason}. Delete this file and call again: its block is quantized from scratch. Nothing "
            "was quantized."
        )


class _OtherRunError(ValueError):
    """A file of another run, which is no damage."""


def _check_tensors(
    tensors: Mapping[str, Tensor], specs: Mapping[str, QuantSpec], model: nn.Module, block: str
) -> None:
    """Raise ValueError unless ``tensors`` are those of the block once its layers ``specs`` are quantized."""
    expected = {
        key: (tuple(value.shape), value.dtype) for key, value in model.get_submodule(block).state_dict().items()
    }
    for name, spec in specs.items():
        inside = name.removeprefix(f"{block}.")
        del expected[dense_key(model, name).removeprefix(f"{block}.")]
        layout = spec.layout_of(dense_shape(model, name))
        expected |= {f"{inside}.{key}": (tuple(entry.shape), entry.dtype) for key, entry in layout.items()}
    found = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise ValueError(f"{key}: found {found.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}")
        if tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key} holds NaN or Inf")
    for name, spec in specs.items():
        inside = name.removeprefix(f"{block}.")
        empty = QuantizedWeight.empty(spec, dense_shape(model, name), "meta")
        own = {key: tensors[f"{inside}.{key}"] for key in empty.tensors}
        dataclasses.replace(empty, tensors=own).check(name)
