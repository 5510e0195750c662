// The innermost loops of the CPU kernel: over rows of channels of the value and of its gradient.
#pragma once

#include <cstring>

#include "simd.h"

namespace msda {

// Corners of a vector of samples, times attention, ready for a loop over rows.
template <class A>
struct Rows {
  static constexpr int lanes = Simd<A>::lanes;
  alignas(kVectorBytes) typename Simd<A>::Index offset[4][lanes];  // of a row; <0: there is none
  alignas(kVectorBytes) A weight[4][lanes];
};

// sum += weighted rows, for `width` vectors of channels.
template <int width, bool in_place, class T, class A>
MSDA_INLINE void gather(const T* value, const Rows<A>& rows, int count, A* sum) {
  typedef typename Simd<A>::V V;
  constexpr int lanes = Simd<A>::lanes;
  V total[2][width];
  for (int v = 0; v < width; ++v) total[0][v] = load(sum + v * lanes), total[1][v] = V{};
  for (int j = 0; j < count; ++j) {
    for (int i = 0; i < 4; ++i) {
      if (in_place && rows.offset[i][j] < 0) continue;
      const T* at = value + rows.offset[i][j];
      const V weight = splat<A>(rows.weight[i][j]);
      V row[width];
      load_row<width, !in_place>(at, row);
      for (int v = 0; v < width; ++v) total[i & 1][v] += weight * row[v];
    }
  }
  for (int v = 0; v < width; ++v) store(sum + v * lanes, total[0][v] + total[1][v]);
}

// dots of samples from j on += sums of the parts, which stand corner by corner.
template <int group, class A>
MSDA_INLINE void add_dots(const typename Simd<A>::V* part, int j, A (&dots)[4][Simd<A>::lanes]) {
  typedef typename Simd<A>::V V;
  constexpr int lanes = Simd<A>::lanes;
  if constexpr (lanes >= 4) {
    typedef A Group __attribute__((vector_size(group * sizeof(A))));
    const V all = sums<A>(part);
    for (int i = 0; i < 4; ++i) {
      Group old, more;
      std::memcpy(&old, &dots[i][j], sizeof(Group));
      std::memcpy(&more, reinterpret_cast<const A*>(&all) + i * group, sizeof(Group));
      old += more;
      std::memcpy(&dots[i][j], &old, sizeof(Group));
    }
  } else {
    for (int i = 0; i < 4; ++i) dots[i][j] += sum_of<A>(part[i])[0];
  }
}

// dots += gradient . row of each corner; row of grad_value += weight * gradient.
template <int width, bool in_place, class T, class A>
MSDA_INLINE void scatter(const T* value, A* grad_value, const Rows<A>& rows, int count,
                         const A* gradient, A (&dots)[4][Simd<A>::lanes]) {
  typedef typename Simd<A>::V V;
  typedef typename Simd<A>::Index Index;
  constexpr int lanes = Simd<A>::lanes;
  constexpr int group = lanes >= 4 ? lanes / 4 : 1;  // samples whose dots fill a vector
  V g[width];
  for (int v = 0; v < width; ++v) g[v] = load(gradient + v * lanes);
  for (int j = 0; j < count; j += group) {
    V part[4 * group];
#pragma GCC unroll 2
    for (int k = 0; k < group; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Index offset = rows.offset[i][j + k];
        V dot{};
        if (!in_place || offset >= 0) {
          const T* at = value + offset;
          A* grad_at = grad_value + offset;
          const V weight = splat<A>(rows.weight[i][j + k]);
          V row[width];
          load_row<width, !in_place>(at, row);
#pragma GCC unroll 4
          for (int v = 0; v < width; ++v) {
            dot += g[v] * row[v];
            store(grad_at + v * lanes, load(grad_at + v * lanes) + weight * g[v]);
          }
        }
        part[i * group + k] = dot;
      }
    }
    add_dots<group, A>(part, j, dots);
  }
}

}  // namespace msda
