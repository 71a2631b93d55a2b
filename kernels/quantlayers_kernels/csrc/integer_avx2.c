/* Products in integers on x86 with AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>
#define VARIANT(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define BLOCK_TOKENS 2
#include "hqq_integer.h"
#endif
