// Vectors of float and double as wide as the instruction set that this file is compiled for.
// Include it only from kernel_table.inl: FASTRES_ISA names the namespace.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
// Its unmasked AVX-512 intrinsics trip GCC's -Wmaybe-uninitialized; the maskz ones do not.
#include <immintrin.h>
#endif

#include "kernel_table.h"

namespace fastres::cpu::FASTRES_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

inline constexpr int kFloatLanes = kVecBytes / 4;
inline constexpr int kDoubleLanes = kVecBytes / 8;

typedef float Floats __attribute__((vector_size(kVecBytes)));
typedef double Doubles __attribute__((vector_size(kVecBytes)));
typedef int32_t Ints __attribute__((vector_size(kVecBytes)));
typedef uint32_t Uints __attribute__((vector_size(kVecBytes)));
typedef int64_t Longs __attribute__((vector_size(kVecBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVecBytes / 2)));

// For a storage type T: the type it is computed in, that type's vector and its lanes.
template <typename T>
struct Compute {
  using scalar = float;
  using vec = Floats;
  static constexpr int lanes = kFloatLanes;
};
template <>
struct Compute<double> {
  using scalar = double;
  using vec = Doubles;
  static constexpr int lanes = kDoubleLanes;
};

#define FASTRES_INLINE inline __attribute__((always_inline))
#define FASTRES_LAMBDA_INLINE __attribute__((always_inline))

template <typename T>
FASTRES_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FASTRES_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

template <typename To, typename From>
FASTRES_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

FASTRES_INLINE Floats splat(float x) { return x - Floats{}; }
FASTRES_INLINE Doubles splat(double x) { return x - Doubles{}; }

// a where mask is set, else b.
FASTRES_INLINE Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
FASTRES_INLINE Doubles select(Longs mask, Doubles a, Doubles b) { return mask ? a : b; }

// max(x, 0) with NaN and -0.0 kept: x86's max returns its second operand for both.
FASTRES_INLINE Floats relu(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_setzero_ps(), x);
#else
  return select(x < 0.0f, Floats{}, x);
#endif
}
FASTRES_INLINE Doubles relu(Doubles x) { return select(x < 0.0, Doubles{}, x); }

FASTRES_INLINE Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

FASTRES_INLINE Doubles load(const double* p) {
  Doubles v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

FASTRES_INLINE Floats load(const bfloat16* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_cast<Floats>(__builtin_convertvector(h, Uints) << 16);
}

FASTRES_INLINE Floats load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof(h));
  const Uints bits = __builtin_convertvector(h, Uints);
  const Uints magnitude = bits & 0x7fff;
  // Rebias the exponent by a multiplication, which is exact for subnormal numbers as well.
  const Uints finite = bit_cast<Uints>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);
  const Uints special = bit_cast<Uints>(magnitude >= 0x7c00) & 0x7f800000;
  return bit_cast<Floats>(((bits & 0x8000) << 16) | finite | special);
#endif
}

FASTRES_INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof(v)); }

FASTRES_INLINE void store(double* p, Doubles v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even, as torch does; every NaN becomes 0x7fc0.
FASTRES_INLINE void store(bfloat16* p, Floats v) {
  const Uints bits = bit_cast<Uints>(v);
  const Uints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Uints quiet_nan = Uints{} + 0x7fc0;
  const Halves h = __builtin_convertvector(v != v ? quiet_nan : rounded, Halves);
  __builtin_memcpy(p, &h, sizeof(h));
}

// Rounds to nearest even.
FASTRES_INLINE void store(float16* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Uints bits = bit_cast<Uints>(v);
  const Uints sign = (bits >> 16) & 0x8000;
  const Uints magnitude = bits & 0x7fffffff;
  const Uints normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 aligns a subnormal result's last bit with the float's last bit and rounds there.
  const Uints subnormal =
      bit_cast<Uints>(bit_cast<Floats>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const Uints infinity = Uints{} + 0x7c00;
  const Uints quiet_nan = Uints{} + 0x7e00;
  Uints result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? infinity : result;
  result = magnitude > 0x7f800000 ? quiet_nan : result;
  const Halves h = __builtin_convertvector(result | sign, Halves);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}

// With `stream`, floats go past the caches, which saves reading the lines they replace: `p` must
// then be aligned, and a line's other vectors should follow at once.
template <typename T, typename V>
FASTRES_INLINE void store(T* p, V v, [[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (stream) {
#if defined(__AVX512F__)
      _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
      _mm256_stream_ps(p, v);
#else
      _mm_stream_ps(p, v);
#endif
      return;
    }
  }
#endif
  store(p, v);
}

// Where a line's other vectors do not follow at once, only vectors that are lines are streamed.
inline constexpr bool kVecIsLine = kVecBytes == 64;

// Ends a kernel: what it streamed comes before what its thread writes from now on.
FASTRES_INLINE void end_stream([[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

FASTRES_INLINE bool all_zero(Floats x) {
  alignas(64) float lanes[kFloatLanes];
  store(lanes, x);
  bool zero = true;
  for (int i = 0; i < kFloatLanes; ++i) zero &= lanes[i] == 0.0f;
  return zero;
}

// The first n < lanes elements; the other lanes are 0.
template <typename T>
FASTRES_INLINE typename Compute<T>::vec load_partial(const T* p, int n) {
  T buffer[Compute<T>::lanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

#if defined(__AVX512F__)
FASTRES_INLINE Floats load_partial(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
#endif

// Only the first n < lanes elements.
template <typename T>
FASTRES_INLINE void store_partial(T* p, typename Compute<T>::vec v, int n) {
  T buffer[Compute<T>::lanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

}  // namespace fastres::cpu::FASTRES_ISA
