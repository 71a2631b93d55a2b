/* AQLM: sums of codebook entries to dense rows, and their product with x. See aqlm/reference.py for the meaning. */

INLINE uint32_t code_at(const struct aqlm_weight *w, int64_t i, int code_bytes) {
    /* The mask makes any stored code a valid one: no code reads outside of its codebook. */
    const uint32_t mask = (uint32_t)w->size - 1;
    return (code_bytes == 1 ? ((const uint8_t *)w->codes)[i] : ((const uint16_t *)w->codes)[i]) & mask;
}

/* Offset of an entry's part for row `a` of its group; codebooks are (num_codebooks, size, out_group, in_group). */
INLINE int64_t entry_at(const struct aqlm_weight *w, int64_t codebook, uint32_t code, int64_t a, int64_t in_group) {
    return ((codebook * w->size + code) * w->out_group + a) * in_group;
}

/* Sum over the codebooks of eight inputs, from input j of group i of a row whose codes start at `first`. */
INLINE floats8 entries(const struct aqlm_weight *w, int64_t first, int64_t i, int64_t a, int64_t j, int64_t in_group,
                       int64_t num_codebooks, int code_bytes, int kind) {
    floats8 total = {0};
    for (int64_t m = 0; m < num_codebooks; m++) {
        uint32_t code = code_at(w, first + i * num_codebooks + m, code_bytes);
        floats8 entry = floats8_at_kind(w->codebooks, entry_at(w, m, code, a, in_group) + j, kind);
        total = m == 0 ? entry : total + entry;
    }
    return total;
}

/* Calls CALL(num_codebooks, in_group, code_bytes, kind) with constants for the schemes that are published. */
#define FOR_SCHEME(w, CALL)                                                                                          \
    do {                                                                                                             \
        const int64_t M = (w)->num_codebooks, G = (w)->in_group;                                                     \
        const int B = (w)->code_bytes, K = (w)->codebook_kind;                                                       \
        if (M == 1 && G == 8 && B == 2 && K == KIND_FLOAT16) CALL(1, 8, 2, KIND_FLOAT16);                            \
        else if (M == 1 && G == 8 && B == 2 && K == KIND_FLOAT32) CALL(1, 8, 2, KIND_FLOAT32);                       \
        else if (M == 1 && G == 8 && B == 2 && K == KIND_BFLOAT16) CALL(1, 8, 2, KIND_BFLOAT16);                     \
        else if (M == 2 && G == 8 && B == 1 && K == KIND_FLOAT16) CALL(2, 8, 1, KIND_FLOAT16);                       \
        else if (M == 2 && G == 8 && B == 1 && K == KIND_FLOAT32) CALL(2, 8, 1, KIND_FLOAT32);                       \
        else if (M == 2 && G == 8 && B == 1 && K == KIND_BFLOAT16) CALL(2, 8, 1, KIND_BFLOAT16);                     \
        else if (K == KIND_FLOAT16) CALL(M, G, B, KIND_FLOAT16);                                                     \
        else if (K == KIND_BFLOAT16) CALL(M, G, B, KIND_BFLOAT16);                                                   \
        else CALL(M, G, B, KIND_FLOAT32);                                                                            \
    } while (0)

INLINE float dot_row_of(const struct aqlm_weight *w, int64_t row, const float *x, int64_t num_codebooks,
                        int64_t in_group, int code_bytes, int kind) {
    const int64_t first = row / w->out_group * w->in_groups * num_codebooks, a = row % w->out_group;
    const int64_t panel = in_group < PANEL ? PANEL / in_group : 1;
    floats8 total = {0};
    for (int64_t begin = 0; begin < w->in_groups; begin += panel) {
        const int64_t end = begin + panel < w->in_groups ? begin + panel : w->in_groups;
        floats8 even = {0}, odd = {0};
        int64_t i = begin;
        for (; i + 2 <= end; i += 2)
            for (int64_t j = 0; j < in_group; j += 8) {
                const float *input = x + i * in_group + j;
                even += entries(w, first, i, a, j, in_group, num_codebooks, code_bytes, kind) *
                        *(const floats8_at *)input;
                odd += entries(w, first, i + 1, a, j, in_group, num_codebooks, code_bytes, kind) *
                       *(const floats8_at *)(input + in_group);
            }
        if (i < end)
            for (int64_t j = 0; j < in_group; j += 8)
                even += entries(w, first, i, a, j, in_group, num_codebooks, code_bytes, kind) *
                        *(const floats8_at *)(x + i * in_group + j);
        total += even + odd;
    }
    return sum_of8(total);
}

INLINE void dequantize_row_of(const struct aqlm_weight *w, int64_t row, float *out, int64_t num_codebooks,
                              int64_t in_group, int code_bytes, int kind) {
    const int64_t first = row / w->out_group * w->in_groups * num_codebooks, a = row % w->out_group;
    const float scale = float_at(w->scales, row / w->out_group, w->scale_kind);
    for (int64_t i = 0; i < w->in_groups; i++)
        for (int64_t j = 0; j < in_group; j += 8)
            *(floats8_at *)(out + i * in_group + j) =
                entries(w, first, i, a, j, in_group, num_codebooks, code_bytes, kind) * scale;
}

/* For groups that eight does not divide: one number at a time. */
INLINE void dequantize_ragged_row(const struct aqlm_weight *w, int64_t row, float *out) {
    const int64_t first = row / w->out_group * w->in_groups * w->num_codebooks, a = row % w->out_group;
    const float scale = float_at(w->scales, row / w->out_group, w->scale_kind);
    for (int64_t i = 0; i < w->in_groups; i++)
        for (int64_t j = 0; j < w->in_group; j++) {
            float total = 0;
            for (int64_t m = 0; m < w->num_codebooks; m++) {
                uint32_t code = code_at(w, first + i * w->num_codebooks + m, w->code_bytes);
                total += float_at(w->codebooks, entry_at(w, m, code, a, w->in_group) + j, w->codebook_kind);
            }
            out[i * w->in_group + j] = total * scale;
        }
}

static TARGET void dequantize_aqlm_row(const struct aqlm_weight *weight, int64_t row, float *out) {
    /* A copy, which no store to `out` can change: its fields stay in registers. */
    const struct aqlm_weight copy = *weight, *const w = &copy;
#define DEQUANTIZE(M, G, B, K) dequantize_row_of(w, row, out, M, G, B, K)
    if (w->in_group % 8)
        dequantize_ragged_row(w, row, out);
    else
        FOR_SCHEME(w, DEQUANTIZE);
#undef DEQUANTIZE
}

static TARGET void VARIANT(aqlm_rows)(const struct aqlm_weight *w, const struct dense_rows *rows, int64_t begin,
                                      int64_t end) {
    for (int64_t row = begin; row < end; row++)
        dequantize_aqlm_row(w, rows->first_row + row, rows->out + row * w->in_groups * w->in_group);
}

static TARGET float dot_aqlm_row(const struct aqlm_weight *w, int64_t row, const float *x) {
    float y = 0;
#define DOT(M, G, B, K) y = dot_row_of(w, row, x, M, G, B, K)
    FOR_SCHEME(w, DOT);
#undef DOT
    return y * float_at(w->scales, row / w->out_group, w->scale_kind);
}

static TARGET void VARIANT(aqlm_product)(const struct aqlm_weight *w, const struct product *p, int64_t begin,
                                         int64_t end, float *scratch) {
    const int64_t in_features = w->in_groups * w->in_group;
    if (p->tokens == 1 && w->in_group % 8 == 0) {
        for (int64_t row = begin; row < end; row++)
            p->y[row] = dot_aqlm_row(w, row, p->x) + (p->bias ? p->bias[row] : 0);
        return;
    }
    for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
        const int rows = (int)(end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS);
        for (int r = 0; r < rows; r++)
            dequantize_aqlm_row(w, row + r, scratch + r * in_features);
        dot_rows(scratch, in_features, rows, row, p);
    }
}
