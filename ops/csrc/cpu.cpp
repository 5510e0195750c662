// Multi-scale deformable attention on a CPU: forward and backward, vectors over samples for the
// arithmetic of points and over channels for the sums, no atomics on results, the same bits for any
// number of threads.
//
// Two ways through the value [N,S,M,D]. *Packed*, for many queries: the rows of one (image, head)
// are copied together first, so that neighbours in the image are neighbours in the cache. *Direct*,
// for few queries: rows are read where they lie.

#include "simd.h"
//
#include "bilinear.h"
#include "parallel.h"
#include "problem.h"
#include "rows.h"
#include "samples.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace msda {
namespace {

template <class T>
struct Kernel {
  typedef typename Arithmetic<T>::type A;
  typedef Simd<A> S;
  typedef typename S::V V;
  typedef typename S::I I;
  typedef typename S::Index Index;
  static constexpr int lanes = S::lanes;
  static constexpr int kAhead = 6, kLine = 64;  // queries; bytes

  const Problem& p;
  const int row;       // channels, padded to whole vectors
  const int tile;      // vectors of channels that a loop holds in registers
  const bool direct;
  const Index stride;  // numbers from a token to the next
  const Levels<A> levels;
  const int samples;

  Kernel(const Problem& problem, bool backward)
      : p(problem), row((problem.channels + lanes - 1) / lanes * lanes),
        tile(row / lanes % 4 == 0 ? 4 : row / lanes % 2 == 0 ? 2 : 1),
        direct(fits_direct(backward)), stride(direct ? p.heads * p.channels : row),
        levels(problem, stride), samples(levels.samples) {}

  // Places of numbers within one image, or one head of it, are told in an Index.
  bool fits() const {
    const std::int64_t numbers = (p.tokens + 1) * stride;
    return numbers <= std::numeric_limits<Index>::max();
  }

  // Packing pays when the queries read the value several times over.
  bool fits_direct(bool backward) const {
    const bool in_place = !backward || sizeof(T) == sizeof(A);  // gradients add up in A
    const bool whole = p.channels % lanes == 0;
    const bool addressable =
        (p.tokens + 1) * p.heads * p.channels <= std::numeric_limits<Index>::max();
    const std::int64_t corners = 4 * p.queries * p.levels * p.per_level;
    return in_place && whole && addressable && corners < 6 * p.tokens;
  }

  static I load_index(const Index* from) {
    I v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }

  // One number of the reference for every sample from j on, of `form` numbers a level.
  V reference_of(const A* reference, int j, int number) const {
    V v;
    for (int i = 0; i < lanes; ++i) v[i] = reference[levels.level[j + i] * p.form + number];
    return v;
  }

  // Samples from j on of a query and head, in cells.
  void find_points(std::int64_t query, std::int64_t head, int j, V& x, V& y) const {
    const A* points = static_cast<const A*>(p.points) + 2 * ((query * p.heads + head) * samples + j);
    load_pairs(points, samples - j, x, y);
    const V width = load(&levels.width[j]), height = load(&levels.height[j]);
    if (p.form == kPlain) {
      x *= width, y *= height;
    } else {
      const A* reference = static_cast<const A*>(p.reference) + query * p.levels * p.form;
      const V at_x = reference_of(reference, j, 0), at_y = reference_of(reference, j, 1);
      if (p.form == kFusedPoints) {
        x += at_x * width, y += at_y * height;
      } else {
        const A half = A(0.5) / p.per_level;
        x = (at_x + x * half * reference_of(reference, j, 2)) * width;
        y = (at_y + y * half * reference_of(reference, j, 3)) * height;
      }
    }
    x -= A(0.5), y -= A(0.5);
  }

  // Attention weights of a query and head, padded with zeros.
  void find_attention(std::int64_t query, std::int64_t head, A* attention) const {
    const A* weights = static_cast<const A*>(p.weights) + (query * p.heads + head) * samples;
    if (p.form == kPlain) {
      for (int j = 0; j < samples; j += lanes) {
        store(attention + j, load_some(weights + j, samples - j));
      }
      return;
    }
    const V lowest = V{} - std::numeric_limits<A>::infinity();
    V largest = lowest;
    for (int j = 0; j < samples; j += lanes) {
      V v = load_some(weights + j, samples - j);
      v = select(load(&levels.width[j]) > 0, v, lowest);  // padding has no width
      store(attention + j, v);
      largest = select(v > largest, v, largest);
    }
    largest = largest_of<A>(largest);
    V total{};
    for (int j = 0; j < samples; j += lanes) {
      const V e = exp_nonpositive(load(attention + j) - largest);
      store(attention + j, e);
      total += e;
    }
    const V scale = 1 / sum_of<A>(total);
    for (int j = 0; j < samples; j += lanes) store(attention + j, load(attention + j) * scale);
  }

  // One head at a time walks through the queries in strides too long for the processor to foresee.
  template <int write>
  static MSDA_INLINE void fetch(const void* array, std::int64_t item, std::int64_t count,
                                std::int64_t size) {
    const char* first = static_cast<const char*>(array) + item * count * size;
    for (std::int64_t b = 0; b < count * size; b += kLine) __builtin_prefetch(first + b, write);
  }
  MSDA_INLINE void fetch_ahead(std::int64_t query, std::int64_t head, bool backward) const {
    const std::int64_t next = (query + kAhead) * p.heads + head;
    fetch<0>(p.weights, next, samples, sizeof(A));
    fetch<0>(p.points, next, 2 * samples, sizeof(A));
    if (backward) {
      fetch<0>(p.grad_output, next, p.channels, sizeof(T));
      fetch<1>(p.grad_weights, next, samples, sizeof(A));
      fetch<1>(p.grad_points, next, 2 * samples, sizeof(A));
    } else {
      fetch<1>(p.output, next, p.channels, sizeof(T));
    }
  }

  Corners<V, I> corners_of(std::int64_t query, std::int64_t head, int j, const A* attention,
                           Index nowhere, Rows<A>& rows) const {
    V x, y;
    find_points(query, head, j, x, y);
    const I none = I{} + nowhere;
    const Corners<V, I> c = find_corners(
        x, y, load(&levels.width[j]), load(&levels.height[j]), load_index(&levels.start[j]),
        load_index(&levels.pitch[j]), I{} + stride, none);
    const V share = load(attention + j);
    for (int i = 0; i < 4; ++i) {
      // attention that is not finite matters where there is a cell only
      store(rows.weight[i], select(c.cell[i] != none, share * c.weight[i], V{}));
      std::memcpy(rows.offset[i], &c.cell[i], sizeof(I));
    }
    return c;
  }

  template <bool in_place>
  void attend(std::int64_t query, std::int64_t head, const T* value, Index nowhere,
              Scratch<A>& s) const {
    Rows<A> rows;
    A *const attention = &s.attention[0], *const sum = &s.sum[0];
    fetch_ahead(query, head, false);
    find_attention(query, head, attention);
    for (int d = 0; d < row; d += lanes) store(sum + d, V{});
    for (int j = 0; j < samples; j += lanes) {
      corners_of(query, head, j, attention, nowhere, rows);
      const int count = std::min(lanes, samples - j), step = tile * lanes;
      for (int d = 0; d < row; d += step) {
        if (tile == 4) gather<4, in_place>(value + d, rows, count, sum + d);
        else if (tile == 2) gather<2, in_place>(value + d, rows, count, sum + d);
        else gather<1, in_place>(value + d, rows, count, sum + d);
      }
    }
  }

  template <bool in_place>
  void differentiate(std::int64_t query, std::int64_t head, const T* value, A* grad_value,
                     Index nowhere, const A* gradient, Scratch<A>& s) const {
    Rows<A> rows;
    A *const attention = &s.attention[0];
    fetch_ahead(query, head, true);
    find_attention(query, head, attention);
    for (int j = 0; j < samples; j += lanes) {
      const Corners<V, I> c = corners_of(query, head, j, attention, nowhere, rows);
      const int count = std::min(lanes, samples - j), step = tile * lanes;
      alignas(kVectorBytes) A dots[4][lanes];
      for (int i = 0; i < 4; ++i) store(dots[i], V{});
      for (int d = 0; d < row; d += step) {
        const T* at = value + d;
        A* grad_at = grad_value + d;
        if (tile == 4) scatter<4, in_place>(at, grad_at, rows, count, gradient + d, dots);
        else if (tile == 2) scatter<2, in_place>(at, grad_at, rows, count, gradient + d, dots);
        else scatter<1, in_place>(at, grad_at, rows, count, gradient + d, dots);
      }
      const V dot[4] = {load(dots[0]), load(dots[1]), load(dots[2]), load(dots[3])};
      const V share = load(attention + j);
      store(&s.grad_attention[j], gradient_of_attention(c, dot));
      store_point_gradients(query, head, j, share * gradient_of_x(c, dot),
                            share * gradient_of_y(c, dot));
    }
    store_weight_gradients(query, head, attention, &s.grad_attention[0]);
  }

  // x, y: gradients of points in cells.
  void store_point_gradients(std::int64_t query, std::int64_t head, int j, V x, V y) const {
    A* to = static_cast<A*>(p.grad_points) + 2 * ((query * p.heads + head) * samples + j);
    if (p.form != kFusedPoints || p.to_locations) {
      x *= load(&levels.width[j]), y *= load(&levels.height[j]);
    }
    if (p.form == kFusedBoxes && !p.to_locations) {
      const A* reference = static_cast<const A*>(p.reference) + query * p.levels * p.form;
      const A half = A(0.5) / p.per_level;
      x *= half * reference_of(reference, j, 2), y *= half * reference_of(reference, j, 3);
    }
    store_pairs(to, samples - j, x, y);
  }

  void store_weight_gradients(std::int64_t query, std::int64_t head, const A* attention,
                              const A* gradient) const {
    A* to = static_cast<A*>(p.grad_weights) + (query * p.heads + head) * samples;
    V mean{};
    if (p.form != kPlain) {
      for (int j = 0; j < samples; j += lanes) mean += load(attention + j) * load(gradient + j);
      mean = sum_of<A>(mean);
    }
    for (int j = 0; j < samples; j += lanes) {
      V g = load(gradient + j);
      if (p.form != kPlain) g = load(attention + j) * (g - mean);
      store_some(to + j, g, samples - j);
    }
  }

  const T* value_of(std::int64_t image, std::int64_t head) const {
    return static_cast<const T*>(p.value) + (image * p.tokens * p.heads + head) * p.channels;
  }

  void pack(const T* value, T* packed, std::int64_t first, std::int64_t last) const {
    for (std::int64_t t = first; t < last; ++t) {
      fetch<0>(value, (t + 2 * kAhead) * p.heads, p.channels, sizeof(T));
      pack_row(value + t * p.heads * p.channels, packed + t * row, p.channels, tile % 2 == 0);
    }
  }

  void store_output(std::int64_t query, std::int64_t head, const Scratch<A>& s) const {
    T* output = static_cast<T*>(p.output) + (query * p.heads + head) * p.channels;
    narrow_row(&s.sum[0], output, p.channels);
  }

  const A* load_gradient(std::int64_t query, std::int64_t head, Scratch<A>& s) const {
    const T* gradient = static_cast<const T*>(p.grad_output) + (query * p.heads + head) * p.channels;
    if (std::is_same<T, A>::value && row == p.channels) return reinterpret_cast<const A*>(gradient);
    widen_row(gradient, &s.gradient[0], p.channels);
    return &s.gradient[0];
  }

  int threads() const {
    const std::int64_t rows = 4 * p.batch * p.queries * p.heads * samples;
    return rows < 16384 ? 1 : p.threads;
  }
  Scratch<A> scratch() const { return Scratch<A>(levels.padded, row); }

  void forward() const {
    const std::int64_t queries = p.batch * p.queries;
    prefer_huge_pages(p.output, queries * p.heads * p.channels * sizeof(T));
    if (direct) {
      parallel_blocks(p, threads(), queries, 16, [&] { return scratch(); },
                      [&](std::int64_t query, Scratch<A>& s) {
        for (std::int64_t m = 0; m < p.heads; ++m) {
          attend<true>(query, m, value_of(query / p.queries, m), -1, s);
          store_output(query, m, s);
        }
      });
      return;
    }
    Array<T> packed((p.tokens + 1) * row);
    std::memset(&packed[p.tokens * row], 0, row * sizeof(T));  // what a corner outside reads
    for (std::int64_t slice = 0; slice < p.batch * p.heads; ++slice) {
      const std::int64_t image = slice / p.heads, head = slice % p.heads;
      parallel_blocks(p, threads(), p.tokens, 1024, [] { return 0; },
                      [&](std::int64_t token, int) {
        pack(value_of(image, head), &packed[0], token, token + 1);
      });
      parallel_blocks(p, threads(), p.queries, 256, [&] { return scratch(); },
                      [&](std::int64_t q, Scratch<A>& s) {
        const std::int64_t query = image * p.queries + q;
        attend<false>(query, head, &packed[0], p.tokens * row, s);
        store_output(query, head, s);
      });
    }
  }

  // One (image, head): its gradient of the value belongs to it alone.
  void backward_slice(std::int64_t slice, Array<T>& packed, Array<A>& grad_packed,
                      Scratch<A>& s) const {
    const std::int64_t image = slice / p.heads, head = slice % p.heads;
    T* grad_value = static_cast<T*>(p.grad_value) + (value_of(image, head) - value_of(0, 0));
    if (!direct) {
      pack(value_of(image, head), &packed[0], 0, p.tokens);
      std::memset(&packed[p.tokens * row], 0, row * sizeof(T));
      std::memset(&grad_packed[0], 0, (p.tokens + 1) * row * sizeof(A));
    }
    for (std::int64_t q = 0; q < p.queries; ++q) {
      const std::int64_t query = image * p.queries + q;
      const A* gradient = load_gradient(query, head, s);
      if (direct) {
        differentiate<true>(query, head, value_of(image, head), reinterpret_cast<A*>(grad_value),
                            -1, gradient, s);
      } else {
        differentiate<false>(query, head, &packed[0], &grad_packed[0], p.tokens * row,
                             gradient, s);
      }
    }
    if (direct) return;
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      fetch<1>(grad_value, (t + 2 * kAhead) * p.heads, p.channels, sizeof(T));
      narrow_row(&grad_packed[t * row], grad_value + t * p.heads * p.channels, p.channels);
    }
  }

  void backward() const {
    const std::int64_t values = p.batch * p.tokens * p.heads * p.channels;
    const std::int64_t weights = p.batch * p.queries * p.heads * samples;
    prefer_huge_pages(p.grad_value, values * sizeof(T));
    prefer_huge_pages(p.grad_points, 2 * weights * sizeof(A));
    prefer_huge_pages(p.grad_weights, weights * sizeof(A));
    if (direct) {
      const std::int64_t page = 1 << 20;
      parallel_blocks(p, threads(), (values * sizeof(T) + page - 1) / page, 1, [] { return 0; },
                      [&](std::int64_t block, int) {
        const std::int64_t first = block * page;
        std::memset(static_cast<char*>(p.grad_value) + first, 0,
                    std::min<std::int64_t>(page, values * sizeof(T) - first));
      });
    }
    struct Own {
      Array<T> packed;
      Array<A> grad_packed;
      Scratch<A> scratch;
    };
    const std::int64_t rows = direct ? 0 : (p.tokens + 1) * row;
    parallel_blocks(p, threads(), p.batch * p.heads, 1,
                    [&] { return Own{Array<T>(rows), Array<A>(rows), scratch()}; },
                    [&](std::int64_t slice, Own& own) {
      backward_slice(slice, own.packed, own.grad_packed, own.scratch);
    });
  }
};

template <class T>
Outcome run(const Problem& p, bool backward) {
  const Kernel<T> kernel(p, backward);
  if (!kernel.fits()) return kTooLarge;
  backward ? kernel.backward() : kernel.forward();
  return kDone;
}

Outcome run_any(const Problem& p, bool backward) {
  try {
    switch (p.storage) {
      case kFloat32: return run<float>(p, backward);
      case kFloat64: return run<double>(p, backward);
      case kBFloat16: return run<bfloat16>(p, backward);
      default: return run<float16>(p, backward);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace msda

#define MSDA_EXPORT extern "C" __attribute__((visibility("default")))
MSDA_EXPORT msda::Outcome msda_forward(const msda::Problem* p) {
  return msda::run_any(*p, false);
}
MSDA_EXPORT msda::Outcome msda_backward(const msda::Problem* p) {
  return msda::run_any(*p, true);
}
