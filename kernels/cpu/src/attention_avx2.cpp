// Attention with AVX2, FMA and F16C.
#include "attention_impl.h"

namespace ql {
const AttentionKernels avx2_attention = kAttention;
}
