// Vectors of the widest kind that the compiler may use here (GCC's and Clang's vector extension),
// and rows of numbers read and written in the four storage types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define MSDA_INLINE inline __attribute__((always_inline))

namespace msda {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t Index;
  typedef std::int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / 4;
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t Index;
  typedef std::int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / 8;
};
typedef Simd<float>::V FloatV;
typedef Simd<float>::I FloatI;
typedef Simd<double>::V DoubleV;
typedef Simd<double>::I DoubleI;

MSDA_INLINE FloatI to_int(FloatV x) { return __builtin_convertvector(x, FloatI); }
MSDA_INLINE DoubleI to_int(DoubleV x) { return __builtin_convertvector(x, DoubleI); }
MSDA_INLINE FloatV to_float(FloatI x) { return __builtin_convertvector(x, FloatV); }
MSDA_INLINE DoubleV to_float(DoubleI x) { return __builtin_convertvector(x, DoubleV); }

// mask: all bits of a lane set or none, as comparisons give.
template <class Mask, class V>
MSDA_INLINE V select(Mask mask, V yes, V no) {
  return mask ? yes : no;
}

template <class A>
MSDA_INLINE typename Simd<A>::V load(const A* from) {
  return *reinterpret_cast<const typename Simd<A>::Unaligned*>(from);
}
template <class A>
MSDA_INLINE void store(A* to, typename Simd<A>::V v) {
  *reinterpret_cast<typename Simd<A>::Unaligned*>(to) = v;
}

template <class A>
MSDA_INLINE typename Simd<A>::V splat(A x) {
  return x - typename Simd<A>::V{};  // unlike adding zero, this is x itself to the compiler
}

// Half precision lives in memory only; arithmetic on it is in float.
struct bfloat16 { std::uint16_t bits; };
struct float16 { std::uint16_t bits; };
template <class T> struct Arithmetic { typedef T type; };
template <> struct Arithmetic<bfloat16> { typedef float type; };
template <> struct Arithmetic<float16> { typedef float type; };

typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t UnalignedHalves
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));

MSDA_INLINE Bits widened(const void* from) {
  return __builtin_convertvector((Halves)*static_cast<const UnalignedHalves*>(from), Bits);
}
MSDA_INLINE FloatV load(const bfloat16* from) { return (FloatV)(widened(from) << 16); }
MSDA_INLINE FloatV load(const float16* from) {
  const Bits half = widened(from);
  const Bits magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  // moving the exponent's bias from 15 to 127 by a multiplication does subnormal numbers too
  Bits value = (Bits)((FloatV)magnitude * 0x1p112f);
  const auto special = (FloatI)magnitude >= (0x7c00 << 13);
  value = select(special, magnitude | 0x7f800000u, value);  // infinity, NaN
  return (FloatV)(value | sign);
}

MSDA_INLINE void store(bfloat16* to, FloatV v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Bits quiet = (bits >> 16) | 0x40u;
  const Bits result = select(v != v, quiet, rounded);
  *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(result, Halves);
}
MSDA_INLINE void store(float16* to, FloatV v) {
  const Bits bits = (Bits)v, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  // normal: rebias, round to nearest even; subnormal: adding 0.5 lets the addition round
  const Bits odd = (magnitude >> 13) & 1u;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const Bits subnormal = (Bits)((FloatV)magnitude + 0.5f) - 0x3f000000u;
  const Bits infinite = select(v != v, Bits{} + 0x7e00u, Bits{} + 0x7c00u);
  Bits result = select((FloatI)magnitude < (113 << 23), subnormal, normal);
  result = select((FloatI)magnitude >= (143 << 23) - 0x1000, infinite, result);  // 65520 and more
  *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(result | sign, Halves);
}

// The first `count` lanes: the others are zero, or are not written.
template <class T>
MSDA_INLINE auto load_some(const T* from, int count) {
  constexpr int lanes = Simd<typename Arithmetic<T>::type>::lanes;
  if (count >= lanes) return load(from);
  T whole[lanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}
template <class T, class V>
MSDA_INLINE void store_some(T* to, V v, int count) {
  constexpr int lanes = Simd<typename Arithmetic<T>::type>::lanes;
  if (count >= lanes) return store(to, v);
  T whole[lanes];
  store(whole, v);
  std::memcpy(to, whole, count * sizeof(T));
}

// Row of `count` numbers <-> row of arithmetic type padded with zeros to whole vectors.
template <class T, class A>
MSDA_INLINE void widen_row(const T* from, A* to, int count) {
  constexpr int lanes = Simd<A>::lanes;
  for (int i = 0; i < count; i += lanes) store(to + i, load_some(from + i, count - i));
}
// `width` vectors of a row as it lies, or as `pack_row` left it.
template <int width, bool packed, class T, class V>
MSDA_INLINE void load_row(const T* from, V (&row)[width]) {
  constexpr int lanes = sizeof(V) / sizeof(typename Arithmetic<T>::type);
  for (int v = 0; v < width; ++v) row[v] = load(from + v * lanes);
}
// Two bfloat16 vectors in one read: packed, number i shares a word with number i + lanes.
template <int width, bool packed>
MSDA_INLINE void load_row(const bfloat16* from, FloatV (&row)[width]) {
  constexpr int lanes = Simd<float>::lanes;
  if constexpr (packed && width % 2 == 0) {
    for (int v = 0; v < width; v += 2) {
      Bits pair;
      std::memcpy(&pair, from + v * lanes, sizeof(pair));
      row[v] = (FloatV)(pair << 16), row[v + 1] = (FloatV)(pair & 0xffff0000u);
    }
  } else {
    for (int v = 0; v < width; ++v) row[v] = load(from + v * lanes);
  }
}

// A row for `load_row<..., true>`: as it is, padded with zeros.
template <class T>
MSDA_INLINE void pack_row(const T* from, T* to, int count, bool) {
  constexpr int lanes = Simd<typename Arithmetic<T>::type>::lanes;
  for (int i = 0; i < count; i += lanes) {
    T part[lanes] = {};
    if (count - i >= lanes) std::memcpy(part, from + i, sizeof(part));
    else std::memcpy(part, from + i, (count - i) * sizeof(T));
    std::memcpy(to + i, part, sizeof(part));
  }
}
// With `pairs` the row holds an even number of vectors.
MSDA_INLINE void pack_row(const bfloat16* from, bfloat16* to, int count, bool pairs) {
  constexpr int lanes = Simd<float>::lanes;
  pack_row<bfloat16>(from, to, count, pairs);  // the general one
  for (int i = 0; pairs && i < count; i += 2 * lanes) {
    const Bits words = widened(to + i) | widened(to + i + lanes) << 16;
    std::memcpy(to + i, &words, sizeof(words));
  }
}
template <class A, class T>
MSDA_INLINE void narrow_row(const A* from, T* to, int count) {
  constexpr int lanes = Simd<A>::lanes;
  for (int i = 0; i < count; i += lanes) store_some(to + i, load(from + i), count - i);
}

// Lanes of two vectors in any order, counted on from the first into the second.
#if defined(__clang__)
#define MSDA_SHUFFLE(V, I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MSDA_SHUFFLE(V, I, a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// (x, y) pairs <-> a vector of each. `odd` 0 takes the first numbers, 1 the second.
template <class A, int odd, std::size_t... i>
MSDA_INLINE auto every_other(typename Simd<A>::V a, typename Simd<A>::V b,
                             std::index_sequence<i...>) {
  return MSDA_SHUFFLE(typename Simd<A>::V, typename Simd<A>::I, a, b, (2 * i + odd)...);
}
template <class A, int half, std::size_t... i>
MSDA_INLINE auto alternating(typename Simd<A>::V x, typename Simd<A>::V y,
                             std::index_sequence<i...>) {
  constexpr int lanes = Simd<A>::lanes;
  return MSDA_SHUFFLE(typename Simd<A>::V, typename Simd<A>::I, x, y,
                      (i % 2 * lanes + half * lanes / 2 + i / 2)...);
}
template <class A>
MSDA_INLINE void load_pairs(const A* from, int count, typename Simd<A>::V& x,
                            typename Simd<A>::V& y) {
  constexpr int lanes = Simd<A>::lanes;
  const auto order = std::make_index_sequence<lanes>();
  A padded[2 * lanes];
  if (count < lanes) {
    store(padded, typename Simd<A>::V{}), store(padded + lanes, typename Simd<A>::V{});
    std::memcpy(padded, from, 2 * count * sizeof(A));
    from = padded;
  }
  const auto a = load(from), b = load(from + lanes);
  x = every_other<A, 0>(a, b, order), y = every_other<A, 1>(a, b, order);
}
template <class A>
MSDA_INLINE void store_pairs(A* to, int count, typename Simd<A>::V x, typename Simd<A>::V y) {
  constexpr int lanes = Simd<A>::lanes;
  const auto order = std::make_index_sequence<lanes>();
  A padded[2 * lanes];
  A* out = count < lanes ? padded : to;
  store(out, alternating<A, 0>(x, y, order)), store(out + lanes, alternating<A, 1>(x, y, order));
  if (count < lanes) std::memcpy(to, padded, 2 * count * sizeof(A));
}

// Lane `i` of the step of the tree below that leaves `width` lanes to every sum.
template <int lanes>
constexpr int tree_lane(int i, int width, bool second_half) {
  const int group = i / width, groups = lanes / (2 * width);
  const int source = group / groups, place = group % groups;
  return source * lanes + place * 2 * width + i % width + (second_half ? width : 0);
}
template <class A, int width, bool second_half, std::size_t... i>
MSDA_INLINE auto tree_shuffle(typename Simd<A>::V a, typename Simd<A>::V b,
                              std::index_sequence<i...>) {
  return MSDA_SHUFFLE(typename Simd<A>::V, typename Simd<A>::I, a, b,
                      tree_lane<Simd<A>::lanes>(i, width, second_half)...);
}

// Sums of as many vectors as a vector has lanes: lane i of the result is the sum of part[i].
template <class A, int width = Simd<A>::lanes / 2>
MSDA_INLINE typename Simd<A>::V sums(const typename Simd<A>::V* part) {
  typedef typename Simd<A>::V V;
  constexpr int lanes = Simd<A>::lanes;
  V halves[lanes];
  for (int i = 0; i < 2 * width; i += 2) {
    const auto order = std::make_index_sequence<lanes>();
    halves[i / 2] = tree_shuffle<A, width, false>(part[i], part[i + 1], order) +
                    tree_shuffle<A, width, true>(part[i], part[i + 1], order);
  }
  if constexpr (width > 1) {
    return sums<A, width / 2>(halves);
  } else {
    return halves[0];
  }
}

// Every lane gets what `op` makes of all lanes.
template <class A, int step, std::size_t... i>
MSDA_INLINE auto rotated(typename Simd<A>::V v, std::index_sequence<i...>) {
  return MSDA_SHUFFLE(typename Simd<A>::V, typename Simd<A>::I, v, v, (i ^ step)...);
}
template <class A, int step = Simd<A>::lanes / 2, class Op>
MSDA_INLINE typename Simd<A>::V over_lanes(typename Simd<A>::V v, Op op) {
  v = op(v, rotated<A, step>(v, std::make_index_sequence<Simd<A>::lanes>()));
  if constexpr (step > 1) return over_lanes<A, step / 2>(v, op);
  else return v;
}
template <class A>
MSDA_INLINE typename Simd<A>::V sum_of(typename Simd<A>::V v) {
  return over_lanes<A>(v, [](auto a, auto b) { return a + b; });
}
template <class A>
MSDA_INLINE typename Simd<A>::V largest_of(typename Simd<A>::V v) {
  return over_lanes<A>(v, [](auto a, auto b) { return select(a > b, a, b); });
}

// e^x for x <= 0, to about one unit in the last place.
MSDA_INLINE FloatV exp_nonpositive(FloatV x) {
  const FloatV low = FloatV{} - 87.0f;
  const auto vanishes = x < low;
  x = select(vanishes, low, x);
  const FloatI n = to_int(x * 1.44269504f - 0.5f);  // the nearest whole power of two
  const FloatV whole = to_float(n);
  const FloatV r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  FloatV p = FloatV{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return select(vanishes, FloatV{}, p * (FloatV)((n + 127) << 23));
}
MSDA_INLINE DoubleV exp_nonpositive(DoubleV x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace msda
