/* HQQ products: inputs are arranged, or rounded to 8 bits, once a call, before the rows are distributed over threads. */
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

/* y (tokens, out_features) = x (tokens, in_features) @ weight.T + bias, for groups along the inputs. */
int ql_hqq_linear(const struct hqq_weight *weight, const struct product *product, int n_threads, int variant) {
    return multiply_in_float32(multiply_exactly, weight, product, 1, weight->in_features, n_threads, variant);
}

/* The same for several weights of one layout, with one x. */
int ql_hqq_linears(const struct products *all, int n_threads, int variant) {
    const struct hqq_weight *const weights = all->weights;
    return multiply_together(multiply_exactly, all, weights->in_features, n_threads, variant);
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
    return multiply_together(multiply_rounded, all, weights->in_features, n_threads, variant);
}
