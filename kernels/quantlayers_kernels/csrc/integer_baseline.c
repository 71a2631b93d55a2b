/* Products in integers on every machine of any architecture. */
#define VARIANT(name) name##_baseline
#define TARGET
#define LANES 4
#define BLOCK_TOKENS 2
#include "hqq_integer.h"
