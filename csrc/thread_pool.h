// Thread pool, one per process. A job runs on all threads at once (a thread team); inside it, phases are separated by
// barriers and work is handed out dynamically in chunks, so that a core slowed down by its neighbours takes fewer of
// them. Costs grow slowly with the threads: arrivals at a barrier are counted by a combining tree, groups of kFanOut
// threads have a work counter each and steal from the others, and threads that wake up wake others. Threads inherit the CPU affinity of the process (utils/numa.py).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lowlat {

class Pool;

// Threads that share a work counter, and a node of the tree of arrivals.
constexpr int kFanOut = 8;

// A job's view of the pool: its thread number, barriers, and shared work counters (dynamic scheduling).
class Team {
 public:
  Team(Pool& pool, int thread);
  int thread() const { return thread_; }
  int threads() const { return threads_; }

  // Waits until every thread of the job arrives. Writes before it are visible after it. If another thread's part of
  // the job has failed, this thread's part ends here by an internal exception.
  void barrier();

  // Parallel for: calls body(first, last) for chunks of [0, count), each on one thread, then waits for all threads.
  // Which thread takes a chunk varies from run to run; results must not depend on it.
  template <class Body>
  void for_chunks(std::int64_t count, std::int64_t chunk, Body&& body) {
    const std::int64_t chunks = (count + chunk - 1) / chunk;
    each_part(chunks, [&](std::atomic<std::int64_t>& next, std::int64_t begin, std::int64_t end, int) {
      // The load spares exhausted counters of other groups a write by every thread.
      if (begin + next.load(std::memory_order_relaxed) >= end) return;
      for (;;) {
        const std::int64_t taken = begin + next.fetch_add(1, std::memory_order_relaxed);
        if (taken >= end) return;
        body(taken * chunk, std::min((taken + 1) * chunk, count));
      }
    });
  }

  // Guided scheduling: chunks shrink with the remaining work, from a fraction of a thread's share down to 1. Large
  // chunks first keep memory accesses sequential, small ones last balance the threads.
  template <class Body>
  void for_shrinking_chunks(std::int64_t count, Body&& body) {
    each_part(count, [&](std::atomic<std::int64_t>& next, std::int64_t begin, std::int64_t end, int threads) {
      std::int64_t taken = next.load(std::memory_order_relaxed);
      while (begin + taken < end) {
        const std::int64_t first = begin + taken, chunk = std::max<std::int64_t>(1, (end - first) / (2 * threads));
        if (!next.compare_exchange_weak(taken, taken + chunk, std::memory_order_relaxed)) continue;
        body(first, first + chunk);
        taken = next.load(std::memory_order_relaxed);
      }
    });
  }

 private:
  // Calls take(counter, begin, end, threads) for the part of [0, count) of this thread's group, then for those of the
  // other groups (work stealing), and waits for all threads. `threads`: of the part's group.
  template <class Take>
  void each_part(std::int64_t count, Take&& take) {
    const int groups = (threads_ + kFanOut - 1) / kFanOut, own = thread_ / kFanOut;
    for (int i = 0; i < groups; ++i) {
      const int group = (own + i) % groups, first = group * kFanOut, last = std::min(first + kFanOut, threads_);
      take(counter(group), count * first / threads_, count * last / threads_, last - first);
    }
    barrier();
  }
  std::atomic<std::int64_t>& counter(int group);

  Pool& pool_;
  int thread_;
  int threads_;
  std::uint32_t phase_;  // phases before this one, in all jobs of the pool
};

// Combining tree of arrivals: kFanOut threads share a node, kFanOut nodes a node above. The last to arrive at a node
// continues at the one above.
class ArrivalTree {
 public:
  explicit ArrivalTree(int threads);
  // Whether the thread is the last of all; the tree is then as before the first arrival.
  bool arrive(int thread);
  void reset();

 private:
  struct Level {
    int first;  // node
    int count;  // of threads or nodes that arrive at its nodes
  };
  struct alignas(64) Node { std::atomic<int> arrived{0}; };
  std::vector<Level> levels_;
  std::vector<Node> nodes_;
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
  void leave(int thread);
  void wait_for_job(std::uint32_t seen);
  template <class Done>
  void spin_until(Done done) const;

  std::vector<std::thread> workers_;
  std::mutex callers_;
  const std::function<void(Team&)>* job_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::exception_ptr error_;  // of the first thread that failed
  int spins_;                 // of a waiting thread before it yields

  // Words on which threads spin, each on a cache line of its own.
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // jobs begun
  alignas(64) std::atomic<std::uint32_t> finished_{0};    // jobs that all threads have left
  alignas(64) std::atomic<std::uint32_t> phase_{0};       // barriers at which all threads have arrived
  alignas(64) std::atomic<bool> failed_{false};           // some thread will not arrive at the barrier
  ArrivalTree barrier_, end_;
  // Work counters of each group of threads in two phases: the barrier between them resets those of the next.
  static constexpr int kPhases = 2;
  struct alignas(64) Counter { std::atomic<std::int64_t> next{0}; };
  std::vector<Counter> counters_;
};

// The process's pool, created on first use with the threads of set_threads (default: the processors this process may
// use). A pool replaced by set_threads lives until its jobs are done. A forked child creates its own.
std::shared_ptr<Pool> pool();

// Seconds of a phase of `items` empty items (for_chunks, or for_shrinking_chunks) in a pool of its own: barrier and
// distribution of work.
double time_phases(int threads, int phases, std::int64_t items, bool shrinking);
void set_threads(int threads);
int get_threads();

// Number of forks down to this process. A change tells an object that it belongs to the parent: the child must not use or
// free what another thread of the parent may have been holding.
std::uint64_t forks();

}  // namespace lowlat
