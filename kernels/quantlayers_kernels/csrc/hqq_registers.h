/* HQQ products with few tokens: codes decoded in registers, WINDOW columns at a time, where a plane has as many bytes to
 * load. Dense rows are made faster the other way, with their columns in order.
 *
 * What the codes of a group stand for, (code - zero) * scale, lies in a vector where its lanes are enough, and the
 * codes permute it: no conversion and no arithmetic for each weight. Other codes are converted. Either way a weight
 * has the bits that the reference gives it.
 */
#if LANES >= 8

/* The bytes of a vector, and the columns whose codes are in them: byte b of lane l is column 4 * l + b. */
#define WINDOW (4 * LANES)

/* A row is taken in slots: as many neighbouring columns as the plane with the fewest bits a code has bytes. A slot's
 * codes lie at one shift, in neighbouring bytes of each plane. `low` and `high` are the planes' bits a code, 0 for no
 * second plane; all but `columns` are constants wherever nbits is one. */
struct slots {
    int64_t columns;
    int n, low, high;
};

INLINE struct slots slots_of(int64_t in_features, int nbits) {
    const int high = nbits == 3 || nbits == 5 ? 1 : nbits == 6 ? 2 : 0, low = nbits - high;
    const int n = 8 / (high ? high : low);
    return (struct slots){in_features / n, n, low, high};
}

/* Up to WINDOW columns in one slot and one group: [begin, end) of the slot, in the window that begins `at`. */
struct run {
    int64_t begin, end, at, group;
    int slot;
};

/* Moves on to the next columns of a row, {0} before the first. No window reaches beyond its slot: a last one that
 * would do begins earlier, on columns of the one before it. */
INLINE int next_run(struct slots slots, int64_t group_size, struct run *run) {
    run->begin = run->end;
    if (run->begin == slots.columns) {
        run->begin = 0;
        run->slot++;
    }
    if (run->slot == slots.n)
        return 0;
    const int64_t first = run->slot * slots.columns;
    if (first + run->begin == (run->group + 1) * group_size)
        run->group++;
    const int64_t end_of_group = (run->group + 1) * group_size - first, last = slots.columns - WINDOW;
    run->end = run->begin + WINDOW;
    run->end = run->end < slots.columns ? run->end : slots.columns;
    run->end = run->end < end_of_group ? run->end : end_of_group;
    run->at = run->begin < last ? run->begin : last;
    return 1;
}

/* The codes of a window, one in each byte; what lies above their bits is of others. Shifts are of whole lanes, and
 * what they bring in from the next byte stays above a code too. */
INLINE lanes codes_in_window(const uint8_t *packed, struct slots slots, int slot, int64_t at) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1;
    const uint8_t *const low = packed + slot % slots_a_byte * slots.columns + at;
    const lanes codes = *(const lanes_at *)low >> (slot / slots_a_byte * slots.low);
    if (slots.high == 0)
        return codes;
    const uint8_t *const high = packed + slots_a_byte * slots.columns + at;
    const uint32_t of_low = 0x01010101u * ((1u << slots.low) - 1);
    return (codes & of_low) | (*(const lanes_at *)high >> (slot * slots.high) << slots.low & ~of_low);
}

/* What the codes of one group stand for. */
struct group_values {
    floats table;
    float scale, zero;
};

INLINE int is_in_table(int nbits) {
    return 1 << nbits <= LANES;
}

INLINE struct group_values values_of_group(float scale, float zero, int nbits) {
    floats code = {0};
    if (is_in_table(nbits))
        for (int i = 0; i < LANES; i++)
            code[i] = (float)(i & ((1 << nbits) - 1));
    return (struct group_values){(code - zero) * scale, scale, zero};
}

/* The weights of codes that are the lowest bits of their lanes. A table repeats itself where the codes have fewer bits
 * than its index. */
INLINE floats weights_of(lanes codes, struct group_values values, int nbits) {
    if (is_in_table(nbits))
        return permuted(values.table, codes);
    return (floats_of((ints)(codes & ((1u << nbits) - 1))) - values.zero) * values.scale;
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

typedef floats sums_of_tile[BLOCK_ROWS][MAX_BLOCK_TOKENS];

INLINE void add_window(const struct hqq_block *w, struct slots slots, struct run run, const float *x,
                       int64_t token_step, int rows, int tokens, int nbits, sums_of_tile acc) {
    lanes codes[BLOCK_ROWS];
    struct group_values values[BLOCK_ROWS];
    for (int r = 0; r < rows; r++) {
        const int64_t group = r * w->n_groups + run.group;
        values[r] = values_of_group(w->scale[group], w->zero[group], nbits);
        codes[r] = codes_in_window(w->packed + r * w->row_bytes, slots, run.slot, run.at);
    }
    for (int b = 0; b < 4; b++) {
        floats weights[BLOCK_ROWS];
        for (int r = 0; r < rows; r++)
            weights[r] = weights_of(codes[r] >> (8 * b), values[r], nbits);
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
                       float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t group_size = w->in_features / w->n_groups;
    sums_of_tile total = {{{0}}};
    struct run run = {0};
    for (int64_t window = 0; window < n_windows;) {
        sums_of_tile acc = {{{0}}};
        const int64_t end = window + PANEL / WINDOW < n_windows ? window + PANEL / WINDOW : n_windows;
        for (; window < end && next_run(slots, group_size, &run); window++) {
            /* The rows that come next: the slots go through a row several times, memory only once. */
            for (int r = rows; r < 2 * rows; r++)
                __builtin_prefetch(w->packed + r * w->row_bytes + (run.slot * slots.columns + run.at) * nbits / 8);
            add_window(w, slots, run, x + window * WINDOW, n_windows * WINDOW, rows, tokens, nbits, acc);
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
                                                            float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    dot_packed(w, x, n_windows, 1, tokens, nbits, sums);
}

INLINE struct hqq_block read_block(const struct hqq_weight *w, int64_t row, int rows, float *scratch) {
    float *const scale = scratch, *const zero = scratch + rows * w->n_groups;
    convert_floats(w->scale, row * w->n_groups, rows * w->n_groups, w->kind, scale);
    convert_floats(w->zero, row * w->n_groups, rows * w->n_groups, w->kind, zero);
    return (struct hqq_block){w->packed + row * w->row_bytes, scale, zero, w->row_bytes, w->n_groups, w->in_features};
}

/* Rows [begin, end) of the product with `tokens` tokens; scratch: the arranged inputs, then a block's metadata. */
INLINE void multiply_tokens(const struct hqq_weight *w, const struct product *p, int64_t begin, int64_t end,
                            int64_t token, int tokens, int nbits, float *scratch) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t group_size = w->in_features / w->n_groups, n_windows = number_of_windows(slots, group_size);
    float *const metadata = scratch + tokens * n_windows * WINDOW;
    for (int t = 0; t < tokens; t++)
        arrange(p->x + (token + t) * w->in_features, slots, group_size, scratch + t * n_windows * WINDOW);
    int64_t row = begin;
    float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS];
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS) {
        const struct hqq_block block = read_block(w, row, BLOCK_ROWS, metadata);
        dot_packed(&block, scratch, n_windows, BLOCK_ROWS, tokens, nbits, sums);
        write_sums(sums, BLOCK_ROWS, tokens, row, token, p);
    }
    for (; row < end; row++) {
        const struct hqq_block block = read_block(w, row, 1, metadata);
        dot_packed_row(&block, scratch, n_windows, tokens, nbits, sums);
        write_sums(sums, 1, tokens, row, token, p);
    }
}

INLINE void multiply_packed(const struct hqq_weight *w, const struct product *p, int64_t begin, int64_t end,
                            int nbits, float *scratch) {
    int64_t token = 0;
    for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
        multiply_tokens(w, p, begin, end, token, BLOCK_TOKENS, nbits, scratch);
    switch (p->tokens - token) {
    case 3: multiply_tokens(w, p, begin, end, token, 3, nbits, scratch); break;
    case 2: multiply_tokens(w, p, begin, end, token, 2, nbits, scratch); break;
    case 1: multiply_tokens(w, p, begin, end, token, 1, nbits, scratch); break;
    }
}

#define FOR_NBITS(nbits, CALL)                                                                                       \
    switch (nbits) {                                                                                                 \
    case 1: CALL(1); break;                                                                                          \
    case 2: CALL(2); break;                                                                                          \
    case 3: CALL(3); break;                                                                                          \
    case 4: CALL(4); break;                                                                                          \
    case 5: CALL(5); break;                                                                                          \
    case 6: CALL(6); break;                                                                                          \
    case 8: CALL(8); break;                                                                                          \
    }

static TARGET void product_in_registers(const struct hqq_weight *w, const struct product *p, int64_t begin,
                                        int64_t end, float *scratch) {
#define MULTIPLY(nbits) multiply_packed(w, p, begin, end, nbits, scratch)
    FOR_NBITS(w->nbits, MULTIPLY);
#undef MULTIPLY
}

/* Decoding anew for each block of tokens pays for two of them; the scratch memory holds half-empty windows at most.
 * Arithmetic in AVX2's short vectors gains nothing here. */
INLINE int can_multiply_in_registers(const struct hqq_weight *w, const struct product *p) {
    const struct slots slots = slots_of(w->in_features, w->nbits);
    return w->in_features % slots.n == 0 && slots.columns >= WINDOW && (LANES == 16 || is_in_table(w->nbits)) &&
           p->tokens <= 2 * BLOCK_TOKENS &&
           number_of_windows(slots, w->in_features / w->n_groups) * WINDOW <= 2 * w->in_features;
}

#endif
