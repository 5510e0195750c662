// Multi-scale deformable attention on a GPU: forward and backward, plain and fused form.
//
// Compiled for one kind of call at a time, with these constants given on the command line:
//   MSDA_STORAGE   type of the value: 0 float32, 1 float64, 2 bfloat16, 3 float16
//   MSDA_CHANNELS, MSDA_LEVELS, MSDA_PER_LEVEL   D, L and K
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

constexpr int kChannels = MSDA_CHANNELS, kLevels = MSDA_LEVELS, kPerLevel = MSDA_PER_LEVEL;
constexpr int kSamples = kLevels * kPerLevel;
constexpr int kSlots = kSamples + 1;  // one unused, so that groups of a warp read other banks
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
MSDA_INLINE float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
MSDA_INLINE unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

MSDA_INLINE A widen(float x) { return x; }
MSDA_INLINE A widen(double x) { return static_cast<A>(x); }
MSDA_INLINE A widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
MSDA_INLINE A widen(float16 x) { return half_to_float(x.bits); }
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
constexpr int kSharedBytes = 48 * 1024, kSampleBytes = 12 * sizeof(A);
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
constexpr unsigned kWarp = 0xffffffffu;

struct alignas(kWide * sizeof(T)) Bundle { T item[kWide]; };

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
  double scale;  // of the whole numbers
  int batch, tokens, heads, queries;
  int height[kLevels], width[kLevels], start[kLevels];
};

struct Place {
  long long slot;   // (image * queries + query) * heads + head
  long long image;
  int head, lane, group;
  bool active;
};

MSDA_INLINE Place place_of(const Arguments& p) {
  const int tiles = (p.queries + kGroups - 1) / kGroups;
  Place at;
  at.lane = threadIdx.x % kLanes;
  at.group = threadIdx.x / kLanes;
  const int query = static_cast<int>(blockIdx.x % tiles) * kGroups + at.group;
  at.head = static_cast<int>(blockIdx.x / tiles % p.heads);
  at.image = blockIdx.x / tiles / p.heads;
  at.active = query < p.queries;
  at.slot = (at.image * p.queries + (at.active ? query : 0)) * p.heads + at.head;
  return at;
}

// What the lanes of a group need to know of one sample.
struct alignas(16) Sample {
  A weight[4];   // bilinear weights
  int cell[4];   // tokens of the corners, -1 outside
  A right, down;  // shares of the right column and lower row
  A attention;
  A unused;
};
static_assert(sizeof(Sample) <= kSampleBytes, "");

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
  total = over_lanes(total, Add());
  for (int i = 0; i < kOwn; ++i) attention[i] /= total;
}

MSDA_INLINE void find_samples(const Arguments& p, const Place& at, Sample* samples) {
  A attention[kOwn];
  find_attention(p, at, attention);
  const A* points = p.points + at.slot * kSamples * 2;
  const A* reference = p.reference + (at.slot / p.heads) * kLevels * kForm;
  for (int i = 0; i < kOwn; ++i) {
    const int j = at.lane + i * kLanes;
    if (j >= kSamples) break;
    const int level = j / kPerLevel, start = p.start[level];
    const A width = static_cast<A>(p.width[level]), height = static_cast<A>(p.height[level]);
    A x = points[2 * j], y = points[2 * j + 1];
    if (kForm == 0) {
      x *= width, y *= height;
    } else if (kForm == 2) {
      x += reference[2 * level] * width, y += reference[2 * level + 1] * height;
    } else {
      const A* box = reference + 4 * level;
      const A half = A(0.5) / kPerLevel;
      x = (box[0] + x * half * box[2]) * width, y = (box[1] + y * half * box[3]) * height;
    }
    const Corners<A, int> c = find_corners(x - A(0.5), y - A(0.5), width, height, start, p.width[level],
                                           1, -1);
    Sample& sample = samples[j];
    for (int k = 0; k < 4; ++k) {
      sample.weight[k] = c.weight[k];
      sample.cell[k] = at.active ? c.cell[k] : -1;
    }
    sample.right = c.right, sample.down = c.down, sample.attention = attention[i];
  }
  __syncwarp();
}

MSDA_INLINE bool has_bundle(int round, int lane) {
  return kBundles % kLanes == 0 || round * kLanes + lane < kBundles;
}
MSDA_INLINE int channel_of(int round, int lane) { return (round * kLanes + lane) * kWide; }

extern "C" __global__ void __launch_bounds__(kThreads) msda_forward(const Arguments p) {
  __shared__ Sample all[kGroups][kSlots];
  const Place at = place_of(p);
  Sample* samples = all[at.group];
  find_samples(p, at, samples);

  const long long row = static_cast<long long>(p.heads) * kChannels;
  const T* value = p.value + at.image * p.tokens * row + at.head * kChannels;
  A sum[kRounds][kWide] = {};
  for (int j = 0; j < kSamples; ++j) {
    const Sample s = samples[j];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (!has_bundle(r, at.lane)) continue;
      Bundle corner[4] = {};  // all four are asked for before the first is used
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (s.cell[k] < 0) continue;
        const T* from = value + s.cell[k] * row + channel_of(r, at.lane);
        corner[k] = *reinterpret_cast<const Bundle*>(from);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const A weight = s.cell[k] < 0 ? A(0) : s.weight[k] * s.attention;
#pragma unroll
        for (int i = 0; i < kWide; ++i) sum[r][i] += weight * widen(corner[k].item[i]);
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
MSDA_INLINE void accumulate(const Arguments& p, long long to, const A (&x)[kWide], A weight) {
  if (kDeterministic) {
    unsigned long long* sums = static_cast<unsigned long long*>(p.grad_value) + to;
    for (int i = 0; i < kWide; ++i) {
      const long long whole = __double2ll_rn(static_cast<double>(x[i] * weight) * p.scale);
      atomicAdd(sums + i, static_cast<unsigned long long>(whole));
    }
    return;
  }
  A* sums = static_cast<A*>(p.grad_value) + to;
  if constexpr (kAddsFour) {
#pragma unroll
    for (int i = 0; i < kWide; i += 4) {
      float four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = static_cast<float>(x[i + j] * weight);
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + i), "f"(four[0]),
                   "f"(four[1]), "f"(four[2]), "f"(four[3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) atomicAdd(sums + i, x[i] * weight);
  }
}

// Gradients of points and weights of the samples of this lane, which `samples` holds in the first
// three weights: of attention, of x and of y in cells.
MSDA_INLINE void store_gradients(const Arguments& p, const Place& at, const Sample* samples) {
  A expected = 0;  // the softmax takes from each its mean
  if (kForm != 0) {
    for (int j = at.lane; j < kSamples; j += kLanes) {
      expected += samples[j].attention * samples[j].weight[0];
    }
    expected = over_lanes(expected, Add());
  }
  if (!at.active) return;
  const A* reference = p.reference + (at.slot / p.heads) * kLevels * kForm;
  for (int j = at.lane; j < kSamples; j += kLanes) {
    const Sample& s = samples[j];
    const int level = j / kPerLevel;
    A of_weight = s.weight[0], of_x = s.attention * s.weight[1], of_y = s.attention * s.weight[2];
    if (kForm != 0) of_weight = s.attention * (of_weight - expected);
    if (kForm != 2 || kToLocations) of_x *= p.width[level], of_y *= p.height[level];
    if (kForm == 4 && !kToLocations) {
      const A half = A(0.5) / kPerLevel;
      of_x *= half * reference[4 * level + 2], of_y *= half * reference[4 * level + 3];
    }
    p.grad_weights[at.slot * kSamples + j] = of_weight;
    p.grad_points[(at.slot * kSamples + j) * 2] = of_x;
    p.grad_points[(at.slot * kSamples + j) * 2 + 1] = of_y;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) msda_backward(const Arguments p) {
  __shared__ Sample all[kGroups][kSlots];
  const Place at = place_of(p);
  Sample* samples = all[at.group];
  find_samples(p, at, samples);

  const long long row = static_cast<long long>(p.heads) * kChannels;
  const long long first = at.image * p.tokens * row + at.head * kChannels;
  A gradient[kRounds][kWide];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (!has_bundle(r, at.lane)) continue;
    const Bundle g = *reinterpret_cast<const Bundle*>(
        p.grad_output + at.slot * kChannels + channel_of(r, at.lane));
#pragma unroll
    for (int i = 0; i < kWide; ++i) gradient[r][i] = widen(g.item[i]);
  }

  for (int j = 0; j < kSamples; ++j) {
    Corners<A, int> c;
    c.right = samples[j].right, c.left = 1 - c.right;
    c.down = samples[j].down, c.up = 1 - c.down;
    const A attention = samples[j].attention;
    A dot[4] = {};  // over the channels of this lane
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      c.weight[k] = samples[j].weight[k];
      const int cell = samples[j].cell[k];
      if (cell < 0) continue;
      const long long token = first + cell * row;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (!has_bundle(r, at.lane)) continue;
        const long long channel = token + channel_of(r, at.lane);
        const Bundle v = *reinterpret_cast<const Bundle*>(p.value + channel);
#pragma unroll
        for (int i = 0; i < kWide; ++i) dot[k] += gradient[r][i] * widen(v.item[i]);
        accumulate(p, channel, gradient[r], attention * c.weight[k]);
      }
    }
    // sums over channels, so that lanes may add up afterwards
    const A of_attention = over_lanes(gradient_of_attention(c, dot), Add());
    const A of_x = over_lanes(gradient_of_x(c, dot), Add());
    const A of_y = over_lanes(gradient_of_y(c, dot), Add());
    if (at.lane == 0) {
      samples[j].weight[0] = of_attention, samples[j].weight[1] = of_x, samples[j].weight[2] = of_y;
    }
  }
  __syncwarp();
  store_gradients(p, at, samples);
}

}  // namespace msda
