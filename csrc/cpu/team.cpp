#include "team.h"

#include <thread>
#include <utility>

namespace fastres::cpu {
namespace {

// Waits until `reached()`: at first without leaving the processor, which would take longer.
template <typename Reached>
void wait_until(const Reached& reached) {
  constexpr int turns = 4096;
  for (int turn = 0; !reached(); ++turn) {
    if (turn >= turns) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

}  // namespace

Team::Team(int64_t size) : claims_(size) {}

bool Team::claim(int64_t task, uint64_t loop) {
  uint64_t before = loop - 1;
  return claims_[task].compare_exchange_strong(before, loop, std::memory_order_acq_rel,
                                               std::memory_order_relaxed);
}

void Team::take_tasks(int64_t member, uint64_t loop) {
  for (int64_t i = 0; i < size(); ++i) {
    const int64_t task = (member + i) % size();
    if (!claim(task, loop)) continue;
    try {
      task_(of_, task);
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::work(int64_t member) {
  uint64_t seen = 0, loop = 0;
  for (;; seen = loop) {
    wait_until([&] { return (loop = loop_.load(std::memory_order_acquire)) != seen; });
    if (loop == kDismissed) return;
    take_tasks(member, loop);
  }
}

void Team::run(Task task, const void* of) {
  // Loops within its tasks are for torch, which runs them in one thread.
  current_ = nullptr;
  task_ = task;
  of_ = of;
  unfinished_.store(size(), std::memory_order_relaxed);
  const uint64_t loop = loop_.load(std::memory_order_relaxed) + 1;
  loop_.store(loop, std::memory_order_release);
  take_tasks(0, loop);
  wait_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
  current_ = this;
  if (error_ != nullptr) {
    failed_.clear();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Team::gather(void (*lead)(const void* of), const void* of) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || current_ != nullptr) return lead(of);
  Team team(threads);
  const auto leader = std::this_thread::get_id();
  bool led = false;
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t member, int64_t) {
    if (std::this_thread::get_id() != leader) return team.work(member);
    if (std::exchange(led, true)) return;
    current_ = &team;
    try {
      lead(of);
    } catch (...) {
      // Not through torch, which would lose what it says.
      error = std::current_exception();
    }
    current_ = nullptr;
    team.loop_.store(kDismissed, std::memory_order_release);
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace fastres::cpu
