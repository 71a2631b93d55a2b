/* HQQ: packed codes to dense rows, and their product with x. The layout is defined in bitpack/reference.py. The kernels
 * here take any shape; hqq_registers.h has a faster product for most. */
#include "hqq_slots.h"
#include "hqq_unpack.h"

#include "hqq_windows.h"

#include "hqq_registers.h"

#include "hqq_dense.h"

/* One row's place in the worker's scratch memory. */
struct row_parts {
    int8_t *codes;
    float *scale, *zero;
};

INLINE struct row_parts row_parts_in(const struct hqq_weight *w, float *scratch) {
    struct row_parts parts = {(int8_t *)scratch, scratch + code_floats(w), NULL};
    parts.zero = parts.scale + w->n_groups;
    return parts;
}

INLINE void read_row(const struct hqq_weight *w, int64_t row, struct row_parts parts) {
    unpack_row(w->packed + row * w->row_bytes, w->in_features, w->nbits, parts.codes);
    convert_floats(w->scale, row * w->n_groups, w->n_groups, w->kind, parts.scale);
    convert_floats(w->zero, row * w->n_groups, w->n_groups, w->kind, parts.zero);
}

/* out = (code - zero) * scale, rounded as the reference rounds. */
static TARGET void dequantize_row(const struct hqq_weight *w, int64_t row, float *scratch, float *out) {
    const struct row_parts parts = row_parts_in(w, scratch);
    const int64_t group_size = w->in_features / w->n_groups;
    const float centre = (float)centre_of(w->nbits);
    read_row(w, row, parts);
    for (int64_t g = 0; g < w->n_groups; g++) {
        const float scale = parts.scale[g], zero = parts.zero[g];
        const int64_t end = (g + 1) * group_size;
        int64_t k = g * group_size;
        for (; k + LANES <= end; k += LANES)
            store(out + k, (load_codes(parts.codes + k) + centre - zero) * scale);
        for (; k < end; k++)
            out[k] = ((float)parts.codes[k] + centre - zero) * scale;
    }
}

/* The same for groups that run along the outputs: every input has its own scale, every n_groups-th row shares them. */
static TARGET void dequantize_row_of_columns(const struct hqq_weight *w, int64_t row, float *scratch, float *out) {
    const float centre = (float)centre_of(w->nbits);
    const int64_t n = w->in_features, first = row % w->n_groups * n;
    int8_t *codes = (int8_t *)scratch;
    float *zero = scratch + code_floats(w);
    unpack_row(w->packed + row * w->row_bytes, n, w->nbits, codes);
    convert_floats(w->scale, first, n, w->kind, out);
    convert_floats(w->zero, first, n, w->kind, zero);
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store(out + k, (load_codes(codes + k) + centre - load(zero + k)) * load(out + k));
    for (; k < n; k++)
        out[k] = ((float)codes[k] + centre - zero[k]) * out[k];
}

static TARGET void VARIANT(hqq_rows)(const struct hqq_weight *w, const struct dense_rows *rows, int64_t begin,
                                     int64_t end, float *scratch) {
#if LANES == 16
    if (can_look_up_rows(w)) {
        look_up_rows(w, rows, begin, end, scratch);
        return;
    }
#endif
    float *const row_scratch = scratch + w->in_features;
    for (int64_t row = begin; row < end; row++) {
        float *out = row_to_write(rows, row, w->in_features, scratch);
        if (w->axis == 1)
            dequantize_row(w, rows->first_row + row, row_scratch, out);
        else
            dequantize_row_of_columns(w, rows->first_row + row, row_scratch, out);
        finish_row(rows, row, w->in_features, out);
    }
}

/* sum_j (code_j - zero) * x_j of n neighbours in a group, lane by lane; the remainder of the last vector goes to `rest`. */
INLINE floats dot_codes(const int8_t *codes, const float *x, int64_t n, float zero, float *rest) {
    floats even = {0}, odd = {0};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        even += (load_codes(codes + k) - zero) * load(x + k);
        odd += (load_codes(codes + k + LANES) - zero) * load(x + k + LANES);
    }
    for (; k + LANES <= n; k += LANES)
        even += (load_codes(codes + k) - zero) * load(x + k);
    *rest = 0;
    for (; k < n; k++)
        *rest += ((float)codes[k] - zero) * x[k];
    return even + odd;
}

INLINE float sum_of_row(const float *x, int64_t n) {
    floats total = {0};
    float rest = 0;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        total += load(x + k);
    for (; k < n; k++)
        rest += x[k];
    return sum_of(total) + rest;
}

/* Of groups along the inputs: sum_j (code_j - zero) * G_j for the scale, -scale * sum_j G_j for the zero. */
static TARGET void VARIANT(hqq_gradient)(const struct hqq_weight *w, const struct hqq_gradient *gradient,
                                         int64_t begin, int64_t end, float *scratch) {
    const struct row_parts parts = row_parts_in(w, scratch);
    const int64_t group_size = w->in_features / w->n_groups;
    const float centre = (float)centre_of(w->nbits);
    for (int64_t row = begin; row < end; row++) {
        read_row(w, gradient->first_row + row, parts);
        for (int64_t g = 0; g < w->n_groups; g++) {
            const int64_t first = g * group_size, at = (gradient->first_row + row) * w->n_groups + g;
            const float *G = gradient->weight + row * w->in_features + first;
            float rest;
            const floats sums = dot_codes(parts.codes + first, G, group_size, parts.zero[g] - centre, &rest);
            gradient->scale[at] = sum_of(sums) + rest;
            gradient->zero[at] = -parts.scale[g] * sum_of_row(G, group_size);
        }
    }
}

/* sum_g scale_g * sum_j (code_j - zero_g) * x_j. Taking zero_g * sum_j x_j off afterwards would save a subtraction a
 * vector, but cancels: for inputs with a common offset its error was more than twice as large. Prefetches the packed row
 * that comes `next`. */
INLINE float dot_one_token(const struct hqq_weight *w, struct row_parts parts, const float *x, const uint8_t *next) {
    const int64_t group_size = w->in_features / w->n_groups, bytes_a_group = w->row_bytes / w->n_groups;
    const float centre = (float)centre_of(w->nbits);
    floats total = {0};
    float total_rest = 0;
    for (int64_t g = 0; g < w->n_groups; g++) {
        __builtin_prefetch(next + g * bytes_a_group);
        for (int64_t begin = 0; begin < group_size; begin += PANEL) {
            const int64_t first = g * group_size + begin, left = group_size - begin;
            float rest;
            total += parts.scale[g] * dot_codes(parts.codes + first, x + first, left < PANEL ? left : PANEL,
                                                parts.zero[g] - centre, &rest);
            total_rest += parts.scale[g] * rest;
        }
    }
    return sum_of(total) + total_rest;
}

/* The same for groups of a few vectors, whose number is a constant in every call. */
INLINE float dot_short_groups(const struct hqq_weight *w, struct row_parts parts, const float *x, const uint8_t *next,
                              int vectors) {
    const float centre = (float)centre_of(w->nbits);
    floats total = {0};
    for (int64_t b = 0; b < w->row_bytes; b += CACHE_LINE)
        __builtin_prefetch(next + b);
    for (int64_t g = 0; g < w->n_groups; g++) {
        const float zero = parts.zero[g] - centre;
        floats sum = {0};
        for (int64_t k = g * vectors * LANES; k < (g + 1) * vectors * LANES; k += LANES)
            sum += (load_codes(parts.codes + k) - zero) * load(x + k);
        total += parts.scale[g] * sum;
    }
    return sum_of(total);
}

INLINE float dot_row(const struct hqq_weight *w, struct row_parts parts, const float *x, const uint8_t *next) {
    const int64_t group_size = w->in_features / w->n_groups;
    switch (group_size % LANES ? 0 : group_size / LANES) {
    case 1: return dot_short_groups(w, parts, x, next, 1);
    case 2: return dot_short_groups(w, parts, x, next, 2);
    case 4: return dot_short_groups(w, parts, x, next, 4);
    }
    return dot_one_token(w, parts, x, next);
}

static TARGET void VARIANT(hqq_product)(const struct hqq_weight *w, const struct product *p,
                                        const struct arranged_inputs *inputs, int64_t begin, int64_t end,
                                        float *scratch) {
    (void)inputs;
#if LANES >= 8
    if (inputs != NULL) {
        product_in_registers(w, p, inputs, begin, end, scratch);
        return;
    }
#endif
    float *const row_scratch = scratch + BLOCK_ROWS * w->in_features;
    if (p->tokens == 1) {
        const struct row_parts parts = row_parts_in(w, row_scratch);
        for (int64_t row = begin; row < end; row++) {
            read_row(w, row, parts);
            p->y[row] = dot_row(w, parts, p->x, w->packed + (row + 1) * w->row_bytes) + (p->bias ? p->bias[row] : 0);
        }
        return;
    }
    for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
        const int rows = (int)(end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS);
        for (int r = 0; r < rows; r++)
            dequantize_row(w, row + r, row_scratch, scratch + r * w->in_features);
        dot_rows(scratch, w->in_features, rows, row, p);
    }
}
