/* x86 with AVX-512 as Skylake servers and Zen 4 have it. */
#if defined(__x86_64__)
#include <immintrin.h>
#define VARIANT(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define BLOCK_TOKENS 4 /* 16 sums, 4 weights and an input fit 32 registers */
/* AMX, which Linux has to be asked for; the intrinsics came with these compilers. */
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_MATRIX_TILES 1
#endif
#include "kernels.h"
#endif
