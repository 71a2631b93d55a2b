/* HQQ products in integers: activations are rounded to 8 bits once a call, and meet the codes as they are packed. What
 * is computed is defined in hqq/integer_reference.py.
 *
 * A row is taken window by window, as hqq_registers.h does it, but a byte of a window stays one: four neighbouring codes
 * and activations give one sum of 32 bits in each lane, which is scaled and added up as a float. The zero points come
 * off once for each group. Rows that have no windows are unpacked.
 */
#include "quantlayers.h"

#include "vector.h"

#include "hqq_slots.h"
#include "hqq_unpack.h"

#include "hqq_row_scales.h"

/* The columns of a row in windows; their number, or 0 where they are to be unpacked. `windows` may be NULL. A window has
 * columns of one group, or several whole ones, and a lane columns of one block. */
static TARGET int64_t VARIANT(hqq_windows)(const struct hqq_weight *w, struct window *windows) {
    int64_t n = 0;
#if LANES >= 8
    const struct slots slots = slots_of(w->in_features, w->nbits);
    const int64_t group_size = w->in_features / w->n_groups, last = slots.columns - WINDOW;
    const int short_groups = has_short_groups(slots, group_size, w->nbits);
    if (w->in_features % slots.n != 0 || last < 0)
        return 0;
    for (int slot = 0; slot < slots.n; slot++) {
        const int64_t first = slot * slots.columns;
        for (int64_t begin = 0, end; begin < slots.columns; begin = end, n++) {
            const int64_t at = begin < last ? begin : last, group = (first + begin) / group_size;
            const int64_t end_of_group = (group + 1) * group_size - first;
            end = begin + WINDOW < slots.columns ? begin + WINDOW : slots.columns;
            end = short_groups || end < end_of_group ? end : end_of_group;
            int64_t block = group * group_size - first;
            for (; !short_groups && block < end; block += ACTIVATION_BLOCK)
                if (block > begin && (block - at) % 4 != 0)
                    end = block;
            if (windows != NULL)
                windows[n] = (struct window){(int)at, (int)((first + (short_groups ? at : begin)) / group_size),
                                             (int8_t)(begin - at), (int8_t)(end - at), (int8_t)slot};
        }
    }
    if (n * WINDOW > MAX_PADDING * w->in_features)
        return 0;
#endif
    return n;
}

/* The nearest whole numbers, to even between two, as bytes. Not by adding 1.5 * 2^23, which compilers may fuse with a
 * product before it. */
INLINE void store_rounded(floats v, int8_t *out) {
#if LANES == 16
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#elif LANES == 8
    const __m256i whole = _mm256_cvtps_epi32((__m256)v);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)out, _mm_packs_epi16(halves, halves));
#else
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = (int8_t)__builtin_rintf(v[lane]);
#endif
}

/* Rounds a block of n columns to bytes; returns its scale, NaN if one of its numbers is not finite. */
INLINE float round_block(const float *x, int64_t n, int8_t *out) {
    int32_t highest = 0;
    for (int64_t k = 0; k < n; k++) {
        int32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff; /* ordered as the numbers are, NaN above all */
        highest = bits > highest ? bits : highest;
    }
    float largest;
    memcpy(&largest, &highest, 4);
    const int is_finite = highest < 0x7f800000;
    const float per_unit = is_finite && largest > SMALLEST_ACTIVATION ? 127 / largest : 0;
    if (per_unit == 0) {
        for (int64_t k = 0; k < n; k++)
            out[k] = 0;
        return is_finite ? 0 : __builtin_nanf("");
    }
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store_rounded(load(x + k) * per_unit, out + k);
    if (k < n) {
        float rest[LANES] = {0};
        int8_t rounded[LANES];
        memcpy(rest, x + k, (size_t)(n - k) * sizeof(float));
        store_rounded(load(rest) * per_unit, rounded);
        memcpy(out + k, rounded, (size_t)(n - k));
    }
    return largest / 127;
}

/* A block of at most ACTIVATION_BLOCK columns, most of which have that many. */
INLINE float round_up_to_a_block(const float *x, int64_t n, int8_t *out, int32_t *sum) {
    const float scale = n == ACTIVATION_BLOCK ? round_block(x, ACTIVATION_BLOCK, out) : round_block(x, n, out);
    *sum = 0;
    for (int64_t k = 0; k < n; k++)
        *sum += out[k];
    return scale;
}

/* Puts codes and each lane's scale in the order of the windows. */
INLINE void arrange_windows(const struct rounded_inputs *inputs, int64_t slot_columns, const int8_t *in_order,
                            const float *of_columns, int8_t *codes, float *scales) {
    for (int64_t i = 0; i < inputs->n_windows; i++, codes += 4 * LANES, scales += LANES) {
        const struct window window = inputs->windows[i];
        const int64_t first = window.slot * slot_columns + window.at;
        if (window.end - window.begin == 4 * LANES) {
            memcpy(codes, in_order + first, 4 * LANES);
            for (int lane = 0; lane < LANES; lane++)
                scales[lane] = of_columns[first + 4 * lane];
            continue;
        }
        memset(codes, 0, 4 * LANES);
        memcpy(codes + window.begin, in_order + first + window.begin, (size_t)(window.end - window.begin));
        for (int lane = 0; lane < LANES; lane++) {
            const int column = 4 * lane < window.begin ? window.begin : 4 * lane;
            scales[lane] = column < window.end && column < 4 * lane + 4 ? of_columns[first + column] : 0;
        }
    }
}

/* Scratch: a token's codes in order, and for windows the scale of each of its columns. */
static TARGET void VARIANT(hqq_round)(const struct hqq_weight *w, const struct product *p,
                                      const struct rounded_inputs *inputs, int64_t begin, int64_t end, float *scratch) {
    const int64_t n = w->in_features, group_size = n / w->n_groups;
    float *const of_columns = scratch + code_floats(w);
    for (int64_t token = begin; token < end; token++) {
        const float *const x = p->x + token * n;
        int8_t *const codes = inputs->codes + token * inputs->token_bytes;
        int8_t *const in_order = inputs->n_windows ? (int8_t *)scratch : codes;
        float *scales = inputs->scale + token * inputs->token_scales;
        float *const offset = inputs->offset + token * padded(w->n_groups);
        memset(offset, 0, (size_t)padded(w->n_groups) * sizeof(float));
        for (int64_t g = 0; g < w->n_groups; g++)
            for (int64_t in_group = 0; in_group < group_size; in_group += ACTIVATION_BLOCK) {
                const int64_t first = g * group_size + in_group, left = group_size - in_group;
                const int64_t size = left < ACTIVATION_BLOCK ? left : ACTIVATION_BLOCK;
                int32_t sum;
                const float scale = round_up_to_a_block(x + first, size, in_order + first, &sum);
                offset[g] += scale * (float)sum;
                if (inputs->n_windows)
                    for (int64_t k = 0; k < size; k++)
                        of_columns[first + k] = scale;
                else
                    *scales++ = scale;
            }
#if LANES >= 8
        if (inputs->n_windows)
            arrange_windows(inputs, slots_of(n, w->nbits).columns, in_order, of_columns, codes, scales);
#endif
    }
}

#if LANES >= 8

/* Sums of four neighbouring products of an unsigned code and a signed activation. Without an instruction for them two
 * products at a time must fit 16 bits, which only the codes of 8 bits do not. */
INLINE ints sums_of_four(lanes codes, lanes activations, int nbits) {
#if defined(HAS_DOT_PRODUCTS) && LANES == 16
    return (ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)codes, (__m512i)activations);
#elif defined(HAS_DOT_PRODUCTS)
    return (ints)_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), (__m256i)codes, (__m256i)activations);
#else
    if (nbits == 8) {
        const lanes low = codes & 0x0f0f0f0f, high = codes >> 4 & 0x0f0f0f0f;
        return sums_of_four(low, activations, 4) + (sums_of_four(high, activations, 4) << 4);
    }
#if LANES == 16
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)activations);
    return (ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)activations);
    return (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#endif
}

/* How many bits up in their bytes the codes of a slot are left, which saves a shift. */
INLINE int bits_up(struct slots slots, int slot, int nbits) {
    const int up = slot / (slots.high ? slots.low / slots.high : 1) * slots.low;
#if defined(HAS_DOT_PRODUCTS)
    return up + nbits <= 8 ? up : 0;
#else
    return ((1 << nbits) - 1) << up < 128 ? up : 0;
#endif
}

INLINE lanes shifted_down(lanes v, int bits) {
    return bits < 0 ? v << -bits : v >> bits;
}

/* The codes of a window, one in each byte and bits_up. */
INLINE lanes bytes_of_window(const uint8_t *packed, struct slots slots, int slot, int64_t at, int nbits) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1, up = bits_up(slots, slot, nbits);
    const lanes low = *(const lanes_at *)(packed + slot % slots_a_byte * slots.columns + at);
    const uint32_t every = 0x01010101u << up;
    const lanes of_low = shifted_down(low, slot / slots_a_byte * slots.low - up) & every * ((1u << slots.low) - 1);
    if (slots.high == 0)
        return nbits == 8 ? low : of_low;
    const lanes high = *(const lanes_at *)(packed + slots_a_byte * slots.columns + at);
    const uint32_t its_bits = (every << slots.low) * ((1u << slots.high) - 1);
    return of_low | (shifted_down(high, slot * slots.high - slots.low - up) & its_bits);
}

/* The windows of one slot: adds to the sums of `rows` rows and `tokens` tokens. */
INLINE void add_slot(const uint8_t *packed, int64_t row_bytes, struct slots slots, int slot,
                     const struct rounded_inputs *inputs, int64_t token, const float *scale, int64_t n_groups, int rows,
                     int tokens, int nbits, lanes group, int short_groups, floats acc[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    const int of_window = rows * nbits * WINDOW / 8; /* bytes of later rows, to be read ahead with each window of these */
    const uint8_t *const ahead = packed + bytes_ahead_of(rows * row_bytes);
    const int8_t *const activations = inputs->codes + token * inputs->token_bytes;
    const float *const of_lanes = inputs->scale + token * inputs->token_scales;
    for (int64_t i = inputs->first[slot]; i < inputs->first[slot + 1]; i++) {
        const int64_t at = inputs->windows[i].at;
        const float *const its = scale + inputs->windows[i].group;
        lanes codes[BLOCK_ROWS];
        floats of_group[BLOCK_ROWS];
        for (int b = 0; b < of_window; b += CACHE_LINE)
            __builtin_prefetch(ahead + i * of_window + b);
        for (int r = 0; r < rows; r++) {
            codes[r] = bytes_of_window(packed + r * row_bytes, slots, slot, at, nbits);
            of_group[r] = short_groups ? permuted(load(its + r * n_groups), group) : (floats){0} + its[r * n_groups];
        }
        for (int t = 0; t < tokens; t++) {
            const lanes of_token = *(const lanes_at *)(activations + t * inputs->token_bytes + i * WINDOW);
            const floats unit = load(of_lanes + t * inputs->token_scales + i * LANES);
            for (int r = 0; r < rows; r++)
                acc[r][t] += floats_of(sums_of_four(codes[r], of_token, nbits)) * unit * of_group[r];
        }
    }
}

/* `rows` rows with `tokens` tokens; both, nbits and short_groups are constants in most calls. */
INLINE void multiply_windows(const struct hqq_weight *w, struct row_scales of_rows, const struct product *p,
                             const struct rounded_inputs *inputs, int64_t row, int64_t token, int rows, int tokens,
                             int nbits, int short_groups) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t n_groups = padded(w->n_groups);
    const int shift = short_groups ? __builtin_ctzll((uint64_t)(w->in_features / w->n_groups)) : 0;
    lanes column;
    for (uint32_t lane = 0; lane < LANES; lane++)
        column[lane] = 4 * lane;
    floats total[BLOCK_ROWS][MAX_BLOCK_TOKENS] = {{{0}}};
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            total[r][t] = -zeros_of(of_rows.offset + r * n_groups, inputs->offset + (token + t) * n_groups, n_groups);
#pragma GCC unroll 8
    for (int slot = 0; slot < slots.n; slot++) {
        floats acc[BLOCK_ROWS][MAX_BLOCK_TOKENS] = {{{0}}};
        add_slot(w->packed + row * w->row_bytes, w->row_bytes, slots, slot, inputs, token, of_rows.scale, n_groups, rows,
                 tokens, nbits, column >> shift, short_groups, acc);
        const float unit = 1.0f / (float)(1 << bits_up(slots, slot, nbits));
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                total[r][t] += acc[r][t] * unit;
    }
    write_tile(p, row, token, rows, tokens, total, 1);
}

/* The same for one row and one token, of which few are left at the end. */
static TARGET __attribute__((noinline)) void multiply_last_row(const struct hqq_weight *w, struct row_scales of_rows,
                                                               const struct product *p,
                                                               const struct rounded_inputs *inputs, int64_t row,
                                                               int64_t token, int nbits, int short_groups) {
    multiply_windows(w, of_rows, p, inputs, row, token, 1, 1, nbits, short_groups);
}

INLINE void multiply_rows_in_windows(const struct hqq_weight *w, const struct product *p,
                                     const struct rounded_inputs *inputs, int64_t begin, int64_t end, int nbits,
                                     int short_groups, float *scratch) {
    int64_t row = begin;
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS) {
        const struct row_scales scales = row_scales_of(w, row, BLOCK_ROWS, 0, scratch);
        int64_t token = 0;
        for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
            multiply_windows(w, scales, p, inputs, row, token, BLOCK_ROWS, BLOCK_TOKENS, nbits, short_groups);
        for (; token < p->tokens; token++)
            multiply_windows(w, scales, p, inputs, row, token, BLOCK_ROWS, 1, nbits, short_groups);
    }
    for (; row < end; row++) {
        const struct row_scales scales = row_scales_of(w, row, 1, 0, scratch);
        for (int64_t token = 0; token < p->tokens; token++)
            multiply_last_row(w, scales, p, inputs, row, token, nbits, short_groups);
    }
}

#endif

/* Rows of codes unpacked to bytes, minus the middle of their range. */
static TARGET void multiply_unpacked_rows(const struct hqq_weight *w, const struct product *p,
                                          const struct rounded_inputs *inputs, int64_t begin, int64_t end,
                                          float *scratch) {
    const int64_t group_size = w->in_features / w->n_groups;
    int8_t *const codes = (int8_t *)scratch;
    for (int64_t row = begin; row < end; row++) {
        const struct row_scales scales = row_scales_of(w, row, 1, (float)centre_of(w->nbits), scratch + code_floats(w));
        unpack_row(w->packed + row * w->row_bytes, w->in_features, w->nbits, codes);
        for (int64_t token = 0; token < p->tokens; token++) {
            const int8_t *const activations = inputs->codes + token * inputs->token_bytes;
            const float *of_block = inputs->scale + token * inputs->token_scales;
            float y = -sum_of(zeros_of(scales.offset, inputs->offset + token * padded(w->n_groups), padded(w->n_groups)));
            for (int64_t g = 0; g < w->n_groups; g++)
                for (int64_t in_group = 0; in_group < group_size; in_group += ACTIVATION_BLOCK) {
                    const int64_t left = group_size - in_group, first = g * group_size + in_group;
                    const int64_t last = first + (left < ACTIVATION_BLOCK ? left : ACTIVATION_BLOCK);
                    int32_t sum = 0;
                    for (int64_t k = first; k < last; k++)
                        sum += (int16_t)codes[k] * (int16_t)activations[k];
                    y += (float)sum * *of_block++ * scales.scale[g];
                }
            p->y[token * p->out_features + row] = y + (p->bias ? p->bias[row] : 0);
        }
    }
}

static TARGET void VARIANT(hqq_integer_product)(const struct hqq_weight *w, const struct product *p,
                                                const struct rounded_inputs *inputs, int64_t begin, int64_t end,
                                                float *scratch) {
    if (inputs->n_windows == 0) {
        multiply_unpacked_rows(w, p, inputs, begin, end, scratch);
        return;
    }
#if LANES >= 8
    if (has_short_groups(slots_of(w->in_features, w->nbits), w->in_features / w->n_groups, w->nbits)) {
        switch (w->nbits) {
        case 1: multiply_rows_in_windows(w, p, inputs, begin, end, 1, 1, scratch); break;
        case 2: multiply_rows_in_windows(w, p, inputs, begin, end, 2, 1, scratch); break;
        case 3: multiply_rows_in_windows(w, p, inputs, begin, end, 3, 1, scratch); break;
        case 4: multiply_rows_in_windows(w, p, inputs, begin, end, 4, 1, scratch); break;
        }
        return;
    }
#define MULTIPLY(nbits) multiply_rows_in_windows(w, p, inputs, begin, end, nbits, 0, scratch)
    FOR_NBITS(w->nbits, MULTIPLY);
#undef MULTIPLY
#endif
}

const struct integer_kernels VARIANT(integer_kernels) = {
    .hqq_windows = VARIANT(hqq_windows),
    .hqq_round = VARIANT(hqq_round),
    .hqq_product = VARIANT(hqq_integer_product),
    .window_bytes = 4 * LANES,
};
