/* HQQ: the codes of a window of columns in a vector, and which windows a row is taken in. */
#if LANES >= 8

/* How many columns a window must not reach beyond. */
INLINE int64_t run_size_of(int64_t in_features, int64_t n_groups, int short_groups) {
    return short_groups ? in_features : in_features / n_groups;
}

/* By how much the lanes of each plane are shifted for a slot, a number for each lane: a shift by one number for all of
 * them takes two instructions where it is not a constant. The high plane is rotated, from where its codes lie to above
 * those of the low plane. */
struct shifts {
    lanes low, high;
};

INLINE struct shifts shifts_of_slot(struct slots slots, int slot) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1;
    const lanes none = {0};
    return (struct shifts){none + (uint32_t)(slot / slots_a_byte * slots.low),
                           none + (uint32_t)((slot * slots.high - slots.low) & 31)};
}

INLINE lanes rotated(lanes v, lanes bits) {
#if LANES == 16
    return (lanes)_mm512_rorv_epi32((__m512i)v, (__m512i)bits);
#else
    return v >> bits | v << (-bits & 31);
#endif
}

/* The codes whose bytes are given, one in each byte; the bits above a code belong to other codes. Shifts are of whole
 * lanes, and the bits that they bring in from the next byte stay above a code too. */
INLINE lanes codes_in_planes(lanes low, lanes high, struct slots slots, struct shifts shifts) {
    low >>= shifts.low;
    if (slots.high == 0)
        return low;
    high = rotated(high, shifts.high);
    const uint32_t of_low = 0x01010101u * ((1u << slots.low) - 1);
    return (low & of_low) | (high & ~of_low);
}

/* The bytes of a window in the low plane, and in the high one. */
INLINE const lanes_at *in_low_plane(const uint8_t *packed, struct slots slots, int slot, int64_t at) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1;
    return (const lanes_at *)(packed + slot % slots_a_byte * slots.columns + at);
}

INLINE const lanes_at *in_high_plane(const uint8_t *packed, struct slots slots, int64_t at) {
    const int slots_a_byte = slots.high ? slots.low / slots.high : 1;
    return (const lanes_at *)(packed + slots_a_byte * slots.columns + at);
}

INLINE lanes codes_in_window(const uint8_t *packed, struct slots slots, struct shifts shifts, int slot, int64_t at) {
    const lanes low = *in_low_plane(packed, slots, slot, at);
    if (slots.high == 0)
        return codes_in_planes(low, low, slots, shifts);
    return codes_in_planes(low, *in_high_plane(packed, slots, at), slots, shifts);
}

/* Whether windows are joined, two for each slot that ends within a group. They take a third to a half more time than one
 * alone, which pays where there are many slots. */
INLINE int can_join(int nbits, int short_groups) {
    return LANES == 16 && (nbits == 2 || nbits == 3) && !short_groups;
}

/* `next` in the lanes `of_next`. */
INLINE lanes joined_lanes(lanes first, lanes next, uint16_t of_next) {
#if LANES == 16
    return (lanes)_mm512_mask_mov_epi32((__m512i)first, of_next, (__m512i)next);
#else
    (void)next, (void)of_next;
    return first;
#endif
}

INLINE lanes codes_in_joined_window(const uint8_t *packed, struct slots slots, struct shifts shifts,
                                    const struct joined_window *joined) {
    const struct window first = joined->first, next = joined->next;
    const lanes low = joined_lanes(*in_low_plane(packed, slots, first.slot, first.at),
                                   *in_low_plane(packed, slots, next.slot, next.at), joined->of_next);
    if (slots.high == 0)
        return codes_in_planes(low, low, slots, shifts);
    const lanes high = joined_lanes(*in_high_plane(packed, slots, first.at), *in_high_plane(packed, slots, next.at),
                                    joined->of_next);
    return codes_in_planes(low, high, slots, shifts);
}

INLINE int64_t number_of_windows(struct slots slots, int64_t group_size) {
    int64_t n = 0;
    for (struct run run = {0}; next_run(slots, group_size, &run);)
        n++;
    return n;
}

/* The lanes that have columns of a window. */
INLINE uint16_t lanes_of(struct window window) {
    return (uint16_t)((1u << ((window.end - 1) / 4 + 1)) - (1u << window.begin / 4));
}

/* The windows of a row; their number. `windows` may be NULL. Where a slot ends within a group, what is left of the
 * window is filled with the first columns of the next slot, if they go on in other lanes: each lane adds what it would
 * have added in two windows, in the same order. */
INLINE int64_t joined_windows(const struct hqq_weight *w, struct slots slots, struct joined_window *windows) {
    const int64_t group_size = w->in_features / w->n_groups, in_panel = PANEL / WINDOW;
    const int short_groups = has_short_groups(slots, group_size, w->nbits);
    const int64_t run_size = run_size_of(w->in_features, w->n_groups, short_groups);
    struct joined_window joined = {{0}};
    int64_t n = 0, n_runs = 0;
    for (struct run run = {0}; next_run(slots, run_size, &run); n_runs++) {
        const int64_t group = short_groups ? (run.slot * slots.columns + run.at) / group_size : run.group;
        const struct window window = {(int)run.at, (int)group, (int8_t)(run.begin - run.at),
                                      (int8_t)(run.end - run.at), (int8_t)run.slot};
        if (can_join(w->nbits, short_groups) && n_runs % in_panel != 0 && joined.of_next == 0 &&
            group == joined.first.group && (lanes_of(joined.first) & lanes_of(window)) == 0) {
            joined.next = window;
            joined.of_next = lanes_of(window);
        } else {
            joined = (struct joined_window){.first = window};
            n++;
        }
        joined.ends_panel = (n_runs + 1) % in_panel == 0;
        if (windows != NULL)
            windows[n - 1] = joined;
    }
    if (windows != NULL)
        windows[n - 1].ends_panel = 1;
    return n;
}

#endif
