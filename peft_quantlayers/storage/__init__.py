"""Files on a disk that a kill, a full disk or a second process may meet at any moment. Knows no tensors, no models."""

from .full_disk import is_full, says_full
from .lock import locked_folder
from .single_file import replace_file
from .staging import FolderContents, is_interrupted, recover_folder, staged_folder

__all__ = [
    "FolderContents",
    "is_full",
    "is_interrupted",
    "locked_folder",
    "recover_folder",
    "replace_file",
    "says_full",
    "staged_folder",
]
