/* Rows distributed over the threads of the OpenMP runtime that torch has already started.
 *
 * Not with OpenMP pragmas: they would link a second runtime, whose threads compete with torch's, which spin for a while
 * after each operator. GOMP_parallel is the entry point that GCC's and LLVM's runtimes both have; Python passes its
 * address. Without it the caller's thread does all rows.
 */
#include "quantlayers.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

typedef void (*parallel_region)(void (*work)(void *), void *shared, unsigned n_threads, unsigned flags);

static parallel_region torch_parallel_region;

void ql_set_parallel_region(void *address) {
    torch_parallel_region = (parallel_region)address;
}

struct shared_rows {
    row_body body;
    const void *context;
    int64_t n_rows, step, scratch_floats;
    int n_threads, is_even;
    atomic_llong next;
};

/* The end of the rows that a worker takes from `begin` on: half of a fair share of those that are left, if all rows take
 * as long. */
static int64_t end_of_next(const struct shared_rows *shared, int64_t begin) {
    const int64_t share = (shared->n_rows - begin) / (2 * (int64_t)shared->n_threads) / BLOCK_ROWS * BLOCK_ROWS;
    const int64_t end = begin + (shared->is_even && share > shared->step ? share : shared->step);
    return end < shared->n_rows ? end : shared->n_rows;
}

/* A worker takes the next rows until none are left, so that a delayed thread does not delay the others; many at first,
 * since memory is read ahead of the rows, in vain where another worker takes the next ones. */
static void work_on_rows(void *argument) {
    struct shared_rows *shared = argument;
    void *memory = NULL;
    float *scratch = NULL;
    if (shared->scratch_floats) {
        memory = malloc((size_t)shared->scratch_floats * sizeof(float) + CACHE_LINE);
        if (memory == NULL)
            return; /* the other workers do its rows */
        scratch = (float *)(((uintptr_t)memory + CACHE_LINE - 1) & ~(uintptr_t)(CACHE_LINE - 1));
    }
    for (;;) {
        long long begin = atomic_load(&shared->next), end = 0;
        while (begin < shared->n_rows) {
            end = end_of_next(shared, begin);
            if (atomic_compare_exchange_weak(&shared->next, &begin, end))
                break;
        }
        if (begin >= shared->n_rows)
            break;
        shared->body(shared->context, begin, end, scratch);
    }
    free(memory);
}

static int for_all(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads,
                   int is_even) {
    /* The smallest ranges balance the load on a busy machine; whole blocks of rows take the kernels' fast path. */
    int64_t step = n_rows / (8 * (int64_t)n_threads) / BLOCK_ROWS * BLOCK_ROWS;
    step = step < BLOCK_ROWS ? BLOCK_ROWS : step;
    struct shared_rows shared = {body, context, n_rows, step, scratch_floats, n_threads, is_even, 0};
    if (n_threads > 1 && torch_parallel_region != NULL && n_rows > BLOCK_ROWS)
        torch_parallel_region(work_on_rows, &shared, (unsigned)n_threads, 0);
    else
        work_on_rows(&shared);
    return atomic_load(&shared.next) >= n_rows ? 0 : -1;
}

int for_rows(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads) {
    return for_all(body, context, n_rows, scratch_floats, n_threads, 1);
}

int for_uneven_rows(row_body body, const void *context, int64_t n_rows, int64_t scratch_floats, int n_threads) {
    return for_all(body, context, n_rows, scratch_floats, n_threads, 0);
}

struct product_rows {
    product_body body;
    const void *context;
    const struct product *products;
    int64_t n;
};

/* Products follow each other, each from a whole block of rows on. */
static int64_t whole_blocks(int64_t rows) {
    return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
}

static void work_on_products(const void *argument, int64_t begin, int64_t end, float *scratch) {
    const struct product_rows *rows = argument;
    for (int64_t i = 0, first = 0; i < rows->n && first < end; i++) {
        const int64_t n_rows = rows->products[i].out_features;
        const int64_t from = begin > first ? begin - first : 0, to = end - first < n_rows ? end - first : n_rows;
        if (from < to)
            rows->body(rows->context, i, from, to, scratch);
        first += whole_blocks(n_rows);
    }
}

int for_product_rows(product_body body, const void *context, const struct product *products, int64_t n,
                     int64_t scratch_floats, int n_threads) {
    const struct product_rows rows = {body, context, products, n};
    int64_t n_rows = 0;
    for (int64_t i = 0; i < n; i++)
        n_rows += whole_blocks(products[i].out_features);
    return for_rows(work_on_products, &rows, n_rows, scratch_floats, n_threads);
}
