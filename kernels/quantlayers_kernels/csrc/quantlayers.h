/* What the compiled kernels share: argument structs, row-parallel loops, the table of one instruction set's kernels.
 *
 * Plain C with GCC's vector extensions; no torch and no Python headers, so that one build serves all versions of
 * both. Every kernel is written once, in hqq_kernels.h and aqlm_kernels.h, and compiled for each instruction set by
 * a variant_*.c; exports.c chooses among them at run time.
 */
#ifndef QUANTLAYERS_H
#define QUANTLAYERS_H

#include <stddef.h>
#include <stdint.h>

enum float_kind { KIND_FLOAT32, KIND_FLOAT16, KIND_BFLOAT16 };

/* Packed HQQ codes (out_features, row_bytes), and scale and zero of `kind`; see hqq/reference.py for the meaning. */
struct hqq_weight {
    const uint8_t *packed;
    const void *scale, *zero;
    int64_t in_features, n_groups, row_bytes;
    int nbits, axis, kind;
};

/* AQLM codes (out_groups, in_groups, num_codebooks) of code_bytes each; see aqlm/reference.py for the meaning. */
struct aqlm_weight {
    const void *codes, *codebooks, *scales;
    int64_t in_groups, num_codebooks, size, out_group, in_group;
    int code_bytes, codebook_kind, scale_kind;
};

/* Groups of AQLM codes (n, num_codebooks), to be moved in place along `change` (n, d); the rest as aqlm/update.py has
 * it. `neighbours` is a multiple of the widest vector. */
struct aqlm_update {
    void *codes;
    const float *change, *steps, *per_energy;
    const int32_t *entries;
    const float *noise;
    int64_t num_codebooks, size, d, neighbours;
    int code_bytes;
};

/* A product of x (tokens, in_features) with rows of a weight, all float32; bias may be NULL. */
struct product {
    float *y; /* (tokens, out_features) */
    const float *x, *bias;
    int64_t tokens, out_features;
};

/* Dense rows [first_row, first_row + n) of a weight, float32 or bfloat16. */
struct dense_rows {
    void *out;
    int64_t first_row;
    int kind;
};

/* The gradient of rows [first_row, first_row + n) of a dense weight, and what the numbers of its groups get of it. */
struct hqq_gradient {
    const float *weight; /* (n, in_features) */
    float *scale, *zero; /* (out_features, n_groups) */
    int64_t first_row;
};

/* Codes to be chosen for neighbouring groups of columns, one group after the other; see aqlm/choice.py. Entries and
 * own are padded to `width`, with infinity in own. */
struct aqlm_choice {
    int64_t *codes;                       /* (n_out, n_groups, num_codebooks), changed */
    float *pull;                          /* (n_out * out_group, columns), changed */
    const float *hessian;                 /* (columns, columns) */
    const float *codebooks;               /* (num_codebooks, size, d) */
    const float *entries;                 /* (num_codebooks, d, width) */
    const float *own;                     /* each entry's own cost, (n_groups, num_codebooks, width) */
    const float *pairs;                   /* NULL, or what two entries cost together beyond that: see below */
    int64_t n_groups, num_codebooks, size, width, out_group, in_group, columns, beam;
};

/* Groups of values (n, group_size), shifted and scaled as hqq/solve.py has it; pointers are to (n,) but for those to
 * what belongs to all groups. */
struct hqq_groups {
    float *offset; /* changed */
    const float *values, *mean;
    int64_t group_size, iters;
    float max_code;
    /* hqq_offsets: steps in a unit of weight; for all, the beta of each iteration, and the size of a residual up to which
     * its shrink leaves nothing, the smallest of these, and the exponent of the shrink. */
    const float *steps, *betas, *thresholds;
    float smallest_threshold, exponent;
    const int64_t *order; /* in which groups are taken, or NULL */
    /* hqq_lines: what is found, the other start, how much of its variance the other's error must be below, and the whole
     * number that half of max_code is rounded down to. */
    float *slope;
    const float *other_slope, *other_offset;
    float margin, centre;
};

/* HQQ codes to be chosen column after column; see hqq/choice.py. */
struct hqq_choice {
    float *codes, *pull;    /* (out_features, columns), changed */
    const float *steps;     /* (out_features, columns) */
    const float *hessian;   /* (columns, columns) */
    const float *curvature; /* its diagonal */
    int64_t columns, sweeps;
    float max_code;
};

/* Kernels work on the rows [begin, end); `scratch` is the worker's own memory, aligned to a cache line. AQLM's product
 * wants BLOCK_ROWS dense rows of it, HQQ's hqq_product_floats; dense rows want one, HQQ's hqq_row_floats beside it; the
 * solvers of HQQ want MAX_LANES groups. */
struct kernels {
    void (*hqq_product)(const struct hqq_weight *, const struct product *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_rows)(const struct hqq_weight *, const struct dense_rows *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_gradient)(const struct hqq_weight *, const struct hqq_gradient *, int64_t begin, int64_t end,
                         float *scratch);
    void (*aqlm_product)(const struct aqlm_weight *, const struct product *, int64_t begin, int64_t end, float *scratch);
    void (*aqlm_rows)(const struct aqlm_weight *, const struct dense_rows *, int64_t begin, int64_t end, float *scratch);
    void (*aqlm_update)(const struct aqlm_update *, int64_t begin, int64_t end);
    void (*aqlm_choose)(const struct aqlm_choice *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_offsets)(const struct hqq_groups *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_lines)(const struct hqq_groups *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_choose)(const struct hqq_choice *, int64_t begin, int64_t end);
};

extern const struct kernels kernels_baseline, kernels_avx2, kernels_avx512;

/* Bytes that memory is fetched in, on most machines. */
#define CACHE_LINE 64

/* Floats in the widest vector. */
#define MAX_LANES 16

/* Rows that are dequantized together before they meet several tokens. */
#define BLOCK_ROWS 4

/* Floats that hold the int8 codes of one HQQ row. */
static inline int64_t code_floats(const struct hqq_weight *w) {
    return (w->in_features + 3) / 4;
}

/* Scratch memory to dequantize one HQQ row: its codes, and the scales and zeros of its groups or the zeros of its
 * inputs. */
static inline int64_t hqq_row_floats(const struct hqq_weight *w) {
    return code_floats(w) + (w->axis == 1 ? 2 * w->n_groups : w->in_features);
}

/* Scratch memory of the product: dense rows, or the inputs of as many tokens in windows of which half may be empty;
 * then what one row takes to dequantize, or the scales and zeros of a block of rows, which are loaded a vector at a
 * time. */
static inline int64_t hqq_product_floats(const struct hqq_weight *w) {
    return 2 * BLOCK_ROWS * (w->in_features + w->n_groups) + hqq_row_floats(w) + MAX_LANES;
}

/* Scores that are held at a time for each of four sums of entries that are compared. */
#define SCORES 1024

/* The costs of pairs are (n_groups, width / PAIR_COLUMNS, size, PAIR_COLUMNS), to be read in one stream. */
#define PAIR_COLUMNS 32

/* Scratch memory to choose the codes of BLOCK_ROWS output groups. */
static inline int64_t aqlm_choice_floats(const struct aqlm_choice *c) {
    const int64_t d = c->out_group * c->in_group, codes = c->beam * c->num_codebooks;
    return BLOCK_ROWS * (3 * SCORES + c->beam * (d + 1) + d + codes + 3 * c->beam) + 2 * d + codes;
}

/* Calls body(context, begin, end, scratch) until all rows are done, on up to n_threads threads. Returns 0, or -1
 * where no thread could get its scratch memory. */
typedef void (*row_body)(const void *context, int64_t begin, int64_t end, float *scratch);
int for_rows(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads);

#endif
