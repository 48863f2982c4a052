// Thread pool, one per process. A job runs on all threads at once (a thread team); inside it, phases are separated by
// barriers and work is handed out dynamically in chunks from a shared counter, so that a core slowed down by its
// neighbours takes fewer of them. There is no pinning and no NUMA placement of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lowlat {

class Pool;

// A job's view of the pool: its thread number, barriers, and shared work counters (dynamic scheduling).
class Team {
 public:
  Team(Pool& pool, int thread, int threads) : pool_(pool), thread_(thread), threads_(threads) {}
  int thread() const { return thread_; }
  int threads() const { return threads_; }

  // Waits until every thread of the job arrives. Writes before it are visible after it. If another thread's part of
  // the job has failed, this thread's part ends here by an internal exception.
  void barrier();

  // Parallel for: calls body(first, last) for chunks of [0, count), each on one thread, then waits for all threads.
  // Which thread takes a chunk varies from run to run; results must not depend on it.
  template <class Body>
  void for_chunks(std::int64_t count, std::int64_t chunk, Body&& body) {
    std::atomic<std::int64_t>& next = counter();
    for (;;) {
      const std::int64_t first = next.fetch_add(chunk, std::memory_order_relaxed);
      if (first >= count) break;
      body(first, first + chunk < count ? first + chunk : count);
    }
    barrier();
  }

  // Guided scheduling: chunks shrink with the remaining work, from a fraction of a thread's share down to 1. Large
  // chunks first keep memory accesses sequential, small ones last balance the threads.
  template <class Body>
  void for_shrinking_chunks(std::int64_t count, Body&& body) {
    std::atomic<std::int64_t>& next = counter();
    std::int64_t first = next.load(std::memory_order_relaxed);
    while (first < count) {
      const std::int64_t chunk = std::max<std::int64_t>(1, (count - first) / (2 * threads_));
      if (!next.compare_exchange_weak(first, first + chunk, std::memory_order_relaxed)) continue;
      body(first, first + chunk);
      first = next.load(std::memory_order_relaxed);
    }
    barrier();
  }

 private:
  std::atomic<std::int64_t>& counter();

  Pool& pool_;
  int thread_;
  int threads_;
  std::uint32_t phase_ = 0;
};

class Pool {
 public:
  explicit Pool(int threads);  // throws std::runtime_error if the system refuses a thread
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs job on all threads, the caller's included, and returns when all are done. One job at a time: concurrent
  // callers wait. An exception on any thread (memory may run out) is rethrown here once all threads are done.
  void run(const std::function<void(Team&)>& job);

 private:
  friend class Team;
  void work(int thread);
  void take_part(int thread);
  void stop();
  void wait_for_job(std::uint64_t seen);

  std::vector<std::thread> workers_;
  std::mutex callers_;
  std::mutex sleep_;
  std::condition_variable wake_;
  const std::function<void(Team&)>* job_ = nullptr;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> busy_{0};  // workers still in the job
  std::exception_ptr error_;  // of the first thread that failed

  // Sense-reversing barrier, on its own cache line because every thread spins on it.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> sense_{0};
  std::atomic<bool> failed_{false};  // some thread will not reach the barrier
  // Work counters of consecutive phases: while a phase uses one, the preceding barrier resets the next.
  struct alignas(64) Counter { std::atomic<std::int64_t> next{0}; };
  Counter counters_[4];
};

// The process's pool, created on first use with the threads of set_threads (default: the processors this process may
// use). A pool replaced by set_threads lives until its jobs are done. A forked child creates its own.
std::shared_ptr<Pool> pool();
void set_threads(int threads);
int get_threads();

// Number of forks down to this process. A change tells an object that it belongs to the parent: the child must not use or
// free what another thread of the parent may have been holding.
std::uint64_t forks();

}  // namespace lowlat
