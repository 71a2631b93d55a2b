/* HQQ: products of codes whose zero points come off once for each group. */

/* The scales of the groups of `rows` neighbouring rows, and these times the zero points minus `centre`; with zeros up to
 * a multiple of the widest vector. */
struct row_scales {
    float *scale, *offset; /* (rows, padded(n_groups)) */
};

INLINE struct row_scales row_scales_of(const struct hqq_weight *w, int64_t row, int rows, float centre, float *scratch) {
    const int64_t n = w->n_groups, n_groups = padded(n);
    const struct row_scales of_rows = {scratch, scratch + rows * n_groups};
#if LANES == 16
    for (int64_t g = 0; g < n_groups; g += LANES)
        for (int r = 0; r < rows; r++) {
            const floats scale = first_lanes(w->scale, (row + r) * n + g, n - g, w->kind);
            const floats zero = first_lanes(w->zero, (row + r) * n + g, n - g, w->kind);
            store(of_rows.scale + r * n_groups + g, scale);
            store(of_rows.offset + r * n_groups + g, (zero - centre) * scale);
        }
#else
    float *const scales = of_rows.offset + rows * n_groups, *const zeros = scales + rows * n + MAX_LANES;
    convert_floats(w->scale, row * n, rows * n, w->kind, scales);
    convert_floats(w->zero, row * n, rows * n, w->kind, zeros);
    ints lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (int64_t g = 0; g < n_groups; g += LANES) {
        const ints is_group = lane < (ints){0} + (int32_t)(n - g);
        for (int r = 0; r < rows; r++) {
            const floats scale = (floats)((ints)load(scales + r * n + g) & is_group);
            const floats zero = (floats)((ints)load(zeros + r * n + g) & is_group);
            store(of_rows.scale + r * n_groups + g, scale);
            store(of_rows.offset + r * n_groups + g, (zero - centre) * scale);
        }
    }
#endif
    return of_rows;
}

/* What the zero points take off a product, lane by lane. */
INLINE floats zeros_of(const float *of_row, const float *of_token, int64_t n_groups) {
    floats total = {0};
    for (int64_t g = 0; g < n_groups; g += LANES)
        total += load(of_row + g) * load(of_token + g);
    return total;
}

#if LANES >= 8

/* Sums of the lanes of four vectors. */
INLINE void sums_of_four_vectors(const floats *v, float *out) {
#if LANES == 16
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]),
                                    _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]),
                                    _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]),
                                    _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]),
                                    _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]));
    const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* Writes the sums of a tile's lanes, each times `unit`, plus the bias. */
INLINE void write_tile(const struct product *p, int64_t row, int64_t token, int rows, int tokens,
                       floats total[BLOCK_ROWS][MAX_BLOCK_TOKENS], float unit) {
    for (int t = 0; t < tokens; t++) {
        floats of_token[BLOCK_ROWS] = {{0}};
        float sums[BLOCK_ROWS];
        for (int r = 0; r < rows; r++)
            of_token[r] = total[r][t];
        sums_of_four_vectors(of_token, sums);
        for (int r = 0; r < rows; r++)
            p->y[(token + t) * p->out_features + row + r] = sums[r] * unit + (p->bias ? p->bias[row + r] : 0);
    }
}

#endif
