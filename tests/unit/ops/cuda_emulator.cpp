// The CUDA kernel on a CPU: compiled with the constants of `ops/csrc/cuda.cu`, loaded by
// `test_cuda.py`.
//
// Blocks run one after the other, and of a block one warp after the other, which the kernel allows
// since no warp waits for another. The lanes of a warp are fibers: each runs to its next warp-wide
// operation, then the next lane does; once all are there, all continue. A warp whose lanes do not meet
// at the same operation is reported.
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// one place for all lanes, found by the linker's names so that each block gets it filled again
#define __shared__ static __attribute__((section("msda_shared")))

namespace emulator {

constexpr int kLanesOfWarp = 32, kStackBytes = 256 * 1024;
struct Index { unsigned x; };

struct Lane {
  bool started, finished;
  int waits_at;  // what it waits for: 0 all lanes, else the step of a shuffle
  ucontext_t entry;
  jmp_buf here;
};

Lane lanes[kLanesOfWarp];
alignas(16) char stacks[kLanesOfWarp][kStackBytes];
double posted[2][kLanesOfWarp];  // by turns, for a fast lane posts before a slow one has read
int turns[kLanesOfWarp];
int current;
jmp_buf scheduler;
volatile sig_atomic_t faulted;  // a lane touched memory that is not there

// Returns once every lane of the warp waits for the same.
__attribute__((noinline)) void wait(int what) {
  lanes[current].waits_at = what;
  if (!_setjmp(lanes[current].here)) _longjmp(scheduler, 1);
  asm volatile("" ::: "memory");
}

}  // namespace emulator

static emulator::Index threadIdx, blockIdx;

inline void __syncwarp() { emulator::wait(0); }

template <class V>
V __shfl_xor_sync(unsigned mask, V x, int step) {
  static_assert(sizeof(V) <= sizeof(double), "");
  const int lane = emulator::current, turn = emulator::turns[lane]++ & 1;
  std::memcpy(&emulator::posted[turn][lane], &x, sizeof x);
  emulator::wait(mask == 0xffffffffu ? step : -1);
  std::memcpy(&x, &emulator::posted[turn][lane ^ step], sizeof x);
  return x;
}

template <class V>
void atomicAdd(V* to, V x) { *to += x; }

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline long long __double2ll_rn(double x) { return std::llrint(x); }
inline float half_to_float(unsigned word, int upper) {
  const unsigned short bits = static_cast<unsigned short>(upper ? word >> 16 : word);
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
inline unsigned short float_to_half(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

template <class P>
P* kept(P* address) { return address; }

#include "cuda.cu"

extern "C" char __start_msda_shared[], __stop_msda_shared[];

namespace emulator {

const msda::Arguments* arguments;
bool runs_backward, runs_reversed;

void enter() {
  if (runs_backward) {
    msda_backward(*arguments);
  } else {
    msda_forward(*arguments);
  }
  lanes[current].finished = true;
  _longjmp(scheduler, 1);
}

// Let a lane run until it waits or has finished.
void resume(int lane) {
  current = lane;
  if (_setjmp(scheduler)) return;
  Lane& it = lanes[lane];
  if (it.started) _longjmp(it.here, 1);
  it.started = true;
  getcontext(&it.entry);
  it.entry.uc_stack.ss_sp = stacks[lane];
  it.entry.uc_stack.ss_size = kStackBytes;
  makecontext(&it.entry, enter, 0);
  setcontext(&it.entry);
}

// Returns false where the lanes part ways at a warp-wide operation, or one is at fault.
bool run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) lane.started = lane.finished = false;
  const Lane& one = lanes[0];
  while (!one.finished) {
    for (int i = 0; i < kLanesOfWarp; ++i) {
      const int lane = runs_reversed ? kLanesOfWarp - 1 - i : i;
      threadIdx.x = first_thread + lane;
      resume(lane);
      if (faulted) return false;
    }
    for (const Lane& lane : lanes) {
      if (lane.finished != one.finished) return false;
      if (!one.finished && lane.waits_at != one.waits_at) return false;
    }
    if (!one.finished && one.waits_at < 0) return false;  // not a full mask
  }
  return true;
}

int run_blocks(int blocks) {
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = runs_reversed ? blocks - 1 - i : i;
    // NaN, where the kernel reads before it writes
    std::memset(__start_msda_shared, 0xff, __stop_msda_shared - __start_msda_shared);
    for (int thread = 0; thread < msda::kThreads; thread += kLanesOfWarp) {
      if (!run_warp(thread)) return 1 + static_cast<int>(blockIdx.x);
    }
  }
  return 0;
}

void leave(int) {
  faulted = 1;
  _longjmp(scheduler, 1);
}

}  // namespace emulator

extern "C" int emulated_threads() { return msda::kThreads; }
extern "C" int emulated_lanes() { return msda::kLanes; }
extern "C" int emulated_size() { return sizeof(msda::Arguments); }

// Run all blocks of one kernel, and the lanes of a warp, from the last to the first if `reversed`.
// Returns 0, or 1 + the block in which the lanes of a warp part ways, or minus that of the block in
// which one leaves its arrays.
extern "C" int emulate(bool backward, const msda::Arguments* arguments, int blocks, bool reversed) {
  using namespace emulator;
  emulator::arguments = arguments;
  runs_backward = backward, runs_reversed = reversed, faulted = 0;
  struct sigaction ours = {}, before;
  ours.sa_handler = leave;
  ours.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &ours, &before);
  const int block = run_blocks(blocks);
  sigaction(SIGSEGV, &before, nullptr);
  return faulted ? -block : block;
}
