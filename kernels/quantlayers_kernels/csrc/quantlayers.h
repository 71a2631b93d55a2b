/* Shared by the compiled kernels: argument structs, row-parallel loops, the table of one instruction set's kernels.
 *
 * Plain C with GCC's vector extensions; no torch and no Python headers, so that one build serves all versions of
 * both. Every kernel is written once, in hqq_kernels.h, aqlm_kernels.h and the like, and compiled for each instruction
 * set by a variant_*.c; exports.c chooses among them at run time.
 *
 * Python fills the structs in: interface.py declares them again, with the same names, fields and order.
 */
#ifndef QUANTLAYERS_H
#define QUANTLAYERS_H

#include <stddef.h>
#include <stdint.h>

enum float_kind { KIND_FLOAT32, KIND_FLOAT16, KIND_BFLOAT16 };

/* Packed HQQ codes (out_features, row_bytes), and scale and zero of `kind`; see hqq/reference.py for the definition. */
struct hqq_weight {
    const uint8_t *packed;
    const void *scale, *zero;
    int64_t in_features, n_groups, row_bytes;
    int nbits, axis, kind;
};

/* AQLM codes (out_groups, in_groups, num_codebooks) of code_bytes each; see aqlm/reference.py for the definition. */
struct aqlm_weight {
    const void *codes, *codebooks, *scales;
    int64_t in_groups, num_codebooks, size, out_group, in_group;
    int code_bytes, codebook_kind, scale_kind;
};

/* A product of x (tokens, in_features) with the rows of a weight, float32 inside. */
struct product {
    float *y; /* (tokens, out_features), of `kind` */
    const float *x, *bias; /* x of `kind`; bias may be NULL */
    int64_t tokens, out_features;
    int kind; /* KIND_BFLOAT16 is known to multiply_in_float32 only, kernels get KIND_FLOAT32 */
};

/* Products of one x with n weights of one method, at most MAX_TOGETHER. HQQ weights have one layout, and may differ in
 * their rows and in the dtype of their metadata. */
struct products {
    const void *weights;
    const int64_t *out_features; /* (n) */
    const void *biases;          /* (n) pointers to float, each may be NULL; or NULL */
    void *y;       /* (tokens, out_features) of the first weight, then those of the others, of `kind` */
    const float *x; /* (tokens, in_features), of `kind` */
    int64_t n, tokens;
    int kind;
};

#define MAX_TOGETHER 8

/* Dense rows [first_row, first_row + n_rows) of a weight, written as float32 or bfloat16. */
struct dense_rows {
    void *out; /* (n_rows, in_features) */
    int64_t first_row, n_rows;
    int kind;
};

/* Tokens sorted by expert, x (tokens, in_features) and y (tokens, out_features) for a product, the other way round for
 * its gradient, bfloat16. The experts' weights lie one after the other; an expert has out_features rows. */
struct expert_tokens {
    void *y;
    const void *x;
    const int64_t *offsets; /* (n_experts + 1): where the tokens of each expert begin, and where the last one's end */
    int64_t n_experts, out_features;
};

/* The gradient of rows [first_row, first_row + n_rows) of a dense weight, and the gradients of the rows' scales and
 * zeros, for groups along the inputs. */
struct hqq_gradient {
    const float *weight; /* (n_rows, in_features) */
    float *scale, *zero; /* (out_features, n_groups), written */
    int64_t first_row, n_rows;
};

/* Groups of values, shifted to start at 0 and scaled to a step of 1; see hqq/solve_reference.py. */
struct hqq_groups {
    const float *values; /* (n_groups, group_size) */
    const float *mean;   /* (n_groups) */
    int64_t n_groups, group_size;
    float max_code, centre; /* centre: half of max_code, rounded down to a whole number */
};

/* The half-quadratic iteration on the zero points of groups. */
struct hqq_half_quadratic {
    float *offset;               /* (n_groups): where to start, and the result */
    const float *steps_per_unit; /* (n_groups): size of a unit of weight in steps */
    const float *betas;          /* (iters) */
    const float *thresholds;     /* (iters): largest residual that the shrink sets to zero */
    const int64_t *order;        /* (n_groups): the order to take groups in */
    int64_t iters;
    float smallest_threshold, exponent;
};

/* Least squares fits of slope * (code - offset) to groups, from two starts; the better one is written. */
struct hqq_affine_fit {
    float *slope;                            /* (n_groups), written */
    float *offset;                           /* (n_groups): the first start, with a slope of 1; and the result */
    const float *other_slope, *other_offset; /* (n_groups): the second start */
    int64_t iters;
    float margin; /* fraction of a group's variance by which the second fit's error must be lower */
};

/* HQQ codes to choose column by column; see hqq/choice.py. */
struct hqq_choice {
    float *codes;           /* (out_features, columns), updated */
    float *correlation;     /* D H, (out_features, columns), updated */
    const float *steps;     /* (out_features, columns) */
    const float *hessian;   /* (columns, columns) */
    const float *curvature; /* diagonal of the Hessian, (columns) */
    int64_t out_features, columns, sweeps;
    float max_code;
};

/* Groups of AQLM codes to move along a delta; see aqlm/update.py. `neighbours` is a multiple of the widest vector. */
struct aqlm_update {
    void *codes;              /* (n_groups, num_codebooks), updated */
    const float *delta;       /* (n_groups, d) */
    const float *steps;       /* (num_codebooks, size, d, neighbours) */
    const float *per_energy;  /* (num_codebooks, size, neighbours) */
    const int32_t *entries;   /* (num_codebooks, size, neighbours) */
    const float *noise;       /* (n_groups) */
    int64_t n_groups, num_codebooks, size, d, neighbours;
    int code_bytes;
};

/* AQLM codes of neighbouring groups of columns, to choose one group after the other; see aqlm/choice.py. `entries` and
 * `own` are padded to `width`, with infinity in `own`; columns = n_groups * in_group. */
struct aqlm_choice {
    int64_t *codes;         /* (n_out, n_groups, num_codebooks), updated */
    float *correlation;     /* D H, (n_out * out_group, columns), updated */
    const float *hessian;   /* (columns, columns) */
    const float *codebooks; /* (num_codebooks, size, d) */
    const float *entries;   /* (num_codebooks, d, width) */
    const float *own;       /* each entry's own cost, (n_groups, num_codebooks, width) */
    const float *pairs;     /* NULL, or the cost of two entries beyond their own costs: see PAIR_COLUMNS */
    int64_t n_out, n_groups, num_codebooks, size, width, out_group, in_group, columns, beam;
};

/* Columns of a row whose codes lie in neighbouring bytes of a plane, from byte `at` of a slot on; those in
 * [begin, end) of the window's bytes count. `group` is theirs, or the first of several short ones. */
struct window {
    int at, group;
    int8_t begin, end, slot;
};

/* A window, and one in the next slot that goes on with its group, in the lanes `of_next`, none where it stands alone.
 * The sums of windows up to one that `ends_panel` are added first. */
struct joined_window {
    struct window first, next;
    uint16_t of_next;
    int16_t ends_panel;
};

/* Inputs in the order of the codes that lie in windows. */
struct arranged_inputs {
    const struct joined_window *windows; /* (n_windows) */
    const float *x;                      /* (tokens, n_windows, columns of a window) */
    int64_t n_windows;
    int has_joined; /* whether any two windows are */
};

/* Tokens of an expert that meet its weight together. */
#define EXPERT_TOKENS 64

/* Kernels work on the rows [begin, end), those of experts on the experts. `scratch` is the worker's own memory, aligned to a cache line: BLOCK_ROWS dense
 * rows for AQLM's product and what hqq_product_floats says for HQQ's; one dense row for dense rows, and hqq_row_floats more for
 * HQQ's; MAX_LANES groups for the solvers of HQQ; hqq_experts_floats for experts, whose kernels are NULL without AMX. With short
 * vectors there are no hqq_exact_windows; inputs that are not arranged are NULL. */
struct kernels {
    int64_t window_columns; /* of the windows that inputs are arranged in */
    int64_t (*hqq_exact_windows)(const struct hqq_weight *, const struct product *);
    int (*hqq_arrange)(const struct hqq_weight *, const struct product *, struct joined_window *, float *arranged);
    void (*hqq_product)(const struct hqq_weight *, const struct product *, const struct arranged_inputs *, int64_t begin,
                        int64_t end, float *scratch);
    void (*hqq_rows)(const struct hqq_weight *, const struct dense_rows *, int64_t begin, int64_t end, float *scratch);
    void (*hqq_gradient)(const struct hqq_weight *, const struct hqq_gradient *, int64_t begin, int64_t end,
                         float *scratch);
    void (*hqq_experts_product)(const struct hqq_weight *, const struct expert_tokens *, int64_t begin, int64_t end,
                                float *scratch);
    void (*hqq_experts_gradient)(const struct hqq_weight *, const struct expert_tokens *, int64_t begin, int64_t end,
                                 float *scratch);
    int64_t (*hqq_experts_floats)(const struct hqq_weight *, const struct expert_tokens *);
    void (*hqq_half_quadratic)(const struct hqq_groups *, const struct hqq_half_quadratic *, int64_t begin, int64_t end,
                               float *scratch);
    void (*hqq_affine_fit)(const struct hqq_groups *, const struct hqq_affine_fit *, int64_t begin, int64_t end,
                           float *scratch);
    void (*hqq_choose)(const struct hqq_choice *, int64_t begin, int64_t end);
    void (*aqlm_product)(const struct aqlm_weight *, const struct product *, int64_t begin, int64_t end, float *scratch);
    void (*aqlm_rows)(const struct aqlm_weight *, const struct dense_rows *, int64_t begin, int64_t end, float *scratch);
    void (*aqlm_update)(const struct aqlm_update *, int64_t begin, int64_t end);
    void (*aqlm_choose)(const struct aqlm_choice *, int64_t begin, int64_t end, float *scratch);
};

extern const struct kernels kernels_baseline, kernels_avx2, kernels_avx512;

/* The kernels of a variant, 0 to 2, or of the best one that the CPU has. */
const struct kernels *kernels_of(int variant);

/* Activations rounded to 8 bits; see hqq/integer_reference.py. Window by window where there are windows, with zeros for
 * the columns that do not count, and a scale for each lane of four columns; otherwise in order, a scale for each block. */
struct rounded_inputs {
    int8_t *codes;                /* (tokens, token_bytes) */
    float *scale;                 /* (tokens, token_scales) */
    float *offset;                /* (tokens, padded(n_groups)): sums of scale * code over the columns of each group */
    const struct window *windows; /* (n_windows), slot after slot */
    int64_t first[9];             /* where the windows of each slot begin, and where the last one's end */
    int64_t n_windows, token_bytes, token_scales;
};

/* Products of rounded activations; scratch: integer_product_floats, and for rounding rounding_floats. */
struct integer_kernels {
    int64_t (*hqq_windows)(const struct hqq_weight *, struct window *);
    void (*hqq_round)(const struct hqq_weight *, const struct product *, const struct rounded_inputs *, int64_t begin,
                      int64_t end, float *scratch);
    void (*hqq_product)(const struct hqq_weight *, const struct product *, const struct rounded_inputs *, int64_t begin,
                        int64_t end, float *scratch);
    int64_t window_bytes;
};

extern const struct integer_kernels integer_kernels_baseline, integer_kernels_avx2, integer_kernels_avx512;
extern const struct integer_kernels integer_kernels_avx2_vnni, integer_kernels_avx512_vnni;

/* Those of a variant, for products of bytes with the extension that the CPU has for them. Added to a variant,
 * WITHOUT_EXTENSIONS gives those of a CPU that has none, for tests. */
#define WITHOUT_EXTENSIONS 16
const struct integer_kernels *integer_kernels_of(int variant);

/* bfloat16 inputs in the order of the codes that lie in windows, and their sums. */
struct bfloat16_inputs {
    struct joined_window *windows; /* (n_windows) */
    uint16_t *x;                   /* (tokens, n_windows, columns of a window) */
    float *sums;                   /* (tokens, padded(n_groups)) */
    int64_t n_windows;
    int has_joined;
};

/* Products of bfloat16 inputs as they are; p->x is not read, and p->y is float32. Scratch: row_scales_floats. A row of 0
 * windows is none that they read, and inputs for which hqq_arrange gives 0 are none: infinite or NaN. */
struct bfloat16_kernels {
    int64_t window_columns;
    int64_t (*hqq_windows)(const struct hqq_weight *, struct joined_window *);
    int (*hqq_arrange)(const struct hqq_weight *, const uint16_t *x, int64_t tokens, struct bfloat16_inputs *);
    void (*hqq_product)(const struct hqq_weight *, const struct product *, const struct bfloat16_inputs *, int64_t begin,
                        int64_t end, float *scratch);
};

extern const struct bfloat16_kernels bfloat16_kernels_avx512;

/* Those for a variant; NULL where the CPU has no products of bfloat16, or none of extensions are wanted. Added to a
 * variant, IN_FLOAT32 asks for products in float32. */
#define IN_FLOAT32 32
const struct bfloat16_kernels *bfloat16_kernels_of(int variant);

/* Bytes of a cache line on most machines. */
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

/* Scratch memory of the product: dense rows and the scratch to dequantize one; or, where inputs are arranged, the scales
 * and zeros of a block of rows, loaded a vector at a time. */
static inline int64_t hqq_product_floats(const struct hqq_weight *w) {
    return BLOCK_ROWS * w->in_features + hqq_row_floats(w);
}

static inline int64_t hqq_arranged_product_floats(const struct hqq_weight *w) {
    return 2 * BLOCK_ROWS * w->n_groups + MAX_LANES;
}

/* Columns of a group whose activations share a scale when they are rounded to 8 bits; the last ones may be fewer. */
#define ACTIVATION_BLOCK 16

/* Blocks of smaller activations are rounded to 0: 127 over the largest of them might overflow. */
#define SMALLEST_ACTIVATION 0x1p-100f

/* Windows hold at most so many bytes for each column of a row; where they would hold more, rows are unpacked. */
#define MAX_PADDING 4

/* How many blocks of activations a row has. */
static inline int64_t blocks_of(const struct hqq_weight *w) {
    return w->n_groups * ((w->in_features / w->n_groups + ACTIVATION_BLOCK - 1) / ACTIVATION_BLOCK);
}

/* How far ahead of a block of rows memory is read, in whole blocks: a block of short rows takes less time than memory. */
static inline int64_t bytes_ahead_of(int64_t block_bytes) {
    enum { PREFETCHED = 4096 };
    return (PREFETCHED + block_bytes - 1) / block_bytes * block_bytes;
}

/* A number of floats as whole vectors, whatever their width. */
static inline int64_t padded(int64_t n) {
    return (n + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
}

/* Scratch memory for the scales and zeros of a block of rows, as they are converted and with padding; they are loaded a
 * vector at a time. */
static inline int64_t row_scales_floats(const struct hqq_weight *w) {
    return 2 * BLOCK_ROWS * (padded(w->n_groups) + w->n_groups) + 4 * MAX_LANES;
}

/* Scratch memory of the product of rounded activations: one row of codes too. */
static inline int64_t integer_product_floats(const struct hqq_weight *w) {
    return code_floats(w) + row_scales_floats(w);
}

/* Scratch memory of rounding: a row of codes, and the scale of each column. */
static inline int64_t rounding_floats(const struct hqq_weight *w) {
    return code_floats(w) + w->in_features;
}

/* Scores computed at a time for each of the four sums of entries that are compared. */
#define SCORES 1024

/* The costs of pairs are (n_groups, width / PAIR_COLUMNS, size, PAIR_COLUMNS), to be read in one stream. */
#define PAIR_COLUMNS 32

/* Scratch memory to choose the codes of BLOCK_ROWS output groups. */
static inline int64_t aqlm_choice_floats(const struct aqlm_choice *c) {
    const int64_t d = c->out_group * c->in_group, codes = c->beam * c->num_codebooks;
    return BLOCK_ROWS * (3 * SCORES + c->beam * (d + 1) + d + codes + 3 * c->beam) + 2 * d + codes;
}

/* Calls body(context, begin, end, scratch) until all rows are done, on up to n_threads threads. Returns 0, or -1
 * when out of memory: no thread could allocate its scratch. */
typedef void (*row_body)(const void *context, int64_t begin, int64_t end, float *scratch);
int for_rows(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads);

/* The same for rows of which some may take far longer than others. */
int for_uneven_rows(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads);

/* The same for the rows of n products, all at once: body is called with rows of product i. */
typedef void (*product_body)(const void *context, int64_t i, int64_t begin, int64_t end, float *scratch);
int for_product_rows(product_body body, const void *context, const struct product *products, int64_t n,
                     int64_t scratch_floats, int n_threads);

/* Products of one float32 x with n weights, which write float32; 0, or -1 when out of memory. */
typedef int (*multiplication)(const void *weights, const struct product *products, int64_t n, int n_threads,
                              int variant);

/* `multiply` of x and y as they are, or of copies of all in float32 if they are bfloat16. */
int multiply_in_float32(multiplication multiply, const void *weights, const struct product *products, int64_t n,
                        int64_t in_features, int n_threads, int variant);

/* Numbers to bfloat16, to the nearest, and to even between two. */
void round_to_bfloat16(const float *values, int64_t n, uint16_t *to);

/* The single products of all, MAX_TOGETHER at most. */
void products_of(const struct products *all, struct product *products);

#endif
