/* Extensions of x86 that not every compiler knows. */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 8)
#define HAS_AVX512_VNNI 1
#endif
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AVX_VNNI 1
#define HAS_AVX512_BF16 1
#endif
