"""Names of what a writer keeps beside or inside a folder while it writes."""

import hashlib
import re
import secrets
from pathlib import Path

INSIDE_LOCK = ".saving.lock"
# A file system's own folder in the root of a mounted disk.
_NOT_CONTENTS = {"lost+found", INSIDE_LOCK}
_LONGEST_NAME = 200  # bytes; file systems take 255 with what is added


def sibling_name(folder: Path, ending: str) -> str:
    """The hidden name of a companion of ``folder`` in its parent."""
    name = folder.name
    if len(name.encode()) > _LONGEST_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f".{name}.saving{ending}"


def new_staging_path(folder: Path) -> Path:
    """Where to stage what goes to ``folder``: on its file system, so inside it where it is there."""
    ending = f"-{secrets.token_hex(4)}"
    return folder / f".saving{ending}" if folder.is_dir() else folder.parent / sibling_name(folder, ending)


def staging_paths(folder: Path) -> list[Path]:
    """All that :func:`new_staging_path` has named for ``folder`` and that is still there."""
    found = []
    for parent, prefix in ((folder, ".saving"), (folder.parent, sibling_name(folder, ""))):
        pattern = re.compile(re.escape(prefix) + "-[0-9a-f]{8}")
        if parent.is_dir():
            found += [path for path in parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
    return sorted(found)


def contents(folder: Path) -> list[Path]:
    """What lies in ``folder``, without what belongs to a writer or to the file system; [] where it is not there."""
    if not folder.is_dir():
        return []
    own = {path.name for path in staging_paths(folder)}
    return sorted(path for path in folder.iterdir() if path.name not in own | _NOT_CONTENTS)
