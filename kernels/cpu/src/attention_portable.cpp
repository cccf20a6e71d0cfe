// Attention for any processor.
#include "attention_impl.h"

namespace ql {
const AttentionKernels portable_attention = kAttention;
}
