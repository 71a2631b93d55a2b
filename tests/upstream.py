"""Released sources of other projects, fetched with pip: for running their tests on our layers, and for `patches/`.

Imports nothing of ours, so that scripts without torch can use it.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class FetchError(RuntimeError):
    """A source distribution is neither in the cache nor to be had from pip; says what pip said."""


def cache_folder() -> Path:
    """``$PEFT_QUANTLAYERS_CACHE`` or ``~/.cache/peft_quantlayers``."""
    return Path(os.environ.get("PEFT_QUANTLAYERS_CACHE", Path.home() / ".cache" / "peft_quantlayers"))


def source_folder(project: str, version: str) -> Path:
    """The unpacked source distribution of ``project`` at ``version``; fetched on the first call, then cached.

    Raises:
        FetchError: pip could not fetch it.
    """
    folder = cache_folder() / "sources" / f"{project}-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _fetch(project, version, Path(scratch))
        with tarfile.open(archive) as tar:
            # Python 3.11.3 and older know no filter, and extract an archive of the package index as it is.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(scratch)
        try:
            (Path(scratch) / folder.name).rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _fetch(project: str, version: str, scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest",
        str(scratch), f"{project}=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"pip could not fetch the source of {project} {version}: {done.stderr.strip()}")
    (archive,) = scratch.glob("*.tar.gz")
    return archive
