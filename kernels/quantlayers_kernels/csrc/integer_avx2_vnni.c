/* Products in integers on x86 with AVX2 and dot products of bytes, as Alder Lake has them. */
#include "extensions.h"
#if HAS_AVX_VNNI
#include <immintrin.h>
#define VARIANT(name) name##_avx2_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define LANES 8
#define BLOCK_TOKENS 2
#define HAS_DOT_PRODUCTS 1
#include "hqq_integer.h"
#endif
