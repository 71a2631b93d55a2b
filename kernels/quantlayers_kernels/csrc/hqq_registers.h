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

/* Puts the inputs of each window in the order of its codes, (windows, 4, LANES), with zeros outside of the run. */
INLINE void arrange(const float *x, struct slots slots, int64_t group_size, float *arranged) {
    for (struct run run = {0}; next_run(slots, group_size, &run); arranged += WINDOW) {
        const float *const from = x + run.slot * slots.columns + run.at;
        for (int i = 0; i < WINDOW; i++) {
            const int64_t j = run.at + i;
            arranged[i % 4 * LANES + i / 4] = run.begin <= j && j < run.end ? from[i] : 0;
        }
    }
}

INLINE int64_t number_of_windows(struct slots slots, int64_t group_size) {
    int64_t n = 0;
    for (struct run run = {0}; next_run(slots, group_size, &run);)
        n++;
    return n;
}

/* How many columns a window must not reach beyond. */
INLINE int64_t run_size_of(int64_t in_features, int64_t n_groups, int short_groups) {
    return short_groups ? in_features : in_features / n_groups;
}

typedef floats sums_of_tile[BLOCK_ROWS][MAX_BLOCK_TOKENS];

INLINE void add_window(const struct hqq_block *w, struct slots slots, struct run run, const float *x,
                       int64_t token_step, int rows, int tokens, int nbits, int short_groups, sums_of_tile acc) {
    const int shift = short_groups ? __builtin_ctzll((uint64_t)(w->in_features / w->n_groups)) : 0;
    const int64_t first = short_groups ? (run.slot * slots.columns + run.at) >> shift : run.group;
    lanes codes[BLOCK_ROWS];
    struct group_values values[BLOCK_ROWS];
    for (int r = 0; r < rows; r++) {
        const float *const scale = w->scale + r * w->n_groups + first, *const zero = w->zero + r * w->n_groups + first;
        values[r] = short_groups ? values_of_short_groups(scale, zero, shift, nbits)
                                 : values_of_group(*scale, *zero, nbits);
        codes[r] = codes_in_window(w->packed + r * w->row_bytes, slots, run.slot, run.at);
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

/* Sums over all inputs for `rows` rows of the weight and `tokens` rows of arranged inputs; the counts and nbits are
 * constants in every call. */
INLINE void dot_packed(const struct hqq_block *w, const float *x, int64_t n_windows, int rows, int tokens, int nbits,
                       int short_groups, float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t run_size = run_size_of(w->in_features, w->n_groups, short_groups);
    sums_of_tile total = {{{0}}};
    struct run run = {0};
    for (int64_t window = 0; window < n_windows;) {
        sums_of_tile acc = {{{0}}};
        const int64_t end = window + PANEL / WINDOW < n_windows ? window + PANEL / WINDOW : n_windows;
        for (; window < end && next_run(slots, run_size, &run); window++) {
            /* The rows that come next: the slots go through a row several times, memory only once. */
            for (int r = rows; r < 2 * rows; r++)
                __builtin_prefetch(w->packed + r * w->row_bytes + (run.slot * slots.columns + run.at) * nbits / 8);
            add_window(w, slots, run, x + window * WINDOW, n_windows * WINDOW, rows, tokens, nbits, short_groups, acc);
        }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                total[r][t] += acc[r][t];
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            sums[r][t] = sum_of(total[r][t]);
}

/* The same for one row, of which few are left at the end; not compiled for each count, which would take minutes. */
static TARGET __attribute__((noinline)) void dot_packed_row(const struct hqq_block *w, const float *x,
                                                            int64_t n_windows, int tokens, int nbits,
                                                            int short_groups,
                                                            float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    dot_packed(w, x, n_windows, 1, tokens, nbits, short_groups, sums);
}

INLINE struct hqq_block read_block(const struct hqq_weight *w, int64_t row, int rows, float *scratch) {
    float *const scale = scratch, *const zero = scratch + rows * w->n_groups;
    convert_floats(w->scale, row * w->n_groups, rows * w->n_groups, w->kind, scale);
    convert_floats(w->zero, row * w->n_groups, rows * w->n_groups, w->kind, zero);
    return (struct hqq_block){w->packed + row * w->row_bytes, scale, zero, w->row_bytes, w->n_groups, w->in_features};
}

/* Rows [begin, end) of the product with `tokens` tokens; scratch: the arranged inputs, then a block's metadata. */
INLINE void multiply_tokens(const struct hqq_weight *w, const struct product *p, int64_t begin, int64_t end,
                            int64_t token, int tokens, int nbits, int short_groups, float *scratch) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t run_size = run_size_of(w->in_features, w->n_groups, short_groups);
    const int64_t n_windows = number_of_windows(slots, run_size);
    float *const metadata = scratch + tokens * n_windows * WINDOW;
    for (int t = 0; t < tokens; t++)
        arrange(p->x + (token + t) * w->in_features, slots, run_size, scratch + t * n_windows * WINDOW);
    int64_t row = begin;
    float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS];
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS) {
        const struct hqq_block block = read_block(w, row, BLOCK_ROWS, metadata);
        dot_packed(&block, scratch, n_windows, BLOCK_ROWS, tokens, nbits, short_groups, sums);
        write_sums(sums, BLOCK_ROWS, tokens, row, token, p);
    }
    for (; row < end; row++) {
        const struct hqq_block block = read_block(w, row, 1, metadata);
        dot_packed_row(&block, scratch, n_windows, tokens, nbits, short_groups, sums);
        write_sums(sums, 1, tokens, row, token, p);
    }
}

INLINE void multiply_packed(const struct hqq_weight *w, const struct product *p, int64_t begin, int64_t end,
                            int nbits, int short_groups, float *scratch) {
    int64_t token = 0;
    for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
        multiply_tokens(w, p, begin, end, token, BLOCK_TOKENS, nbits, short_groups, scratch);
    switch (p->tokens - token) {
    case 3: multiply_tokens(w, p, begin, end, token, 3, nbits, short_groups, scratch); break;
    case 2: multiply_tokens(w, p, begin, end, token, 2, nbits, short_groups, scratch); break;
    case 1: multiply_tokens(w, p, begin, end, token, 1, nbits, short_groups, scratch); break;
    }
}

static TARGET void product_in_registers(const struct hqq_weight *w, const struct product *p, int64_t begin,
                                        int64_t end, float *scratch) {
    if (has_short_groups(slots_of(w->in_features, w->nbits), w->in_features / w->n_groups, w->nbits)) {
        switch (w->nbits) {
        case 1: multiply_packed(w, p, begin, end, 1, 1, scratch); break;
        case 2: multiply_packed(w, p, begin, end, 2, 1, scratch); break;
        case 3: multiply_packed(w, p, begin, end, 3, 1, scratch); break;
        case 4: multiply_packed(w, p, begin, end, 4, 1, scratch); break;
        }
        return;
    }
#define MULTIPLY(nbits) multiply_packed(w, p, begin, end, nbits, 0, scratch)
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

#endif
