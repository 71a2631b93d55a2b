/* HQQ products with bfloat16 inputs as they are: codes are whole numbers that bfloat16 holds, so that each product of a
 * code and an input is exact, and two of them are added up at once in float32. Scales and zero points come after that,
 * once for each window and for each group. The instruction takes subnormal numbers for zeros.
 *
 * A row is taken window by window, as hqq_registers.h does it. The codes in the even bytes of a window permute a table
 * of what they stand for, and so do those in the odd bytes.
 */
#include "quantlayers.h"

#include "vector.h"

#include "hqq_slots.h"

#include "hqq_row_scales.h"
#include "hqq_windows.h"

/* Entries of the table: codes of up to five bits. Where they have fewer it repeats itself, since the bits above a code
 * are others'. Sums are of codes and inputs times UNIT, which no input makes overflow where the result does not. */
#define TABLE 32
#define UNIT 0x1p-10f
#define HALF_WINDOW (WINDOW / 2)

static TARGET int64_t VARIANT(hqq_bfloat16_windows)(const struct hqq_weight *w, struct joined_window *windows) {
    const struct slots slots = slots_of(w->in_features, w->nbits);
    const int64_t group_size = w->in_features / w->n_groups;
    if (1 << w->nbits > TABLE || w->in_features % slots.n != 0 || slots.columns < WINDOW ||
        has_short_groups(slots, group_size, w->nbits) ||
        number_of_windows(slots, group_size) * WINDOW > 2 * w->in_features)
        return 0;
    return joined_windows(w, slots, windows);
}

INLINE floats floats_of_bfloat16(const uint16_t *x) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

INLINE float sum_of_group(const uint16_t *x, int64_t n) {
    floats total = {0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        total += floats_of_bfloat16(x + k) * UNIT;
    if (k < n) {
        uint16_t rest[LANES] = {0};
        memcpy(rest, x + k, (size_t)(n - k) * sizeof(uint16_t));
        total += floats_of_bfloat16(rest) * UNIT;
    }
    return sum_of(total);
}

INLINE void arrange_run(const uint16_t *x, struct slots slots, struct window window, uint16_t *arranged) {
    const uint16_t *const from = x + window.slot * slots.columns + window.at;
    for (int k = window.begin; k < window.end; k++)
        arranged[k % 2 * HALF_WINDOW + k / 2] = from[k];
}

/* Puts the inputs of each window in the order of its codes, (tokens, windows, 2, HALF_WINDOW), with zeros for columns
 * that do not count, and adds up those of each group. Whether all sums are finite. */
static TARGET int VARIANT(hqq_bfloat16_arrange)(const struct hqq_weight *w, const uint16_t *x, int64_t tokens,
                                                struct bfloat16_inputs *inputs) {
    const struct slots slots = slots_of(w->in_features, w->nbits);
    const int64_t group_size = w->in_features / w->n_groups;
    float is_finite = 0; /* 0, or NaN */
    uint16_t *arranged = inputs->x;
    inputs->has_joined = 0;
    for (int64_t token = 0; token < tokens; token++, x += w->in_features) {
        float *const sums = inputs->sums + token * padded(w->n_groups);
        memset(sums + w->n_groups, 0, (size_t)(padded(w->n_groups) - w->n_groups) * sizeof(float));
        for (int64_t g = 0; g < w->n_groups; g++)
            is_finite += 0 * (sums[g] = sum_of_group(x + g * group_size, group_size));
        for (int64_t i = 0; i < inputs->n_windows; i++, arranged += WINDOW) {
            const struct joined_window *const window = &inputs->windows[i];
            if (window->first.end - window->first.begin == WINDOW) {
                const uint16_t *const from = x + window->first.slot * slots.columns + window->first.at;
                for (int k = 0; k < HALF_WINDOW; k++) {
                    arranged[k] = from[2 * k];
                    arranged[HALF_WINDOW + k] = from[2 * k + 1];
                }
                continue;
            }
            memset(arranged, 0, WINDOW * sizeof(uint16_t));
            arrange_run(x, slots, window->first, arranged);
            arrange_run(x, slots, window->next, arranged);
            inputs->has_joined |= window->of_next != 0;
        }
    }
    return is_finite == 0;
}

INLINE __m512i table_of(int nbits) {
    uint16_t table[TABLE];
    for (int i = 0; i < TABLE; i++) {
        const float code = (float)(i & ((1 << nbits) - 1)) * UNIT;
        uint32_t bits;
        memcpy(&bits, &code, 4);
        table[i] = (uint16_t)(bits >> 16);
    }
    return _mm512_loadu_si512(table);
}

/* Sums of two products in each lane, added to `total`. */
INLINE __m512 add_pairs(__m512 total, __m512i codes, __m512i inputs) {
    return _mm512_dpbf16_ps(total, (__m512bh)codes, (__m512bh)inputs);
}

/* The counts, nbits and has_joined are constants in every call. */
INLINE void multiply_tile(const struct hqq_weight *w, struct row_scales of_rows, const struct product *p,
                          const struct bfloat16_inputs *inputs, int64_t row, int64_t token, int rows, int tokens,
                          int nbits, int has_joined) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t n_groups = padded(w->n_groups), n_windows = inputs->n_windows;
    const int of_window = rows * nbits * WINDOW / 8; /* bytes of later rows, to be read ahead with each window of these */
    const uint8_t *const packed = w->packed + row * w->row_bytes, *const ahead = packed + bytes_ahead_of(rows * w->row_bytes);
    const uint16_t *const x = inputs->x + token * n_windows * WINDOW;
    const __m512i table = table_of(nbits);
    floats total[BLOCK_ROWS][MAX_BLOCK_TOKENS] = {{{0}}};
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            total[r][t] = -zeros_of(of_rows.offset + r * n_groups, inputs->sums + (token + t) * n_groups, n_groups);
    struct shifts shifts = shifts_of_slot(slots, 0);
    int slot = 0;
    for (int64_t i = 0; i < n_windows; i++) {
        const struct joined_window *const window = &inputs->windows[i];
        const struct window first = window->first;
        __m512i even[BLOCK_ROWS], odd[BLOCK_ROWS];
        if (first.slot != slot)
            shifts = shifts_of_slot(slots, slot = first.slot);
        for (int b = 0; b < of_window; b += CACHE_LINE)
            __builtin_prefetch(ahead + i * of_window + b);
        struct shifts both = shifts;
        if (has_joined && window->of_next) {
            const struct shifts of_next = shifts_of_slot(slots, window->next.slot);
            both = (struct shifts){joined_lanes(shifts.low, of_next.low, window->of_next),
                                   joined_lanes(shifts.high, of_next.high, window->of_next)};
        }
        for (int r = 0; r < rows; r++) {
            const uint8_t *const of_row = packed + r * w->row_bytes;
            const lanes codes = has_joined && window->of_next
                                    ? codes_in_joined_window(of_row, slots, both, window)
                                    : codes_in_window(of_row, slots, shifts, first.slot, first.at);
            even[r] = _mm512_permutexvar_epi16((__m512i)codes, table);
            odd[r] = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes, 8), table);
        }
        for (int t = 0; t < tokens; t++) {
            const uint16_t *const its = x + (t * n_windows + i) * WINDOW;
            const __m512i of_even = _mm512_loadu_si512(its), of_odd = _mm512_loadu_si512(its + HALF_WINDOW);
            for (int r = 0; r < rows; r++) {
                const __m512 sums = add_pairs(add_pairs(_mm512_setzero_ps(), even[r], of_even), odd[r], of_odd);
                total[r][t] += (floats)sums * of_rows.scale[r * n_groups + first.group];
            }
        }
    }
    write_tile(p, row, token, rows, tokens, total, 1 / UNIT);
}

/* The same for one row and one token, of which few are left at the end. */
static TARGET __attribute__((noinline)) void multiply_last_row(const struct hqq_weight *w, struct row_scales of_rows,
                                                               const struct product *p,
                                                               const struct bfloat16_inputs *inputs, int64_t row,
                                                               int64_t token, int nbits) {
    multiply_tile(w, of_rows, p, inputs, row, token, 1, 1, nbits, 1);
}

INLINE void multiply_rows(const struct hqq_weight *w, const struct product *p, const struct bfloat16_inputs *inputs,
                          int64_t begin, int64_t end, int nbits, int has_joined, float *scratch) {
    int64_t row = begin;
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS) {
        const struct row_scales scales = row_scales_of(w, row, BLOCK_ROWS, 0, scratch);
        int64_t token = 0;
        for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
            multiply_tile(w, scales, p, inputs, row, token, BLOCK_ROWS, BLOCK_TOKENS, nbits, has_joined);
        for (; token < p->tokens; token++)
            multiply_tile(w, scales, p, inputs, row, token, BLOCK_ROWS, 1, nbits, has_joined);
    }
    for (; row < end; row++) {
        const struct row_scales scales = row_scales_of(w, row, 1, 0, scratch);
        for (int64_t token = 0; token < p->tokens; token++)
            multiply_last_row(w, scales, p, inputs, row, token, nbits);
    }
}

static TARGET void VARIANT(hqq_bfloat16_product)(const struct hqq_weight *w, const struct product *p,
                                                 const struct bfloat16_inputs *inputs, int64_t begin, int64_t end,
                                                 float *scratch) {
    if (inputs->has_joined) {
        if (w->nbits == 3)
            multiply_rows(w, p, inputs, begin, end, 3, 1, scratch);
        else
            multiply_rows(w, p, inputs, begin, end, 2, 1, scratch);
        return;
    }
    switch (w->nbits) {
    case 1: multiply_rows(w, p, inputs, begin, end, 1, 0, scratch); break;
    case 2: multiply_rows(w, p, inputs, begin, end, 2, 0, scratch); break;
    case 3: multiply_rows(w, p, inputs, begin, end, 3, 0, scratch); break;
    case 4: multiply_rows(w, p, inputs, begin, end, 4, 0, scratch); break;
    case 5: multiply_rows(w, p, inputs, begin, end, 5, 0, scratch); break;
    }
}

const struct bfloat16_kernels VARIANT(bfloat16_kernels) = {
    .window_columns = WINDOW,
    .hqq_windows = VARIANT(hqq_bfloat16_windows),
    .hqq_arrange = VARIANT(hqq_bfloat16_arrange),
    .hqq_product = VARIANT(hqq_bfloat16_product),
};
