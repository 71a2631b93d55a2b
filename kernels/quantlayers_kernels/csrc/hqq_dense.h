/* HQQ: dense rows whose weights are looked up, for groups along the inputs and codes of up to 4 bits. What the codes of
 * a group stand for, (code - zero) * scale, lies in a vector, in the dtype that is written, and the codes permute it: no
 * arithmetic for each weight, and the bits that the reference gives it. */
#if LANES == 16

/* Columns that are looked up at once: as many as a vector has 16-bit lanes. */
#define LOOKED_UP 32
#define ALL_LOOKED_UP 0xffffffffu

/* With shorter groups there is a table to make for each vector. */
INLINE int can_look_up_rows(const struct hqq_weight *w) {
    return w->axis == 1 && w->nbits <= 4 && w->in_features / w->n_groups >= LOOKED_UP &&
           w->in_features % slots_of(w->in_features, w->nbits).n == 0;
}

INLINE __m512i bytes_in_lanes(const uint8_t *p, __mmask32 mask, int shift) {
    const __m256i bytes =
        mask == ALL_LOOKED_UP ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8(mask, p);
    return _mm512_srl_epi16(_mm512_cvtepu8_epi16(bytes), _mm_cvtsi32_si128(shift));
}

/* The codes of the columns of a slot from `at` on, one in each lane; the bits above a code belong to other codes. */
INLINE __m512i codes_in_lanes(const uint8_t *packed, struct slots slots, int slot, int64_t at, __mmask32 mask) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1;
    const __m512i codes = bytes_in_lanes(packed + slot % slots_a_byte * slots.columns + at, mask,
                                         slot / slots_a_byte * slots.low);
    if (slots.high == 0)
        return codes;
    const __m512i high = bytes_in_lanes(packed + slots_a_byte * slots.columns + at, mask, slot * slots.high);
    const __m512i of_low = _mm512_set1_epi16((short)((1 << slots.low) - 1));
    return _mm512_or_si512(_mm512_and_si512(codes, of_low),
                           _mm512_andnot_si512(of_low, _mm512_slli_epi16(high, (unsigned)slots.low)));
}

/* out[0:32] = the weights of the codes, where the mask says so. The table repeats itself: an index has more bits. */
INLINE void write_weights(floats table, __m512i codes, __mmask32 mask, int kind, void *out, int64_t at) {
    if (kind == KIND_BFLOAT16) {
        const __m512i halves = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16((__m512i)bfloat16_of(table)));
        const __m512i weights = _mm512_permutexvar_epi16(codes, halves);
        if (mask == ALL_LOOKED_UP)
            _mm512_storeu_si512((uint16_t *)out + at, weights);
        else
            _mm512_mask_storeu_epi16((uint16_t *)out + at, mask, weights);
        return;
    }
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
    const __m512 weights[] = {(__m512)permuted(table, (lanes)first), (__m512)permuted(table, (lanes)second)};
    for (int half = 0; half < 2; half++) {
        float *const to = (float *)out + at + half * LANES;
        if (mask == ALL_LOOKED_UP)
            _mm512_storeu_ps(to, weights[half]);
        else
            _mm512_mask_storeu_ps(to, (__mmask16)(mask >> (half * LANES)), weights[half]);
    }
}

/* One row; nbits and kind are constants in every call. */
INLINE void look_up_row(const struct hqq_block *w, int nbits, int kind, void *out) {
    const struct slots slots = slots_of(w->in_features, nbits);
    const int64_t group_size = w->in_features / w->n_groups;
    const floats codes_of_lanes = floats_of_codes(nbits);
    int64_t group = 0, end_of_group = group_size;
    for (int slot = 0; slot < slots.n; slot++) {
        const int64_t first = slot * slots.columns;
        for (int64_t at = 0; at < slots.columns;) {
            if (first + at == end_of_group) {
                group++;
                end_of_group += group_size;
            }
            const floats table = (codes_of_lanes - w->zero[group]) * w->scale[group];
            const int64_t end = end_of_group - first < slots.columns ? end_of_group - first : slots.columns;
            for (; at < end; at += LOOKED_UP) {
                const int64_t left = end - at;
                const __mmask32 mask = left >= LOOKED_UP ? ALL_LOOKED_UP : ((__mmask32)1 << left) - 1;
                write_weights(table, codes_in_lanes(w->packed, slots, slot, at, mask), mask, kind, out, first + at);
            }
            at = end;
        }
    }
}

INLINE void look_up_rows_of(const struct hqq_weight *w, const struct dense_rows *rows, int64_t begin, int64_t end,
                            int nbits, int kind, float *scratch) {
    const int64_t size = w->in_features * (kind == KIND_FLOAT32 ? 4 : 2);
    for (int64_t row = begin; row < end; row++) {
        const struct hqq_block block = read_block(w, rows->first_row + row, 1, scratch);
        look_up_row(&block, nbits, kind, (uint8_t *)rows->out + row * size);
    }
}

static TARGET void look_up_rows(const struct hqq_weight *w, const struct dense_rows *rows, int64_t begin, int64_t end,
                                float *scratch) {
#define LOOK_UP(nbits)                                                                                               \
    if (rows->kind == KIND_BFLOAT16)                                                                                 \
        look_up_rows_of(w, rows, begin, end, nbits, KIND_BFLOAT16, scratch);                                         \
    else                                                                                                             \
        look_up_rows_of(w, rows, begin, end, nbits, KIND_FLOAT32, scratch)
    switch (w->nbits) {
    case 1: LOOK_UP(1); break;
    case 2: LOOK_UP(2); break;
    case 3: LOOK_UP(3); break;
    case 4: LOOK_UP(4); break;
    }
#undef LOOK_UP
}

#endif
