/* Products in integers on x86 with AVX-512. */
#if defined(__x86_64__)
#include <immintrin.h>
#define VARIANT(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define BLOCK_TOKENS 4
#include "hqq_integer.h"
#endif
