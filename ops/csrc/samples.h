// What the CPU kernel keeps for the samples of one query and head.
#pragma once

#include "parallel.h"
#include "problem.h"
#include "simd.h"

namespace msda {

// Where each sample of a query and head belongs, in arrays padded to whole vectors of samples.
template <class A>
struct Levels {
  typedef typename Simd<A>::Index Index;
  static constexpr int lanes = Simd<A>::lanes;

  // stride: numbers from a row to the next
  Levels(const Problem& p, Index stride)
      : samples(p.levels * p.per_level), padded((samples + lanes - 1) / lanes * lanes),
        width(padded, Begin::zero), height(padded, Begin::zero), pitch(padded, Begin::zero),
        start(padded, Begin::zero), level(padded, Begin::zero) {
    Index first = 0;
    for (Index l = 0; l < p.levels; ++l) {
      const Index h = p.shapes[2 * l], w = p.shapes[2 * l + 1];
      for (Index k = 0; k < p.per_level; ++k) {
        const Index j = l * p.per_level + k;
        width[j] = w, height[j] = h, level[j] = l;
        pitch[j] = w * stride, start[j] = first * stride;
      }
      first += h * w;
    }
  }

  int samples, padded;
  Array<A> width, height;  // 0 in the padding, whose points are thus outside
  Array<Index> pitch, start, level;
};

// Working memory of one thread, for one query and head.
template <class A>
struct Scratch {
  Scratch(int padded, int row)
      : attention(padded), grad_attention(padded), sum(row), gradient(row) {}
  Array<A> attention, grad_attention;  // of the samples
  Array<A> sum, gradient;              // rows of channels
};

}  // namespace msda
