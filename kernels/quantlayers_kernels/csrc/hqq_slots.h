/* HQQ: where the codes of a row lie, a window of neighbouring columns after the other, for the products that decode them
 * in registers. The layout is defined in bitpack/reference.py. */
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

/* Whether a window holds several whole groups, and a lane columns of one of them only. Their size is a power of two
 * then, as WINDOW is: quotients are shifts. */
INLINE int has_short_groups(struct slots slots, int64_t group_size, int nbits) {
    return nbits <= 4 && group_size < WINDOW && group_size % 4 == 0 && WINDOW % group_size == 0 &&
           slots.columns % group_size == 0;
}

#endif

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
