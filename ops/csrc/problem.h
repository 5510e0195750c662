// One call of the op, as the Python side describes it (`ops/cpu.py` mirrors the fields in order).
#pragma once

#include <cstdint>

namespace msda {

enum StorageType : std::int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// What `points` and `weights` hold. The plain form has sampling locations (fractions of the level)
// and attention weights; the fused forms have sampling offsets and attention logits, and
// `reference` points of that many numbers, (x, y) or (cx, cy, w, h).
enum Form : std::int64_t { kPlain = 0, kFusedPoints = 2, kFusedBoxes = 4 };

enum Outcome : int { kDone, kNoMemory, kTooLarge };

// All arrays are contiguous. T is the storage type; A is float, or double where T is.
struct Problem {
  const void* value;            // T [N,S,M,D]
  const std::int64_t* shapes;   // [L,2] (height, width)
  const void* reference;        // A [N,Q,L,Form], or null
  const void* points;           // A [N,Q,M,L,K,2]
  const void* weights;          // A [N,Q,M,L,K]
  void* output;                 // T [N,Q,M,D]
  const void* grad_output;      // T [N,Q,M,D]
  void* grad_value;             // T [N,S,M,D]
  void* grad_points;            // A [N,Q,M,L,K,2]
  void* grad_weights;           // A [N,Q,M,L,K]
  void* parallel;               // GOMP_parallel of the process's OpenMP, or null
  std::int64_t batch, tokens, heads, channels, queries, levels, per_level;  // N, S, M, D, Q, L, K
  std::int64_t storage;         // StorageType
  std::int64_t form;            // Form
  std::int64_t to_locations;    // 1: grad_points is that of sampling locations, in any form
  std::int64_t threads;         // at most this many
};

}  // namespace msda
