// The KV cache and attention from outside (kernels/cpu/attention_library.py): one layer at a time,
// for `count` sequences that each bring `tokens` tokens. The decoder engine does not come through
// here: it uses AttentionKernels itself.
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "team.h"

namespace ql {

const AttentionKernels* attention_of(int32_t isa) {
  const TileKernels* tiles = kernels_of(isa);
  if (!tiles) return nullptr;
#if defined(QL_X86)
  if (tiles == &avx512_tiles || tiles == &avx512vnni_tiles) return &avx512_attention;
  if (tiles == &avx2_tiles || tiles == &avx2vnni_tiles) return &avx2_attention;
#endif
  return &portable_attention;
}

namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Memory aligned_memory(int64_t bytes) {
  return Memory(
      static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(whole_lines(bytes)))));
}

// Rows of q, k, v and out: [count][tokens][heads][head_dim].
struct Call {
  const AttentionKernels* kernels;
  const KvLayer* cache;
  const AttentionShape* shape;
  int64_t count;
  int64_t tokens;
  const int64_t* sequences;
  const int64_t* firsts;  // position of the first token of each
  const float* query;
  float* out;
  uint8_t* scratch;  // of all threads
  int64_t scratch_bytes;
  float* partials;
  const int64_t* first_units;  // [count + 1]: splits of sequences before, times KV heads

  int64_t row() const { return shape->heads * cache->head_dim; }
};

void attend_prompt_unit(const Call& c, int64_t unit, uint8_t* scratch) {
  const int64_t heads = c.cache->kv_heads, block = attention_tokens(*c.cache, *c.shape);
  const int64_t blocks = (c.tokens + block - 1) / block;
  // The last tokens see most: they come first, so that threads end together.
  const int64_t begin = (blocks - 1 - unit / (c.count * heads)) * block;
  const int64_t i = unit / heads % c.count;
  const int64_t tokens = c.tokens - begin < block ? c.tokens - begin : block;
  const int64_t at = (i * c.tokens + begin) * c.row();
  c.kernels->attend_tokens(*c.cache, *c.shape, c.sequences[i], unit % heads, c.firsts[i] + begin,
                           tokens, c.query + at, c.row(), c.out + at, c.row(), scratch);
}

void attend_prompt(void* context, const Member& member) {
  const Call& c = *static_cast<const Call*>(context);
  const int64_t block = attention_tokens(*c.cache, *c.shape);
  const int64_t units = (c.tokens + block - 1) / block * c.count * c.cache->kv_heads;
  for (int64_t unit, end; member.next(units, 1, &unit, &end);) {
    attend_prompt_unit(c, unit, c.scratch + member.index * c.scratch_bytes);
  }
}

// Splits of one token: units of a sequence are its heads' splits, head by head.
void attend_token(void* context, const Member& member) {
  const Call& c = *static_cast<const Call*>(context);
  const int64_t heads = c.cache->kv_heads, floats = partial_floats(*c.cache, *c.shape);
  uint8_t* scratch = c.scratch + member.index * c.scratch_bytes;
  int64_t i = 0;  // units come in order
  for (int64_t unit, end; member.next(c.first_units[c.count], 1, &unit, &end);) {
    while (unit >= c.first_units[i + 1]) ++i;
    const int64_t splits = attention_splits(*c.shape, c.firsts[i]);
    const int64_t at = unit - c.first_units[i];
    c.kernels->attend_split(*c.cache, *c.shape, c.sequences[i], at / splits, c.firsts[i],
                            at % splits, c.query + i * c.row(), c.partials + unit * floats,
                            scratch);
  }
  member.barrier();
  for (int64_t unit, end; member.next(c.count * heads, 1, &unit, &end);) {
    const int64_t sequence = unit / heads, head = unit % heads;
    const int64_t splits = attention_splits(*c.shape, c.firsts[sequence]);
    c.kernels->merge_splits(*c.cache, *c.shape, head, splits,
                            c.partials + (c.first_units[sequence] + head * splits) * floats,
                            c.out + sequence * c.row(), scratch);
  }
}

struct AppendCall {
  const AttentionKernels* kernels;
  const KvLayer* cache;
  int64_t tokens;
  const int64_t* sequences;
  const int64_t* firsts;
  const float* keys;
  const float* values;
};

void append_unit(void* context, int64_t unit) {
  const AppendCall& c = *static_cast<const AppendCall*>(context);
  const int64_t heads = c.cache->kv_heads, head_dim = c.cache->head_dim, row = heads * head_dim;
  const int64_t i = unit / heads, head = unit % heads;
  const int64_t at = i * c.tokens * row + head * head_dim;
  c.kernels->append(*c.cache, c.sequences[i], head, c.firsts[i], c.tokens, c.keys + at, row,
                    c.values + at, row);
}

int32_t attend(Call& call, int32_t threads) {
  std::vector<int64_t> first_units(1, 0);
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t splits = attention_splits(*call.shape, call.firsts[i]);
    first_units.push_back(first_units.back() + splits * call.cache->kv_heads);
  }
  const bool decode = call.tokens == 1;
  const int64_t floats = decode ? partial_floats(*call.cache, *call.shape) * first_units.back() : 1;
  call.scratch_bytes = whole_lines(call.kernels->scratch_bytes(*call.cache));
  const Memory scratch = aligned_memory(call.scratch_bytes * threads);
  const Memory partials = aligned_memory(floats * 4);
  if (!scratch || !partials) return QL_NO_MEMORY;
  call.scratch = scratch.get();
  call.partials = reinterpret_cast<float*>(partials.get());
  call.first_units = first_units.data();
  run_team(threads, decode ? attend_token : attend_prompt, &call);
  return QL_OK;
}

}  // namespace
}  // namespace ql

// sizeof KvFormat, KvLayer, AttentionShape, for the other side to compare.
QL_API void ql_kv_struct_bytes(int64_t sizes[3]) {
  sizes[0] = sizeof(ql::KvFormat);
  sizes[1] = sizeof(ql::KvLayer);
  sizes[2] = sizeof(ql::AttentionShape);
}

// Bytes of 64 positions of one KV head; -1 for a format that does not exist.
QL_API int64_t ql_kv_block_bytes(const ql::KvFormat* format, int64_t head_dim) {
  if (head_dim < 1 || head_dim > ql::kKvMaxHeadDim) return -1;
  return kv_format_is_valid(*format, head_dim) ? kv_block_bytes(*format, head_dim) : -1;
}

// Keys and values of tokens [count][tokens][kv_heads][head_dim], stored at positions firsts[i] and
// on of sequences[i], which are all different.
QL_API int32_t ql_kv_append(const ql::KvLayer* cache, int64_t count, int64_t tokens,
                            const int64_t* sequences, const int64_t* firsts, const float* keys,
                            const float* values, int32_t isa, int32_t threads) {
  const ql::AttentionKernels* kernels = ql::attention_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  ql::AppendCall call{kernels, cache, tokens, sequences, firsts, keys, values};
  ql::parallel_for(count * cache->kv_heads, threads, ql::append_unit, &call);
  return QL_OK;
}

// query, out: [count][tokens][heads][head_dim]; the tokens are at positions firsts[i] and on of
// sequences[i] and have been appended.
QL_API int32_t ql_attend(const ql::KvLayer* cache, const ql::AttentionShape* shape, int64_t count,
                         int64_t tokens, const int64_t* sequences, const int64_t* firsts,
                         const float* query, float* out, int32_t isa, int32_t threads) {
  const ql::AttentionKernels* kernels = ql::attention_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  ql::Call call{kernels, cache, shape,   count, tokens,  sequences, firsts,
                query,   out,   nullptr, 0,     nullptr, nullptr};
  try {
    return ql::attend(call, threads);
  } catch (const std::bad_alloc&) {
    return QL_NO_MEMORY;
  }
}

// keys, values: [length][kv_heads][head_dim], the numbers that positions [0, length) stand for.
QL_API int32_t ql_kv_dequantize(const ql::KvLayer* cache, int64_t sequence, int64_t length,
                                float* keys, float* values, int32_t isa) {
  const ql::AttentionKernels* kernels = ql::attention_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  const ql::Memory scratch = ql::aligned_memory(kernels->scratch_bytes(*cache));
  if (!scratch) return QL_NO_MEMORY;
  const int64_t row = cache->kv_heads * cache->head_dim;
  for (int64_t head = 0; head < cache->kv_heads; ++head) {
    const int64_t column = head * cache->head_dim;
    kernels->dequantize(*cache, sequence, head, 0, length, keys + column, row, values + column, row,
                        scratch.get());
  }
  return QL_OK;
}
