"""Write one file so that its name stands for the old contents or the new ones, never for a part."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"


@contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Give a path beside ``file`` to write to; what is there at the end is synced and takes the place of ``file``.

    After an error the written part is removed and ``file`` is as it was.
    """
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PART}")
    try:
        yield part
        sync(part)
        part.replace(file)
        sync(file.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != "posix":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """:func:`sync` for all files and folders below ``folder``, and itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
