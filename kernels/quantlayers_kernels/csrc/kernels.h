/* All kernels of one instruction set. A variant_*.c defines VARIANT, TARGET, LANES and BLOCK_TOKENS, and includes this. */
#include "quantlayers.h"

#include "vector.h"

#include "aqlm_choice.h"
#include "aqlm_kernels.h"
#include "aqlm_update.h"
#include "hqq_choice.h"
#include "hqq_kernels.h"
#include "hqq_solve.h"

const struct kernels VARIANT(kernels) = {
    VARIANT(hqq_product), VARIANT(hqq_rows), VARIANT(hqq_gradient), VARIANT(aqlm_product), VARIANT(aqlm_rows),
    VARIANT(aqlm_update), VARIANT(aqlm_choose), VARIANT(hqq_offsets), VARIANT(hqq_lines), VARIANT(hqq_choose),
};
