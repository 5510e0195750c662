// Multi-scale deformable attention on a GPU: forward and backward, plain and fused form.
//
// Compiled for one kind of call at a time, with these constants given on the command line:
//   MSDA_STORAGE   type of the value: 0 float32, 1 float64, 2 bfloat16, 3 float16
//   MSDA_HEADS, MSDA_CHANNELS, MSDA_LEVELS, MSDA_PER_LEVEL   M, D, L and K
//   MSDA_FORM      0 plain, 2 fused with points, 4 fused with boxes
//   MSDA_TO_LOCATIONS   1: gradients of points are those of sampling locations, in any form
//   MSDA_DETERMINISTIC  1: gradients of the value add up in whole numbers, in any order the same
// No header of CUDA or PyTorch is needed; NVRTC and nvcc both take it.
//
// A group of lanes computes one query and head: each lane a few neighbouring channels, 16 bytes of
// every row at a time. The lanes of a group share the arithmetic of its samples through shared
// memory. A block has neighbouring queries of one head, whose samples tend to lie close together.
// Gradients of the value are added in float32 (or float64) to global memory, four at a time where
// the GPU can; those of points and weights belong to one group and are stored once.

#define MSDA_INLINE __device__ __forceinline__

namespace msda {
template <class Mask, class V>
MSDA_INLINE V select(Mask mask, V yes, V no) { return mask ? yes : no; }
MSDA_INLINE int to_int(float x) { return static_cast<int>(x); }
MSDA_INLINE int to_int(double x) { return static_cast<int>(x); }
#if MSDA_STORAGE == 1
typedef double A;
#else
typedef float A;
#endif
MSDA_INLINE A to_float(int x) { return static_cast<A>(x); }
}  // namespace msda

#include "bilinear.h"

namespace msda {

constexpr int kHeads = MSDA_HEADS, kChannels = MSDA_CHANNELS;
constexpr int kLevels = MSDA_LEVELS, kPerLevel = MSDA_PER_LEVEL, kSamples = kLevels * kPerLevel;
constexpr int kSlots = kSamples | 1;  // odd, so that the groups of a warp read different banks
constexpr int kRow = kHeads * kChannels;  // numbers from a token to the next
constexpr int kForm = MSDA_FORM;
constexpr bool kToLocations = MSDA_TO_LOCATIONS;
constexpr bool kDeterministic = MSDA_DETERMINISTIC;

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };
#if MSDA_STORAGE == 0
typedef float T;
#elif MSDA_STORAGE == 1
typedef double T;
#elif MSDA_STORAGE == 2
typedef bfloat16 T;
#else
typedef float16 T;
#endif

#ifdef __CUDACC__  // the emulator of the tests brings its own
MSDA_INLINE float half_to_float(unsigned word, int upper) {
  float x;
  if (upper) {
    asm("{.reg .b16 l, u; mov.b32 {l, u}, %1; cvt.f32.f16 %0, u;}" : "=f"(x) : "r"(word));
  } else {
    asm("{.reg .b16 l, u; mov.b32 {l, u}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(word));
  }
  return x;
}
MSDA_INLINE unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// Makes the compiler keep an address in registers; it would compute it anew for every corner.
template <class P>
MSDA_INLINE P* kept(P* address) {
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}
#endif

MSDA_INLINE A widen(float x) { return x; }
MSDA_INLINE A widen(double x) { return static_cast<A>(x); }
MSDA_INLINE A widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
MSDA_INLINE A widen(float16 x) { return half_to_float(x.bits, 0); }
// One of the two numbers in a word.
MSDA_INLINE A widen_half(bfloat16, unsigned word, int upper) {
  return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
}
MSDA_INLINE A widen_half(float16, unsigned word, int upper) { return half_to_float(word, upper); }
MSDA_INLINE void narrow(A x, float& to) { to = static_cast<float>(x); }
MSDA_INLINE void narrow(A x, double& to) { to = x; }
MSDA_INLINE void narrow(A x, bfloat16& to) {
  const unsigned bits = __float_as_uint(static_cast<float>(x));
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  to.bits = static_cast<unsigned short>(x != x ? (bits >> 16) | 0x40u : rounded);
}
MSDA_INLINE void narrow(A x, float16& to) { to.bits = float_to_half(static_cast<float>(x)); }

// Channels that a lane takes at once: 16 bytes, or fewer where the rows do not divide.
__device__ constexpr int widest(int channels, int most) {
  return channels % most == 0 ? most : widest(channels, most / 2);
}
constexpr int kSharedBytes = 48 * 1024, kSampleBytes = 4 * sizeof(A);
__device__ constexpr bool fits(int threads, int lanes) {
  return threads / lanes * kSlots * kSampleBytes <= kSharedBytes;
}
__device__ constexpr int lanes_for(int bundles, int lanes) {
  const bool enough = lanes >= bundles && fits(32, lanes);
  return enough || lanes == 32 ? lanes : lanes_for(bundles, lanes * 2);
}
constexpr int kWide = widest(kChannels, 16 / static_cast<int>(sizeof(T)));
constexpr int kBundles = kChannels / kWide;
constexpr int kLanes = lanes_for(kBundles, 1);                // of a group, a power of two
constexpr int kRounds = (kBundles + kLanes - 1) / kLanes;     // bundles of a lane
constexpr int kThreads = fits(128, kLanes) ? 128 : fits(64, kLanes) ? 64 : 32;
static_assert(fits(kThreads, kLanes), "too many samples for the shared memory of a block");
constexpr int kGroups = kThreads / kLanes;
constexpr int kOwn = (kSamples + kLanes - 1) / kLanes;        // samples of a lane
constexpr int kUnrolled = kPerLevel <= 8 ? kPerLevel : 1;
constexpr unsigned kWarp = 0xffffffffu;

// Two numbers of half precision stay in one word until they are used.
constexpr bool kPairs = sizeof(T) == 2 && kWide % 2 == 0;
template <bool> struct WordType { typedef T type; };
template <> struct WordType<true> { typedef unsigned type; };
union alignas(kWide * sizeof(T)) Bundle {
  T item[kWide];
  WordType<kPairs>::type word[kPairs ? kWide / 2 : kWide];
};
template <class V = T>
MSDA_INLINE A widen(const Bundle& bundle, int i) {
  if constexpr (kPairs) {
    return widen_half(V(), bundle.word[i / 2], i % 2);
  } else {
    return widen(bundle.item[i]);
  }
}

// Numbers that lie together, read or written at once.
template <int n>
struct alignas(n * sizeof(A) < 16 ? n * sizeof(A) : 16) Several { A item[n]; };
template <class S>
MSDA_INLINE S several(const A* from) { return *reinterpret_cast<const S*>(from); }
typedef Several<kForm == 4 ? 4 : 2> Around;  // a reference

// Mirrored by `ops/cuda.py`. Arrays as `problem.h` has them; grad_value is of type A, or of 64-bit
// whole numbers where the sum is deterministic.
struct Arguments {
  const T* value;
  const A* reference;
  const A* points;
  const A* weights;
  T* output;
  const T* grad_output;
  void* grad_value;
  A* grad_points;
  A* grad_weights;
  const double* scale;  // of the whole numbers: one number
  int tokens, queries;
  int height[kLevels], width[kLevels], start[kLevels];
};

struct Place {
  long long row;    // image * queries + query
  long long slot;   // row * heads + head
  long long image;
  int head, lane, group;
  bool active;
};

MSDA_INLINE Place place_of(const Arguments& p) {
  const unsigned tiles = (p.queries + kGroups - 1) / kGroups;
  Place at;
  at.lane = threadIdx.x % kLanes;
  at.group = threadIdx.x / kLanes;
  const int query = static_cast<int>(blockIdx.x % tiles) * kGroups + at.group;
  const unsigned slice = blockIdx.x / tiles;
  at.head = slice % kHeads;
  at.image = slice / kHeads;
  at.active = query < p.queries;
  at.row = at.image * p.queries + (at.active ? query : 0);
  at.slot = at.row * kHeads + at.head;
  return at;
}

// What the lanes of a group need to know of one sample: no more than they read at once.
struct alignas(16) Sample {
  A attention;
  A x, y;  // shares of the right column and lower row; then gradients of the point, in cells
  union {
    int corners;     // 16 times the token of the top left one, and a bit for each that exists
    A of_attention;  // its gradient, once the corners are done with
  };
};
static_assert(sizeof(Sample) == kSampleBytes, "");

template <class Op>
MSDA_INLINE A over_lanes(A x, Op op) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}
struct Add { MSDA_INLINE A operator()(A a, A b) const { return a + b; } };
struct Larger { MSDA_INLINE A operator()(A a, A b) const { return a > b ? a : b; } };
MSDA_INLINE float exponential(float x) { return expf(x); }
MSDA_INLINE double exponential(double x) { return exp(x); }

// Attention weights of the samples of this lane.
MSDA_INLINE void find_attention(const Arguments& p, const Place& at, A (&attention)[kOwn]) {
  const A* weights = p.weights + at.slot * kSamples;
  const A lowest = -__uint_as_float(0x7f800000u);
  A largest = lowest;
  for (int i = 0; i < kOwn; ++i) {
    const int j = at.lane + i * kLanes;
    attention[i] = j < kSamples ? weights[j] : lowest;
    largest = Larger()(largest, attention[i]);
  }
  if (kForm == 0) return;
  largest = over_lanes(largest, Larger());
  A total = 0;
  for (int i = 0; i < kOwn; ++i) total += attention[i] = exponential(attention[i] - largest);
  const A scale = 1 / over_lanes(total, Add());
  for (int i = 0; i < kOwn; ++i) attention[i] *= scale;
}

// The point of sample j in cells of its level, which has this size.
MSDA_INLINE void find_point(const Arguments& p, const Place& at, int j, A width, A height, A& x,
                            A& y) {
  const Several<2> point = several<Several<2>>(p.points + (at.slot * kSamples + j) * 2);
  x = point.item[0], y = point.item[1];
  if constexpr (kForm == 0) {
    x *= width, y *= height;
  } else {
    const A* reference = p.reference + (at.row * kLevels + j / kPerLevel) * kForm;
    const Around around = several<Around>(reference);
    if constexpr (kForm == 2) {
      x += around.item[0] * width, y += around.item[1] * height;
    } else {
      const A half = A(0.5) / kPerLevel;
      x = (around.item[0] + x * half * around.item[2]) * width;
      y = (around.item[1] + y * half * around.item[3]) * height;
    }
  }
  x -= A(0.5), y -= A(0.5);
}

MSDA_INLINE void find_samples(const Arguments& p, const Place& at, Sample* samples) {
  A attention[kOwn];
  find_attention(p, at, attention);
  for (int i = 0; i < kOwn; ++i) {
    const int j = at.lane + i * kLanes;
    if (j >= kSamples) break;
    const int level = j / kPerLevel, columns = p.width[level];
    const A width = static_cast<A>(columns), height = static_cast<A>(p.height[level]);
    A x, y;
    find_point(p, at, j, width, height, x, y);
    const Corners<A, int> c = find_corners(x, y, width, height, p.start[level], columns, 1, -1);
    int exists = 0;
    for (int k = 0; k < 4; ++k) exists |= c.exists[k] << k;
    Sample& sample = samples[j];
    sample.attention = attention[i], sample.x = c.right, sample.y = c.down;
    sample.corners = at.active ? c.first * 16 + exists : 0;
  }
  __syncwarp();
}

MSDA_INLINE bool has_bundle(int round, int lane) {
  return kBundles % kLanes == 0 || round * kLanes + lane < kBundles;
}
MSDA_INLINE int channel_of(int round, int lane) { return (round * kLanes + lane) * kWide; }
// The first number that a lane reads of a value.
MSDA_INLINE long long first_of(const Arguments& p, const Place& at) {
  return at.image * p.tokens * kRow + at.head * kChannels + channel_of(0, at.lane);
}
MSDA_INLINE bool exists(const Sample& sample, int corner) { return sample.corners >> corner & 1; }

// The row of the numbers of a corner; `first` has that of the first token.
template <class V>
MSDA_INLINE V* row_of(V* first, const Sample& sample, int corner, int width) {
  const int top = sample.corners >> 4;
  return first + static_cast<long long>(corner < 2 ? top : top + width) * kRow + corner % 2 * kRow;
}

// A bundle of every corner. All four are asked for before the first is used.
MSDA_INLINE void read_corners(const T* value, const Sample& sample, int width,
                              Bundle (&corner)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!exists(sample, k)) continue;
    corner[k] = *reinterpret_cast<const Bundle*>(row_of(value, sample, k, width));
  }
}

// Bilinear weights, right for corners that exist.
MSDA_INLINE Corners<A, int> weights_of(const Sample& sample) {
  Corners<A, int> c;
  c.right = sample.x, c.left = 1 - c.right;
  c.down = sample.y, c.up = 1 - c.down;
  c.weight[0] = c.left * c.up, c.weight[1] = c.right * c.up;
  c.weight[2] = c.left * c.down, c.weight[3] = c.right * c.down;
  return c;
}

// With at most 64 registers a thread, which the compiler then spends on reading ahead.
constexpr int kResident = kRounds == 1 ? 1024 / kThreads : 1;
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    msda_forward(const __grid_constant__ Arguments p) {
  __shared__ Sample all[kGroups][kSlots];
  const Place at = place_of(p);
  find_samples(p, at, all[at.group]);

  const T* value = kept(p.value + first_of(p, at));
  A sum[kRounds][kWide] = {};
#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    const int width = p.width[level];
#pragma unroll kUnrolled
    for (int j = level * kPerLevel; j < (level + 1) * kPerLevel; ++j) {
      const Sample s = all[at.group][j];
      const Corners<A, int> c = weights_of(s);
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (!has_bundle(r, at.lane)) continue;
        Bundle corner[4] = {};
        read_corners(value + channel_of(r, 0), s, width, corner);
        A weight[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) weight[k] = exists(s, k) ? s.attention * c.weight[k] : A(0);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[r][i] += weight[k] * widen(corner[k], i);
        }
      }
    }
  }
  if (!at.active) return;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (!has_bundle(r, at.lane)) continue;
    Bundle out;
#pragma unroll
    for (int i = 0; i < kWide; ++i) narrow(sum[r][i], out.item[i]);
    *reinterpret_cast<Bundle*>(p.output + at.slot * kChannels + channel_of(r, at.lane)) = out;
  }
}

// Four floats in one instruction: compute capability 9.0, and a compiler from CUDA 12.1.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
constexpr bool kAddsFour = sizeof(A) == sizeof(float) && kWide % 4 == 0;
#else
constexpr bool kAddsFour = false;
#endif

// to += x * weight, for one bundle.
MSDA_INLINE void accumulate(A* to, const A (&x)[kWide], A weight, double) {
  if constexpr (kAddsFour) {
#pragma unroll
    for (int i = 0; i < kWide; i += 4) {
      float four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = static_cast<float>(x[i + j] * weight);
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i), "f"(four[0]),
                   "f"(four[1]), "f"(four[2]), "f"(four[3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) atomicAdd(to + i, x[i] * weight);
  }
}
// The same in whole numbers, `scale` times as large.
MSDA_INLINE void accumulate(unsigned long long* to, const A (&x)[kWide], A weight, double scale) {
  for (int i = 0; i < kWide; ++i) {
    const long long whole = __double2ll_rn(static_cast<double>(x[i] * weight) * scale);
    atomicAdd(to + i, static_cast<unsigned long long>(whole));
  }
}

template <bool> struct SumType { typedef A type; };
template <> struct SumType<true> { typedef unsigned long long type; };
typedef SumType<kDeterministic>::type Sum;  // of gradients of the value

// Gradients of points and weights of the samples of this lane, of which `samples` holds those of
// attention and of x and y in cells, without the factor attention.
MSDA_INLINE void store_gradients(const Arguments& p, const Place& at, const Sample* samples) {
  A expected = 0;  // the softmax takes from each its mean
  if (kForm != 0) {
    for (int i = 0; i < kOwn; ++i) {
      const int j = at.lane + i * kLanes;
      if (j >= kSamples) break;
      expected += samples[j].attention * samples[j].of_attention;
    }
    expected = over_lanes(expected, Add());
  }
  if (!at.active) return;
  for (int i = 0; i < kOwn; ++i) {
    const int j = at.lane + i * kLanes;
    if (j >= kSamples) break;
    const Sample s = samples[j];
    const int level = j / kPerLevel;
    A of_weight = s.of_attention;
    Several<2> of_point = {{s.attention * s.x, s.attention * s.y}};
    if (kForm != 0) of_weight = s.attention * (of_weight - expected);
    if (kForm != 2 || kToLocations) {
      of_point.item[0] *= p.width[level], of_point.item[1] *= p.height[level];
    }
    if constexpr (kForm == 4 && !kToLocations) {
      const Several<4> box = several<Several<4>>(p.reference + (at.row * kLevels + level) * 4);
      const A half = A(0.5) / kPerLevel;
      of_point.item[0] *= half * box.item[2], of_point.item[1] *= half * box.item[3];
    }
    p.grad_weights[at.slot * kSamples + j] = of_weight;
    *reinterpret_cast<Several<2>*>(p.grad_points + (at.slot * kSamples + j) * 2) = of_point;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    msda_backward(const __grid_constant__ Arguments p) {
  __shared__ Sample all[kGroups][kSlots];
  const Place at = place_of(p);
  Sample* samples = all[at.group];
  find_samples(p, at, samples);

  const T* value = kept(p.value + first_of(p, at));
  Sum* grad_value = kept(static_cast<Sum*>(p.grad_value) + first_of(p, at));
  double scale = 0;
  if constexpr (kDeterministic) scale = *p.scale;
  A gradient[kRounds][kWide];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (!has_bundle(r, at.lane)) continue;
    const Bundle g = *reinterpret_cast<const Bundle*>(
        p.grad_output + at.slot * kChannels + channel_of(r, at.lane));
#pragma unroll
    for (int i = 0; i < kWide; ++i) gradient[r][i] = widen(g, i);
  }

#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    const int width = p.width[level];
#pragma unroll kUnrolled
    for (int j = level * kPerLevel; j < (level + 1) * kPerLevel; ++j) {
      const Sample s = samples[j];
      const Corners<A, int> c = weights_of(s);
      A dot[4] = {};  // over the channels of this lane
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (!has_bundle(r, at.lane)) continue;
        Bundle corner[4] = {};
        read_corners(value + channel_of(r, 0), s, width, corner);
        // additions in the meantime, as they need no value and no read passes one
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!exists(s, k)) continue;
          Sum* to = row_of(grad_value + channel_of(r, 0), s, k, width);
          accumulate(to, gradient[r], s.attention * c.weight[k], scale);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kWide; ++i) {
            if (exists(s, k)) dot[k] += gradient[r][i] * widen(corner[k], i);
          }
        }
      }
      // sums over channels, so that lanes may add up afterwards
      const A of_attention = over_lanes(gradient_of_attention(c, dot), Add());
      const A of_x = over_lanes(gradient_of_x(c, dot), Add());
      const A of_y = over_lanes(gradient_of_y(c, dot), Add());
      if (at.lane == 0) {
        samples[j].of_attention = of_attention, samples[j].x = of_x, samples[j].y = of_y;
      }
    }
  }
  __syncwarp();
  store_gradients(p, at, samples);
}

}  // namespace msda
