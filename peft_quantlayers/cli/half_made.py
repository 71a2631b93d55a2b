"""What a training that fails has made: removed, unless the next call can resume from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..report.training_parts import checkpoints

RESUME = "--training.resume_from_checkpoint true"


@contextmanager
def half_made_removed(folder: Path, *, base: Path | None, is_active: bool) -> Iterator[None]:
    """After an error remove what was written into ``folder`` meanwhile, and add to the error what is kept.

    All is kept where a checkpoint was completed, and always what was there before.

    Args:
        folder: of the adapter; it may be absent, and then goes with the folders above it that were made for it.
        base: folder of the quantized model that is made on the way, kept complete or not, since the next call goes on
            with it; None where none is made.
        is_active: whether anything is removed; of several processes in one.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    before, had_checkpoints = _names(folder), set(checkpoints(folder))
    base_before = base is not None and bool(_names(base))
    try:
        yield
    except BaseException as error:
        if is_active:
            if set(checkpoints(folder)) - had_checkpoints:
                error.add_note(f"Checkpoints that are complete are kept: go on with {RESUME}.")
                raise
            for path in [folder / name for name in _names(folder) - before]:
                if base is None or path.resolve() != base.resolve() or not _names(path):
                    _remove(path)
            for path in missing:
                with suppress(OSError):
                    path.rmdir()
            if base is not None and not base_before and _names(base):
                error.add_note(f"The quantized model in {base} is kept: go on with {RESUME}.")
            elif not had_checkpoints:
                error.add_note("Nothing was written.")
        raise


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
