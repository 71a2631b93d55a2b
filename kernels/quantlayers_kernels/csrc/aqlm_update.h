/* AQLM: codes that move along a small delta with a probability. See aqlm/update.py for the rule. */

INLINE int64_t read_code(const struct aqlm_update *u, int64_t i) {
    const uint32_t code = u->code_bytes == 1 ? ((uint8_t *)u->codes)[i] : ((uint16_t *)u->codes)[i];
    return code & (uint32_t)(u->size - 1);
}

INLINE void write_code(const struct aqlm_update *u, int64_t i, int32_t code) {
    const int64_t stored = u->size > 2 && code >= u->size / 2 ? code - u->size : code;
    if (u->code_bytes == 1)
        ((int8_t *)u->codes)[i] = (int8_t)stored;
    else
        ((int16_t *)u->codes)[i] = (int16_t)stored;
}

/* Each lane follows the best of its own steps; the lanes are compared at the end. */
INLINE void update_group(const struct aqlm_update *u, int64_t group, int64_t d) {
    const float *t = u->delta + group * d;
    float energy = 0;
    for (int64_t j = 0; j < d; j++)
        energy += t[j] * t[j];
    if (energy == 0)
        return;
    floats best = (floats){0} - energy, best_along = {0}; /* the worth of not moving */
    ints best_step = {0}; /* codebook * neighbours + the lane's first neighbour of it */
    for (int64_t m = 0; m < u->num_codebooks; m++) {
        const int64_t entry = m * u->size + read_code(u, group * u->num_codebooks + m);
        const float *steps = u->steps + entry * d * u->neighbours, *per_energy = u->per_energy + entry * u->neighbours;
        for (int64_t k = 0; k < u->neighbours; k += LANES) {
            floats along = {0};
            for (int64_t j = 0; j < d; j++)
                along += load(steps + j * u->neighbours + k) * t[j];
            /* A step that does not reach as far as t ranks below any that does, by how far it reaches. */
            const floats gain = along * load(per_energy + k), lack = along - energy;
            const floats worth = chosen((ints)(lack >= 0), gain, lack);
            const ints is_better = (ints)(worth > best);
            best = chosen(is_better, worth, best);
            best_along = chosen(is_better, along, best_along);
            best_step = chosen_ints(is_better, (ints){0} + (int32_t)(m * u->neighbours + k), best_step);
        }
    }
    int lane = 0;
    for (int other = 1; other < LANES; other++)
        if (best[other] > best[lane])
            lane = other;
    if (best_along[lane] > 0 && u->noise[group] < energy / best_along[lane]) {
        const int64_t m = best_step[lane] / u->neighbours, k = best_step[lane] % u->neighbours + lane;
        const int64_t code = group * u->num_codebooks + m;
        write_code(u, code, u->entries[(m * u->size + read_code(u, code)) * u->neighbours + k]);
    }
}

static TARGET void VARIANT(aqlm_update)(const struct aqlm_update *update, int64_t begin, int64_t end) {
    const struct aqlm_update copy = *update, *const u = &copy;
    for (int64_t group = begin; group < end; group++)
        if (u->d == 8)
            update_group(u, group, 8);
        else
            update_group(u, group, u->d);
}
