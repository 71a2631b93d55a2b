"""Write the files of a folder all at once, or not at all.

Files are staged on the file system of the target and synced. Where the target is not there, the staged folder is
renamed. Otherwise (other files may be in it, and it may be a mount point, which cannot be renamed) the files are moved
one by one. While that lasts, the file that readers open first is a placeholder that readers refuse; the old files are
kept, and the placeholder says what was to be moved. So a kill leaves the old files, the new ones, or a folder that
refuses to be read until :func:`recover_folder` takes it back to the old files, as the next writer does too.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .full_disk import decimal_size, says_full
from .lock import locked_folder
from .single_file import replace_file, sync, sync_tree
from .writer_names import contents, new_staging_path, staging_paths

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted_save"
"""The field of a placeholder that says what is being moved."""
# Space that a file system takes beyond the bytes of the files.
_SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    """What kind of files a folder holds.

    Fields:
        first_read: name of the JSON file that readers open first; it is moved last.
        placeholder: what stands in its place meanwhile, a JSON object that readers refuse, for the target folder.
        is_replaced: whether an old file of this name goes when new files come, apart from those of the same name.
    """

    first_read: str
    placeholder: Callable[[Path], Mapping[str, Any]]
    is_replaced: Callable[[str], bool]


@contextmanager
def staged_folder(
    folder: str | Path, kind: FolderContents, *, overwrite: bool = False, n_bytes: int = 0
) -> Iterator[Path]:
    """Give an empty folder to write to; what is in it at the end is moved to ``folder``.

    What earlier, interrupted writers left is removed first, or taken back to the files that they were to replace.

    Args:
        folder: the target; symbolic links and ``..`` are resolved, parents are made.
        kind: of the files.
        overwrite: whether ``folder`` may hold files. Those of the same names and those that ``kind`` names are
            replaced; others stay.
        n_bytes: about how much will be written.

    Raises:
        FileExistsError: the target is a file; it holds files, now or at the end, and ``overwrite`` is False; another
            process writes to it. Its files are as they were.
        OSError: no permission, read-only, less than ``n_bytes`` free, or a disk that filled up meanwhile; nothing was
            written.
    """
    target = Path(os.path.realpath(folder))
    _check_target(target, overwrite=overwrite)
    with _parents_of(target), locked_folder(target):
        recover(target, kind)
        _check_target(target, overwrite=overwrite)
        _check_space(target, n_bytes)
        staging = new_staging_path(target)
        new = staging / "new"
        try:
            _make_staging(target, new)
            yield new
            _give_usual_modes(new)
            sync_tree(new)
            _check_target(target, overwrite=overwrite)
            if staging.parent == target:
                _move_into(target, staging, kind)
            else:
                _rename(new, target)
        except BaseException as error:
            # Also where the placeholder stands: the old files come back.
            recover(target, kind)
            if says_full(error):
                raise OSError(errno.ENOSPC, _full(target)) from error
            raise
        _remove(staging)


def is_interrupted(folder: str | Path, kind: FolderContents) -> bool:
    """Whether a placeholder stands in ``folder``, with what it takes to get the old files back."""
    return _journal(Path(os.path.realpath(folder)), kind) is not None


def recover_folder(folder: str | Path, kind: FolderContents, *, wait_seconds: float = 0) -> bool:
    """Take ``folder`` back to the files that it held before a writer was interrupted, and remove what that left.

    ``wait_seconds``: for another process that is writing to it.

    Returns:
        Whether there was anything to do.

    Raises:
        FileExistsError: another process is writing to it.
    """
    target = Path(os.path.realpath(folder))
    if not staging_paths(target) and _journal(target, kind) is None:
        return False
    with locked_folder(target, wait_seconds=wait_seconds):
        recover(target, kind)
    return True


def recover(target: Path, kind: FolderContents) -> None:
    """:func:`recover_folder` under the lock."""
    journal = _journal(target, kind)
    if journal is not None:
        _move_back(target, target / journal["staging"], journal["files"], kind)
    for staging in staging_paths(target):
        _remove(staging)


def _move_into(target: Path, staging: Path, kind: FolderContents) -> None:
    """Move the files of ``staging / "new"`` into ``target``, and those that they replace to ``staging / "old"``."""
    new, old = staging / "new", staging / "old"
    names = sorted(path.name for path in new.iterdir())
    old.mkdir()
    first = target / kind.first_read
    if first.exists():
        shutil.copy2(first, old / first.name)
        sync_tree(old)
    journal = {"staging": staging.name, "files": names}
    with replace_file(first) as part:
        part.write_text(json.dumps(dict(kind.placeholder(target)) | {INTERRUPTED: journal}, indent=2))
    for path in contents(target):
        if path != first and (path.name in names or kind.is_replaced(path.name)):
            path.rename(old / path.name)
    for name in names:
        if name != kind.first_read:
            (new / name).rename(target / name)
    sync(target)
    if kind.first_read in names:
        (new / kind.first_read).replace(first)
    else:
        first.unlink()
    sync(target)


def _move_back(target: Path, staging: Path, names: list[str], kind: FolderContents) -> None:
    """Undo :func:`_move_into`, which may have got to any point; may itself be interrupted and called again."""
    new, old, first = staging / "new", staging / "old", target / kind.first_read
    for name in names:
        path = target / name
        if path != first and os.path.lexists(path) and new.is_dir() and not os.path.lexists(new / name):
            path.rename(new / name)
    for path in sorted(old.iterdir()) if old.is_dir() else ():
        if path.name != kind.first_read:
            path.rename(target / path.name)
    sync(target)
    if (old / kind.first_read).exists():
        (old / kind.first_read).replace(first)
    else:
        first.unlink()
    sync(target)
    logger.warning("%s: an interrupted save was undone; the folder is as it was before it.", target)


def _journal(target: Path, kind: FolderContents) -> dict[str, Any] | None:
    """What the placeholder in ``target`` says; None if none is there, or the files that it speaks of are not."""
    file = target / kind.first_read
    try:
        journal = json.loads(file.read_text())[INTERRUPTED] if file.is_file() else {}
        names = [journal["staging"], *journal["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Names only, no paths and no links out of the folder: the file may come from anywhere.
    are_names = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not are_names or target / journal["staging"] not in staging_paths(target):
        return None
    staging = target / journal["staging"]
    return None if any(path.is_symlink() for path in (staging, staging / "new", staging / "old")) else journal


def _rename(new: Path, target: Path) -> None:
    try:
        new.rename(target)  # over an empty folder too, which another program may have made meanwhile
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"{target} was made by another process meanwhile; it is as that left it, and nothing was saved."
        ) from None
    sync(target.parent)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target) and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder; nothing was written.")
    if not overwrite and contents(target):
        raise FileExistsError(
            f"{target} exists and is not empty; nothing was written. Choose another folder, or pass overwrite=True to "
            "replace the model in it (other files stay)."
        )


def _check_space(target: Path, n_bytes: int) -> None:
    """Raise OSError if the file system has no space for the new files beside the old ones."""
    usage = shutil.disk_usage(target if target.is_dir() else target.parent)
    needed = n_bytes + _SPARE_BYTES
    if usage.total and usage.free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{target} needs about {decimal_size(needed)}, and {decimal_size(usage.free)} are free there; nothing was "
            "written. Old files are kept until the new ones are complete. Free some space or choose another folder.",
        )


def _full(target: Path) -> str:
    old = " The old files are kept." if contents(target) else ""
    return f"the disk of {target} is full; nothing was written.{old} Free some space or choose another folder."


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above ``target``; after an error those that were made are removed."""
    missing = []
    for parent in target.parents:
        if parent.exists():
            break
        missing.append(parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.filename is not None and not target.parent.is_dir():
            reason = f"{target} cannot be made ({error.strerror}: {error.filename}); nothing was written."
            raise OSError(error.errno, reason) from None
        raise


def _make_staging(target: Path, new: Path) -> None:
    try:
        new.mkdir(parents=True)
    except OSError as error:
        reason = f"{target} cannot be written ({error.strerror}); nothing was written. Choose another folder."
        raise OSError(error.errno, reason) from None


def _give_usual_modes(folder: Path) -> None:
    """Let all read the files in ``folder`` who may read what this process writes: safetensors lets the owner only."""
    if os.name != "posix":
        return
    sample = folder / ".mode"
    sample.touch()
    usual = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() and not path.is_symlink() else usual
        if mode & ~stat.S_IXUSR == stat.S_IRUSR | stat.S_IWUSR and mode != usual:
            path.chmod(mode | usual)


def _remove(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    if staging.exists():
        logger.warning("%s, left by a save, could not be removed. Remove it yourself.", staging)
