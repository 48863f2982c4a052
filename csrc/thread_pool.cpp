#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace lowlat {

namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins before a waiting thread yields, about ten microseconds: the thread it waits for may need this processor.
constexpr int kSpins = 256;

// Thrown to end a thread's part of a job in which another thread has failed.
struct Abandoned {};

// Spins of an idle worker before it sleeps: decoding leaves gaps of tens of microseconds between jobs.
constexpr int kIdleSpins = 20000;

// Sleeping threads that each one wakes: all of them in logarithmic time.
constexpr int kWoken = 2;

// Never destroyed: waiting threads end with the process.
struct State {
  std::mutex mutex;
  std::shared_ptr<Pool> pool;
  int wanted_threads = 0;
  std::atomic<std::uint64_t> forks{0};
};

State& state() {
  static State* const the_state = [] {
    // A forked child has none of its parent's threads. It drops the pool, because joining them would never return.
    pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                   [] {
                     new std::shared_ptr<Pool>(std::move(state().pool));
                     state().pool = nullptr;
                     ++state().forks;
                     state().mutex.unlock();
                   });
    return new State;
  }();
  return *the_state;
}

int usable_processors() {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

ArrivalTree::ArrivalTree(int threads) {
  int first = 0, count = threads;
  do {
    levels_.push_back({first, count});
    count = (count + kFanOut - 1) / kFanOut;
    first += count;
  } while (count > 1);
  nodes_ = std::vector<Node>(first);
}

bool ArrivalTree::arrive(int thread) {
  int index = thread;
  for (const Level& level : levels_) {
    const int node = index / kFanOut, expected = std::min(kFanOut, level.count - node * kFanOut);
    std::atomic<int>& arrived = nodes_[level.first + node].arrived;
    if (arrived.fetch_add(1, std::memory_order_acq_rel) != expected - 1) return false;
    arrived.store(0, std::memory_order_relaxed);
    index = node;
  }
  return true;
}

void ArrivalTree::reset() {
  for (Node& node : nodes_) node.arrived.store(0);
}

Team::Team(Pool& pool, int thread)
    : pool_(pool), thread_(thread), threads_(pool.threads()), phase_(pool.phase_.load(std::memory_order_relaxed)) {}

void Team::barrier() {
  const std::uint32_t phase = phase_++;
  // The phase that begins uses the counters of the last but one, which every thread has left.
  if (thread_ % kFanOut == 0) counter(thread_ / kFanOut).store(0, std::memory_order_relaxed);
  if (threads_ == 1) return pool_.phase_.store(phase + 1, std::memory_order_relaxed);
  if (pool_.barrier_.arrive(thread_)) return pool_.phase_.store(phase + 1, std::memory_order_release);
  const auto has_come = [&] { return pool_.phase_.load(std::memory_order_acquire) != phase; };
  pool_.spin_until([&] { return has_come() || pool_.failed_.load(std::memory_order_relaxed); });
  if (!has_come()) throw Abandoned{};
}

std::atomic<std::int64_t>& Team::counter(int group) {
  return pool_.counters_[group * Pool::kPhases + phase_ % Pool::kPhases].next;
}

// With more threads than processors, another thread needs this processor at once.
Pool::Pool(int threads)
    : spins_(threads > usable_processors() ? 0 : kSpins),
      barrier_(threads),
      end_(threads),
      counters_((threads + kFanOut - 1) / kFanOut * kPhases) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& error) {
    const std::string reason = error.what();
    stop();
    throw std::runtime_error("the system does not start " + std::to_string(threads) + " threads (" + reason +
                             "); use fewer, or allow more threads or memory");
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

template <class Done>
void Pool::spin_until(Done done) const {
  for (int i = 0; !done(); ++i) {
    if (i < spins_) {
      pause_cpu();
    } else {
      sched_yield();
    }
  }
}

void Pool::run(const std::function<void(Team&)>& job) {
  const std::lock_guard one_caller(callers_);
  job_ = &job;
  const std::uint32_t own = generation_.fetch_add(1) + 1;
  for (int i = 0; i < kWoken; ++i) generation_.notify_one();
  take_part(0);
  leave(0);
  spin_until([&] { return finished_.load(std::memory_order_acquire) == own; });
  if (!failed_.load()) return;
  // Threads that waited for the failed one have not passed the barrier.
  barrier_.reset();
  for (Counter& counter : counters_) counter.next.store(0);
  failed_.store(false);
  std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::leave(int thread) {
  if (end_.arrive(thread)) finished_.store(generation_.load(std::memory_order_relaxed), std::memory_order_release);
}

void Pool::take_part(int thread) {
  Team team(*this, thread);
  try {
    (*job_)(team);
  } catch (const Abandoned&) {
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Pool::wait_for_job(std::uint32_t seen) {
  for (int i = 0; spins_ > 0 && i < kIdleSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != seen) return;
    pause_cpu();
  }
  generation_.wait(seen, std::memory_order_acquire);
  for (int i = 0; i < kWoken; ++i) generation_.notify_one();
}

void Pool::work(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    wait_for_job(seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    take_part(thread);
    leave(thread);
  }
}

double time_phases(int threads, int phases, std::int64_t items, bool shrinking) {
  Pool own(threads);
  const auto run = [&] {
    const auto nothing = [](std::int64_t, std::int64_t) {};
    const auto begin = std::chrono::steady_clock::now();
    own.run([&](Team& team) {
      for (int i = 0; i < phases; ++i) {
        shrinking ? team.for_shrinking_chunks(items, nothing) : team.for_chunks(items, 1, nothing);
      }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / phases;
  };
  run();  // starts the threads
  return run();
}

std::shared_ptr<Pool> pool() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (!s.pool) s.pool = std::make_shared<Pool>(s.wanted_threads > 0 ? s.wanted_threads : usable_processors());
  return s.pool;
}

void set_threads(int threads) {
  State& s = state();
  std::shared_ptr<Pool> old;  // destroyed outside the lock, by its last owner
  const std::lock_guard lock(s.mutex);
  if (s.pool && s.pool->threads() != threads) old = std::move(s.pool);
  s.wanted_threads = threads;
}

int get_threads() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (s.pool) return s.pool->threads();
  return s.wanted_threads > 0 ? s.wanted_threads : usable_processors();
}

std::uint64_t forks() { return state().forks.load(); }

}  // namespace lowlat
