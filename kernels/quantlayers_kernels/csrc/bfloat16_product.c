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

void round_to_bfloat16(const float *values, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i] = (uint16_t)(values[i] == values[i] ? rounded : 0x7fc0);
    }
}

int multiply_in_float32(multiplication multiply, const void *weights, const struct product *products, int64_t n,
                        int64_t in_features, int n_threads, int variant) {
    if (products->kind != KIND_BFLOAT16)
        return multiply(weights, products, n, n_threads, variant);
    const int64_t tokens = products->tokens, of_x = tokens * in_features;
    int64_t of_y = 0;
    for (int64_t i = 0; i < n; i++)
        of_y += tokens * products[i].out_features;
    void *const memory = malloc((size_t)n * sizeof(struct product) + (size_t)(of_x + of_y) * sizeof(float));
    if (memory == NULL)
        return -1;
    struct product *const inside = memory;
    float *const x = (float *)(inside + n), *y = x + of_x;
    read_bfloat16((const uint16_t *)products->x, of_x, x);
    for (int64_t i = 0; i < n; y += tokens * products[i].out_features, i++)
        inside[i] = (struct product){y, x, products[i].bias, tokens, products[i].out_features, KIND_FLOAT32};
    const int failed = multiply(weights, inside, n, n_threads, variant);
    for (int64_t i = 0; i < n && !failed; i++)
        round_to_bfloat16(inside[i].y, tokens * products[i].out_features, (uint16_t *)products[i].y);
    free(memory);
    return failed;
}

void products_of(const struct products *all, struct product *products) {
    const size_t value_bytes = all->kind == KIND_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    uint8_t *y = all->y;
    for (int64_t i = 0; i < all->n; i++) {
        const int64_t rows = all->out_features[i];
        const float *const bias = all->biases ? ((const float *const *)all->biases)[i] : NULL;
        products[i] = (struct product){(float *)y, all->x, bias, all->tokens, rows, all->kind};
        y += (size_t)(all->tokens * rows) * value_bytes;
    }
}
