/* The functions that Python calls, but those of hqq_linear.c, and the choice of the instruction set.
 *
 * Kernels take their arguments as structs, the number of threads and the instruction set, and return 0, or -1 when out
 * of memory. Python declares the structs and the functions again in interface.py.
 */
#include "extensions.h"
#include "quantlayers.h"

/* Checksum of interface.py when this library was built; native.py refuses a library with another one. */
#ifndef QL_INTERFACE
#error "setup.py defines QL_INTERFACE"
#endif

uint32_t ql_interface(void) {
    return QL_INTERFACE;
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

const struct kernels *kernels_of(int variant) {
#if defined(__x86_64__)
    const int best = ql_best_variant();
    variant &= ~(WITHOUT_EXTENSIONS | IN_FLOAT32);
    variant = variant < best ? variant : best;
    return variant == 2 ? &kernels_avx512 : variant == 1 ? &kernels_avx2 : &kernels_baseline;
#else
    (void)variant;
    return &kernels_baseline;
#endif
}

#if defined(__x86_64__)
#include <cpuid.h>

static int has_avx_vnni(void) {
    enum { AVX_VNNI = 1 << 4 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX_VNNI);
}
#endif

const struct integer_kernels *integer_kernels_of(int variant) {
#if defined(__x86_64__)
    const struct kernels *kernels = kernels_of(variant);
    const int with_extensions = !(variant & WITHOUT_EXTENSIONS);
    (void)with_extensions;
#if HAS_AVX512_VNNI
    if (kernels == &kernels_avx512 && with_extensions && __builtin_cpu_supports("avx512vnni"))
        return &integer_kernels_avx512_vnni;
#endif
#if HAS_AVX_VNNI
    if (kernels == &kernels_avx2 && with_extensions && has_avx_vnni())
        return &integer_kernels_avx2_vnni;
#endif
    if (kernels != &kernels_baseline)
        return kernels == &kernels_avx2 ? &integer_kernels_avx2 : &integer_kernels_avx512;
#endif
    (void)variant;
    return &integer_kernels_baseline;
}

const struct bfloat16_kernels *bfloat16_kernels_of(int variant) {
#if HAS_AVX512_BF16
    const int is_wanted = !(variant & (WITHOUT_EXTENSIONS | IN_FLOAT32));
    if (is_wanted && kernels_of(variant) == &kernels_avx512 && __builtin_cpu_supports("avx512bf16"))
        return &bfloat16_kernels_avx512;
#endif
    (void)variant;
    return NULL;
}

/* Whether products of bfloat16 inputs are computed from them as they are. */
int ql_has_bfloat16_products(int variant) {
    return bfloat16_kernels_of(variant) != NULL;
}

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the CPU multiplies tiles of bfloat16 (AMX), and Linux lets this process use their registers. */
int ql_has_matrix_tiles(void) {
    enum { TILES_OF_BFLOAT16 = 1 << 22, TILES = 1 << 24, BFLOAT16 = 1 << 5, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (kernels_avx512.hqq_experts_product == NULL || ql_best_variant() < 2 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if ((d & (TILES | TILES_OF_BFLOAT16)) != (TILES | TILES_OF_BFLOAT16) || !__get_cpuid_count(7, 1, &a, &b, &c, &d))
        return 0;
    return (a & BFLOAT16) != 0 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
int ql_has_matrix_tiles(void) {
    return 0;
}
#endif

/* What for_rows passes on to a kernel: its first struct, and its second one where it has two. */
struct call {
    const struct kernels *kernels;
    const void *first, *second;
};

static void dequantize_hqq(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_rows(call->first, call->second, begin, end, scratch);
}

int ql_hqq_dequantize(const struct hqq_weight *weight, const struct dense_rows *rows, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), weight, rows};
    return for_rows(dequantize_hqq, &call, rows->n_rows, weight->in_features + hqq_row_floats(weight), n_threads);
}

static void sum_hqq_gradient(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_gradient(call->first, call->second, begin, end, scratch);
}

int ql_hqq_gradient(const struct hqq_weight *weight, const struct hqq_gradient *gradient, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), weight, gradient};
    return for_rows(sum_hqq_gradient, &call, gradient->n_rows, hqq_row_floats(weight), n_threads);
}

static void multiply_hqq_experts(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_experts_product(call->first, call->second, begin, end, scratch);
}

/* y (tokens, out_features) = x (tokens, in_features) @ the transposed weight of each token's expert; only where
 * ql_has_matrix_tiles, and with the sizes that hqq/experts.py asks for. */
int ql_hqq_experts_linear(const struct hqq_weight *weight, const struct expert_tokens *tokens, int n_threads,
                          int variant) {
    const struct call call = {kernels_of(variant), weight, tokens};
    const int64_t floats = call.kernels->hqq_experts_floats(weight, tokens);
    return for_uneven_rows(multiply_hqq_experts, &call, tokens->n_experts, floats, n_threads);
}

static void add_hqq_experts_gradient(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_experts_gradient(call->first, call->second, begin, end, scratch);
}

/* y (tokens, in_features) = x (tokens, out_features) @ the weight of each token's expert. */
int ql_hqq_experts_gradient(const struct hqq_weight *weight, const struct expert_tokens *tokens, int n_threads,
                            int variant) {
    const struct call call = {kernels_of(variant), weight, tokens};
    const int64_t floats = call.kernels->hqq_experts_floats(weight, tokens);
    return for_uneven_rows(add_hqq_experts_gradient, &call, tokens->n_experts, floats, n_threads);
}

static void iterate_half_quadratic(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_half_quadratic(call->first, call->second, begin, end, scratch);
}

int ql_hqq_half_quadratic(const struct hqq_groups *groups, const struct hqq_half_quadratic *iteration, int n_threads,
                          int variant) {
    const struct call call = {kernels_of(variant), groups, iteration};
    return for_rows(iterate_half_quadratic, &call, groups->n_groups, MAX_LANES * groups->group_size, n_threads);
}

static void fit_affine(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->hqq_affine_fit(call->first, call->second, begin, end, scratch);
}

int ql_hqq_affine_fit(const struct hqq_groups *groups, const struct hqq_affine_fit *fit, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), groups, fit};
    return for_rows(fit_affine, &call, groups->n_groups, MAX_LANES * groups->group_size, n_threads);
}

static void choose_hqq(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    (void)scratch;
    call->kernels->hqq_choose(call->first, begin, end);
}

int ql_hqq_choose(const struct hqq_choice *choice, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), choice, NULL};
    return for_rows(choose_hqq, &call, choice->out_features, 0, n_threads);
}

static void multiply_aqlm(const void *context, int64_t i, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    const struct aqlm_weight *const weights = call->first;
    const struct product *const products = call->second;
    call->kernels->aqlm_product(weights + i, products + i, begin, end, scratch);
}

static int64_t aqlm_inputs(const struct aqlm_weight *weight) {
    return weight->in_groups * weight->in_group;
}

static int multiply_in_rows(const void *weights, const struct product *products, int64_t n, int n_threads,
                            int variant) {
    const struct call call = {kernels_of(variant), weights, products};
    return for_product_rows(multiply_aqlm, &call, products, n, BLOCK_ROWS * aqlm_inputs(weights), n_threads);
}

/* y (tokens, out_features) = x (tokens, in_features) @ weight.T + bias. */
int ql_aqlm_linear(const struct aqlm_weight *weight, const struct product *product, int n_threads, int variant) {
    return multiply_in_float32(multiply_in_rows, weight, product, 1, aqlm_inputs(weight), n_threads, variant);
}

/* The same for several weights with one x. */
int ql_aqlm_linears(const struct products *all, int n_threads, int variant) {
    struct product products[MAX_TOGETHER];
    products_of(all, products);
    const int64_t in_features = aqlm_inputs(all->weights);
    return multiply_in_float32(multiply_in_rows, all->weights, products, all->n, in_features, n_threads, variant);
}

static void dequantize_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->aqlm_rows(call->first, call->second, begin, end, scratch);
}

int ql_aqlm_dequantize(const struct aqlm_weight *weight, const struct dense_rows *rows, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), weight, rows};
    return for_rows(dequantize_aqlm, &call, rows->n_rows, aqlm_inputs(weight), n_threads);
}

static void update_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    (void)scratch;
    call->kernels->aqlm_update(call->first, begin, end);
}

int ql_aqlm_update(const struct aqlm_update *update, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), update, NULL};
    return for_rows(update_aqlm, &call, update->n_groups, 0, n_threads);
}

static void choose_aqlm(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct call *call = context;
    call->kernels->aqlm_choose(call->first, begin, end, scratch);
}

int ql_aqlm_choose(const struct aqlm_choice *choice, int n_threads, int variant) {
    const struct call call = {kernels_of(variant), choice, NULL};
    return for_rows(choose_aqlm, &call, choice->n_out, aqlm_choice_floats(choice), n_threads);
}
