// Loops over threads of the process's own OpenMP pool, and the memory they work in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "problem.h"

namespace msda {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// A fresh array of several megabytes costs a page fault per 4 KB, more than the work on it: ask for
// large pages. Advice only; on other systems and for small arrays nothing happens.
inline void prefer_huge_pages(void* array, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(array);
  const std::uintptr_t first = (from + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (from + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

enum class Begin { anyhow, zero };

// A fixed number of plain values, aligned for vectors.
template <class X>
class Array {
 public:
  explicit Array(std::size_t count, Begin begin = Begin::anyhow) {
    if (!count) return;
    const std::size_t bytes = (count * sizeof(X) + 63) / 64 * 64;
    data_ = static_cast<X*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_, bytes);
    if (begin == Begin::zero) std::memset(data_, 0, bytes);
  }
  Array(Array&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  X& operator[](std::size_t i) { return data_[i]; }
  const X& operator[](std::size_t i) const { return data_[i]; }

 private:
  X* data_ = nullptr;
};

// Call body(i, own) for i in 0..count-1 from up to `threads` threads, each with an `own` that `make`
// gave it; a thread takes `block` neighbours at a time.
template <class Make, class Body>
void parallel_blocks(const Problem& p, std::int64_t threads, std::int64_t count, std::int64_t block,
                     Make make, Body body) {
  const std::int64_t blocks = (count + block - 1) / block;
  struct Job {
    std::int64_t count, block;
    Make& make;
    Body& body;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};

    void work() {
      try {
        std::int64_t first = next.fetch_add(block, std::memory_order_relaxed);
        if (first >= count) return;
        auto own = make();
        for (; first < count; first = next.fetch_add(block, std::memory_order_relaxed)) {
          const std::int64_t last = std::min(first + block, count);
          for (std::int64_t i = first; i < last; ++i) body(i, own);
        }
      } catch (const std::bad_alloc&) {
        failed = true;
        next = count;
      }
    }
  } job{count, block, make, body};

  // GOMP_parallel runs a function on every thread of a team; libgomp has it, and LLVM's on Linux.
  typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
  const auto team = reinterpret_cast<GompParallel>(p.parallel);
  if (team && threads > 1 && blocks > 1) {
    team([](void* shared) { static_cast<Job*>(shared)->work(); }, &job,
         static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    const std::int64_t wanted = std::min(threads, blocks) - 1;
    for (std::int64_t i = 0; i < wanted; ++i) others.emplace_back([&job] { job.work(); });
    job.work();
    for (std::thread& other : others) other.join();
  }
  if (job.failed) throw std::bad_alloc();
}

}  // namespace msda
