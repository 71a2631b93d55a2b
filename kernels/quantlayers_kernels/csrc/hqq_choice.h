/* HQQ: codes chosen column after column, with all others fixed. See hqq/choice.py for the definition. */

/* A code that moves changes its row's residual correlation in all columns. Few codes move after the first sweep, so the
 * test that LANES codes stay must be fast; rows go through the columns together, to share a column of the Hessian. */
#define CHOICE_FLOATS (1 << 16)

/* The n floats at p, and `rest` in the lanes beyond. */
INLINE floats load_some(const float *p, int64_t n, float rest) {
    if (n == LANES)
        return load(p);
    floats v = (floats){0} + rest;
    for (int64_t lane = 0; lane < n; lane++)
        v[lane] = p[lane];
    return v;
}

/* Moves the codes of one row in the `n` columns from `first` on. */
INLINE void choose_codes(const struct hqq_choice *c, int64_t row, int64_t first, int64_t n) {
    float *codes = c->codes + row * c->columns, *correlation = c->correlation + row * c->columns;
    const float *steps = c->steps + row * c->columns;
    const floats step = load_some(steps + first, n, 1), per_step = load_some(c->curvature + first, n, 1) * step;
    /* A move may cause another one in a column to the right of it; columns to the left wait for the next sweep. */
    for (int64_t next = 0; next < n;) {
        const floats code = load_some(codes + first, n, 0), wanted = load_some(correlation + first, n, 0) / per_step;
        const floats best = nearest_code(code + wanted, c->max_code, 0);
        if (!is_any(best != code))
            return;
        while (next < n && best[next] == code[next])
            next++;
        if (next == n)
            return;
        const int64_t column = first + next;
        const float moved = (best[next] - code[next]) * step[next], *hessian = c->hessian + column * c->columns;
        codes[column] = best[next++];
        int64_t k = 0;
        for (; k + LANES <= c->columns; k += LANES)
            store(correlation + k, load(correlation + k) - load(hessian + k) * moved);
        for (; k < c->columns; k++)
            correlation[k] -= hessian[k] * moved;
    }
}

static TARGET void VARIANT(hqq_choose)(const struct hqq_choice *c, int64_t begin, int64_t end) {
    const int64_t rows = CHOICE_FLOATS / c->columns + 1;
    for (int64_t first_row = begin; first_row < end; first_row += rows) {
        const int64_t last_row = first_row + rows < end ? first_row + rows : end;
        for (int64_t sweep = 0; sweep < c->sweeps; sweep++)
            for (int64_t first = 0; first < c->columns; first += LANES) {
                const int64_t n = first + LANES < c->columns ? LANES : c->columns - first;
                for (int64_t row = first_row; row < last_row; row++)
                    choose_codes(c, row, first, n);
            }
    }
}
