"""The answer of an estimate, as a value with a short text."""

from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one step of the work takes.

    Fields:
        step: what was estimated, in a word.
        memory: bytes by what they are for; together the peak of the process, mapped weights included.
        disk: bytes that are written.
        seconds: on this machine if it does nothing else, with as many threads as torch has now; None where it was
            not measured.
        per_step: whether ``seconds`` is for one step of the optimizer.
        notes: what was left out or assumed.
    """

    step: str
    memory: dict[str, int]
    disk: int
    seconds: float | None = None
    per_step: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> int:
        """Bytes of memory at the worst moment."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "step": self.step,
            "peak_bytes": self.peak,
            "memory": self.memory,
            "disk_bytes": self.disk,
            "seconds": self.seconds,
            "per_step": self.per_step,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in self.memory.items() if size >= MIB)
        took = "" if self.seconds is None else f", {time_text(self.seconds)}{' a step' if self.per_step else ''}"
        lines = [f"{self.step}: {size_text(self.peak)} of memory ({parts}), {size_text(self.disk)} on disk{took}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def size_text(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def time_text(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
