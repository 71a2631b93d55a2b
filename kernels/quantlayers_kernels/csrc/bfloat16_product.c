/* Products of bfloat16 inputs: one call, where two conversions by torch would take as long as a small layer. */
#include "quantlayers.h"

#include <stdlib.h>
#include <string.h>

static void read_bfloat16(const uint16_t *from, int64_t n, float *values) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(values + i, &bits, sizeof(bits));
    }
}

/* To the nearest, and to even between two. */
static void round_to_bfloat16(const float *values, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i] = (uint16_t)(values[i] == values[i] ? rounded : 0x7fc0);
    }
}

int multiply_in_float32(multiplication multiply, const void *weight, const struct product *product, int64_t in_features,
                        int n_threads, int variant) {
    if (product->kind != KIND_BFLOAT16)
        return multiply(weight, product, n_threads, variant);
    const int64_t of_x = product->tokens * in_features, of_y = product->tokens * product->out_features;
    float *const x = malloc((size_t)(of_x + of_y) * sizeof(float));
    if (x == NULL)
        return -1;
    float *const y = x + of_x;
    read_bfloat16((const uint16_t *)product->x, of_x, x);
    const struct product inside = {y, x, product->bias, product->tokens, product->out_features, KIND_FLOAT32};
    const int failed = multiply(weight, &inside, n_threads, variant);
    if (!failed)
        round_to_bfloat16(y, of_y, (uint16_t *)product->y);
    free(x);
    return failed;
}
