/* What every machine runs, whatever its architecture. */
#define VARIANT(name) name##_baseline
#define TARGET
#define LANES 4
#define BLOCK_TOKENS 2
#include "kernels.h"
