/* HQQ products with few tokens: codes decoded in registers, WINDOW columns at a time, where a plane has as many bytes to
 * load. Dense rows are made faster the other way, with their columns in order.
 *
 * What the codes of a group stand for, (code - zero) * scale, lies in a vector where its lanes are enough, and the
 * codes permute it: no conversion and no arithmetic for each weight. Other codes are converted, and so are those of
 * groups shorter than a window, of which it has several then: each lane has the scale and zero of its own. Either way a
 * weight has the bits that the reference gives it.
 */
#if LANES >= 8

/* What the codes of one group stand for; of short groups the floats of all codes, and each lane's scale and zero. */
struct group_values {
    floats table, scale, zero;
};

INLINE int is_in_table(int nbits) {
    return 1 << nbits <= LANES;
}

INLINE floats floats_of_codes(int nbits) {
    floats code = {0};
    if (is_in_table(nbits))
        for (int i = 0; i < LANES; i++)
            code[i] = (float)(i & ((1 << nbits) - 1));
    return code;
}

INLINE struct group_values values_of_group(float scale, float zero, int nbits) {
    const floats none = {0};
    return (struct group_values){(floats_of_codes(nbits) - zero) * scale, none + scale, none + zero};
}

/* `scale` and `zero` are those of the window's first group and the ones after it, with LANES numbers to load. */
INLINE struct group_values values_of_short_groups(const float *scale, const float *zero, int shift, int nbits) {
    lanes column;
    for (uint32_t lane = 0; lane < LANES; lane++)
        column[lane] = 4 * lane;
    const lanes group = column >> shift;
    return (struct group_values){floats_of_codes(nbits), permuted(load(scale), group), permuted(load(zero), group)};
}

/* The weights of codes that are the lowest bits of their lanes. A table repeats itself where the codes have fewer bits
 * than its index. */
INLINE floats weights_of(lanes codes, struct group_values values, int nbits, int short_groups) {
    if (is_in_table(nbits) && !short_groups)
        return permuted(values.table, codes);
    const floats numbers =
        is_in_table(nbits) ? permuted(values.table, codes) : floats_of((ints)(codes & ((1u << nbits) - 1)));
    return (numbers - values.zero) * values.scale;
}

/* Neighbouring rows of a weight, and their scales and zeros as float32. */
struct hqq_block {
    const uint8_t *packed;
    const float *scale, *zero; /* (rows, n_groups) */
    int64_t row_bytes, n_groups, in_features;
};

typedef floats sums_of_tile[BLOCK_ROWS][MAX_BLOCK_TOKENS];

INLINE void add_window(const struct hqq_block *w, struct slots slots, const struct joined_window *joined,
                       struct shifts shifts, const float *x, int64_t token_step, int rows, int tokens, int nbits,
                       int short_groups, int has_joined, sums_of_tile acc) {
    const struct window window = joined->first;
    const int shift = short_groups ? __builtin_ctzll((uint64_t)(w->in_features / w->n_groups)) : 0;
    lanes codes[BLOCK_ROWS];
    struct group_values values[BLOCK_ROWS];
    for (int r = 0; r < rows; r++) {
        const float *const scale = w->scale + r * w->n_groups + window.group;
        const float *const zero = w->zero + r * w->n_groups + window.group;
        values[r] = short_groups ? values_of_short_groups(scale, zero, shift, nbits)
                                 : values_of_group(*scale, *zero, nbits);
        if (!has_joined || joined->of_next == 0)
            codes[r] = codes_in_window(w->packed + r * w->row_bytes, slots, shifts, window.slot, window.at);
    }
    if (has_joined && joined->of_next != 0) {
        const struct shifts of_next = shifts_of_slot(slots, joined->next.slot);
        const struct shifts both = {joined_lanes(shifts.low, of_next.low, joined->of_next),
                                    joined_lanes(shifts.high, of_next.high, joined->of_next)};
        for (int r = 0; r < rows; r++)
            codes[r] = codes_in_joined_window(w->packed + r * w->row_bytes, slots, both, joined);
    }
    for (int b = 0; b < 4; b++) {
        floats weights[BLOCK_ROWS];
        for (int r = 0; r < rows; r++)
            weights[r] = weights_of(codes[r] >> (8 * b), values[r], nbits, short_groups);
        for (int t = 0; t < tokens; t++) {
            const floats input = load(x + t * token_step + b * LANES);
            for (int r = 0; r < rows; r++)
                acc[r][t] += weights[r] * input;
        }
    }
}

/* The sum of each vector's lanes, from the first to the last as sum_of adds them, for four vectors at once. */
INLINE void sums_in_order(const floats *v, float *out) {
    __m128 total = _mm_setzero_ps();
#if LANES == 16
    const __m512 ab = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]), cd = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]);
    const __m512 AB = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]), CD = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
    const __m512 lane[4] = {_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee),
                            _mm512_shuffle_ps(AB, CD, 0x44), _mm512_shuffle_ps(AB, CD, 0xee)};
#define ADD_FOUR(i)                                                                                                  \
    for (int k = 0; k < 4; k++)                                                                                      \
        total = _mm_add_ps(total, _mm512_extractf32x4_ps(lane[k], i))
    ADD_FOUR(0);
    ADD_FOUR(1);
    ADD_FOUR(2);
    ADD_FOUR(3);
#else
    const __m256 ab = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]);
    const __m256 AB = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]), CD = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
    const __m256 lane[4] = {_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee),
                            _mm256_shuffle_ps(AB, CD, 0x44), _mm256_shuffle_ps(AB, CD, 0xee)};
#define ADD_FOUR(i)                                                                                                  \
    for (int k = 0; k < 4; k++)                                                                                      \
        total = _mm_add_ps(total, _mm256_extractf128_ps(lane[k], i))
    ADD_FOUR(0);
    ADD_FOUR(1);
#endif
#undef ADD_FOUR
    _mm_storeu_ps(out, total);
}

/* Sums over all inputs for `rows` rows of the weight and `tokens` rows of arranged inputs; the counts and nbits are
 * constants in every call. */
INLINE void dot_packed(const struct hqq_block *w, const struct arranged_inputs *inputs, const float *x, int rows,
                       int tokens, int nbits, int short_groups, int has_joined,
                       float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t n_windows = inputs->n_windows;
    const int of_window = rows * nbits * WINDOW / 8; /* bytes of later rows, to be read ahead with each window of these */
    const uint8_t *const ahead = w->packed + bytes_ahead_of(rows * w->row_bytes);
    sums_of_tile total = {{{0}}};
    struct shifts shifts = shifts_of_slot(slots, 0);
    int slot = 0;
    for (int64_t i = 0; i < n_windows;) {
        sums_of_tile acc = {{{0}}};
        int64_t end = i + PANEL / WINDOW < n_windows ? i + PANEL / WINDOW : n_windows;
        for (; i < end; i++) {
            const struct joined_window *const window = &inputs->windows[i];
            if (window->first.slot != slot)
                shifts = shifts_of_slot(slots, slot = window->first.slot);
            for (int b = 0; b < of_window; b += CACHE_LINE)
                __builtin_prefetch(ahead + i * of_window + b);
            add_window(w, slots, window, shifts, x + i * WINDOW, n_windows * WINDOW, rows, tokens, nbits, short_groups,
                       has_joined, acc);
            if (has_joined && window->ends_panel)
                end = 0;
        }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                total[r][t] += acc[r][t];
    }
    for (int t = 0; t < tokens; t++) {
        floats of_token[BLOCK_ROWS] = {{0}};
        float of_rows[BLOCK_ROWS];
        for (int r = 0; r < rows; r++)
            of_token[r] = total[r][t];
        sums_in_order(of_token, of_rows);
        for (int r = 0; r < rows; r++)
            sums[r][t] = of_rows[r];
    }
}

/* The same for one row, of which few are left at the end; not compiled for each count, which would take minutes. */
static TARGET __attribute__((noinline)) void dot_packed_row(const struct hqq_block *w,
                                                            const struct arranged_inputs *inputs, const float *x,
                                                            int tokens, int nbits, int short_groups,
                                                            float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    dot_packed(w, inputs, x, 1, tokens, nbits, short_groups, can_join(nbits, short_groups), sums);
}

INLINE struct hqq_block read_block(const struct hqq_weight *w, int64_t row, int rows, float *scratch) {
    float *const scale = scratch, *const zero = scratch + rows * w->n_groups;
    convert_floats(w->scale, row * w->n_groups, rows * w->n_groups, w->kind, scale);
    convert_floats(w->zero, row * w->n_groups, rows * w->n_groups, w->kind, zero);
    return (struct hqq_block){w->packed + row * w->row_bytes, scale, zero, w->row_bytes, w->n_groups, w->in_features};
}

/* A block of rows, whose codes stay in the caches from one block of tokens to the next. */
INLINE void multiply_block(const struct hqq_block *block, const struct product *p, const struct arranged_inputs *inputs,
                           int64_t row, int64_t token, int tokens, int nbits, int short_groups, int has_joined) {
    float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS];
    dot_packed(block, inputs, inputs->x + token * inputs->n_windows * WINDOW, BLOCK_ROWS, tokens, nbits, short_groups,
               has_joined, sums);
    write_sums(sums, BLOCK_ROWS, tokens, row, token, p);
}

INLINE void multiply_packed(const struct hqq_weight *w, const struct product *p, const struct arranged_inputs *inputs,
                            int64_t begin, int64_t end, int nbits, int short_groups, int has_joined,
                            float *scratch) {
    int64_t row = begin;
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS) {
        const struct hqq_block block = read_block(w, row, BLOCK_ROWS, scratch);
        int64_t token = 0;
        for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
            multiply_block(&block, p, inputs, row, token, BLOCK_TOKENS, nbits, short_groups, has_joined);
        switch (p->tokens - token) {
        case 3: multiply_block(&block, p, inputs, row, token, 3, nbits, short_groups, has_joined); break;
        case 2: multiply_block(&block, p, inputs, row, token, 2, nbits, short_groups, has_joined); break;
        case 1: multiply_block(&block, p, inputs, row, token, 1, nbits, short_groups, has_joined); break;
        }
    }
    for (; row < end; row++) {
        const struct hqq_block block = read_block(w, row, 1, scratch);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS];
            dot_packed_row(&block, inputs, inputs->x + token * inputs->n_windows * WINDOW, 1, nbits, short_groups, sums);
            write_sums(sums, 1, 1, row, token, p);
        }
    }
}

static TARGET void product_in_registers(const struct hqq_weight *w, const struct product *p,
                                        const struct arranged_inputs *inputs, int64_t begin, int64_t end,
                                        float *scratch) {
    if (has_short_groups(slots_of(w->in_features, w->nbits), w->in_features / w->n_groups, w->nbits)) {
        switch (w->nbits) {
        case 1: multiply_packed(w, p, inputs, begin, end, 1, 1, 0, scratch); break;
        case 2: multiply_packed(w, p, inputs, begin, end, 2, 1, 0, scratch); break;
        case 3: multiply_packed(w, p, inputs, begin, end, 3, 1, 0, scratch); break;
        case 4: multiply_packed(w, p, inputs, begin, end, 4, 1, 0, scratch); break;
        }
        return;
    }
    if (inputs->has_joined) {
        if (w->nbits == 3 && can_join(3, 0))
            multiply_packed(w, p, inputs, begin, end, 3, 0, 1, scratch);
        if (w->nbits == 2 && can_join(2, 0))
            multiply_packed(w, p, inputs, begin, end, 2, 0, 1, scratch);
        return;
    }
#define MULTIPLY(nbits) multiply_packed(w, p, inputs, begin, end, nbits, 0, 0, scratch)
    FOR_NBITS(w->nbits, MULTIPLY);
#undef MULTIPLY
}

/* Decoding again for each block of tokens pays for two of them, with short groups for one; the scratch memory holds
 * half-empty windows at most. Arithmetic on codes in AVX2's short vectors gains nothing here. */
INLINE int can_multiply_in_registers(const struct hqq_weight *w, const struct product *p) {
    const struct slots slots = slots_of(w->in_features, w->nbits);
    const int64_t group_size = w->in_features / w->n_groups;
    if (w->in_features % slots.n != 0 || slots.columns < WINDOW || !(LANES == 16 || is_in_table(w->nbits)))
        return 0;
    if (has_short_groups(slots, group_size, w->nbits)) /* with AVX2 unpacking is faster for one token */
        return p->tokens <= BLOCK_TOKENS && (LANES == 16 || p->tokens > 1 || group_size < 2 * LANES);
    return p->tokens <= 2 * BLOCK_TOKENS && number_of_windows(slots, group_size) * WINDOW <= 2 * w->in_features;
}

/* How many windows a row of this product is multiplied in; 0 where it is multiplied in another way. */
static TARGET int64_t VARIANT(hqq_exact_windows)(const struct hqq_weight *w, const struct product *p) {
    if (!can_multiply_in_registers(w, p))
        return 0;
    const struct slots slots = slots_of(w->in_features, w->nbits);
    return joined_windows(w, slots, NULL);
}

INLINE void arrange_columns(const float *x, struct slots slots, struct window window, float *arranged) {
    const float *const from = x + window.slot * slots.columns + window.at;
    for (int k = window.begin; k < window.end; k++)
        arranged[k % 4 * LANES + k / 4] = from[k];
}

/* Finds the windows, and puts the inputs of each in the order of its codes, (tokens, windows, 4, LANES), with zeros for
 * columns that do not count. Whether windows are joined. */
static TARGET int VARIANT(hqq_arrange)(const struct hqq_weight *w, const struct product *p,
                                       struct joined_window *windows, float *arranged) {
    const struct slots slots = slots_of(w->in_features, w->nbits);
    const int64_t n = joined_windows(w, slots, windows);
    int has_joined = 0;
    for (int64_t token = 0; token < p->tokens; token++) {
        const float *const x = p->x + token * w->in_features;
        for (int64_t i = 0; i < n; i++, arranged += WINDOW) {
            const struct window window = windows[i].first;
            const float *const from = x + window.slot * slots.columns + window.at;
            if (window.end - window.begin == WINDOW) {
                for (int b = 0; b < 4; b++)
                    for (int lane = 0; lane < LANES; lane++)
                        arranged[b * LANES + lane] = from[4 * lane + b];
                continue;
            }
            memset(arranged, 0, WINDOW * sizeof(float));
            arrange_columns(x, slots, window, arranged);
            arrange_columns(x, slots, windows[i].next, arranged);
            has_joined |= windows[i].of_next != 0;
        }
    }
    return has_joined;
}

#endif
