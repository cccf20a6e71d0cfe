// Runs everything that the library offers in a program that is compiled with a sanitizer whole:
// see dev/sanitize.py. Prints what was run and returns 0 when every answer was right.
#include <chrono>

#include "buffers.h"
#include "checks.h"

namespace {

template <typename Check>
void timed(const char* name, Check check) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t before = calls.load();
  check();
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  printf("  %-16s %6lld answers %7.1f s\n", name, static_cast<long long>(calls.load() - before),
         passed.count());
  fflush(stdout);
}

}  // namespace

int main() {
  // First, so that several threads start the team, and choose an instruction set, at once.
  timed("callers", check_callers);
  timed("weights", [] { check_weights(3); });
  timed("unusual numbers", check_unusual_numbers);
  timed("attention", [] { check_attention(3); });
  timed("engine", [] { check_engine(3); });
  return failures.load() == 0 ? 0 : 1;
}
