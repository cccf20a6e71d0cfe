#include "checks.h"
#include "decoder.h"

namespace {

// Appends the same `count` tokens to each of the sequences in `to`, and puts the logits of the last
// row of each into `logits`. Returns the engine's status.
int32_t append(QlEngine* engine, const std::vector<int32_t>& to, int64_t count, int32_t threads,
               const Exact<float>& logits, int32_t token = -1) {
  const int64_t rows = count * static_cast<int64_t>(to.size());
  const Exact<int32_t> tokens(rows, 4), sequences(rows, 4), best(logits.count() / kVocabulary, 4);
  const Exact<int64_t> wanted(static_cast<int64_t>(to.size()), 8);
  const Exact<float> states = exact_floats((kLayers + 1) * rows * kHidden);
  for (int64_t row = 0; row < rows; ++row) {
    sequences[row] = to[static_cast<size_t>(row / count)];
    const int64_t drawn = (row % count * 37 + count) % kVocabulary;
    tokens[row] = token >= 0 ? token : static_cast<int32_t>(drawn);
    wanted[row / count] = row;
  }
  QlStep step = {};
  step.tokens = tokens.get();
  step.sequences = sequences.get();
  step.wanted = wanted.get();
  step.logits = logits.get();
  step.best = best.get();
  step.hidden_states = count % 2 ? states.get() : nullptr;
  step.count = rows;
  step.wanted_count = wanted.count();
  step.threads = threads;
  const int32_t status = ql_engine_step(engine, &step);
  if (status == QL_ENGINE_OK) {
    const float* last = logits.get() + logits.count() - kVocabulary;
    int32_t largest = 0;
    for (int32_t i = 0; i < kVocabulary; ++i) largest = last[i] > last[largest] ? i : largest;
    expect(best[best.count() - 1] == largest, "the best token", "engine", rows);
  }
  return status;
}

// Prompts, decoding alone and together, forgetting and copying; the logits of the last steps.
Exact<float> converse(const Decoder& decoder, int32_t isa, int32_t threads) {
  const Engine engine = make_engine(decoder, isa);
  const Exact<float> one = exact_floats(kVocabulary);
  Exact<float> three = exact_floats(3 * kVocabulary);
  const auto fine = [&](int32_t status, const char* what) {
    expect(status == QL_ENGINE_OK, what, "engine", isa, status);
  };
  fine(append(engine.get(), {0}, 101, threads, one), "a prompt");
  fine(append(engine.get(), {2}, 300, threads, one), "a longer prompt");
  fine(append(engine.get(), {0}, 1, threads, one), "a token");
  fine(append(engine.get(), {1}, 1, threads, one), "a first token");
  fine(append(engine.get(), {2, 0, 1}, 1, threads, three), "a batch");
  fine(ql_engine_truncate(engine.get(), 0, 65), "forgetting");
  fine(append(engine.get(), {0}, 6, threads, one), "more of a prompt");
  fine(ql_engine_copy(engine.get(), 0, 1), "a copy");
  expect(ql_engine_length(engine.get(), 1) == 71, "the copy's length", "engine", isa);
  fine(append(engine.get(), {1, 2, 0}, 5, threads, three), "prompts together");
  fine(append(engine.get(), {0, 1, 2}, 1, threads, three), "a batch again");
  expect(memcmp(three.get(), three.get() + kVocabulary, kVocabulary * sizeof(float)) == 0,
         "a copy goes on alike", "engine", isa);
  expect(append(engine.get(), {2}, 150, threads, one) == QL_ENGINE_FULL, "full", "engine");
  expect(append(engine.get(), {3}, 1, threads, one) == QL_ENGINE_BAD_SEQUENCE, "3", "engine");
  expect(append(engine.get(), {0, 1, 0}, 1, threads, three) == QL_ENGINE_BAD_SEQUENCE, "twice",
         "engine");
  expect(append(engine.get(), {0}, 2, threads, one, kVocabulary) == QL_ENGINE_BAD_TOKEN,
         "a token too many", "engine");
  fine(append(engine.get(), {2}, kEngineCapacity - 307, threads, one), "to the last position");
  expect(ql_engine_length(engine.get(), 2) == kEngineCapacity, "its length", "engine", isa);
  return three;
}

}  // namespace

void check_engine(int32_t threads) {
  const ql::KvFormat plain{32, 0, 0, 0}, narrow{4, 16, 0, 0}, rotated{8, 0, 0, 1};
  for (const int32_t mode : {QL_INPUT_EXACT, QL_INPUT_INT8, QL_INPUT_ROUNDED}) {
    for (const bool changed : {false, true}) {
      for (const bool blocks : {false, true}) {
        const bool packed = changed || mode != QL_INPUT_EXACT;
        const Decoder decoder(mode, packed ? narrow : plain, packed ? rotated : plain, changed,
                              blocks);
        const Exact<float> expected = converse(decoder, QL_ISA_PORTABLE, 1);
        for (const int32_t isa : instruction_sets()) {
          expect(same(converse(decoder, isa, threads), expected), "logits", "engine", isa, mode);
        }
      }
    }
  }
}
