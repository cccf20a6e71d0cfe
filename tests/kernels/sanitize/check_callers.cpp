#include <thread>

#include "checks.h"
#include "decoder.h"

namespace {

constexpr int32_t kCallers = 3;

// Runs `body` on several threads at once.
template <typename Body>
void together(Body body) {
  std::vector<std::thread> callers;
  for (int32_t i = 0; i < kCallers; ++i) callers.emplace_back(body, i);
  for (std::thread& caller : callers) caller.join();
}

// All callers multiply the same weight, which is large enough for the team.
void call_linears() {
  const Weight weight(420, {{"w4g64", 1500}}, 2);
  const Tiles tiles(weight, QL_ISA_BEST, 1);
  const Exact<float> x = exact_floats(5 * weight.columns());
  Random(4).fill(x, -2.0f, 2.0f);
  const Exact<float> expected = exact_floats(5 * weight.rows());
  ql_linear_int8(&tiles.view(), x.get(), 5, 0, nullptr, expected.get(), 0, 1);
  together([&](int32_t caller) {
    for (int32_t turn = 0; turn < 10; ++turn) {
      const Exact<float> y = exact_floats(expected.count());
      ql_linear_int8(&tiles.view(), x.get(), 5, 0, nullptr, y.get(), 0, 1 + (caller + turn) % 3);
      expect(same(y, expected), "linears of several callers", "int8", caller, turn);
    }
  });
}

// Each caller goes on with a sequence of its own, in one engine; what others do does not matter.
void call_one_engine() {
  const ql::KvFormat cache{8, 0, 0, 0};
  const Decoder decoder(QL_INPUT_INT8, cache, cache, true, true);
  const Engine engine = make_engine(decoder, QL_ISA_BEST);
  const Exact<float> logits[kCallers] = {exact_floats(kVocabulary), exact_floats(kVocabulary),
                                         exact_floats(kVocabulary)};
  together([&](int32_t caller) {
    const Exact<int32_t> tokens(1, 4), sequences(1, 4);
    const Exact<int64_t> wanted(1, 8);
    sequences[0] = caller;
    QlStep step = {};
    step.tokens = tokens.get();
    step.sequences = sequences.get();
    step.wanted = wanted.get();
    step.logits = logits[caller].get();
    step.count = step.wanted_count = 1;
    step.threads = 1 + caller;
    for (int32_t turn = 0; turn < 20; ++turn) {
      tokens[0] = turn * 7;
      expect(ql_engine_step(engine.get(), &step) == QL_ENGINE_OK, "steps of callers", "engine");
      expect(ql_engine_length(engine.get(), caller) == turn % 10 + 1, "length", "engine", turn);
      if (turn == 9) ql_engine_truncate(engine.get(), caller, 0);
      expect(ql_engine_memory(engine.get()) > 0, "memory", "engine");
    }
  });
  expect(same(logits[0], logits[1]) && same(logits[0], logits[2]), "sequences", "engine");
}

// Packing, using and giving back weights, as a model's first step on several threads does.
void call_allocation() {
  const Weight weight(64, {{"w3g32z", 96}}, 6);
  const int64_t bytes = ql_tile_bytes(&weight.view());
  together([&](int32_t caller) {
    std::vector<uint8_t*> held;
    for (int32_t turn = 0; turn < 30; ++turn) {
      held.push_back(ql_allocate(bytes));
      ql_tile_pack(&weight.view(), held.back(), QL_ISA_BEST, 2);
      if (turn % 3 == 2) {
        const bool right = weight.equals_unpacked(held[0], QL_ISA_BEST, 2);
        expect(right, "tiles of several callers", "allocation", caller, turn);
        ql_free(held[0], bytes);
        held.erase(held.begin());
      }
    }
    for (uint8_t* memory : held) ql_free(memory, bytes);
  });
}

}  // namespace

void check_callers() {
  together([](int32_t) { expect(ql_chosen_isa() != 0, "an instruction set", "QUANTLIB_ISA"); });
  call_linears();
  call_one_engine();
  call_allocation();
}
