// Parallel loops. Several in a row can share one team of torch's threads, which then wait for the
// next loop by looking for it: to start and end a loop takes a tenth of the time.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace fastres::cpu {

class Team {
 public:
  using Task = void (*)(const void* of, int64_t task);

  explicit Team(int64_t size);

  // The team whose loops this thread starts, or null.
  static Team* current() { return current_; }

  int64_t size() const { return static_cast<int64_t>(claims_.size()); }

  // Runs `task` for [0, size()), each by the member of that number unless another is earlier.
  // Throws what one of them threw. For the thread that leads the team.
  void run(Task task, const void* of);

  // Calls `lead(of)` in this thread while torch's other threads work for it; throws what it throws.
  static void gather(void (*lead)(const void* of), const void* of);

 private:
  void work(int64_t member);
  void take_tasks(int64_t member, uint64_t loop);
  bool claim(int64_t task, uint64_t loop);

  static constexpr uint64_t kDismissed = ~uint64_t{0};
  static inline thread_local Team* current_ = nullptr;

  // What is read while waiting is in lines of its own. A task's claim is the number of the last
  // loop in which it was taken: what the loop is may be read once one of its tasks is.
  alignas(64) std::atomic<uint64_t> loop_ = 0;
  alignas(64) std::atomic<int64_t> unfinished_ = 0;
  alignas(64) Task task_ = nullptr;
  const void* of_ = nullptr;
  std::vector<std::atomic<uint64_t>> claims_;
  std::atomic_flag failed_;
  std::exception_ptr error_;
};

// Threads that a parallel loop has.
inline int64_t thread_count() {
  const Team* team = Team::current();
  return team != nullptr ? team->size() : torch::stable::get_num_threads();
}

// As torch's parallel_for, by the team that this thread leads where there is one.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  Team* team = Team::current();
  if (team == nullptr) return torch::stable::parallel_for(begin, end, grain, f);
  const int64_t size = end - begin, least = std::max<int64_t>(grain, 1);
  if (size <= 0) return;
  const int64_t parts = std::min(team->size(), (size + least - 1) / least);
  if (parts == 1) return f(begin, end);
  const int64_t part = (size + parts - 1) / parts;
  const auto task = [&](int64_t i) {
    const int64_t first = begin + i * part;
    if (first < end) f(first, std::min(end, first + part));
  };
  team->run([](const void* of, int64_t i) { (*static_cast<decltype(&task)>(of))(i); }, &task);
}

// Calls `f` with a team for its parallel loops.
template <typename F>
void with_team(const F& f) {
  Team::gather([](const void* of) { (*static_cast<const F*>(of))(); }, &f);
}

}  // namespace fastres::cpu
