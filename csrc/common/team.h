// One parallel region for many short stages. Starting and ending a region for each, as parallel_for does, takes as long
// as a stage of a small model; here the threads stay, and look out for the next stage.
//
// One thread leads: it runs the program and hands stages out, of which the others take shares. It takes every share
// that nobody else has taken, so that nothing depends on the others being there: a pool may run them late, or one after
// the other on the leader's thread.
#pragma once

#include <atomic>
#include <thread>

#include "common/parallel.h"

namespace condgen_fast {

class Team {
 public:
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Calls leader(team) on this thread; the first exception of it or of a share is thrown again here.
  template <class Leader>
  static void lead(const Leader& leader) {
    Team team(thread_count());
    torch::stable::parallel_for(0, team.threads_, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      team.guard([&] { leader(team); });
      team.free_.store(kOver, std::memory_order_release);
    });
    if (team.error_) std::rethrow_exception(team.error_);
  }

  // parallel_for, for the leader alone
  template <class Body>
  void share(int64_t count, int64_t work_per_item, const Body& body) {
    if (count <= 0) return;
    const int64_t grain = std::max<int64_t>(1, kWorkPerShare / std::max<int64_t>(1, work_per_item));
    const int64_t shares = std::min(threads_, (count + grain - 1) / grain);
    if (shares == 1) return body(0, count);
    const auto call = [](const void* of, int64_t begin, int64_t end) { (*static_cast<const Body*>(of))(begin, end); };
    body_.store(&body, std::memory_order_relaxed);
    call_.store(call, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    shares_.store(shares, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const int64_t stage = free_.load(std::memory_order_relaxed) / kStage + 1;
    free_.store(stage * kStage + shares, std::memory_order_release);
    take_shares(stage);
    for (int64_t waited = 0; done_.load(std::memory_order_acquire) < shares; ++waited) wait(waited);
    if (error_) throw Failed();
  }

 private:
  static constexpr int64_t kWorkPerShare = 8192;       // as kWorkPerThread, for threads that are already there
  static constexpr int64_t kStage = int64_t{1} << 24;  // free_ is this times the stage's number and its free shares
  static constexpr int64_t kOver = -1;
  struct Failed {};

  explicit Team(int64_t threads) : threads_(threads) {}

  template <class Call>
  void guard(const Call& call) {
    try {
      call();
    } catch (const Failed&) {
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  static void wait(int64_t waited) {
    if (waited > 4096) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void help() {
    int64_t done = 0;
    for (int64_t waited = 0;; ++waited) {
      const int64_t free = free_.load(std::memory_order_acquire);
      if (free == kOver) return;
      if (free / kStage == done) {
        wait(waited);
        continue;
      }
      done = free / kStage;
      take_shares(done);
      waited = 0;
    }
  }

  // Where a share is taken that was free when the stage was looked at, the stage was still that one: the next is
  // described after all its shares are done.
  void take_shares(int64_t stage) {
    int64_t free = free_.load(std::memory_order_acquire);
    while (free / kStage == stage && free % kStage > 0) {
      const int64_t shares = shares_.load(std::memory_order_relaxed), count = count_.load(std::memory_order_relaxed);
      const void* body = body_.load(std::memory_order_relaxed);
      const auto call = call_.load(std::memory_order_relaxed);
      if (!free_.compare_exchange_weak(free, free - 1, std::memory_order_acq_rel)) continue;
      const int64_t share = shares - free % kStage;
      guard([&] { call(body, count * share / shares, count * (share + 1) / shares); });
      done_.fetch_add(1, std::memory_order_acq_rel);
      --free;
    }
  }

  const int64_t threads_;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::atomic<const void*> body_{nullptr};
  std::atomic<void (*)(const void*, int64_t, int64_t)> call_{nullptr};
  std::atomic<int64_t> count_{0}, shares_{0};
  alignas(64) std::atomic<int64_t> free_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace condgen_fast
