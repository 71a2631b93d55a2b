"""What a streamed quantization has finished so far, kept in a hidden folder inside the destination.

One safetensors file for each part of the model, written all at once. The files of the model are put together from
them at the end: only then are the checksums and the config known that every file carries. Any step may be killed and
called again; what is there whole is used, and what is not is made again with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..formats.checksums import checksum
from ..formats.safetensors_file import StoredTensor, write_safetensors
from ..storage import replace_file
from ..storage.single_file import PART, sync

HIDDEN = ".quantizing"
_RECORD = "record"


class WorkFolder:
    """Parts, each a few tensors and a record about them.

    Args:
        destination: the folder in which it lies.
        run: all that determines the result, as JSON; a folder of another run is refused.
        resume: whether to use what an earlier call of the same run has left; otherwise that is removed.

    Raises:
        FileExistsError: it was left by another run.
        OSError: it cannot be written.
    """

    def __init__(self, destination: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.folder, self.keeps = destination / HIDDEN, True
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.rglob(f"*{PART}"):  # of a process that was killed: no other has the lock
            part.unlink()
        file = self.folder / "run.json"
        if not file.exists():
            with replace_file(file) as part:
                part.write_text(json.dumps(run, indent=2, sort_keys=True))
            return
        before = json.loads(file.read_text())
        if before != run:
            differing = sorted(key for key in {**before, **run} if before.get(key) != run.get(key))
            raise FileExistsError(
                f"{destination} holds an unfinished run with other values of {', '.join(differing)}. Call it with "
                "those, or pass resume=False (quantize --resume false) to remove what it has done, or choose another "
                "folder."
            )

    @classmethod
    def of_another_process(cls, folder: Path, *, keeps: bool = True) -> WorkFolder:
        """The folder of a process that holds the lock, to put parts into; or with ``keeps=False`` to read only."""
        work = cls.__new__(cls)
        work.folder, work.keeps = folder, keeps
        return work

    # ---- parts

    def is_finished(self, part: int) -> bool:
        return self._file(part).exists()

    def keep(self, part: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store the tensors of a part, and a record, JSON-able; nothing where another process does."""
        if not self.keeps:
            return
        about = dict(record) | {"checksums": {name: checksum(tensor) for name, tensor in tensors.items()}}
        metadata = {_RECORD: json.dumps(about, sort_keys=True)}
        stored = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
        with replace_file(self._file(part)) as file:
            write_safetensors(file, stored, lambda name: tensors[name], metadata=metadata)

    def record(self, part: int) -> dict[str, Any]:
        """What :meth:`keep` was given, with ``checksums``. Raises ValueError for a damaged file."""
        with self._opened(part) as opened:
            return json.loads(opened.metadata()[_RECORD])

    def stored(self, part: int) -> dict[str, StoredTensor]:
        """The tensors of a part."""
        with self._opened(part) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: StoredTensor(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}

    def read(self, part: int, name: str, expected: str) -> Tensor:
        """One tensor of a part. Raises ValueError unless it has the checksum ``expected``."""
        with self._opened(part) as opened:
            tensor = opened.get_tensor(name)
        if checksum(tensor) != expected:
            raise ValueError(self._refusal(part, f"{name} is not as it was written"))
        return tensor

    def drop(self, part: int) -> None:
        """Remove the file of a part whose tensors are in their place."""
        self._file(part).unlink(missing_ok=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    def _opened(self, part: int) -> Any:
        try:
            return safe_open(self._file(part), framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ValueError(self._refusal(part, str(error))) from None

    def _refusal(self, part: int, reason: str) -> str:
        return f"{self._file(part)} is damaged ({reason}). Delete it and call again: its part is quantized again."

    # ---- JSON beside the parts

    def read_json(self, name: str) -> Any:
        """The contents of a JSON file; None if it is not there."""
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    def write_json(self, name: str, contents: Any) -> None:
        with replace_file(self.folder / name) as part:
            part.write_text(json.dumps(contents))

    # ---- the end

    @property
    def new(self) -> Path:
        """Where the files of the model are put together."""
        return self.folder / "new"

    def publish(self, destination: Path, *, last: str) -> None:
        """Move all files of :attr:`new` into ``destination``, the one that readers open first at the end."""
        ready = self.folder / "ready"
        if not ready.exists():
            self.new.rename(ready)  # from here on nothing is written any more
            sync(self.folder)
        for path in sorted(ready.iterdir(), key=lambda path: path.name == last):
            if path.name == last:
                sync(destination)
            path.rename(destination / path.name)
        sync(destination)
        shutil.rmtree(self.folder)

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`publish` has begun."""
        return (self.folder / "ready").exists()
