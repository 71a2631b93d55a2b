/* x86 since Haswell (2013) and Zen (2017). */
#if defined(__x86_64__)
#include <immintrin.h>
#define VARIANT(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define BLOCK_TOKENS 2 /* 8 sums, 4 weights and an input fit 16 registers */
#include "kernels.h"
#endif
