/* HQQ: scales and zero points of groups, one group in each lane. See hqq/solve_reference.py for the definition. */

/* The groups from place `first` of `order` on, to be read lane by lane; a last batch repeats the last group. */
struct lane_groups {
    int64_t index[LANES];
};

INLINE struct lane_groups groups_from(const int64_t *order, int64_t first, int64_t end) {
    struct lane_groups groups;
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t place = first + lane < end ? first + lane : end - 1;
        groups.index[lane] = order ? order[place] : place;
    }
    return groups;
}

INLINE floats gathered(const float *p, struct lane_groups groups) {
    floats v;
    for (int lane = 0; lane < LANES; lane++)
        v[lane] = p[groups.index[lane]];
    return v;
}

INLINE void scatter(float *p, struct lane_groups groups, floats v) {
    for (int lane = 0; lane < LANES; lane++)
        p[groups.index[lane]] = v[lane];
}

/* Values of the groups, (group_size, LANES). */
INLINE void transpose_groups(const struct hqq_groups *g, struct lane_groups groups, float *values) {
    for (int lane = 0; lane < LANES; lane++)
        for (int64_t k = 0; k < g->group_size; k++)
            values[k * LANES + lane] = g->values[groups.index[lane] * g->group_size + k];
}

/* x ** exponent for positive, normal x, to a few units in the last place; the exponent lies between -1 and 0. */
INLINE floats power(floats x, float exponent) {
    /* x = m * 2^e with m from sqrt(1/2) to sqrt(2); log2(m) by its series in s = (m - 1) / (m + 1). */
    const ints bits = (ints)x, e = (bits - 0x3f3504f3) >> 23;
    const floats m = (floats)(bits - (e << 23)), s = (m - 1) / (m + 1), t = s * s;
    const floats series = 1 + t * (1.f / 3 + t * (1.f / 5 + t * (1.f / 7 + t * (1.f / 9))));
    const floats none = {0}, y = (floats_of(e) + s * series * 2.88539008f) * exponent;
    const floats limited = lower(higher(y, none - 126), none + 126);
    /* 2^y = 2^whole * e^(f ln 2), f from -1/2 to 1/2. */
    const floats whole = (limited + 0x1.8p23f) - 0x1.8p23f, f = (limited - whole) * 0.693147181f;
    const floats raised = 1 + f * (1 + f * (1.f / 2 + f * (1.f / 6 + f * (1.f / 24 + f * (1.f / 120 + f * (1.f / 720))))));
    return (floats)((ints)raised + (__builtin_convertvector(whole, ints) << 23));
}

/* Sums over the values of a group in one iteration: codes, absolute residuals, and shrunk residuals. */
struct shrink_sums {
    floats codes, sizes, shrunk;
    ints is_shrunk;
};

INLINE struct shrink_sums shrunk_sums(const struct hqq_groups *g, const struct hqq_half_quadratic *h,
                                      const float *values, floats offset, floats unit, int64_t step) {
    const floats none = {0}, smallest = none + 1e-30f;
    const float threshold = h->thresholds[step], share = 1 / h->betas[step];
    struct shrink_sums sums = {{0}, {0}, {0}, {0}};
    for (int64_t k = 0; k < g->group_size; k++) {
        const floats v = load(values + k * LANES) + offset, code = nearest_code(v, g->max_code, 0);
        const floats residual = (v - code) * unit, size = higher(residual, -residual);
        sums.codes += code;
        sums.sizes += size;
        if (!any_above(size, threshold))
            continue;
        const floats left = higher(size - power(higher(size, smallest), h->exponent) * share, none);
        sums.shrunk += chosen(residual < none, -left, left);
        sums.is_shrunk |= left > none;
    }
    return sums;
}

static TARGET void VARIANT(hqq_half_quadratic)(const struct hqq_groups *g, const struct hqq_half_quadratic *h,
                                               int64_t begin, int64_t end, float *values) {
    const float n = (float)g->group_size;
    for (int64_t first = begin; first < end; first += LANES) {
        const struct lane_groups groups = groups_from(h->order, first, end);
        transpose_groups(g, groups, values);
        const floats mean = gathered(g->mean, groups), steps = gathered(h->steps_per_unit, groups), none = {0};
        const floats unit = 1 / steps, smallest = h->smallest_threshold * steps;
        floats offset = gathered(h->offset, groups), best = offset, best_error = none + __builtin_inff();
        ints is_shrunk = {0};
        for (int64_t t = 0; t < h->iters; t++) {
            const floats residual = higher(higher(offset, -offset), none + 0.5f) * (1 + 1e-5f);
            const ints is_looked_at = (residual > h->thresholds[t] * steps) | is_shrunk;
            floats moved;
            if (is_any(is_looked_at)) {
                const struct shrink_sums sums = shrunk_sums(g, h, values, offset, unit, t);
                is_shrunk |= is_looked_at & sums.is_shrunk;
                const ints is_better = is_shrunk & (sums.sizes < best_error);
                best = chosen(is_better, offset, best);
                best_error = chosen(is_better, sums.sizes, best_error);
                moved = sums.codes / n - mean + chosen(is_looked_at, sums.shrunk / n * steps, none);
            } else {
                floats sum = {0};
                for (int64_t k = 0; k < g->group_size; k++)
                    sum += nearest_code(load(values + k * LANES) + offset, g->max_code, 0);
                moved = sum / n - mean;
            }
            /* A group that has converged moves again when a growing beta lets the shrink reach its residuals. */
            const ints is_moving = (moved != offset) | (residual > smallest);
            offset = moved;
            if (!is_any(is_moving))
                break;
        }
        scatter(h->offset, groups, chosen(is_shrunk, best, offset));
    }
}

/* An affine fit to the values of a group, slope * (code - offset), and its mean squared error. */
struct line {
    floats slope, offset, error;
};

/* Sums for a least squares fit. Codes count from the centre of their range, and values from their mean, to avoid
 * cancellation. */
struct moments {
    floats sum, squares, products;
};

INLINE struct moments added(struct moments a, struct moments b) {
    return (struct moments){a.sum + b.sum, a.squares + b.squares, a.products + b.products};
}

INLINE struct moments moments_at(const struct hqq_groups *g, const float *deviation, floats steps, floats first) {
    const floats v = load(deviation), code = nearest_code(v * steps + first, g->max_code, g->centre);
    return (struct moments){code, code * code, code * v};
}

/* Sums over the codes nearest to deviation * steps + first of all values. Two interleaved sums hide the
 * latency of an addition; they restart after each panel, since the rounding error of a sum grows with its length. */
INLINE struct moments moments_of_codes(const struct hqq_groups *g, const float *deviations, floats steps, floats first) {
    const int64_t panel = PANEL / 4;
    struct moments total = {{0}, {0}, {0}};
    for (int64_t begin = 0; begin < g->group_size; begin += panel) {
        const int64_t end = begin + panel < g->group_size ? begin + panel : g->group_size;
        struct moments even = {{0}, {0}, {0}}, odd = even;
        int64_t k = begin;
        for (; k + 2 <= end; k += 2) {
            even = added(even, moments_at(g, deviations + k * LANES, steps, first));
            odd = added(odd, moments_at(g, deviations + (k + 1) * LANES, steps, first));
        }
        if (k < end)
            even = added(even, moments_at(g, deviations + k * LANES, steps, first));
        total = added(total, added(even, odd));
    }
    return total;
}

INLINE struct line fitted_line(const struct hqq_groups *g, int64_t iters, const float *deviations, floats mean,
                               floats spread, struct line line) {
    const float share = 1 / (float)g->group_size;
    const floats none = {0};
    for (int64_t t = 0; t < iters; t++) {
        const floats steps = 1 / line.slope;
        const struct moments codes = moments_of_codes(g, deviations, steps, mean * steps + line.offset);
        const floats code_mean = codes.sum * share, covariance = codes.products * share;
        const floats variance = codes.squares * share - code_mean * code_mean;
        const ints is_varied = variance > none, is_fitted = is_varied & (covariance > none);
        const floats slope = chosen(is_fitted, covariance / variance, line.slope);
        const floats fitted_offset = chosen(is_fitted, code_mean + g->centre - mean / slope, line.offset);
        /* With one bit all values may be on one code; an offset of 0 starts from two codes. */
        const floats offset = chosen(is_varied, fitted_offset, none);
        const ints is_moving = (slope != line.slope) | (offset != line.offset);
        line = (struct line){slope, offset, chosen(is_fitted, spread - covariance * slope, spread)};
        if (!is_any(is_moving))
            break;
    }
    return line;
}

static TARGET void VARIANT(hqq_affine_fit)(const struct hqq_groups *g, const struct hqq_affine_fit *f, int64_t begin,
                                           int64_t end, float *values) {
    for (int64_t first = begin; first < end; first += LANES) {
        const struct lane_groups groups = groups_from(NULL, first, end);
        transpose_groups(g, groups, values);
        const floats mean = gathered(g->mean, groups), none = {0}, one = none + 1;
        floats spread = {0};
        for (int64_t k = 0; k < g->group_size; k++) {
            const floats deviation = load(values + k * LANES) - mean;
            store(values + k * LANES, deviation);
            spread += deviation * deviation;
        }
        spread /= (float)g->group_size;
        const struct line wide = {one, gathered(f->offset, groups), none};
        const struct line narrow = {gathered(f->other_slope, groups), gathered(f->other_offset, groups), none};
        const struct line a = fitted_line(g, f->iters, values, mean, spread, wide);
        const struct line b = fitted_line(g, f->iters, values, mean, spread, narrow);
        const ints is_better = b.error < a.error - f->margin * spread;
        scatter(f->slope, groups, chosen(is_better, b.slope, a.slope));
        scatter(f->offset, groups, chosen(is_better, b.offset, a.offset));
    }
}
