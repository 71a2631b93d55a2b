"""Quantize a model from files to files, a part at a time: the model is never in memory as a whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm.auto import tqdm

from ..arguments import check_callable, check_device, check_flag, check_integer, check_tokenizer
from ..bit_allocation import BitPlan
from ..bit_allocation.quantizing_under_budget import given_plan, with_plan
from ..calibration import Calibration, LayerResult
from ..calibration.blocks import find_block_lists
from ..calibration.quantize_calibrated import check_can_calibrate
from ..integrations.float_checkpoint import FloatCheckpoint, local_folder, package_versions
from ..layers.selection import quantizable_modules
from ..methods import QuantConfig
from ..methods.quant_config import check_config
from ..storage import locked_folder
from ..storage.full_disk import NO_SPACE, decimal_size
from ..storage.writer_names import contents
from .assembly import RUN_FILE, Assembly
from .calibrated import describe_calibration, quantize_calibrated_parts
from .checkpoint_parts import PartsOfModel
from .processes import made_in_processes
from .walking_processes import Join, join_started, walk_first
from .work_folder import HIDDEN, WorkFolder

# Of what a part becomes. Larger parts are repeated after a kill, smaller ones make more files.
PART_BYTES = 2**25
# Room for what lies beside the weights, and for the file system.
_SPARE_BYTES = 2**24
# Makes the missing parts, some of them in other processes; gives those that it made itself.
Share = Callable[[PartsOfModel, WorkFolder, Sequence[int]], list[int]]


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: QuantConfig,
    *,
    calibration: Any = None,
    budget: BitPlan | str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    max_shard_size: int | str = "5GB",
    n_processes: int = 1,
    progress: bool = True,
    on_layer: Callable[[LayerResult], None] | None = None,
) -> Path:
    """Quantize the model in ``source`` into ``destination``, with no more of it in memory than its largest layer.

    With ``calibration`` it is one block, its activations, and what lies around the blocks (embeddings, head). The
    tensors of the quantized layers have the same bytes as with ``quantize_model`` and ``save_model``. Tokenizer, chat
    template, generation config and card are copied. The same call after an interruption of any kind, also in another
    process, goes on where it was, and ends with the same files; after the end it does nothing.

    Args:
        source: folder or hub name of a float model, in safetensors files.
        destination: the folder to write, which must not exist or be empty. It becomes a model only at the end; until
            then finished parts lie in ``.quantizing`` inside it.
        config: the method, and overrides by name.
        calibration: as in ``quantize_model``. Each block is read twice, and its inputs are kept in memory.
        budget: a plan of :func:`plan_bits`, or the file that it was saved in: which bits each layer gets. Planning
            takes gradients through the whole model, so it is done before, in memory.
        tokenizer: for texts; None for the one in ``source``.
        resume: False to remove what an interrupted call has left, and start from scratch.
        device: where to quantize, for example ``"cuda"``; None for the CPU.
        max_shard_size: of one safetensors file, as in ``save_pretrained``.
        n_processes: how many share the work, each with memory of its own; the files are the same. They also share a
            ``calibration``, each with its part of this process's threads, and with the device "cuda" each on its own
            GPU.
        progress: show a progress bar.
        on_layer: called after each layer with its errors; only with ``calibration``.

    Returns:
        ``destination``.

    Raises:
        TypeError: ``config`` is not a QuantConfig; an argument of another kind.
        ValueError: a budget that is no plan, or the plan of another model; the source is quantized already, an
            adapter, of an unknown class, or lacks tensors; nothing to quantize; a shape does not fit the config; a
            weight holds NaN or Inf (finished parts are kept, and named in a note).
        FileNotFoundError: no model in ``source``.
        FileExistsError: ``destination`` holds other files, or a run with another config, or another process writes to
            it.
        OSError: no permission; the disk is full, or a process that shares a calibration was killed (finished parts
            are kept).
    """
    return quantize_files(
        source,
        destination,
        config,
        calibration=calibration,
        budget=budget,
        tokenizer=tokenizer,
        resume=resume,
        device=device,
        max_shard_size=max_shard_size,
        n_processes=n_processes,
        progress=progress,
        on_layer=on_layer,
    )


def quantize_files(
    source: str | Path,
    destination: str | Path,
    config: QuantConfig,
    *,
    calibration: Any = None,
    budget: BitPlan | str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    max_shard_size: int | str = "5GB",
    n_processes: int = 1,
    progress: bool = True,
    on_layer: Callable[[LayerResult], None] | None = None,
    share: Share | None = None,
    join: Join | None = None,
    own_device: torch.device | str | None = None,
) -> Path:
    """As :func:`quantize_checkpoint`; ``share`` has other processes make parts, ``join`` has them calibrate.

    ``own_device``: where this process quantizes then; None for ``device``.
    """
    check_config("config", config)
    check_flag("resume", resume)
    check_device("device", device)
    check_flag("progress", progress)
    check_tokenizer(tokenizer)
    check_callable("on_layer", on_layer, "a LayerResult")
    check_integer("n_processes", n_processes, at_least=1, at_most=1024)
    if calibration is not None and n_processes > 1 and not (dist.is_available() and dist.is_gloo_available()):
        raise ValueError(
            f"n_processes={n_processes} with calibration: processes send each other their results by gloo, which this "
            "torch was built without. Leave n_processes out. Nothing was written."
        )
    given = None if calibration is None else Calibration.of(calibration, tokenizer).of_float_model()
    if given is not None and given.resume_folder is not None:
        raise ValueError(
            "quantize_checkpoint keeps finished blocks in the destination: leave resume_folder out of the "
            "Calibration. Nothing was written."
        )
    folder, target = local_folder(source), Path(os.path.realpath(destination))
    if target == Path(os.path.realpath(folder)):
        raise ValueError(f"source and destination are both {target}. Nothing was written; choose another destination.")
    if budget is not None:
        config = with_plan(config, _checked_plan(budget))
    checkpoint = FloatCheckpoint(folder)
    specs = quantizable_modules(checkpoint.model, config)
    _check_shard_size(max_shard_size)
    run: dict[str, Any] = {
        "source": str(source),
        "files": checkpoint.fingerprints(),
        "config": config.to_dict(),
        "dtype": str(checkpoint.dtype),
        "device": str(device or "cpu"),
        "max_shard_size": max_shard_size,
        "part_bytes": PART_BYTES,
        "versions": package_versions(),
    }
    blocks: list[str] | None = None
    batches: Any = []
    if given is not None:
        check_can_calibrate(specs, given)
        batches = given.batches(checkpoint.model, progress=progress)
        run["calibration"] = describe_calibration(given, batches)
        blocks = [block for found in find_block_lists(checkpoint.model, list(specs)) for block in found]
    run = json.loads(json.dumps(run))  # as it is read again
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(target):
        if _is_done(target, run):
            return Path(destination)
        work = WorkFolder(target, run, resume=resume)
        parts = PartsOfModel(
            checkpoint, config, specs=specs, device=own_device or device, blocks=blocks, part_bytes=run["part_bytes"]
        )
        assembly = Assembly(work, parts, max_shard_size=max_shard_size)
        try:
            if not assembly.is_planned:
                _check_space(target, parts, work, max_shard_size)
                if given is None:
                    _quantize_plain(parts, work, n_processes=n_processes, progress=progress, share=share)
                else:
                    if join is None and n_processes > 1:
                        join = join_started(n_processes, device)
                    options: dict[str, Any] = {"progress": progress, "on_layer": on_layer}
                    if join is None or all(work.is_finished(number) for number in range(len(parts.parts))):
                        quantize_calibrated_parts(parts, work, given, batches, **options)
                    else:
                        walk_first(parts, work, given, batches, join, **options)
            assembly.write(target, run)
        except BaseException as error:
            n_done = sum(work.is_finished(number) for number in range(len(parts.parts)))
            if not n_done and not assembly.is_planned and share is None:
                _remove_begun(target, work)
            elif isinstance(error, ValueError):
                error.add_note(
                    f"{n_done} of {len(parts.parts)} parts are finished and kept in {work.folder}. Another source or "
                    "another config starts from scratch: resume=False."
                )
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise _with_way_out(error, target, work, n_done, len(parts.parts)) from None
            raise
    return Path(destination)


def _checked_plan(budget: Any) -> BitPlan:
    """The plan that was given. Raises ValueError where there is none yet."""
    plan = given_plan(budget)
    if plan is None:
        raise ValueError(
            f"budget={budget!r}: from files to files, bits follow a plan that was made before. Make one with "
            "plan_bits where the model fits into memory, save it, and give its file: budget=Path('plan.json'). "
            "Nothing was written."
        )
    return plan


def _quantize_plain(
    parts: PartsOfModel, work: WorkFolder, *, n_processes: int, progress: bool, share: Share | None
) -> None:
    """Make all parts that ``work`` does not have."""
    numbers = range(len(parts.parts))
    own: list[int] = []
    missing = [number for number in numbers if not work.is_finished(number)]
    with tqdm(
        total=len(parts.specs) + len(parts.tables), desc="Quantizing", unit="layer", disable=not progress
    ) as bar:
        if share is not None and missing:
            own = share(parts, work, missing)
        elif n_processes > 1 and len(missing) > 1:
            for number in made_in_processes(parts, work, missing, n_processes=min(n_processes, len(missing))):
                bar.update(len(work.record(number)["layers"]))
        for number in numbers:
            if work.is_finished(number):
                if number not in own:  # of those ``parts`` has the layers
                    parts.take(work, number)
            else:
                parts.make(work, number)
            bar.update(len(parts.layers) - bar.n if bar.n < len(parts.layers) else 0)


def _is_done(target: Path, run: dict[str, Any]) -> bool:
    """Whether ``target`` holds the result of ``run``; removes what a kill at the very end has left.

    Raises:
        FileExistsError: it holds anything else.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder; nothing was written.")
    names = {path.name for path in contents(target)}
    if not (target / "config.json").exists():
        if names and HIDDEN not in names:
            raise FileExistsError(f"{target} is not empty; nothing was written. Choose another folder.")
        return False
    file = target / RUN_FILE
    if not file.exists() or json.loads(file.read_text()) != run:
        raise FileExistsError(
            f"{target} holds another model, or the same one quantized in another way; nothing was written. Choose "
            "another folder, or remove it."
        )
    shutil.rmtree(target / HIDDEN, ignore_errors=True)
    return True


def _check_shard_size(max_shard_size: Any) -> None:
    """Raise ValueError unless ``max_shard_size`` is a number of bytes, or text with a unit."""
    try:
        split_state_dict_into_shards_factory(
            {}, get_storage_size=int, filename_pattern="{suffix}", max_shard_size=max_shard_size
        )
    except ValueError:
        raise ValueError(f"max_shard_size={max_shard_size!r} is no size; write for example '5GB'.") from None


def _check_space(target: Path, parts: PartsOfModel, work: WorkFolder, max_shard_size: int | str) -> None:
    """Raise OSError unless the disk holds what is still to be written.

    That is the rest of the parts, and one file of weights: parts go as files come.
    """
    split = split_state_dict_into_shards_factory(
        parts.sizes,
        get_storage_size=int,
        filename_pattern="{suffix}",
        max_shard_size=max_shard_size,
    )
    largest_file = max(sum(parts.sizes[group] for group in groups) for groups in split.filename_to_tensors.values())
    done = sum(path.stat().st_size for path in work.folder.glob("*.safetensors"))
    needed = max(0, sum(parts.sizes.values()) - done) + largest_file + _SPARE_BYTES
    usage = shutil.disk_usage(target)
    if usage.total and usage.free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{target} needs about {decimal_size(needed)} more, and {decimal_size(usage.free)} are free there",
        )


def _remove_begun(target: Path, work: WorkFolder) -> None:
    """Remove the folder of a run that has finished nothing, and ``target`` if it is then empty."""
    shutil.rmtree(work.folder, ignore_errors=True)
    with suppress(OSError):
        target.rmdir()


def _with_way_out(error: OSError, target: Path, work: WorkFolder, n_done: int, n_parts: int) -> OSError:
    """``error``, of a full disk, with what is kept, and how to go on."""
    is_of_system = error.strerror == os.strerror(error.errno or 0)
    reason = f"the disk of {target} is full" if is_of_system else error.strerror
    if not work.folder.exists():
        return OSError(error.errno, f"{reason}; nothing was written. Free some space, or choose another folder")
    return OSError(
        error.errno,
        f"{reason}. {n_done} of {n_parts} parts are finished and kept in {work.folder}; free some "
        f"space there and call the same again to go on, or remove {target} to give up",
    )
