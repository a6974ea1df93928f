// SPDX-License-Identifier: Apache-2.0
// Fibers: ucontext makes them, _setjmp switches them (swapcontext costs a system call each time).
// A barrier is a set of waiting fibers; the scheduler resumes runnable fibers
// in the chosen order until all have ended. What it makes visible:
//   - a missing barrier: a fiber runs undisturbed up to its next barrier, so a reader that should
//     have waited sees the poison (or the last round's values) in at least one order;
//   - a barrier not reached by all threads: reported as an error, not a hang;
//   - shared memory read before it is written: it starts as NaN;
//   - an asynchronous copy read before its wait, or over data still in use: the destination is NaN
//     from the copy's start to the wait that covers it;
//   - the same of copies that a transaction barrier counts, and of deferred work: nothing of it is
//     there before the wait; fences between proxies are not checked;
//   - lanes of a warp that do not meet in the same collective operation;
//   - out-of-range accesses: under AddressSanitizer, shared memory being its own heap block.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define PKT_ASAN 1
#else
#define PKT_ASAN 0
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

enum class State { runnable, at_block_barrier, at_named_barrier, at_warp_barrier, polling, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, filled, group;
};

struct Fiber {
  ucontext_t context;  // for the first entry
  jmp_buf resume_at;
  bool entered = false;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  unsigned index = 0;
  State state = State::runnable;
  unsigned mask = 0;      // lanes that take part in the exchange waited for
  uint64_t value = 0;     // what this lane published
  Serve serve = nullptr;  // the collective operation this lane is in, and whether it is done
  bool served = false;
  int barrier = 0, barrier_threads = 0;  // the named barrier waited at
  std::vector<std::function<void()>> deferred;
  std::vector<Copy> copies;  // in flight
  size_t groups = 0;         // committed
};

struct TransactionBarrier {
  unsigned count = 0, arrived = 0, phase = 0;
  int64_t outstanding = 0;  // bytes announced and not landed
  std::vector<std::pair<unsigned, std::function<void()>>> in_flight;

  void end_phase_if_complete() {
    if (arrived < count || outstanding != 0) return;
    arrived = 0;
    ++phase;
  }
};

struct Scheduler {
  std::vector<Fiber> fibers;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  jmp_buf home;
  const void* home_stack = nullptr;
  size_t home_bytes = 0;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  std::exception_ptr failure;
  std::mt19937_64 random;
  std::map<const void*, TransactionBarrier> barriers;
  bool progress = false;  // something other than polling happened
};

Order g_order = Order::ascending;
uint64_t g_seed = 0;
Scheduler* g_scheduler = nullptr;

void switch_to_home([[maybe_unused]] bool for_ever) {
  Scheduler& s = *g_scheduler;
#if PKT_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, s.home_stack, s.home_bytes);
#endif
  if (_setjmp(s.current->resume_at) == 0) _longjmp(s.home, 1);
#if PKT_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void enter() {
  Scheduler& s = *g_scheduler;
#if PKT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.home_stack, &s.home_bytes);
#endif
  try {
    (*s.body)();
    if (!s.current->copies.empty() || !s.current->deferred.empty()) {
      throw std::runtime_error(
          "emulation: a thread ended with copies or products it had not waited for");
    }
    s.progress = true;
  } catch (...) {
    s.failure = std::current_exception();
  }
  s.current->state = State::done;
  switch_to_home(true);
}

void resume(Fiber& fiber) {
  Scheduler& s = *g_scheduler;
  s.current = &fiber;
  threadIdx = fiber.thread;
#if PKT_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
  if (_setjmp(s.home) == 0) {
    if (fiber.entered) _longjmp(fiber.resume_at, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }
#if PKT_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void wait(State state) {
  g_scheduler->current->state = state;
  g_scheduler->progress = g_scheduler->progress || state != State::polling;
  switch_to_home(false);
}

// Lanes of `fiber`'s warp that exist in this block.
unsigned live_lanes(const Scheduler& s, const Fiber& fiber) {
  const size_t first = fiber.index / 32 * 32;
  const size_t count = std::min<size_t>(32, s.fibers.size() - first);
  return count == 32 ? 0xffffffffu : (1u << count) - 1;
}

// Frees the lanes of the warp [first, last) whose exchange is complete; false when there are none.
bool release_warp(Scheduler& s, size_t first, size_t last) {
  bool freed = false;
  for (size_t i = first; i < last; ++i) {
    const unsigned mask = s.fibers[i].mask;
    if (s.fibers[i].state != State::at_warp_barrier) continue;
    bool complete = true;
    for (size_t j = first; j < last; ++j) {
      if (mask >> (j - first) & 1) {
        complete =
            complete && s.fibers[j].state == State::at_warp_barrier && s.fibers[j].mask == mask;
      }
    }
    if (!complete) continue;
    for (size_t j = first; j < last; ++j) {
      if (mask >> (j - first) & 1) s.fibers[j].state = State::runnable;
    }
    freed = true;
  }
  return freed;
}

// Runs one warp as far as it can go without the rest of its block: a warp that ought to have waited
// for another one then reads too early.
void run_warp(Scheduler& s, size_t first, size_t last) {
  std::vector<size_t> order(last - first);
  std::iota(order.begin(), order.end(), first);
  if (g_order == Order::descending) std::reverse(order.begin(), order.end());
  do {
    if (g_order == Order::random) std::shuffle(order.begin(), order.end(), s.random);
    for (size_t i : order) {
      if (s.fibers[i].state != State::runnable) continue;
      resume(s.fibers[i]);
      if (s.failure) std::rethrow_exception(s.failure);
    }
  } while (release_warp(s, first, last));
}

// Frees the threads of the named barriers that as many have reached as they are for.
bool release_named(Scheduler& s) {
  bool freed = false;
  for (const Fiber& fiber : s.fibers) {
    if (fiber.state != State::at_named_barrier) continue;
    const int id = fiber.barrier, threads = fiber.barrier_threads;
    const auto waits = [id](const Fiber& other) {
      return other.state == State::at_named_barrier && other.barrier == id;
    };
    if (std::count_if(s.fibers.begin(), s.fibers.end(), waits) != threads) continue;
    for (Fiber& other : s.fibers) {
      if (waits(other)) other.state = State::runnable;
    }
    freed = true;
  }
  return freed;
}

void run_block(Scheduler& s) {
  s.barriers.clear();
  std::fill_n(s.shared.get(), s.shared_bytes, static_cast<unsigned char>(0xff));
  for (Fiber& fiber : s.fibers) {
    fiber.state = State::runnable;
    fiber.entered = false;
    fiber.groups = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<size_t> warps((s.fibers.size() + 31) / 32);
  std::iota(warps.begin(), warps.end(), 0);
  if (g_order == Order::descending) std::reverse(warps.begin(), warps.end());
  const auto all_are = [&s](State state) {
    return std::all_of(s.fibers.begin(), s.fibers.end(),
                       [state](const Fiber& fiber) { return fiber.state == state; });
  };
  const auto any_are = [&s](State state) {
    return std::any_of(s.fibers.begin(), s.fibers.end(),
                       [state](const Fiber& fiber) { return fiber.state == state; });
  };
  for (;;) {
    if (g_order == Order::random) std::shuffle(warps.begin(), warps.end(), s.random);
    for (size_t warp : warps) {
      run_warp(s, warp * 32, std::min(warp * 32 + 32, s.fibers.size()));
    }
    if (all_are(State::done)) return;
    bool freed = release_named(s) || s.progress;
    s.progress = false;
    const bool all_met = all_are(State::at_block_barrier);
    bool polling = false;
    for (Fiber& fiber : s.fibers) {
      if (fiber.state != State::polling) continue;
      polling = true;
      fiber.state = State::runnable;
    }
    if (!all_met && !(freed && (polling || any_are(State::runnable)))) {
      throw std::runtime_error("emulation: threads of block (" + std::to_string(blockIdx.x) + ", " +
                               std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                               ") wait at a barrier that the others never reach");
    }
    if (!all_met) continue;
    for (Fiber& fiber : s.fibers) fiber.state = State::runnable;
  }
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  g_order = order;
  g_seed = seed;
}

int64_t shared_memory_limit = 227 * 1024;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulation: invalid launch configuration");
  }
  if (shared_bytes > static_cast<size_t>(shared_memory_limit)) {
    throw std::runtime_error("emulation: too much shared memory");
  }
  static std::mutex running;  // callers may be on several threads
  const std::lock_guard<std::mutex> alone(running);
  Scheduler s;
  s.body = &body;
  s.shared.reset(new unsigned char[shared_bytes]);
  s.shared_bytes = shared_bytes;
  s.random.seed(g_seed);
  s.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    s.fibers[i].stack.reset(new char[kStackBytes]);
    s.fibers[i].index = i;
    s.fibers[i].thread = uint3{i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  g_scheduler = &s;
  blockDim = block;
  gridDim = grid;
  try {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(s);
      }
    }
  } catch (...) {
    g_scheduler = nullptr;
    throw;
  }
  g_scheduler = nullptr;
}

void* shared_memory() {
  return g_scheduler->shared.get();
}

void block_barrier() {
  wait(State::at_block_barrier);
}

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  Scheduler& s = *g_scheduler;
  Fiber& self = *s.current;
  self.value = value;
  self.mask = mask & live_lanes(s, self);
  wait(State::at_warp_barrier);
  const uint64_t result = s.fibers[self.index / 32 * 32 + static_cast<size_t>(source)].value;
  self.mask = mask & live_lanes(s, self);
  wait(State::at_warp_barrier);  // nobody publishes again before all have read
  return result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Scheduler& s = *g_scheduler;
  Fiber& self = *s.current;
  self.value = predicate;
  const unsigned live = mask & live_lanes(s, self);
  self.mask = live;
  wait(State::at_warp_barrier);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (live >> lane & 1) {
      votes |= static_cast<unsigned>(s.fibers[self.index / 32 * 32 + lane].value) << lane;
    }
  }
  self.mask = live;
  wait(State::at_warp_barrier);
  return votes;
}

void warp_collective(void* operands, Serve serve) {
  Scheduler& s = *g_scheduler;
  Fiber& self = *s.current;
  self.value = reinterpret_cast<uintptr_t>(operands);
  self.serve = serve;
  self.mask = live_lanes(s, self);
  if (self.mask != 0xffffffffu) {
    throw std::runtime_error("emulation: a collective operation of an incomplete warp");
  }
  wait(State::at_warp_barrier);
  if (!self.served) {  // the first lane to go on does it for all, which still stand where they were
    Fiber* const warp = &s.fibers[self.index / 32 * 32];
    void* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      if (warp[lane].serve != serve) {
        throw std::runtime_error("emulation: lanes of a warp are in different operations");
      }
      lanes[lane] = reinterpret_cast<void*>(warp[lane].value);
    }
    serve(lanes);
    for (int lane = 0; lane < 32; ++lane) warp[lane].served = true;
  }
  self.served = false;
  self.serve = nullptr;
}

void copy_async(void* to, const void* from, size_t bytes, size_t filled) {
  Fiber& self = *g_scheduler->current;
  std::memset(to, 0xff, filled);
  self.copies.push_back({to, from, bytes, filled, self.groups});
}

void copy_async_commit() {
  ++g_scheduler->current->groups;
}

void copy_async_wait(size_t pending) {
  Fiber& self = *g_scheduler->current;
  const auto in_flight = [&](const Copy& copy) { return copy.group + pending >= self.groups; };
  for (const Copy& copy : self.copies) {
    if (in_flight(copy)) continue;
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.filled - copy.bytes);
  }
  const auto kept = std::stable_partition(self.copies.begin(), self.copies.end(), in_flight);
  self.copies.erase(kept, self.copies.end());
}

void named_barrier(int id, int threads) {
  g_scheduler->current->barrier = id;
  g_scheduler->current->barrier_threads = threads;
  wait(State::at_named_barrier);
}

void transaction_barrier_init(const void* barrier, unsigned count) {
  TransactionBarrier fresh;
  fresh.count = count;
  g_scheduler->barriers[barrier] = fresh;
}

void transaction_barrier_arrive(const void* barrier, unsigned bytes_announced) {
  TransactionBarrier& b = g_scheduler->barriers.at(barrier);
  b.outstanding += bytes_announced;
  ++b.arrived;
  b.end_phase_if_complete();
}

void transaction_later(const void* barrier, unsigned bytes, std::function<void()> land) {
  g_scheduler->barriers.at(barrier).in_flight.emplace_back(bytes, std::move(land));
}

void transaction_barrier_wait(const void* barrier, unsigned parity) {
  TransactionBarrier& b = g_scheduler->barriers.at(barrier);
  for (;;) {
    for (const auto& [bytes, land] : b.in_flight) {
      land();
      b.outstanding -= bytes;
    }
    if (!b.in_flight.empty()) {
      b.in_flight.clear();
      b.end_phase_if_complete();
    }
    if (b.phase % 2 != parity) break;
    wait(State::polling);
  }
  g_scheduler->progress = true;
}

void defer(std::function<void()> work) {
  g_scheduler->current->deferred.push_back(std::move(work));
}

void run_deferred() {
  Fiber& self = *g_scheduler->current;
  for (const auto& work : self.deferred) work();
  self.deferred.clear();
}

void require_nothing_deferred() {
  if (!g_scheduler->current->deferred.empty()) {
    throw std::runtime_error("emulation: sums looked at while work on them is deferred");
  }
}

}  // namespace emulation
