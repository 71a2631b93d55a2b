/* AQLM: sums of codebook entries to dense rows, and their product with x. See aqlm/reference.py for the definition. */

/* The functions below are inlined where FOR_SCHEME makes the fields that a published scheme fixes constants. */

INLINE uint32_t code_at(const struct aqlm_weight *w, int64_t i) {
    /* The mask makes any stored code valid: no code reads outside of its codebook. */
    const uint32_t mask = (uint32_t)w->size - 1;
    return (w->code_bytes == 1 ? ((const uint8_t *)w->codes)[i] : ((const uint16_t *)w->codes)[i]) & mask;
}

/* Offset of an entry's part for row `a` of its group; codebooks are (num_codebooks, size, out_group, in_group). */
INLINE int64_t entry_at(const struct aqlm_weight *w, int64_t codebook, uint32_t code, int64_t a) {
    return ((codebook * w->size + code) * w->out_group + a) * w->in_group;
}

/* Sum over the codebooks of eight inputs, from input j of group i of a row whose codes start at `first`. */
INLINE floats8 entries(const struct aqlm_weight *w, int64_t first, int64_t i, int64_t a, int64_t j) {
    floats8 total = {0};
    for (int64_t m = 0; m < w->num_codebooks; m++) {
        uint32_t code = code_at(w, first + i * w->num_codebooks + m);
        floats8 entry = floats8_at_kind(w->codebooks, entry_at(w, m, code, a) + j, w->codebook_kind);
        total = m == 0 ? entry : total + entry;
    }
    return total;
}

/* Calls CALL(s) with a copy of the weight w, which no store can change, and whose fields are constants for the schemes
 * that are published, 1x16 and 2x8. */
#define FOR_SCHEME(w, CALL)                                                                                          \
    do {                                                                                                             \
        struct aqlm_weight scheme = *(w);                                                                            \
        const struct aqlm_weight *const s = &scheme;                                                                 \
        const int is_flat = s->out_group == 1 && s->in_group == 8;                                                   \
        if (is_flat && s->num_codebooks == 1 && s->code_bytes == 2 && s->size == 65536) {                            \
            scheme.out_group = 1, scheme.in_group = 8, scheme.num_codebooks = 1, scheme.code_bytes = 2;              \
            scheme.size = 65536;                                                                                     \
            FOR_KIND(scheme, CALL(s));                                                                               \
        } else if (is_flat && s->num_codebooks == 2 && s->code_bytes == 1 && s->size == 256) {                       \
            scheme.out_group = 1, scheme.in_group = 8, scheme.num_codebooks = 2, scheme.code_bytes = 1;              \
            scheme.size = 256;                                                                                       \
            FOR_KIND(scheme, CALL(s));                                                                               \
        } else                                                                                                       \
            FOR_KIND(scheme, CALL(s));                                                                               \
    } while (0)

#define FOR_KIND(scheme, CALL)                                                                                       \
    do {                                                                                                             \
        if (scheme.codebook_kind == KIND_FLOAT16) {                                                                  \
            scheme.codebook_kind = KIND_FLOAT16;                                                                     \
            CALL;                                                                                                    \
        } else if (scheme.codebook_kind == KIND_BFLOAT16) {                                                          \
            scheme.codebook_kind = KIND_BFLOAT16;                                                                    \
            CALL;                                                                                                    \
        } else {                                                                                                     \
            scheme.codebook_kind = KIND_FLOAT32;                                                                     \
            CALL;                                                                                                    \
        }                                                                                                            \
    } while (0)

/* Fetches n codes ahead. */
INLINE void prefetch_codes(const struct aqlm_weight *w, int64_t first, int64_t n) {
    const char *const bytes = (const char *)w->codes + first * w->code_bytes;
    for (int64_t b = 0; b < n * w->code_bytes; b += CACHE_LINE)
        __builtin_prefetch(bytes + b);
}

/* Sums over all inputs for row `a` of `rows` neighbouring output groups, which share their loads of x. */
INLINE void dot_rows_of(const struct aqlm_weight *w, int64_t out_group, int64_t a, int rows, const float *x,
                        float *sums) {
    const int64_t step = w->in_groups * w->num_codebooks, first = out_group * step;
    const int64_t panel = w->in_group < PANEL ? PANEL / w->in_group : 1;
    floats8 total[BLOCK_ROWS] = {{0}};
    for (int64_t begin = 0; begin < w->in_groups; begin += panel) {
        const int64_t end = begin + panel < w->in_groups ? begin + panel : w->in_groups;
        floats8 acc[BLOCK_ROWS] = {{0}};
        for (int r = rows; r < 2 * rows; r++)
            prefetch_codes(w, first + r * step + begin * w->num_codebooks, (end - begin) * w->num_codebooks);
        for (int64_t i = begin; i < end; i++)
            for (int64_t j = 0; j < w->in_group; j += 8) {
                const floats8 input = *(const floats8_at *)(x + i * w->in_group + j);
                for (int r = 0; r < rows; r++)
                    acc[r] += entries(w, first + r * step, i, a, j) * input;
            }
        for (int r = 0; r < rows; r++)
            total[r] += acc[r];
    }
    for (int r = 0; r < rows; r++)
        sums[r] = sum_of8(total[r]);
}

INLINE void dequantize_row_of(const struct aqlm_weight *w, int64_t row, float *out) {
    const int64_t first = row / w->out_group * w->in_groups * w->num_codebooks, a = row % w->out_group;
    const float scale = float_at(w->scales, row / w->out_group, w->scale_kind);
    for (int64_t i = 0; i < w->in_groups; i++)
        for (int64_t j = 0; j < w->in_group; j += 8)
            *(floats8_at *)(out + i * w->in_group + j) = entries(w, first, i, a, j) * scale;
}

/* For group sizes that are not multiples of eight: one number at a time. */
INLINE void dequantize_ragged_row(const struct aqlm_weight *w, int64_t row, float *out) {
    const int64_t first = row / w->out_group * w->in_groups * w->num_codebooks, a = row % w->out_group;
    const float scale = float_at(w->scales, row / w->out_group, w->scale_kind);
    for (int64_t i = 0; i < w->in_groups; i++)
        for (int64_t j = 0; j < w->in_group; j++) {
            float total = 0;
            for (int64_t m = 0; m < w->num_codebooks; m++) {
                uint32_t code = code_at(w, first + i * w->num_codebooks + m);
                total += float_at(w->codebooks, entry_at(w, m, code, a) + j, w->codebook_kind);
            }
            out[i * w->in_group + j] = total * scale;
        }
}

static TARGET void dequantize_aqlm_row(const struct aqlm_weight *w, int64_t row, float *out) {
#define DEQUANTIZE(scheme) dequantize_row_of(scheme, row, out)
    if (w->in_group % 8)
        dequantize_ragged_row(w, row, out);
    else
        FOR_SCHEME(w, DEQUANTIZE);
#undef DEQUANTIZE
}

static TARGET void VARIANT(aqlm_rows)(const struct aqlm_weight *w, const struct dense_rows *rows, int64_t begin,
                                      int64_t end, float *scratch) {
    const int64_t in_features = w->in_groups * w->in_group;
    for (int64_t row = begin; row < end; row++) {
        float *out = row_to_write(rows, row, in_features, scratch);
        dequantize_aqlm_row(w, rows->first_row + row, out);
        finish_row(rows, row, in_features, out);
    }
}

/* One token and up to BLOCK_ROWS neighbouring rows. */
static TARGET void dot_aqlm_rows(const struct aqlm_weight *w, int64_t row, int rows, const float *x, float *sums) {
#define DOT_BLOCK(scheme) dot_rows_of(scheme, row, 0, BLOCK_ROWS, x, sums)
#define DOT_ROW(scheme) dot_rows_of(scheme, (row + r) / w->out_group, (row + r) % w->out_group, 1, x, sums + r)
    if (rows == BLOCK_ROWS && w->out_group == 1)
        FOR_SCHEME(w, DOT_BLOCK);
    else
        for (int r = 0; r < rows; r++)
            FOR_SCHEME(w, DOT_ROW);
#undef DOT_ROW
#undef DOT_BLOCK
    for (int r = 0; r < rows; r++)
        sums[r] *= float_at(w->scales, (row + r) / w->out_group, w->scale_kind);
}

static TARGET void VARIANT(aqlm_product)(const struct aqlm_weight *w, const struct product *p, int64_t begin,
                                         int64_t end, float *scratch) {
    const int64_t in_features = w->in_groups * w->in_group;
    if (p->tokens == 1 && w->in_group % 8 == 0) {
        for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
            const int rows = (int)(end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS);
            float sums[BLOCK_ROWS];
            dot_aqlm_rows(w, row, rows, p->x, sums);
            for (int r = 0; r < rows; r++)
                p->y[row + r] = sums[r] + (p->bias ? p->bias[row + r] : 0);
        }
        return;
    }
    for (int64_t row = begin; row < end; row += BLOCK_ROWS) {
        const int rows = (int)(end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS);
        for (int r = 0; r < rows; r++)
            dequantize_aqlm_row(w, row + r, scratch + r * in_features);
        dot_rows(scratch, in_features, rows, row, p);
    }
}
