// Attention with AVX-512: the flags of the lesser of the two units, so that both may use it.
#include "attention_impl.h"

namespace ql {
const AttentionKernels avx512_attention = kAttention;
}
