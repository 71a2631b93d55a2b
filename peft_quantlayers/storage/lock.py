"""One writer at a time for a folder, also for one that is not there yet."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .writer_names import INSIDE_LOCK, sibling_name


@contextmanager
def locked_folder(folder: Path, *, inside: bool = False, wait_seconds: float = 0) -> Iterator[None]:
    """Hold the lock of ``folder``, a resolved path, or refuse. The system releases it if the process dies.

    Args:
        folder: may be absent; its parent is there.
        inside: keep the lock file in ``folder``; also done where the parent cannot be written. Otherwise beside it.
        wait_seconds: how long to wait for another one that holds it.

    Raises:
        FileExistsError: another process or thread holds the lock.
        OSError: the lock file cannot be made: read-only, no permission.
    """
    is_inside = inside or (folder.is_dir() and not os.access(folder.parent, os.W_OK))
    file = folder / INSIDE_LOCK if is_inside else folder.parent / sibling_name(folder, ".lock")
    lock = FileLock(file, timeout=wait_seconds)
    try:
        lock.acquire()
    except Timeout:
        _check_writable(folder, file.parent)  # where the system refuses files, the lock takes it for a holder
        raise FileExistsError(
            f"another process is writing to {folder}; nothing was written. Wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise _refusal(folder, error) from None
    try:
        yield
    finally:
        try:
            with suppress(OSError):  # before the release: whoever opened it meanwhile sees that it is gone
                file.unlink()
        finally:
            lock.release()


def _check_writable(folder: Path, place: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _refusal(folder, error) from None


def _refusal(folder: Path, error: OSError) -> OSError:
    reason = f"{folder} cannot be written ({error.strerror}); nothing was written. Choose another folder."
    return OSError(error.errno, reason)
