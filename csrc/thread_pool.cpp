#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
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

template <class Done>
void spin_until(Done done) {
  for (int i = 0; !done(); ++i) {
    if (i < kSpins) {
      pause_cpu();
    } else {
      sched_yield();
    }
  }
}

// Thrown to end a thread's part of a job in which another thread has failed.
struct Abandoned {};

// Spins of an idle worker before it sleeps: decoding leaves gaps of tens of microseconds between jobs.
constexpr int kIdleSpins = 20000;

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

void Team::barrier() {
  if (threads_ == 1) {
    ++phase_;
    pool_.counters_[phase_ % 4].next.store(0, std::memory_order_relaxed);
    return;
  }
  const std::uint32_t sense = pool_.sense_.load(std::memory_order_relaxed);
  ++phase_;
  if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    pool_.arrived_.store(0, std::memory_order_relaxed);
    // Every thread has left the counter of the phase that begins, so the last one to arrive resets it.
    pool_.counters_[phase_ % 4].next.store(0, std::memory_order_relaxed);
    pool_.sense_.store(sense + 1, std::memory_order_release);
  } else {
    const auto has_come = [&] { return pool_.sense_.load(std::memory_order_acquire) != sense; };
    spin_until([&] { return has_come() || pool_.failed_.load(std::memory_order_relaxed); });
    if (!has_come()) throw Abandoned{};
  }
}

std::atomic<std::int64_t>& Team::counter() { return pool_.counters_[phase_ % 4].next; }

Pool::Pool(int threads) {
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
  {
    const std::lock_guard lock(sleep_);
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(Team&)>& job) {
  const std::lock_guard one_caller(callers_);
  for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  job_ = &job;
  busy_.store(threads() - 1, std::memory_order_relaxed);
  {
    const std::lock_guard lock(sleep_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  take_part(0);
  spin_until([&] { return busy_.load(std::memory_order_acquire) == 0; });
  if (!failed_.load()) return;
  // Threads that waited for the failed one have not passed the barrier: reset it.
  arrived_.store(0);
  failed_.store(false);
  std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::take_part(int thread) {
  Team team(*this, thread, threads());
  try {
    (*job_)(team);
  } catch (const Abandoned&) {
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Pool::wait_for_job(std::uint64_t seen) {
  for (int i = 0; i < kIdleSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != seen) return;
    pause_cpu();
  }
  std::unique_lock lock(sleep_);
  wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
}

void Pool::work(int thread) {
  std::uint64_t seen = 0;
  for (;;) {
    wait_for_job(seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    take_part(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
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
