/* All kernels of one instruction set. A variant_*.c defines VARIANT, TARGET, LANES and BLOCK_TOKENS, and includes this. */
#include "quantlayers.h"

#include "vector.h"

#include "aqlm_choice.h"
#include "aqlm_kernels.h"
#include "aqlm_update.h"
#include "hqq_choice.h"
#include "hqq_kernels.h"
#include "hqq_experts.h"
#include "hqq_solve.h"

const struct kernels VARIANT(kernels) = {
    .window_columns = 4 * LANES,
#if LANES >= 8
    .hqq_exact_windows = VARIANT(hqq_exact_windows),
    .hqq_arrange = VARIANT(hqq_arrange),
#endif
    .hqq_product = VARIANT(hqq_product),
    .hqq_rows = VARIANT(hqq_rows),
    .hqq_gradient = VARIANT(hqq_gradient),
#if HAS_MATRIX_TILES
    .hqq_experts_product = VARIANT(hqq_experts_product),
    .hqq_experts_gradient = VARIANT(hqq_experts_gradient),
    .hqq_experts_floats = VARIANT(hqq_experts_floats),
#endif
    .hqq_half_quadratic = VARIANT(hqq_half_quadratic),
    .hqq_affine_fit = VARIANT(hqq_affine_fit),
    .hqq_choose = VARIANT(hqq_choose),
    .aqlm_product = VARIANT(aqlm_product),
    .aqlm_rows = VARIANT(aqlm_rows),
    .aqlm_update = VARIANT(aqlm_update),
    .aqlm_choose = VARIANT(aqlm_choose),
};
