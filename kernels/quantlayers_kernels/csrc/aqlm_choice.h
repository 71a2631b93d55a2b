/* AQLM: the codes of groups of columns with the lowest output error. See aqlm/choice.py for the definition. */

/* The beam of an output group: its best choices of codes so far, (count, num_codebooks). */
struct beams {
    int32_t *codes;
    int64_t count;
};

/* The up to `wanted` best continuations: which choice (parent), and which code in it; costs ascend. */
struct candidates {
    float *costs;
    int32_t *parents, *codes;
    int64_t count, wanted;
};

static TARGET void insert_candidate(struct candidates *best, float cost, int32_t parent, int32_t code) {
    int64_t i = best->count < best->wanted ? best->count++ : best->wanted - 1;
    for (; i > 0 && best->costs[i - 1] > cost; i--) {
        best->costs[i] = best->costs[i - 1];
        best->parents[i] = best->parents[i - 1];
        best->codes[i] = best->codes[i - 1];
    }
    best->costs[i] = cost;
    best->parents[i] = parent;
    best->codes[i] = code;
}

/* The best of n scores, those of the entries from `first` on, among the candidates of one row. */
INLINE void collect(const float *scores, int64_t n, int32_t first, float held, int32_t parent,
                    struct candidates *best) {
    float bound = best->count < best->wanted ? __builtin_inff() : best->costs[best->wanted - 1] - held;
    if (best->wanted == 1) {
        floats lowest = load(scores);
        for (int64_t k = LANES; k < n; k += LANES)
            lowest = lower(load(scores + k), lowest);
        float minimum = lowest[0];
        for (int i = 1; i < LANES; i++)
            minimum = lowest[i] < minimum ? lowest[i] : minimum;
        if (!(minimum < bound))
            return;
        for (int64_t k = 0; k < n; k++)
            if (scores[k] == minimum) {
                insert_candidate(best, held + minimum, parent, first + (int32_t)k);
                return;
            }
        return;
    }
    for (int64_t k = 0; k < n; k += LANES) {
        if (!any_below(load(scores + k), bound))
            continue;
        for (int64_t lane = k; lane < k + LANES; lane++)
            if (scores[lane] < bound) {
                insert_candidate(best, held + scores[lane], parent, first + (int32_t)lane);
                bound = best->count < best->wanted ? __builtin_inff() : best->costs[best->wanted - 1] - held;
            }
    }
}

/* scores (4, n) = own - 2 <query, entry> for n entries from `first` on; entries (d, width), queries (4, d) times -2. */
INLINE void score(const float *queries, const float *entries, const float *own, int64_t d, int64_t width,
                  int64_t first, int64_t n, float *scores) {
    for (int64_t k = 0; k < n; k += 2 * LANES) {
        const float *column = entries + first + k;
        floats total[4][2];
        for (int q = 0; q < 4; q++) {
            total[q][0] = load(own + first + k);
            total[q][1] = load(own + first + k + LANES);
        }
        for (int64_t i = 0; i < d; i++, column += width) {
            const floats left = load(column), right = load(column + LANES);
            for (int q = 0; q < 4; q++) {
                total[q][0] += left * queries[q * d + i];
                total[q][1] += right * queries[q * d + i];
            }
        }
        for (int q = 0; q < 4; q++) {
            store(scores + q * SCORES + k, total[q][0]);
            store(scores + q * SCORES + k + LANES, total[q][1]);
        }
    }
}

/* out (d) = v (d) times the Hessian's block of group `group`, for each output of the group. */
INLINE void times_block(const struct aqlm_choice *c, const float *v, int64_t group, float *out) {
    const float *block = c->hessian + group * c->in_group * (c->columns + 1);
    for (int64_t a = 0; a < c->out_group; a++, v += c->in_group, out += c->in_group) {
        for (int64_t j = 0; j < c->in_group; j++)
            out[j] = 0;
        for (int64_t i = 0; i < c->in_group; i++)
            for (int64_t j = 0; j < c->in_group; j++)
                out[j] += v[i] * block[i * c->columns + j];
    }
}

/* out (d) = sum of the entries with indices `codes`, without that of codebook `without`. */
INLINE void sum_entries(const struct aqlm_choice *c, const int32_t *codes, int64_t without, int64_t d, float *out) {
    for (int64_t i = 0; i < d; i++)
        out[i] = 0;
    for (int64_t m = 0; m < c->num_codebooks; m++) {
        if (m == without)
            continue;
        const float *entry = c->codebooks + (m * c->size + codes[m]) * d;
        for (int64_t i = 0; i < d; i++)
            out[i] += entry[i];
    }
}

/* Scratch of a tile of rows, cut into pieces. */
struct choice_scratch {
    float *scores, *pair_costs, *queries, *held, *wanted, *rest, *product;
    struct beams states[BLOCK_ROWS], next;
    struct candidates best[BLOCK_ROWS];
};

INLINE void cut_choice_scratch(const struct aqlm_choice *c, int64_t d, float *memory, struct choice_scratch *s) {
    const int64_t queries = BLOCK_ROWS * c->beam, codes = c->beam * c->num_codebooks;
    s->scores = memory, memory += BLOCK_ROWS * SCORES;
    s->pair_costs = memory, memory += 2 * BLOCK_ROWS * SCORES;
    s->queries = memory, memory += queries * d;
    s->held = memory, memory += queries;
    s->wanted = memory, memory += BLOCK_ROWS * d;
    s->rest = memory, memory += d;
    s->product = memory, memory += d;
    s->next = (struct beams){(int32_t *)memory, 0}, memory += codes;
    for (int r = 0; r < BLOCK_ROWS; r++) {
        s->states[r] = (struct beams){(int32_t *)memory, 0}, memory += codes;
        s->best[r] = (struct candidates){memory, (int32_t *)memory + c->beam, (int32_t *)memory + 2 * c->beam, 0, 0};
        memory += 3 * c->beam;
    }
}

/* Chooses codebook m's code again in all states of all rows, and selects the best states. */
INLINE void choose_codebook(const struct aqlm_choice *c, int64_t group, int64_t m, int rows, int64_t d,
                            struct choice_scratch *s) {
    int64_t n_queries = 0;
    int32_t row_of[4], state_of[4];
    for (int r = 0; r < rows; r++) {
        s->best[r].count = 0;
        s->best[r].wanted = m < c->num_codebooks - 1 ? c->beam : 1;
        for (int64_t state = 0; state < s->states[r].count; state++, n_queries++) {
            const float *wanted = s->wanted + r * d;
            float *query = s->queries + n_queries * d, held = 0;
            sum_entries(c, s->states[r].codes + state * c->num_codebooks, m, d, s->rest);
            times_block(c, s->rest, group, s->product);
            for (int64_t i = 0; i < d; i++) {
                held += (s->product[i] - 2 * wanted[i]) * s->rest[i];
                query[i] = -2 * (wanted[i] - s->product[i]);
            }
            s->held[n_queries] = held;
        }
    }
    for (int64_t i = n_queries * d; i < (n_queries + 3) / 4 * 4 * d; i++)
        s->queries[i] = 0;
    int r = 0;
    int32_t state = 0;
    for (int64_t query = 0; query < n_queries; query += 4) {
        const int n = (int)(n_queries - query < 4 ? n_queries - query : 4);
        for (int q = 0; q < n; q++) {
            row_of[q] = r, state_of[q] = state;
            if (++state == s->states[r].count)
                state = 0, r++;
        }
        for (int64_t first = 0; first < c->width; first += SCORES) {
            const int64_t n_scores = c->width - first < SCORES ? c->width - first : SCORES;
            score(s->queries + query * d, c->entries + m * d * c->width,
                  c->own + (group * c->num_codebooks + m) * c->width, d, c->width, first, n_scores, s->scores);
            for (int q = 0; q < n; q++)
                collect(s->scores + q * SCORES, n_scores, (int32_t)first, s->held[query + q], state_of[q],
                        s->best + row_of[q]);
        }
    }
    for (r = 0; r < rows; r++) {
        const struct candidates *best = s->best + r;
        if (best->count == 0) /* all costs are NaN: the codes stay */
            continue;
        for (int64_t i = 0; i < best->count; i++) {
            int32_t *codes = s->next.codes + i * c->num_codebooks;
            memcpy(codes, s->states[r].codes + best->parents[i] * c->num_codebooks,
                   (size_t)c->num_codebooks * sizeof(int32_t));
            codes[m] = best->codes[i];
        }
        int32_t *free_codes = s->states[r].codes;
        s->states[r].codes = s->next.codes;
        s->states[r].count = best->count;
        s->next.codes = free_codes;
    }
}

/* The best of all pairs of entries by the costs of the left one, of the right one, and of both together. */
INLINE void choose_pair(const struct aqlm_choice *c, int64_t group, int rows, int64_t d, struct choice_scratch *s) {
    const float *pairs = c->pairs + group * c->size * c->width;
    float *left = s->pair_costs, *right = left + BLOCK_ROWS * SCORES, lowest[BLOCK_ROWS];
    int64_t best_right[BLOCK_ROWS];
    for (int64_t i = 0; i < BLOCK_ROWS * d; i++)
        s->queries[i] = i < rows * d ? -2 * s->wanted[i] : 0;
    const float *own = c->own + group * 2 * c->width;
    score(s->queries, c->entries, own, d, c->width, 0, c->width, left);
    score(s->queries, c->entries + d * c->width, own + c->width, d, c->width, 0, c->width, right);
    for (int r = 0; r < BLOCK_ROWS; r++)
        lowest[r] = __builtin_inff(), best_right[r] = -1;
    for (int64_t begin = 0; begin < c->width; begin += PAIR_COLUMNS) {
        const float *tile = pairs + begin * c->size;
        for (int64_t k = 0; k < PAIR_COLUMNS; k += 2 * LANES) {
            floats least[BLOCK_ROWS][2];
            for (int r = 0; r < BLOCK_ROWS; r++)
                least[r][0] = least[r][1] = (floats){0} + __builtin_inff();
            for (int64_t i = 0; i < c->size; i++) {
                const floats one = load(tile + i * PAIR_COLUMNS + k), two = load(tile + i * PAIR_COLUMNS + k + LANES);
                for (int r = 0; r < BLOCK_ROWS; r++) {
                    least[r][0] = lower(one + left[r * SCORES + i], least[r][0]);
                    least[r][1] = lower(two + left[r * SCORES + i], least[r][1]);
                }
            }
            for (int r = 0; r < BLOCK_ROWS; r++)
                for (int half = 0; half < 2; half++) {
                    const int64_t first = begin + k + half * LANES;
                    const floats costs = least[r][half] + load(right + r * SCORES + first);
                    if (!any_below(costs, lowest[r]))
                        continue;
                    for (int lane = 0; lane < LANES; lane++)
                        if (costs[lane] < lowest[r])
                            lowest[r] = costs[lane], best_right[r] = first + lane;
                }
        }
    }
    for (int r = 0; r < rows; r++) {
        if (best_right[r] < 0) /* all costs are NaN: the codes stay */
            continue;
        const int64_t k = best_right[r];
        const float *column = pairs + k / PAIR_COLUMNS * PAIR_COLUMNS * c->size + k % PAIR_COLUMNS;
        int32_t best_left = 0;
        for (int32_t i = 1; i < c->size; i++)
            if (column[i * PAIR_COLUMNS] + left[r * SCORES + i] <
                column[best_left * PAIR_COLUMNS] + left[r * SCORES + best_left])
                best_left = i;
        s->states[r].codes[0] = best_left;
        s->states[r].codes[1] = (int32_t)k;
    }
}

INLINE void choose_tile(const struct aqlm_choice *c, int64_t row, int rows, int64_t d, struct choice_scratch *s) {
    const int64_t mask = c->size - 1;
    for (int64_t group = 0; group < c->n_groups; group++) {
        for (int r = 0; r < rows; r++) {
            const int64_t *codes = c->codes + (row + r) * c->n_groups * c->num_codebooks + group * c->num_codebooks;
            struct beams *states = s->states + r;
            states->count = 1;
            for (int64_t m = 0; m < c->num_codebooks; m++)
                states->codes[m] = (int32_t)(codes[m] & mask);
            sum_entries(c, states->codes, -1, d, s->rest);
            times_block(c, s->rest, group, s->wanted + r * d);
            for (int64_t i = 0; i < d; i++)
                s->wanted[r * d + i] += c->correlation[((row + r) * c->out_group + i / c->in_group) * c->columns +
                                                group * c->in_group + i % c->in_group];
        }
        if (c->pairs)
            choose_pair(c, group, rows, d, s);
        else
            for (int64_t m = 0; m < c->num_codebooks; m++)
                choose_codebook(c, group, m, rows, d, s);
        for (int r = 0; r < rows; r++) {
            int64_t *codes = c->codes + (row + r) * c->n_groups * c->num_codebooks + group * c->num_codebooks;
            int is_moved = 0;
            for (int64_t i = 0; i < d; i++)
                s->rest[i] = 0;
            for (int64_t m = 0; m < c->num_codebooks; m++) {
                const int64_t before = codes[m] & mask, after = s->states[r].codes[m];
                if (before == after)
                    continue;
                is_moved = 1;
                for (int64_t i = 0; i < d; i++)
                    s->rest[i] += c->codebooks[(m * c->size + after) * d + i] -
                                  c->codebooks[(m * c->size + before) * d + i];
                codes[m] = after;
            }
            if (!is_moved || c->n_groups == 1)
                continue;
            for (int64_t i = 0; i < d; i++) {
                float *correlation = c->correlation + ((row + r) * c->out_group + i / c->in_group) * c->columns;
                const float *hessian = c->hessian + (group * c->in_group + i % c->in_group) * c->columns;
                for (int64_t k = 0; k < c->columns; k++)
                    correlation[k] -= s->rest[i] * hessian[k];
            }
        }
    }
}

INLINE void choose_rows(const struct aqlm_choice *c, int64_t begin, int64_t end, float *scratch) {
    const int64_t d = c->out_group * c->in_group;
    struct choice_scratch s;
    cut_choice_scratch(c, d, scratch, &s);
    for (int64_t row = begin; row < end; row += BLOCK_ROWS)
        choose_tile(c, row, (int)(end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS), d, &s);
}

static TARGET void VARIANT(aqlm_choose)(const struct aqlm_choice *choice, int64_t begin, int64_t end, float *scratch) {
    struct aqlm_choice copy = *choice;
    if (copy.out_group == 1 && copy.in_group == 8) { /* the published scheme, with its group size a compile-time constant */
        copy.out_group = 1, copy.in_group = 8;
        choose_rows(&copy, begin, end, scratch);
    } else
        choose_rows(&copy, begin, end, scratch);
}
