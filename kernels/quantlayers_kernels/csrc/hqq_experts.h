/* HQQ: products of sorted tokens with the weights of their experts, in bfloat16 with AMX's tiles of 16 x 16 sums.
 *
 * A weight is decoded into the layout that the tiles read, a block of rows at a time: BLAS would read dense rows again,
 * to bring them into that layout. What a code stands for is looked up, 32 codes in one instruction: a group's values
 * lie in a vector of 32 numbers, as often as they fit, so that the bits above a code do not matter.
 */
#if HAS_MATRIX_TILES

#define TILE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define TILE_INLINE static inline __attribute__((always_inline)) TILE_TARGET

/* Bytes and rows of a tile; columns of bfloat16 in a row of it. */
enum { TILE_BYTES = 1024, TILE_ROWS = 16, TILE_COLUMNS = 32 };
/* Between tiles, or rows, that are written one after the other: not a multiple of what maps to one set of the cache. */
#define APART(bytes) (((bytes) + 1023) / 1024 * 1024 + CACHE_LINE)

/* A row while it is decoded: scales and zeros, the values of its groups (32 bfloat16 each), and codes that do not fill
 * whole slots of bytes. */
struct row_tables {
    float *scale, *zero;
    uint16_t *values;
    int8_t *codes;
};

static inline int64_t row_tables_bytes(const struct hqq_weight *w) {
    return w->n_groups * (2 * (int64_t)sizeof(float) + CACHE_LINE) + (w->in_features + 63) / 64 * 64 + CACHE_LINE;
}

TILE_INLINE struct row_tables row_tables_in(const struct hqq_weight *w, uint8_t *memory) {
    struct row_tables tables = {.values = (uint16_t *)memory};
    memory += w->n_groups * CACHE_LINE;
    tables.codes = (int8_t *)memory;
    tables.scale = (float *)(memory + (w->in_features + 63) / 64 * 64);
    tables.zero = tables.scale + w->n_groups;
    return tables;
}

TILE_INLINE void prepare_values(const struct hqq_weight *w, int64_t row, struct row_tables tables, __m512 first,
                                __m512 second) {
    convert_floats(w->scale, row * w->n_groups, w->n_groups, w->kind, tables.scale);
    convert_floats(w->zero, row * w->n_groups, w->n_groups, w->kind, tables.zero);
    for (int64_t g = 0; g < w->n_groups; g++) {
        const __m512 scale = _mm512_set1_ps(tables.scale[g]), zero = _mm512_set1_ps(tables.zero[g]);
        const __m512 low = _mm512_mul_ps(_mm512_sub_ps(first, zero), scale);
        const __m512 high = _mm512_mul_ps(_mm512_sub_ps(second, zero), scale);
        _mm512_store_si512(tables.values + g * TILE_COLUMNS, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* The 16 numbers of a table from `start`, which is negative where codes are stored minus the middle of their range. */
TILE_INLINE __m512 codes_of_table(int start, int mask, int centre) {
    float code[16];
    for (int i = 0; i < 16; i++)
        code[i] = (float)(mask ? (start + i) & mask : start + i + centre);
    return _mm512_loadu_ps(code);
}

/* The values of neighbouring columns' groups, TILE_COLUMNS columns after the other: a division for each would take longer
 * than all else. */
struct values_at {
    const uint16_t *values;
    int64_t left, steps_a_group;
};

TILE_INLINE struct values_at values_of_column(const struct hqq_weight *w, struct row_tables tables, int64_t column) {
    const int64_t group_size = w->in_features / w->n_groups, steps = group_size / TILE_COLUMNS;
    return (struct values_at){tables.values + column / group_size * TILE_COLUMNS,
                              steps - column % group_size / TILE_COLUMNS, steps};
}

TILE_INLINE __m512i next_values(struct values_at *at) {
    const __m512i values = _mm512_load_si512(at->values);
    if (--at->left == 0) {
        at->left = at->steps_a_group;
        at->values += TILE_COLUMNS;
    }
    return values;
}

/* Row `row` of all rows as bfloat16; `nbits` is a constant in every call. */
TILE_INLINE void decode_row(const struct hqq_weight *w, int64_t row, struct row_tables tables, int nbits,
                            uint16_t *out) {
    const int64_t n = w->in_features;
    const int slots = 8 / nbits;
    const uint8_t *const packed = w->packed + row * w->row_bytes;
    if (8 % nbits == 0 && nbits <= 4 && n % (slots * TILE_COLUMNS) == 0) {
        const int mask = (1 << nbits) - 1;
        const int64_t columns = n / slots;
        prepare_values(w, row, tables, codes_of_table(0, mask, 0), codes_of_table(16, mask, 0));
        for (int slot = 0; slot < slots; slot++) {
            struct values_at at = values_of_column(w, tables, slot * columns);
            for (int64_t b = 0; b < columns; b += TILE_COLUMNS) {
                const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(packed + b)));
                const __m512i index = _mm512_srli_epi16(codes, (unsigned)(slot * nbits));
                _mm512_storeu_si512(out + slot * columns + b, _mm512_permutexvar_epi16(index, next_values(&at)));
            }
        }
        return;
    }
    prepare_values(w, row, tables, codes_of_table(0, 0, centre_of(nbits)), codes_of_table(-16, 0, centre_of(nbits)));
    unpack_row(packed, n, nbits, tables.codes);
    struct values_at at = values_of_column(w, tables, 0);
    for (int64_t k = 0; k < n; k += TILE_COLUMNS) {
        const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(tables.codes + k)));
        _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(codes, next_values(&at)));
    }
}

static TILE_TARGET void decode_row_of(const struct hqq_weight *w, int64_t row, struct row_tables tables,
                                      uint16_t *out) {
    switch (w->nbits) {
    case 1: decode_row(w, row, tables, 1, out); break;
    case 2: decode_row(w, row, tables, 2, out); break;
    case 3: decode_row(w, row, tables, 3, out); break;
    case 4: decode_row(w, row, tables, 4, out); break;
    case 5: decode_row(w, row, tables, 5, out); break;
    }
}

/* Rows become columns: each of four rounds is a perfect shuffle of rows i and i + 8. */
TILE_INLINE void transpose(__m512i rows[16]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (int round = 0; round < 4; round++) {
        __m512i next[16];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + 8]);
            next[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + 8]);
        }
        memcpy(rows, next, sizeof(next));
    }
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
};

/* All tiles whole; what the thread had set up is kept in `before`, since BLAS uses the same registers. */
TILE_INLINE void begin_tiles(struct tile_config *before) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes_a_row[i] = CACHE_LINE;
        config.rows[i] = TILE_ROWS;
    }
    _tile_storeconfig(before);
    _tile_loadconfig(&config);
}

TILE_INLINE void end_tiles(const struct tile_config *before) {
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}

/* y[token][row + 0..15] of a tile (row, token) of sums. */
TILE_INLINE void write_transposed(const float *sums, int64_t tokens, uint16_t *y, int64_t step) {
    __m512i rows[16];
    for (int i = 0; i < 16; i++)
        rows[i] = _mm512_load_si512(sums + i * 16);
    transpose(rows);
    for (int64_t t = 0; t < tokens && t < TILE_ROWS; t++)
        _mm256_storeu_si256((__m256i *)(y + t * step), (__m256i)_mm512_cvtneps_pbh((__m512)rows[t]));
}

/* Up to EXPERT_TOKENS tokens as tiles of (pairs of inputs, tokens), with zeros for tokens that are not there. */
TILE_INLINE void arrange_tokens(const uint16_t *x, int64_t tokens, int64_t n, int64_t token_tiles, uint8_t *tiles) {
    for (int64_t k = 0; k < n; k += TILE_COLUMNS)
        for (int64_t t = 0; t < token_tiles; t++, tiles += TILE_BYTES) {
            __m512i rows[16];
            for (int64_t i = 0; i < TILE_ROWS; i++) {
                const int64_t token = t * TILE_ROWS + i;
                rows[i] = token < tokens ? _mm512_loadu_si512(x + token * n + k) : _mm512_setzero_si512();
            }
            transpose(rows);
            for (int i = 0; i < TILE_ROWS; i++)
                _mm512_store_si512(tiles + i * CACHE_LINE, rows[i]);
        }
}

/* Rows of the product that are decoded together. */
enum { FORWARD_ROWS = 2 * TILE_ROWS };

static inline int64_t product_bytes(const struct hqq_weight *w) {
    return FORWARD_ROWS * APART(2 * w->in_features) + EXPERT_TOKENS / TILE_ROWS * 2 * TILE_ROWS * w->in_features * 2 +
           TILE_BYTES + row_tables_bytes(w);
}

/* Sums of two tiles of rows and one or two of tokens; `pair` is 1 where there are two. */
TILE_INLINE void multiply_tiles(const uint8_t *dense, int64_t pitch, const uint8_t *tokens, int64_t token_step,
                                int64_t n, int pair) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < n; k += TILE_COLUMNS, dense += CACHE_LINE, tokens += token_step) {
        _tile_loadd(4, dense, pitch);
        _tile_loadd(5, dense + TILE_ROWS * pitch, pitch);
        _tile_loadd(6, tokens, CACHE_LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (pair) {
            _tile_loadd(7, tokens + TILE_BYTES, CACHE_LINE);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

static TILE_TARGET void multiply_expert(const struct hqq_weight *w, const struct expert_tokens *p, int64_t expert,
                                        int64_t begin, int64_t tokens, uint8_t *scratch) {
    const int64_t n = w->in_features, token_tiles = (tokens + TILE_ROWS - 1) / TILE_ROWS, pitch = APART(2 * n);
    uint8_t *const arranged = scratch, *const dense = arranged + token_tiles * 2 * TILE_ROWS * n * 2;
    float *const sums = (float *)(dense + FORWARD_ROWS * pitch);
    const struct row_tables tables = row_tables_in(w, (uint8_t *)sums + TILE_BYTES);
    arrange_tokens((const uint16_t *)p->x + begin * n, tokens, n, token_tiles, arranged);
    for (int64_t row = 0; row < p->out_features; row += FORWARD_ROWS) {
        for (int64_t i = 0; i < FORWARD_ROWS; i++)
            decode_row_of(w, expert * p->out_features + row + i, tables, (uint16_t *)(dense + i * pitch));
        for (int64_t t = 0; t < token_tiles; t += 2) {
            const int pair = t + 1 < token_tiles;
            const uint8_t *const its = arranged + t * TILE_BYTES;
            uint16_t *const y = (uint16_t *)p->y + (begin + t * TILE_ROWS) * p->out_features + row;
            const int64_t left = tokens - t * TILE_ROWS;
            if (pair)
                multiply_tiles(dense, pitch, its, token_tiles * TILE_BYTES, n, 1);
            else
                multiply_tiles(dense, pitch, its, token_tiles * TILE_BYTES, n, 0);
            _tile_stored(0, sums, CACHE_LINE);
            write_transposed(sums, left, y, p->out_features);
            _tile_stored(1, sums, CACHE_LINE);
            write_transposed(sums, left, y + TILE_ROWS, p->out_features);
            if (pair) {
                _tile_stored(2, sums, CACHE_LINE);
                write_transposed(sums, left - TILE_ROWS, y + TILE_ROWS * p->out_features, p->out_features);
                _tile_stored(3, sums, CACHE_LINE);
                write_transposed(sums, left - TILE_ROWS, y + TILE_ROWS * p->out_features + TILE_ROWS, p->out_features);
            }
        }
    }
}

/* Rows that are decoded together for the gradient: sums are loaded and stored once for all of them, and half a megabyte
 * of tiles stays in the second-level cache. */
static inline int64_t gradient_rows(const struct hqq_weight *w) {
    const int64_t fitting = (1 << 19) / (w->in_features / TILE_ROWS * (TILE_BYTES + CACHE_LINE));
    return TILE_COLUMNS * (fitting < 1 ? 1 : fitting > 4 ? 4 : fitting);
}

static inline int64_t gradient_bytes(const struct hqq_weight *w, int64_t out_features) {
    return EXPERT_TOKENS * (APART(2 * out_features) + APART(4 * w->in_features)) + 2 * APART(2 * w->in_features) +
           gradient_rows(w) / TILE_COLUMNS * (w->in_features / TILE_ROWS) * (TILE_BYTES + CACHE_LINE) +
           row_tables_bytes(w);
}

/* Rows [row, row + rows) of an expert's weight as tiles of (pairs of rows, inputs). */
TILE_INLINE void decode_tiles(const struct hqq_weight *w, int64_t row, int64_t rows, struct row_tables tables,
                              uint16_t *even, uint16_t *odd, uint8_t *tiles) {
    const int64_t n = w->in_features, step = TILE_BYTES + CACHE_LINE;
    __m512i low, high;
    uint16_t order[64];
    for (int i = 0; i < 64; i++)
        order[i] = (uint16_t)(i / 2 + i % 2 * 32);
    low = _mm512_loadu_si512(order);
    high = _mm512_loadu_si512(order + 32);
    for (int64_t i = 0; i < rows; i += 2) {
        decode_row_of(w, row + i, tables, even);
        decode_row_of(w, row + i + 1, tables, odd);
        uint8_t *into = tiles + i / TILE_COLUMNS * (n / TILE_ROWS) * step + i % TILE_COLUMNS / 2 * CACHE_LINE;
        for (int64_t k = 0; k < n; k += TILE_COLUMNS, into += 2 * step) {
            const __m512i first = _mm512_loadu_si512(even + k), second = _mm512_loadu_si512(odd + k);
            _mm512_store_si512(into, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(into + step, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

/* Adds to the sums of one or two tiles of tokens and two of inputs; `first` says that there are none yet. */
TILE_INLINE void add_tiles(const uint8_t *grad, int64_t grad_pitch, const uint8_t *tiles, int64_t rows, int64_t n,
                           float *sums, int64_t pitch, int first, int pair) {
    const int64_t step = TILE_BYTES + CACHE_LINE;
    uint8_t *const at = (uint8_t *)sums, *const below = at + TILE_ROWS * pitch;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!first) {
        _tile_loadd(0, at, pitch);
        _tile_loadd(1, at + CACHE_LINE, pitch);
        if (pair) {
            _tile_loadd(2, below, pitch);
            _tile_loadd(3, below + CACHE_LINE, pitch);
        }
    }
    for (int64_t i = 0; i < rows; i += TILE_COLUMNS, grad += CACHE_LINE, tiles += n / TILE_ROWS * step) {
        _tile_loadd(4, grad, grad_pitch);
        _tile_loadd(6, tiles, CACHE_LINE);
        _tile_loadd(7, tiles + step, CACHE_LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (pair) {
            _tile_loadd(5, grad + TILE_ROWS * grad_pitch, grad_pitch);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, at, pitch);
    _tile_stored(1, at + CACHE_LINE, pitch);
    if (pair) {
        _tile_stored(2, below, pitch);
        _tile_stored(3, below + CACHE_LINE, pitch);
    }
}

static TILE_TARGET void expert_gradient(const struct hqq_weight *w, const struct expert_tokens *p, int64_t expert,
                                        int64_t begin, int64_t tokens, uint8_t *scratch) {
    const int64_t n = w->in_features, out = p->out_features, token_tiles = (tokens + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t grad_pitch = APART(2 * out), pitch = APART(4 * n), block = gradient_rows(w);
    uint8_t *const grad = scratch;
    uint8_t *const sums = grad + token_tiles * TILE_ROWS * grad_pitch;
    uint8_t *const even = sums + token_tiles * TILE_ROWS * pitch, *const odd = even + APART(2 * n);
    uint8_t *const tiles = odd + APART(2 * n);
    const struct row_tables tables =
        row_tables_in(w, tiles + block / TILE_COLUMNS * (n / TILE_ROWS) * (TILE_BYTES + CACHE_LINE));
    for (int64_t t = 0; t < token_tiles * TILE_ROWS; t++) {
        if (t < tokens)
            memcpy(grad + t * grad_pitch, (const uint16_t *)p->x + (begin + t) * out, (size_t)out * 2);
        else
            memset(grad + t * grad_pitch, 0, (size_t)out * 2);
    }
    for (int64_t row = 0; row < out; row += block) {
        const int64_t rows = out - row < block ? out - row : block;
        decode_tiles(w, expert * out + row, rows, tables, (uint16_t *)even, (uint16_t *)odd, tiles);
        for (int64_t k = 0; k < n; k += 2 * TILE_ROWS)
            for (int64_t t = 0; t < token_tiles; t += 2) {
                const uint8_t *const its = grad + t * TILE_ROWS * grad_pitch + row * 2;
                const uint8_t *const at = tiles + k / TILE_ROWS * (TILE_BYTES + CACHE_LINE);
                float *const into = (float *)(sums + t * TILE_ROWS * pitch) + k;
                if (t + 1 < token_tiles)
                    add_tiles(its, grad_pitch, at, rows, n, into, pitch, row == 0, 1);
                else
                    add_tiles(its, grad_pitch, at, rows, n, into, pitch, row == 0, 0);
            }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < n; k += 16)
            _mm256_storeu_si256((__m256i *)((uint16_t *)p->y + (begin + t) * n + k),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps((float *)(sums + t * pitch) + k)));
}

/* Scratch memory of both kernels. */
static int64_t VARIANT(hqq_experts_floats)(const struct hqq_weight *w, const struct expert_tokens *p) {
    const int64_t product = product_bytes(w), gradient = gradient_bytes(w, p->out_features);
    return (product > gradient ? product : gradient) / (int64_t)sizeof(float) + 1;
}

/* Experts [begin, end), a block of their tokens at a time. */
static TILE_TARGET void for_tokens_of(const struct hqq_weight *w, const struct expert_tokens *p, int64_t begin,
                                      int64_t end, float *scratch, int is_gradient) {
    struct tile_config before;
    begin_tiles(&before);
    for (int64_t expert = begin; expert < end; expert++)
        for (int64_t token = p->offsets[expert]; token < p->offsets[expert + 1]; token += EXPERT_TOKENS) {
            const int64_t left = p->offsets[expert + 1] - token, tokens = left < EXPERT_TOKENS ? left : EXPERT_TOKENS;
            if (is_gradient)
                expert_gradient(w, p, expert, token, tokens, (uint8_t *)scratch);
            else
                multiply_expert(w, p, expert, token, tokens, (uint8_t *)scratch);
        }
    end_tiles(&before);
}

static void VARIANT(hqq_experts_product)(const struct hqq_weight *w, const struct expert_tokens *p, int64_t begin,
                                         int64_t end, float *scratch) {
    for_tokens_of(w, p, begin, end, scratch, 0);
}

static void VARIANT(hqq_experts_gradient)(const struct hqq_weight *w, const struct expert_tokens *p, int64_t begin,
                                          int64_t end, float *scratch) {
    for_tokens_of(w, p, begin, end, scratch, 1);
}

#endif
