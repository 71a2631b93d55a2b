/* The functions that Python calls, and the choice of the instruction set. All return 0, or -1 for want of memory. */
#include "quantlayers.h"

/* Changes with every change of a signature below; native.py refuses a library that says another number. */
int ql_interface_version(void) {
    return 9;
}

/* Instruction sets in the order of their speed: 0 baseline, 1 AVX2, 2 AVX-512. */
int ql_best_variant(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return avx2;
#else
    return 0;
#endif
}

static const struct kernels *kernels_of(int variant) {
#if defined(__x86_64__)
    const int best = ql_best_variant();
    variant = variant < best ? variant : best;
    return variant == 2 ? &kernels_avx512 : variant == 1 ? &kernels_avx2 : &kernels_baseline;
#else
    (void)variant;
    return &kernels_baseline;
#endif
}

struct hqq_call {
    const struct kernels *kernels;
    struct hqq_weight weight;
    struct product product;
    struct dense_rows rows;
    struct hqq_gradient gradient;
};

static void multiply_hqq(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct hqq_call *call = context;
    call->kernels->hqq_product(&call->weight, &call->product, begin, end, scratch);
}

static void dequantize_hqq(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct hqq_call *call = context;
    call->kernels->hqq_rows(&call->weight, &call->rows, begin, end, scratch);
}

static void gather_hqq_gradient(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct hqq_call *call = context;
    call->kernels->hqq_gradient(&call->weight, &call->gradient, begin, end, scratch);
}

/* y (tokens, out_features) = x (tokens, in_features) @ weight.T + bias, for groups along the inputs. */
int ql_hqq_linear(float *y, const float *x, const uint8_t *packed, const void *scale, const void *zero,
                  const float *bias, int64_t tokens, int64_t out_features, int64_t in_features, int64_t n_groups,
                  int64_t row_bytes, int nbits, int kind, int n_threads, int variant) {
    struct hqq_call call = {
        .kernels = kernels_of(variant),
        .weight = {packed, scale, zero, in_features, n_groups, row_bytes, nbits, 1, kind},
        .product = {y, x, bias, tokens, out_features},
    };
    return for_rows(multiply_hqq, &call, out_features, hqq_product_floats(&call.weight), n_threads);
}

/* out (n_rows, in_features) = rows [first_row, first_row + n_rows) of the weight. */
int ql_hqq_dequantize(void *out, const uint8_t *packed, const void *scale, const void *zero, int64_t first_row,
                      int64_t n_rows, int64_t in_features, int64_t n_groups, int64_t row_bytes, int nbits, int axis,
                      int kind, int out_kind, int n_threads, int variant) {
    struct hqq_call call = {
        .kernels = kernels_of(variant),
        .weight = {packed, scale, zero, in_features, n_groups, row_bytes, nbits, axis, kind},
        .rows = {out, first_row, out_kind},
    };
    return for_rows(dequantize_hqq, &call, n_rows, in_features + hqq_row_floats(&call.weight), n_threads);
}

/* Rows [first_row, first_row + n_rows) of the gradients of scale and zero (out_features, n_groups), from those rows of
 * the dense weight's, (n_rows, in_features); for groups along the inputs. */
int ql_hqq_gradient(float *grad_scale, float *grad_zero, const float *grad_weight, const uint8_t *packed,
                    const void *scale, const void *zero, int64_t first_row, int64_t n_rows, int64_t in_features,
                    int64_t n_groups, int64_t row_bytes, int nbits, int kind, int n_threads, int variant) {
    struct hqq_call call = {
        .kernels = kernels_of(variant),
        .weight = {packed, scale, zero, in_features, n_groups, row_bytes, nbits, 1, kind},
        .gradient = {grad_weight, grad_scale, grad_zero, first_row},
    };
    return for_rows(gather_hqq_gradient, &call, n_rows, hqq_row_floats(&call.weight), n_threads);
}

struct aqlm_call {
    const struct kernels *kernels;
    struct aqlm_weight weight;
    struct product product;
    struct dense_rows rows;
};

static void multiply_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct aqlm_call *call = context;
    call->kernels->aqlm_product(&call->weight, &call->product, begin, end, scratch);
}

static void dequantize_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct aqlm_call *call = context;
    call->kernels->aqlm_rows(&call->weight, &call->rows, begin, end, scratch);
}

/* y (tokens, out_features) = x (tokens, in_features) @ weight.T + bias. */
int ql_aqlm_linear(float *y, const float *x, const void *codes, const void *codebooks, const void *scales,
                   const float *bias, int64_t tokens, int64_t out_features, int64_t in_groups, int64_t num_codebooks,
                   int64_t size, int64_t out_group, int64_t in_group, int code_bytes, int codebook_kind,
                   int scale_kind, int n_threads, int variant) {
    struct aqlm_call call = {
        .kernels = kernels_of(variant),
        .weight = {codes, codebooks, scales, in_groups, num_codebooks, size, out_group, in_group, code_bytes,
                   codebook_kind, scale_kind},
        .product = {y, x, bias, tokens, out_features},
    };
    return for_rows(multiply_aqlm, &call, out_features, BLOCK_ROWS * in_groups * in_group, n_threads);
}

/* out (n_rows, in_features) = rows [first_row, first_row + n_rows) of the weight. */
int ql_aqlm_dequantize(void *out, const void *codes, const void *codebooks, const void *scales, int64_t first_row,
                       int64_t n_rows, int64_t in_groups, int64_t num_codebooks, int64_t size, int64_t out_group,
                       int64_t in_group, int code_bytes, int codebook_kind, int scale_kind, int out_kind,
                       int n_threads, int variant) {
    struct aqlm_call call = {
        .kernels = kernels_of(variant),
        .weight = {codes, codebooks, scales, in_groups, num_codebooks, size, out_group, in_group, code_bytes,
                   codebook_kind, scale_kind},
        .rows = {out, first_row, out_kind},
    };
    return for_rows(dequantize_aqlm, &call, n_rows, in_groups * in_group, n_threads);
}

struct update_call {
    const struct kernels *kernels;
    struct aqlm_update update;
};

static void update_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct update_call *call = context;
    (void)scratch;
    call->kernels->aqlm_update(&call->update, begin, end);
}

/* Moves codes (n, num_codebooks) in place; see aqlm/update.py. */
int ql_aqlm_update(void *codes, const float *change, const float *steps, const float *per_energy,
                   const int32_t *entries, const float *noise, int64_t n, int64_t num_codebooks, int64_t size,
                   int64_t d, int64_t neighbours, int code_bytes, int n_threads, int variant) {
    struct update_call call = {
        .kernels = kernels_of(variant),
        .update = {codes, change, steps, per_energy, entries, noise, num_codebooks, size, d, neighbours, code_bytes},
    };
    return for_rows(update_aqlm, &call, n, 0, n_threads);
}

struct aqlm_choice_call {
    const struct kernels *kernels;
    struct aqlm_choice choice;
};

static void choose_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct aqlm_choice_call *call = context;
    call->kernels->aqlm_choose(&call->choice, begin, end, scratch);
}

/* Chooses the codes of n_groups neighbouring groups of each of n_out output groups anew, in place. */
int ql_aqlm_choose(int64_t *codes, float *pull, const float *hessian, const float *codebooks, const float *entries,
                   const float *own, const float *pairs, int64_t n_out, int64_t n_groups, int64_t num_codebooks,
                   int64_t size, int64_t width, int64_t out_group, int64_t in_group, int64_t beam, int n_threads,
                   int variant) {
    struct aqlm_choice_call call = {
        .kernels = kernels_of(variant),
        .choice = {codes, pull, hessian, codebooks, entries, own, pairs, n_groups, num_codebooks, size, width,
                   out_group, in_group, n_groups * in_group, beam},
    };
    return for_rows(choose_aqlm, &call, n_out, aqlm_choice_floats(&call.choice), n_threads);
}

struct solver_call {
    const struct kernels *kernels;
    struct hqq_groups groups;
};

static void solve_offsets(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct solver_call *call = context;
    call->kernels->hqq_offsets(&call->groups, begin, end, scratch);
}

static void solve_lines(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct solver_call *call = context;
    call->kernels->hqq_lines(&call->groups, begin, end, scratch);
}

/* Moves offset (n,) to where the codes of values (n, group_size) stand still, or to the best one that was seen where the
 * shrink is at work. `options`: the smallest threshold and the exponent; `order`: that in which groups are taken. */
int ql_hqq_offsets(float *offset, const float *values, const float *mean, const float *steps, const float *betas,
                   const float *thresholds, const float *options, const int64_t *order, int64_t n,
                   int64_t group_size, int64_t iters, int max_code, int n_threads, int variant) {
    struct solver_call call = {
        .kernels = kernels_of(variant),
        .groups = {.offset = offset, .values = values, .mean = mean, .steps = steps, .betas = betas,
                   .thresholds = thresholds, .smallest_threshold = options[0], .exponent = options[1], .order = order,
                   .group_size = group_size, .iters = iters, .max_code = (float)max_code},
    };
    return for_rows(solve_offsets, &call, n, MAX_LANES * group_size, n_threads);
}

/* slope and offset (n,) of the better of two fits, from slope 1 and `offset` and from the other two; `margin` points to
 * one number. */
int ql_hqq_lines(float *slope, float *offset, const float *values, const float *mean, const float *other_slope,
                 const float *other_offset, const float *margin, int64_t n, int64_t group_size, int64_t iters,
                 int max_code, int n_threads, int variant) {
    struct solver_call call = {
        .kernels = kernels_of(variant),
        .groups = {.offset = offset, .slope = slope, .values = values, .mean = mean, .other_slope = other_slope,
                   .other_offset = other_offset, .margin = *margin, .group_size = group_size, .iters = iters,
                   .max_code = (float)max_code, .centre = (float)(max_code / 2)},
    };
    return for_rows(solve_lines, &call, n, MAX_LANES * group_size, n_threads);
}

struct hqq_choice_call {
    const struct kernels *kernels;
    struct hqq_choice choice;
};

static void choose_hqq(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct hqq_choice_call *call = context;
    (void)scratch;
    call->kernels->hqq_choose(&call->choice, begin, end);
}

/* Chooses codes (out_features, columns) anew, in place. */
int ql_hqq_choose(float *codes, float *pull, const float *steps, const float *hessian, const float *curvature,
                  int64_t out_features, int64_t columns, int64_t sweeps, int max_code, int n_threads, int variant) {
    struct hqq_choice_call call = {
        .kernels = kernels_of(variant),
        .choice = {codes, pull, steps, hessian, curvature, columns, sweeps, (float)max_code},
    };
    return for_rows(choose_hqq, &call, out_features, 0, n_threads);
}
