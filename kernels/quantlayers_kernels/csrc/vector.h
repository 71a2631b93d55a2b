/* Vectors of LANES floats, for the instruction set that the including variant_*.c names. */
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels are written for little-endian machines; others use the torch path"
#endif

#define INLINE static inline __attribute__((always_inline)) TARGET

/* Inputs per partial sum: the rounding error of a float32 sum grows with its length. BLAS does the same. */
#define PANEL 512

#define VECTOR(name, type, n)                                                                                       \
    typedef type name __attribute__((vector_size(sizeof(type) * (n))));                                             \
    typedef type name##_at __attribute__((vector_size(sizeof(type) * (n)), aligned(1), may_alias))

VECTOR(floats, float, LANES);
VECTOR(ints, int32_t, LANES);
VECTOR(lanes, uint32_t, LANES); /* bits, to shift without a sign */
/* As many bytes as `floats` has, to shift and to add bytewise. */
VECTOR(words, uint64_t, LANES / 2);
VECTOR(bytes, uint8_t, 4 * LANES);

/* AQLM's groups are of eight inputs: vectors of eight whatever LANES is. */
VECTOR(floats8, float, 8);

INLINE floats load(const float *p) {
    return *(const floats_at *)p;
}

INLINE void store(float *p, floats v) {
    *(floats_at *)p = v;
}

/* GCC 12 makes a __builtin_convertvector of bytes one byte at a time: hence intrinsics where there are some. */
INLINE floats load_codes(const int8_t *p) {
#if LANES == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif LANES == 8
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    /* Each lane masks its byte out of the same four; a product brings it down. Bytes 0 to 2 are made unsigned first. */
    uint32_t four;
    memcpy(&four, p, 4);
    four ^= 0x00808080u;
    const ints lanes = ((ints){0} + (int32_t)four) & (ints){0xff, 0xff00, 0xff0000, (int32_t)0xff000000};
    const floats down = {1, 0x1p-8f, 0x1p-16f, 0x1p-24f}, centre = {128, 128, 128, 0};
    return __builtin_convertvector(lanes, floats) * down - centre;
#endif
}

#if LANES >= 8
/* The lanes of `table` at the lowest bits of each index. */
INLINE floats permuted(floats table, lanes index) {
#if LANES == 16
    return (floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    return (floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
}
#endif

INLINE floats floats_of(ints v) {
    return __builtin_convertvector(v, floats);
}

INLINE ints chosen_ints(ints condition, ints yes, ints no) {
    return (yes & condition) | (no & ~condition);
}

/* Lane by lane: `yes` where the condition is all ones, `no` where it is 0. */
INLINE floats chosen(ints condition, floats yes, floats no) {
    return (floats)chosen_ints(condition, (ints)yes, (ints)no);
}

INLINE floats lower(floats a, floats b) {
#if LANES == 16
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return chosen(a < b, a, b);
#endif
}

INLINE floats higher(floats a, floats b) {
#if LANES == 16
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return chosen(a > b, a, b);
#endif
}

INLINE int any_below(floats v, float bound) {
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_LT_OQ) != 0;
#elif LANES == 8
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_LT_OQ)) != 0;
#else
    return v[0] < bound || v[1] < bound || v[2] < bound || v[3] < bound;
#endif
}

INLINE int any_above(floats v, float bound) {
    return any_below(-v, -bound);
}

INLINE int is_any(ints condition) {
    return any_below(floats_of(condition), 0);
}

/* The nearest code, from the whole number `centre`. Both bounds are whole, so that rounding may come after them, and
 * adding 1.5 * 2^23 rounds. */
INLINE floats nearest_code(floats v, float max_code, float centre) {
    const floats none = {0};
    return (lower(higher(v, none), none + max_code) + 0x1.8p23f) - (0x1.8p23f + centre);
}

INLINE float sum_of(floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += v[i];
    return total;
}

INLINE float sum_of8(floats8 v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

/* float16 to float32 in integer arithmetic: the exponent moves by a product with 2^112, which also makes subnormal
 * numbers normal; infinities and NaN get the exponent that float32 has for them. */
INLINE float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= sign | (value >= 65536.0f || value != value ? 0x7f800000u : 0);
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float float_at(const void *p, int64_t i, int kind) {
    if (kind == KIND_FLOAT32)
        return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    if (kind == KIND_FLOAT16)
        return float_of_half(half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Eight floats from p[i], `kind` a constant at compile time. */
INLINE floats8 floats8_at_kind(const void *p, int64_t i, int kind) {
    if (kind == KIND_FLOAT32)
        return *(const floats8_at *)((const float *)p + i);
#if LANES >= 8
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (kind == KIND_FLOAT16)
        return (floats8)_mm256_cvtph_ps(halves);
    return (floats8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    floats8 values;
    for (int lane = 0; lane < 8; lane++)
        values[lane] = float_at(p, i + lane, kind);
    return values;
#endif
}

#if LANES == 16
/* Numbers i to i + n of p, of a kind, in the first lanes, and zeros in the others; n is at least 1. Loads with a mask take
 * several times as long. */
INLINE floats first_lanes(const void *p, int64_t i, int64_t n, int kind) {
    const int is_full = n >= LANES;
    const __mmask16 is_inside = is_full ? 0xffff : (__mmask16)((1u << n) - 1);
    if (kind == KIND_FLOAT32)
        return (floats)_mm512_maskz_loadu_ps(is_inside, (const float *)p + i);
    const uint16_t *const at = (const uint16_t *)p + i;
    const __m256i halves = is_full ? _mm256_loadu_si256((const __m256i *)at) : _mm256_maskz_loadu_epi16(is_inside, at);
    if (kind == KIND_FLOAT16)
        return (floats)_mm512_cvtph_ps(halves);
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#endif

/* out[0:n] = p[i:i+n] as float32. */
INLINE void convert_floats(const void *p, int64_t i, int64_t n, int kind, float *out) {
    int64_t j = 0;
    if (kind == KIND_FLOAT32) {
        memcpy(out, (const float *)p + i, (size_t)n * sizeof(float));
        return;
    }
#if LANES == 16
    for (; j + LANES <= n; j += LANES)
        store(out + j, first_lanes(p, i + j, LANES, kind));
    if (j < n) {
        float last[LANES];
        store(last, first_lanes(p, i + j, n - j, kind));
        for (int k = 0; j < n; j++, k++)
            out[j] = last[k];
    }
#else
    if (kind == KIND_FLOAT16)
        for (; j + 8 <= n; j += 8)
            *(floats8_at *)(out + j) = floats8_at_kind(p, i + j, KIND_FLOAT16);
    else
        for (; j + 8 <= n; j += 8)
            *(floats8_at *)(out + j) = floats8_at_kind(p, i + j, KIND_BFLOAT16);
    for (; j < n; j++)
        out[j] = float_at(p, i + j, kind);
#endif
}

/* float32 to bfloat16, to the nearest and to even between two, in the lower half of each lane. */
INLINE lanes bfloat16_of(floats v) {
    const lanes bits = (lanes)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = (lanes){0} + 0x7fc0;
    return (lanes)chosen_ints((ints)(v == v), (ints)rounded, (ints)nan);
}

/* out[0:n] = values as bfloat16. */
INLINE void write_bfloat16(const float *values, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const lanes halves = bfloat16_of(load(values + i));
#if LANES == 16
        _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtepi32_epi16((__m512i)halves));
#elif LANES == 8
        const __m256i packed = _mm256_packus_epi32((__m256i)halves, (__m256i)halves); /* in each half of the vector */
        _mm_storeu_si128((__m128i *)(out + i), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
        for (int lane = 0; lane < LANES; lane++)
            out[i + lane] = (uint16_t)halves[lane];
#endif
    }
    for (; i < n; i++)
        out[i] = (uint16_t)bfloat16_of((floats){0} + values[i])[0];
}

/* Where to write row `row` of n inputs as float32: its place in `rows` if that is float32, else `scratch`. */
INLINE float *row_to_write(const struct dense_rows *rows, int64_t row, int64_t n, float *scratch) {
    return rows->kind == KIND_FLOAT32 ? (float *)rows->out + row * n : scratch;
}

/* Converts a row from where row_to_write had it written to its place in `rows`, if that is bfloat16. */
INLINE void finish_row(const struct dense_rows *rows, int64_t row, int64_t n, const float *written) {
    if (rows->kind == KIND_BFLOAT16)
        write_bfloat16(written, n, (uint16_t *)rows->out + row * n);
}

/* BLOCK_TOKENS tokens fit the registers; the arrays have room for the remainders in the switch below. */
#define MAX_BLOCK_TOKENS 4

/* Sums over n inputs of `rows` dense rows and `tokens` rows of x; both counts are constants in every call. */
INLINE void dot_tile(const float *weight, const float *x, int64_t n, int rows, int tokens,
                     float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS]) {
    floats total[BLOCK_ROWS][MAX_BLOCK_TOKENS] = {{{0}}};
    const int64_t whole = n / LANES * LANES;
    for (int64_t begin = 0; begin < whole; begin += PANEL) {
        const int64_t end = begin + PANEL < whole ? begin + PANEL : whole;
        floats acc[BLOCK_ROWS][MAX_BLOCK_TOKENS] = {{{0}}};
        for (int64_t k = begin; k < end; k += LANES)
            for (int t = 0; t < tokens; t++) {
                const floats input = load(x + t * n + k);
                for (int r = 0; r < rows; r++)
                    acc[r][t] += load(weight + r * n + k) * input;
            }
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                total[r][t] += acc[r][t];
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            sums[r][t] = sum_of(total[r][t]);
            for (int64_t k = whole; k < n; k++)
                sums[r][t] += weight[r * n + k] * x[t * n + k];
        }
}

INLINE void write_sums(float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS], int rows, int tokens, int64_t first_row,
                       int64_t token, const struct product *p) {
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            int64_t row = first_row + r;
            p->y[(token + t) * p->out_features + row] = sums[r][t] + (p->bias ? p->bias[row] : 0);
        }
}

INLINE void dot_tokens(const float *weight, int64_t n, int rows, int tokens, int64_t first_row, int64_t token,
                       const struct product *p) {
    float sums[BLOCK_ROWS][MAX_BLOCK_TOKENS];
    dot_tile(weight, p->x + token * n, n, rows, tokens, sums);
    write_sums(sums, rows, tokens, first_row, token, p);
}

/* The product of all tokens with up to BLOCK_ROWS dense rows of n inputs. */
static TARGET __attribute__((unused)) void dot_rows(const float *weight, int64_t n, int rows, int64_t first_row,
                                                    const struct product *p) {
    int64_t token = 0;
    if (rows < BLOCK_ROWS) {
        for (; token < p->tokens; token++)
            for (int r = 0; r < rows; r++)
                dot_tokens(weight + r * n, n, 1, 1, first_row + r, token, p);
        return;
    }
    for (; token + BLOCK_TOKENS <= p->tokens; token += BLOCK_TOKENS)
        dot_tokens(weight, n, BLOCK_ROWS, BLOCK_TOKENS, first_row, token, p);
    switch (p->tokens - token) {
    case 3: dot_tokens(weight, n, BLOCK_ROWS, 3, first_row, token, p); break;
    case 2: dot_tokens(weight, n, BLOCK_ROWS, 2, first_row, token, p); break;
    case 1: dot_tokens(weight, n, BLOCK_ROWS, 1, first_row, token, p); break;
    }
}
