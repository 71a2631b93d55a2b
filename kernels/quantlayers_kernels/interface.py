"""The C functions of ``csrc/exports.c`` as ctypes calls them: structures, arguments, and the interface number.

This table is the only place where Python says what C expects; a test compares it with the declarations in ``csrc``.
A structure has the name of its C struct (``HQQWeight`` is ``struct hqq_weight``), and the same fields in the same
order. What the fields mean is documented in ``csrc/quantlayers.h``. Imports nothing but the standard library:
``setup.py`` runs this file on its own.
"""

import zlib
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_uint32, c_void_p


class HQQWeight(Structure):
    _fields_ = (
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("in_features", c_int64),
        ("n_groups", c_int64),
        ("row_bytes", c_int64),
        ("nbits", c_int),
        ("axis", c_int),
        ("kind", c_int),
    )


class AQLMWeight(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("codebooks", c_void_p),
        ("scales", c_void_p),
        ("in_groups", c_int64),
        ("num_codebooks", c_int64),
        ("size", c_int64),
        ("out_group", c_int64),
        ("in_group", c_int64),
        ("code_bytes", c_int),
        ("codebook_kind", c_int),
        ("scale_kind", c_int),
    )


class Product(Structure):
    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("tokens", c_int64),
        ("out_features", c_int64),
        ("kind", c_int),
    )


class Products(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("out_features", c_void_p),
        ("biases", c_void_p),
        ("y", c_void_p),
        ("x", c_void_p),
        ("n", c_int64),
        ("tokens", c_int64),
        ("kind", c_int),
    )


class DenseRows(Structure):
    _fields_ = (
        ("out", c_void_p),
        ("first_row", c_int64),
        ("n_rows", c_int64),
        ("kind", c_int),
    )


class ExpertTokens(Structure):
    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("offsets", c_void_p),
        ("n_experts", c_int64),
        ("out_features", c_int64),
    )


class HQQGradient(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("first_row", c_int64),
        ("n_rows", c_int64),
    )


class HQQGroups(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("mean", c_void_p),
        ("n_groups", c_int64),
        ("group_size", c_int64),
        ("max_code", c_float),
        ("centre", c_float),
    )


class HQQHalfQuadratic(Structure):
    _fields_ = (
        ("offset", c_void_p),
        ("steps_per_unit", c_void_p),
        ("betas", c_void_p),
        ("thresholds", c_void_p),
        ("order", c_void_p),
        ("iters", c_int64),
        ("smallest_threshold", c_float),
        ("exponent", c_float),
    )


class HQQAffineFit(Structure):
    _fields_ = (
        ("slope", c_void_p),
        ("offset", c_void_p),
        ("other_slope", c_void_p),
        ("other_offset", c_void_p),
        ("iters", c_int64),
        ("margin", c_float),
    )


class HQQChoice(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("correlation", c_void_p),
        ("steps", c_void_p),
        ("hessian", c_void_p),
        ("curvature", c_void_p),
        ("out_features", c_int64),
        ("columns", c_int64),
        ("sweeps", c_int64),
        ("max_code", c_float),
    )


class AQLMUpdate(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("delta", c_void_p),
        ("steps", c_void_p),
        ("per_energy", c_void_p),
        ("entries", c_void_p),
        ("noise", c_void_p),
        ("n_groups", c_int64),
        ("num_codebooks", c_int64),
        ("size", c_int64),
        ("d", c_int64),
        ("neighbours", c_int64),
        ("code_bytes", c_int),
    )


class AQLMChoice(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("correlation", c_void_p),
        ("hessian", c_void_p),
        ("codebooks", c_void_p),
        ("entries", c_void_p),
        ("own", c_void_p),
        ("pairs", c_void_p),
        ("n_out", c_int64),
        ("n_groups", c_int64),
        ("num_codebooks", c_int64),
        ("size", c_int64),
        ("width", c_int64),
        ("out_group", c_int64),
        ("in_group", c_int64),
        ("columns", c_int64),
        ("beam", c_int64),
    )


# Added to the number of an instruction set; IN_FLOAT32 in csrc/quantlayers.h.
IN_FLOAT32 = 32
# How many weights `Products` may have; MAX_TOGETHER in csrc/quantlayers.h.
MAX_TOGETHER = 8

# Each kernel takes pointers to these structures, then the number of threads and the instruction set, and returns 0, or
# -1 when out of memory.
KERNELS: dict[str, tuple[type[Structure], ...]] = {
    "ql_hqq_linear": (HQQWeight, Product),
    "ql_hqq_linear_int8": (HQQWeight, Product),
    "ql_hqq_linears": (Products,),
    "ql_hqq_linears_int8": (Products,),
    "ql_hqq_dequantize": (HQQWeight, DenseRows),
    "ql_hqq_gradient": (HQQWeight, HQQGradient),
    "ql_hqq_experts_linear": (HQQWeight, ExpertTokens),
    "ql_hqq_experts_gradient": (HQQWeight, ExpertTokens),
    "ql_hqq_half_quadratic": (HQQGroups, HQQHalfQuadratic),
    "ql_hqq_affine_fit": (HQQGroups, HQQAffineFit),
    "ql_hqq_choose": (HQQChoice,),
    "ql_aqlm_linear": (AQLMWeight, Product),
    "ql_aqlm_linears": (Products,),
    "ql_aqlm_dequantize": (AQLMWeight, DenseRows),
    "ql_aqlm_update": (AQLMUpdate,),
    "ql_aqlm_choose": (AQLMChoice,),
}

# Result and arguments of every function that the library exports.
FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ql_interface": (c_uint32, ()),
    "ql_best_variant": (c_int, ()),
    "ql_has_matrix_tiles": (c_int, ()),
    "ql_has_bfloat16_products": (c_int, (c_int,)),
    "ql_set_parallel_region": (None, (c_void_p,)),
    **{
        name: (c_int, (*(POINTER(structure) for structure in structures), c_int, c_int))
        for name, structures in KERNELS.items()
    },
}


def _interface_number() -> int:
    """A checksum of the table: names, fields, order and types."""
    structures = sorted({each for group in KERNELS.values() for each in group}, key=lambda each: each.__name__)
    fields = [(each.__name__, [(name, kind.__name__) for name, kind in each._fields_]) for each in structures]  # type: ignore[misc]
    functions = [
        (name, result and result.__name__, [argument.__name__ for argument in arguments])
        for name, (result, arguments) in FUNCTIONS.items()
    ]
    return zlib.crc32(repr((fields, functions)).encode())


# ``setup.py`` compiles it into the library, and ``native.py`` refuses a library with another one.
INTERFACE = _interface_number()
