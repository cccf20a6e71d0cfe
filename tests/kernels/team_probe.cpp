// What test_team.py calls: small jobs on the thread team that notice when it breaks a promise.
#include <unistd.h>

#include <atomic>
#include <vector>

#include "team.h"

#define PROBE extern "C" __attribute__((visibility("default")))

namespace {

struct Job {
  int32_t rounds;
  int64_t count;
  int64_t most;
  int32_t sleep_us;
  std::atomic<int32_t>* hits;
  std::vector<int32_t> steps;
  std::atomic<int32_t> wrong{0};
  std::atomic<int32_t> members{0};
};

Job& job_of(void* context) { return *static_cast<Job*>(context); }

// Plain integers written by their own thread and read by others: only barriers make that right.
void check_barriers(void* context, const ql::Member& member) {
  Job& job = job_of(context);
  job.members.fetch_add(1);
  for (int32_t round = 1; round <= job.rounds; ++round) {
    if (job.sleep_us > 0 && round % member.threads == member.index) usleep(job.sleep_us);
    job.steps[member.index] = round;
    member.barrier();
    for (int32_t other = 0; other < member.threads; ++other) {
      if (job.steps[other] != round) job.wrong.fetch_add(1);
    }
    member.barrier();
  }
  if (job.members.load() != member.threads) job.wrong.fetch_add(1);
}

void share_loops(void* context, const ql::Member& member) {
  Job& job = job_of(context);
  for (int32_t round = 0; round < job.rounds; ++round) {
    int64_t first, last;
    while (member.next(job.count, job.most, &first, &last)) {
      if (first >= last || last - first > job.most || last > job.count) job.wrong.fetch_add(1);
      for (int64_t i = first; i < last; ++i) job.hits[i].fetch_add(1);
    }
    member.barrier();
  }
}

void hit(void* context, int64_t index) { job_of(context).hits[index].fetch_add(1); }

void start_another(void* context, const ql::Member& member) {
  Job& job = job_of(context);
  job.members.fetch_add(1);
  ql::run_team(member.threads, [](void* inner, const ql::Member& alone) {
    if (alone.threads != 1 || alone.index != 0) job_of(inner).wrong.fetch_add(1);
    alone.barrier();
    job_of(inner).hits[0].fetch_add(1);
  }, context);
}

}  // namespace

// Returns what went wrong, counted; *members is how many threads took part.
PROBE int32_t probe_barriers(int32_t threads, int32_t rounds, int32_t sleep_us, int32_t* members) {
  Job job{};
  job.rounds = rounds;
  job.sleep_us = sleep_us;
  job.steps.resize(threads);
  ql::run_team(threads, check_barriers, &job);
  *members = job.members.load();
  return job.wrong.load();
}

// Every index of [0, count) once per round.
PROBE int32_t probe_loops(int32_t threads, int32_t rounds, int64_t count, int64_t most) {
  std::vector<std::atomic<int32_t>> hits(count);
  Job job{};
  job.rounds = rounds;
  job.count = count;
  job.most = most;
  job.hits = hits.data();
  ql::run_team(threads, share_loops, &job);
  for (const auto& value : hits) {
    if (value.load() != rounds) job.wrong.fetch_add(1);
  }
  return job.wrong.load();
}

PROBE int32_t probe_parallel_for(int32_t threads, int64_t count) {
  std::vector<std::atomic<int32_t>> hits(count);
  Job job{};
  job.hits = hits.data();
  ql::parallel_for(count, threads, hit, &job);
  for (const auto& value : hits) {
    if (value.load() != 1) job.wrong.fetch_add(1);
  }
  return job.wrong.load();
}

// A region inside a region: the inner ones run alone.
PROBE int32_t probe_nested(int32_t threads) {
  std::atomic<int32_t> hits{0};
  Job job{};
  job.hits = &hits;
  ql::run_team(threads, start_another, &job);
  return job.wrong.load() + (hits.load() != job.members.load());
}
