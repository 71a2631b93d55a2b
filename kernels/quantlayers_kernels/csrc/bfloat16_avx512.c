/* Products of bfloat16 on x86 with AVX-512 and dot products of it, as Zen 4 and Sapphire Rapids have them. */
#include "extensions.h"
#if HAS_AVX512_BF16
#include <immintrin.h>
#define VARIANT(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define LANES 16
#define BLOCK_TOKENS 4
#include "hqq_bfloat16.h"
#endif
