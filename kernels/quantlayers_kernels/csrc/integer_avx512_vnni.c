/* Products in integers on x86 with AVX-512 and dot products of bytes, as Ice Lake and Zen 4 have them. */
#include "extensions.h"
#if HAS_AVX512_VNNI
#include <immintrin.h>
#define VARIANT(name) name##_avx512_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define LANES 16
#define BLOCK_TOKENS 4
#define HAS_DOT_PRODUCTS 1
#include "hqq_integer.h"
#endif
