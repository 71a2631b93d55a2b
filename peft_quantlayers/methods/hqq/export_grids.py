"""Which HQQ grids the file formats of other engines hold exactly: facts as data, and questions about them.

``(code - zero) * scale`` is what many formats compute, each with its own widths, groups and zero points. A *target* is
a format ("gguf") or an engine ("vllm", which reads several formats). Here are no tensors, no packing, and no
checkpoint: :func:`why_not` says what of a spec a target cannot hold, :func:`grid_for` which of its grids holds it.
Imports the checks of arguments only.

"Exactly" is up to what the format itself rounds: GGUF stores ``-scale * zero`` as float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...arguments import nearest

Zeros = Literal["symmetric", "integer", "float"]
# Each kind holds those before it.
ZEROS: tuple[Zeros, ...] = ("symmetric", "integer", "float")
_FIELDS: dict[Zeros, str] = {
    "symmetric": "symmetric=True",
    "integer": "integer_zero=True",
    "float": "integer_zero=False",
}


class HQQGrid(Protocol):
    """What of an HQQ weight decides whether a format holds it; the fields of ``HQQSpec``."""

    @property
    def nbits(self) -> int: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def axis(self) -> int: ...

    @property
    def scale_dtype(self) -> str: ...

    @property
    def zeros(self) -> Zeros: ...


@dataclass(frozen=True, kw_only=True)
class ExportGrid:
    """One layout of a format, and the grids that it holds exactly.

    Fields:
        format: the format that it belongs to.
        stored_as: the format's own name of the layout.
        nbits: widths of our codes; narrower codes lie in a wider container.
        stored_nbits: bits per code in the file.
        zeros: the most general kind of zero points.
        group_sizes: weights that share a scale in the file. Larger groups are exact by repeating their scale, so that
            every multiple of one of these is held.
        whole_rows: whether one group a row (``group_size=None``) is a layout of its own; otherwise it is held as a
            large group is.
        scale_dtypes: dtypes of our scales that the file holds unrounded.
        axes: along which side groups may run.
    """

    format: str
    stored_as: str
    nbits: tuple[int, ...]
    stored_nbits: int
    zeros: Zeros
    group_sizes: tuple[int, ...] = (1,)
    whole_rows: bool = False
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    axes: tuple[int, ...] = (1,)

    def holds_zeros(self, zeros: Zeros) -> bool:
        return ZEROS.index(zeros) <= ZEROS.index(self.zeros)

    def holds_groups(self, group_size: int | None, in_features: int | None = None) -> bool:
        """Whether groups of this size are held; None for whole rows, of ``in_features`` if that is known."""
        size = group_size or (None if self.whole_rows else in_features)
        return size is None or any(size % stored == 0 for stored in self.group_sizes)

    def stored_group_size(self, group_size: int) -> int:
        """The largest group of the file that a group of ``group_size`` weights is a multiple of."""
        return max(stored for stored in self.group_sizes if group_size % stored == 0)

    def holds(self, spec: HQQGrid, in_features: int | None = None) -> bool:
        return (
            spec.nbits in self.nbits
            and self.holds_zeros(spec.zeros)
            and self.holds_groups(spec.group_size, in_features)
            and spec.scale_dtype in self.scale_dtypes
            and spec.axis in self.axes
        )


def _gguf(stored_as: str, nbits: tuple[int, ...], stored_nbits: int, zeros: Zeros) -> ExportGrid:
    return ExportGrid(
        format="gguf",
        stored_as=stored_as,
        nbits=nbits,
        stored_nbits=stored_nbits,
        zeros=zeros,
        group_sizes=(32,),
        scale_dtypes=("float16",),
    )


_GGUF = (  # in the order of their size
    _gguf("Q4_0", (1, 2, 3, 4), 4, "symmetric"),
    _gguf("Q4_1", (1, 2, 3, 4), 4, "float"),
    _gguf("Q5_0", (5,), 5, "symmetric"),
    _gguf("Q5_1", (5,), 5, "float"),
    # Signed bytes: code - zero must lie between -127 and 127, or at -128.
    _gguf("Q8_0", (6,), 8, "integer"),
    _gguf("Q8_0", (8,), 8, "symmetric"),
)
_MLX = tuple(
    ExportGrid(
        format="mlx",
        stored_as=f"affine, {nbits} bits",
        nbits=(nbits,),
        stored_nbits=nbits,
        zeros="float",
        group_sizes=(32, 64, 128),
    )
    for nbits in (1, 2, 3, 4, 5, 6, 8)
)
# Scales and zero points have the model's dtype, which must be float16: bfloat16 rounds the zero points.
_HUMMING = tuple(
    ExportGrid(
        format="humming",
        stored_as=f"uint{nbits}",
        nbits=(nbits,),
        stored_nbits=nbits,
        zeros="float",
        group_sizes=tuple(2**power for power in range(4, 13)),
        whole_rows=True,
        scale_dtypes=("float16",),
    )
    for nbits in (1, 2, 3, 4, 5, 6, 8)
)


def _integer(
    format: str, nbits: int, zeros: Zeros = "integer", *, group_sizes: tuple[int, ...] = (32, 64, 128)
) -> ExportGrid:
    """A grid of a format whose zero points are whole; with groups that the kernels of vLLM (Marlin) read."""
    halves: tuple[str, ...] = ("float16",)
    return ExportGrid(
        format=format,
        stored_as=f"{'int' if zeros == 'symmetric' else 'uint'}{nbits}",
        nbits=(nbits,),
        stored_nbits=nbits,
        zeros=zeros,
        group_sizes=group_sizes,
        whole_rows=True,
        scale_dtypes=("float16", "bfloat16", "float32") if format == "compressed-tensors" else halves,
    )


_GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_ONNX_BLOCKS = tuple(2**power for power in range(4, 9))
# By target: its grids, the one to store a weight in before larger or less widely read ones.
TARGETS: dict[str, tuple[ExportGrid, ...]] = {
    "gguf": _GGUF,
    "mlx": _MLX,
    "humming": _HUMMING,
    "compressed-tensors": tuple(_integer("compressed-tensors", nbits) for nbits in (2, 3, 4, 5, 6, 8)),
    "gptq": tuple(_integer("gptq", nbits, group_sizes=_GPTQ_GROUPS) for nbits in (2, 3, 4, 8)),
    "awq": (_integer("awq", 4, group_sizes=_GPTQ_GROUPS),),
    "onnx": (
        ExportGrid(
            format="onnx", stored_as="MatMulNBits, 2 bits", nbits=(1, 2), stored_nbits=2, zeros="float",
            group_sizes=_ONNX_BLOCKS, scale_dtypes=("float16", "float32"),
        ),
        ExportGrid(
            format="onnx", stored_as="MatMulNBits, 4 bits", nbits=(3, 4), stored_nbits=4, zeros="float",
            group_sizes=_ONNX_BLOCKS, scale_dtypes=("float16", "float32"),
        ),
        ExportGrid(
            format="onnx", stored_as="MatMulNBits, 8 bits", nbits=(5, 6, 8), stored_nbits=8, zeros="integer",
            group_sizes=_ONNX_BLOCKS, scale_dtypes=("float16", "float32"),
        ),
    ),
    "openvino": tuple(
        ExportGrid(
            format="openvino", stored_as=f"u{stored}", nbits=nbits, stored_nbits=stored, zeros="float",
            whole_rows=True, scale_dtypes=("float16", "float32"),
        )
        for stored, nbits in ((2, (1, 2)), (4, (3, 4)), (8, (5, 6, 8)))
    ),
    "torchao": tuple(
        ExportGrid(
            format="torchao", stored_as=f"int{nbits}", nbits=(nbits,), stored_nbits=8, zeros="float", whole_rows=True,
        )
        for nbits in (1, 2, 3, 4, 5, 6, 8)
    ),
    "hqq": tuple(
        ExportGrid(
            format="hqq", stored_as=f"{stored} bits", nbits=nbits, stored_nbits=stored, zeros="float", whole_rows=True,
            group_sizes=(8,), axes=(0, 1),
        )
        for stored, nbits in ((1, (1,)), (2, (2,)), (3, (3,)), (4, (4,)), (8, (5, 6, 8)))
    ),
    # What every build of vLLM reads first; its kernels for CPUs read 4 bits only, and humming needs a GPU.
    "vllm": (
        _integer("compressed-tensors", 4),
        _integer("compressed-tensors", 8, "symmetric"),
        *_HUMMING,
    ),
    "vllm-cpu": (_integer("compressed-tensors", 4),),
    "sglang": (_integer("compressed-tensors", 4), _integer("compressed-tensors", 8), *_HUMMING),
}  # fmt: skip
# Other names that people know a target by.
ALIASES = {
    "llama.cpp": "gguf",
    "llama-cpp": "gguf",
    "ollama": "gguf",
    "lm-studio": "gguf",
    "lmstudio": "gguf",
    "mistral.rs": "gguf",
    "mlx-lm": "mlx",
    "onnxruntime": "onnx",
    "onnxruntime-genai": "onnx",
    "openvino-genai": "openvino",
    "gptqmodel": "gptq",
    "autoawq": "awq",
}
# The groups to quantize with where the user names none; 64 elsewhere. GGUF stores a scale for every 32 weights anyway.
_DEFAULT_GROUP_SIZES = {"gguf": 32}
DEFAULT_GROUP_SIZE = 64


def target_name(name: str) -> str:
    """The target that ``name`` means: a key of :data:`TARGETS`, or another name of one, in any case.

    Raises:
        TypeError: no text.
        ValueError: an unknown target; names the nearest one.
    """
    if not isinstance(name, str):
        raise TypeError(f"the target of an export must be a name such as 'gguf', got {name!r}.")
    known = name.strip().lower().replace("_", "-").replace(" ", "-")
    known = ALIASES.get(known, known)
    if known not in TARGETS:
        guess = nearest(name, [*TARGETS, *ALIASES])
        raise ValueError(
            f"no export target {name!r} is known{guess}; choose one of {sorted(TARGETS)}, or what reads one of them: "
            f"{sorted(ALIASES)}."
        )
    return known


def default_group_size(target: str) -> int:
    """The group size to quantize with for ``target``."""
    return _DEFAULT_GROUP_SIZES.get(target, DEFAULT_GROUP_SIZE)


def held_nbits(target: str) -> tuple[int, ...]:
    """The widths that ``target`` holds with some kind of zero points, in order."""
    return tuple(sorted({nbits for grid in TARGETS[target] for nbits in grid.nbits}))


def default_zeros(target: str, nbits: int) -> Zeros:
    """The kind of zero points to quantize with for ``target``: that of the first grid of its first format.

    Of one format it is the most general kind, which has the lowest error.

    Raises:
        ValueError: the target does not hold this width; names those that it holds.
    """
    grids = [grid for grid in TARGETS[target] if nbits in grid.nbits]
    if not grids:
        raise ValueError(f"{target} does not hold {nbits} bits; it holds {_listed(held_nbits(target))} bits.")
    kinds = {grid.zeros for grid in grids if grid.format == grids[0].format}
    return max(kinds, key=ZEROS.index)


def grid_for(target: str, spec: HQQGrid, in_features: int | None = None) -> ExportGrid | None:
    """The first grid of ``target`` that holds weights of ``spec`` exactly; None if there is none."""
    return next((grid for grid in TARGETS[target] if grid.holds(spec, in_features)), None)


def why_not(target: str, spec: HQQGrid, in_features: int | None = None) -> list[str]:
    """Why ``target`` cannot hold weights of ``spec`` exactly, each reason with what it can hold; empty if it can.

    Args:
        target: a key of :data:`TARGETS`.
        spec: the weight's.
        in_features: of the weight; None if not known: then whole rows are taken to fit.
    """
    if grid_for(target, spec, in_features) is not None:
        return []
    grids = [grid for grid in TARGETS[target] if spec.nbits in grid.nbits]
    if not grids:
        return [f"{target} holds {_listed(held_nbits(target))} bits, not {spec.nbits}"]
    reasons = []
    with_zeros = [grid for grid in grids if grid.holds_zeros(spec.zeros)]
    if not with_zeros:
        kinds = sorted({grid.zeros for grid in grids}, key=ZEROS.index, reverse=True)
        needed = " or ".join(_FIELDS[kind] for kind in kinds)
        others = sorted({n for grid in TARGETS[target] if grid.holds_zeros(spec.zeros) for n in grid.nbits})
        instead = f", and {spec.zeros} ones at {_listed(others)} bits" if others else ""
        reasons.append(f"{target} holds no {spec.zeros} zeros at {spec.nbits} bits: it needs {needed} there{instead}")
    grids = with_zeros or grids
    if not any(grid.holds_groups(spec.group_size, in_features) for grid in grids):
        sizes = sorted({min(grid.group_sizes) for grid in grids})
        size = spec.group_size or in_features
        reasons.append(f"{target} holds groups of multiples of {_listed(sizes)} weights, not of {size}")
    if not any(spec.scale_dtype in grid.scale_dtypes for grid in grids):
        dtypes = dict.fromkeys(dtype for grid in grids for dtype in grid.scale_dtypes)
        reasons.append(f"{target} holds scales in {_listed(dtypes)}, not in {spec.scale_dtype}")
    if not any(spec.axis in grid.axes for grid in grids):
        reasons.append(f"{target} holds groups along the inputs (axis=1), not along the outputs")
    # Each field fits some grid, and no grid fits all of them.
    return reasons or [f"no layout of {target} holds these bits, zeros, groups and scales together"]


def _listed(values: Sequence[object] | dict[str, None]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
