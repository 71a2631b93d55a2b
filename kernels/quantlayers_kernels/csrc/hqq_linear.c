/* HQQ products: inputs are arranged, or rounded to 8 bits, once a call, before the rows are distributed over threads.
 * Several weights with one x are one call. */
#include "quantlayers.h"

#include <stdlib.h>

static int64_t whole_lines(int64_t bytes) {
    return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

static void *next_line(void *memory) {
    return (void *)(((uintptr_t)memory + CACHE_LINE - 1) & ~(uintptr_t)(CACHE_LINE - 1));
}

struct exact_call {
    const struct kernels *kernels;
    const struct hqq_weight *weights;
    const struct product *products;
    const struct arranged_inputs *inputs;
};

static void multiply_hqq(const void *context, int64_t i, int64_t begin, int64_t end, float *scratch) {
    const struct exact_call *call = context;
    call->kernels->hqq_product(call->weights + i, call->products + i, call->inputs, begin, end, scratch);
}

static int multiply_exactly(const void *hqq, const struct product *product, int64_t n, int n_threads, int variant) {
    const struct hqq_weight *const weight = hqq;
    struct exact_call call = {kernels_of(variant), weight, product, NULL};
    const int64_t n_windows = call.kernels->hqq_exact_windows ? call.kernels->hqq_exact_windows(weight, product) : 0;
    if (n_windows == 0)
        return for_product_rows(multiply_hqq, &call, product, n, hqq_product_floats(weight), n_threads);
    const int64_t of_x = product->tokens * n_windows * call.kernels->window_columns * (int64_t)sizeof(float);
    void *const memory = malloc((size_t)(of_x + n_windows * (int64_t)sizeof(struct joined_window) + CACHE_LINE));
    if (memory == NULL)
        return -1;
    float *const x = next_line(memory);
    struct joined_window *const windows = (struct joined_window *)((uint8_t *)x + of_x);
    const int has_joined = call.kernels->hqq_arrange(weight, product, windows, x);
    const struct arranged_inputs inputs = {windows, x, n_windows, has_joined};
    call.inputs = &inputs;
    const int failed =
        for_product_rows(multiply_hqq, &call, product, n, hqq_arranged_product_floats(weight), n_threads);
    free(memory);
    return failed;
}

/* Of bfloat16 inputs, where a sum of codes and one of zero points would cancel to NaN; float32 keeps infinities. */
#define NOT_FINITE 1

struct bfloat16_call {
    const struct bfloat16_kernels *kernels;
    const struct hqq_weight *weights;
    const struct product *products;
    struct bfloat16_inputs inputs;
};

static void multiply_bfloat16(const void *context, int64_t i, int64_t begin, int64_t end, float *scratch) {
    const struct bfloat16_call *call = context;
    call->kernels->hqq_product(call->weights + i, call->products + i, &call->inputs, begin, end, scratch);
}

static int multiply_as_they_are(const struct bfloat16_kernels *kernels, int64_t n_windows, const struct hqq_weight *weights,
                                const struct product *products, int64_t n, int n_threads) {
    struct bfloat16_call call = {kernels, weights, NULL, {.n_windows = n_windows}};
    const int64_t tokens = products->tokens, of_float = sizeof(float);
    const int64_t of_x = whole_lines(tokens * n_windows * kernels->window_columns * (int64_t)sizeof(uint16_t));
    const int64_t of_sums = tokens * padded(weights->n_groups) * of_float;
    const int64_t of_windows = whole_lines(n_windows * (int64_t)sizeof(struct joined_window));
    int64_t of_y = 0;
    for (int64_t i = 0; i < n; i++)
        of_y += tokens * products[i].out_features * of_float;
    void *const memory =
        malloc((size_t)(of_x + of_sums + of_windows + of_y + n * (int64_t)sizeof(struct product) + CACHE_LINE));
    if (memory == NULL)
        return -1;
    uint8_t *const lines = next_line(memory);
    struct product *const inside = (struct product *)(lines + of_x + of_sums + of_windows);
    float *y = (float *)(inside + n);
    call.inputs.x = (uint16_t *)lines;
    call.inputs.sums = (float *)(lines + of_x);
    call.inputs.windows = (struct joined_window *)(lines + of_x + of_sums);
    call.products = inside;
    for (int64_t i = 0; i < n; y += tokens * products[i].out_features, i++)
        inside[i] = (struct product){y, NULL, products[i].bias, tokens, products[i].out_features, KIND_FLOAT32};
    kernels->hqq_windows(weights, call.inputs.windows);
    if (!kernels->hqq_arrange(weights, (const uint16_t *)products->x, tokens, &call.inputs)) {
        free(memory);
        return NOT_FINITE;
    }
    const int failed = for_product_rows(multiply_bfloat16, &call, inside, n, row_scales_floats(weights), n_threads);
    for (int64_t i = 0; i < n && !failed; i++)
        round_to_bfloat16(inside[i].y, tokens * products[i].out_features, (uint16_t *)products[i].y);
    free(memory);
    return failed;
}

static int multiply(const struct hqq_weight *weights, const struct product *products, int64_t n, int n_threads,
                    int variant) {
    const struct bfloat16_kernels *const kernels =
        products->kind == KIND_BFLOAT16 ? bfloat16_kernels_of(variant) : NULL;
    const int64_t n_windows = kernels ? kernels->hqq_windows(weights, NULL) : 0;
    const int failed =
        n_windows ? multiply_as_they_are(kernels, n_windows, weights, products, n, n_threads) : NOT_FINITE;
    if (failed != NOT_FINITE)
        return failed;
    return multiply_in_float32(multiply_exactly, weights, products, n, weights->in_features, n_threads, variant);
}

/* y (tokens, out_features) = x (tokens, in_features) @ weight.T + bias, for groups along the inputs. */
int ql_hqq_linear(const struct hqq_weight *weight, const struct product *product, int n_threads, int variant) {
    return multiply(weight, product, 1, n_threads, variant);
}

/* The same for several weights of one layout, with one x. */
int ql_hqq_linears(const struct products *all, int n_threads, int variant) {
    struct product products[MAX_TOGETHER];
    products_of(all, products);
    return multiply(all->weights, products, all->n, n_threads, variant);
}

struct integer_call {
    const struct integer_kernels *kernels;
    const struct hqq_weight *weights;
    const struct product *products;
    struct rounded_inputs inputs;
};

static void round_tokens(const void *context, int64_t begin, int64_t end, float *scratch) {
    const struct integer_call *call = context;
    call->kernels->hqq_round(call->weights, call->products, &call->inputs, begin, end, scratch);
}

static void multiply_rows(const void *context, int64_t i, int64_t begin, int64_t end, float *scratch) {
    const struct integer_call *call = context;
    call->kernels->hqq_product(call->weights + i, call->products + i, &call->inputs, begin, end, scratch);
}

static void find_slots(const struct window *windows, struct rounded_inputs *inputs) {
    int slot = 0;
    inputs->windows = windows;
    for (int64_t i = 0; i < inputs->n_windows; i++)
        while (slot <= windows[i].slot)
            inputs->first[slot++] = i;
    while (slot < 9)
        inputs->first[slot++] = inputs->n_windows;
}

static int multiply_rounded(const void *hqq, const struct product *product, int64_t n, int n_threads, int variant) {
    const struct hqq_weight *const weight = hqq;
    struct integer_call call = {integer_kernels_of(variant), weight, product, {0}};
    struct rounded_inputs *const inputs = &call.inputs;
    const int64_t tokens = product->tokens, of_float = sizeof(float);
    inputs->n_windows = call.kernels->hqq_windows(weight, NULL);
    inputs->token_bytes = inputs->n_windows ? inputs->n_windows * call.kernels->window_bytes : weight->in_features;
    inputs->token_scales = inputs->n_windows ? inputs->token_bytes / 4 : blocks_of(weight);
    const int64_t of_codes = whole_lines(tokens * inputs->token_bytes);
    const int64_t of_scale = whole_lines(tokens * inputs->token_scales * of_float);
    const int64_t of_offset = tokens * padded(weight->n_groups) * of_float;
    const int64_t of_windows = inputs->n_windows * (int64_t)sizeof(struct window);
    void *const memory = malloc((size_t)(of_codes + of_scale + of_offset + of_windows + CACHE_LINE));
    if (memory == NULL)
        return -1;
    uint8_t *const lines = next_line(memory);
    struct window *const windows = (struct window *)(lines + of_codes + of_scale + of_offset);
    inputs->codes = (int8_t *)lines;
    inputs->scale = (float *)(lines + of_codes);
    inputs->offset = (float *)(lines + of_codes + of_scale);
    if (inputs->n_windows)
        call.kernels->hqq_windows(weight, windows);
    find_slots(windows, inputs);
    int failed = for_rows(round_tokens, &call, tokens, rounding_floats(weight), n_threads);
    if (!failed)
        failed = for_product_rows(multiply_rows, &call, product, n, integer_product_floats(weight), n_threads);
    free(memory);
    return failed;
}

/* As ql_hqq_linear, with x rounded to 8 bits; see hqq/integer_reference.py. */
int ql_hqq_linear_int8(const struct hqq_weight *weight, const struct product *product, int n_threads, int variant) {
    return multiply_in_float32(multiply_rounded, weight, product, 1, weight->in_features, n_threads, variant);
}

int ql_hqq_linears_int8(const struct products *all, int n_threads, int variant) {
    const struct hqq_weight *const weights = all->weights;
    struct product products[MAX_TOGETHER];
    products_of(all, products);
    return multiply_in_float32(multiply_rounded, weights, products, all->n, weights->in_features, n_threads, variant);
}
