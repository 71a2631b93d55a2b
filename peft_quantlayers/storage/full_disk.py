"""Full disks and used-up quotas: which errors speak of them, whoever wrote the words, and whether there is one."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As packages that write in Rust say it, whose errors have no number.
_WORDS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_TRIED_BYTES = 2**16


def says_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it came from, says that a disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(words in str(error) for words in _WORDS):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def is_full(path: Path) -> bool:
    """Whether a small file cannot be written where ``path`` is or would be.

    It is tried: what a file system says of its free space knows no quotas.
    """
    folder = next((place for place in (path, *path.parents) if place.is_dir()), None)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
    except OSError as error:
        return error.errno in NO_SPACE
    return False


def decimal_size(n_bytes: int) -> str:
    """Bytes in the decimal unit that suits them."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
