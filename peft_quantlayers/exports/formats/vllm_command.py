"""The command that starts vLLM, for all formats that it reads."""

from __future__ import annotations

# What ``--max-lora-rank`` may be. Source: ``vllm/config/lora.py``.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_RANK = _RANKS[-1]


def vllm_command(folder: str, *, adapter: str | None, rank: int, options: str = "") -> str:
    """Serves the model in ``folder``, and the adapter of rank ``rank`` at most in the folder ``adapter``.

    Without ``--max-lora-rank`` vLLM takes 16; a larger one than needed costs memory and time.
    """
    parts = [f"vllm serve {folder}", options]
    if adapter:
        largest = next(each for each in _RANKS if each >= rank)
        parts.append(f"--enable-lora --max-lora-rank {largest} --lora-modules tuned={adapter}")
    return " ".join(part for part in parts if part)
