// Vectors, bf16, exponentials, norm and SwiGLU: what the compiled kernels have in common.
//
// compiled.py builds each source with the C++ compiler it finds and its functions are called by
// address. Threads are OpenMP's; built with gcc, those PyTorch's own operations run on. T is the
// compute type, float or bf16; sums are float, rounded to T where PyTorch's operations round.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKED
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Lanes of a register: wider vectors would be kept in memory.
#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {  // to nearest, ties to even; a NaN stays one
  uint32_t word;
  std::memcpy(&word, &x, 4);
  uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7FC0);
}

template <class T>
inline float round_to(float x) {
  T rounded;
  narrow(x, rounded);
  return widen(rounded);
}

inline Lanes load(const float* from) {
  Lanes result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Lanes widen(Halves halves) {
#ifdef __AVX512BF16__
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
  return (Lanes)(__builtin_convertvector(halves, Words) << 16);
#endif
}
inline Lanes load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return widen(halves);
}

inline Halves halved(Lanes x) {  // as bf16; a NaN stays one, below 1.2e-38 it may be 0
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Words words = (Words)x, rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;
  Words kept = (Words)(x == x);
  return __builtin_convertvector((rounded & kept) | (0x7FC0 & ~kept), Halves);
#endif
}

inline void store(Lanes x, float* to) { std::memcpy(to, &x, sizeof x); }
inline void store(Lanes x, bf16* to) {
  Halves halves = halved(x);
  std::memcpy(static_cast<void*>(to), &halves, sizeof halves);
}

// Loads and stores of `count` numbers, where fewer than LANES are left; `rest` stands for the others.
#ifdef MASKED
inline __mmask16 first_bits(int64_t count) {
  return __mmask16(count < LANES ? (1 << count) - 1 : 0xFFFF);
}
inline Lanes load_first(const float* from, int64_t count, float rest) {
  return (Lanes)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first_bits(count), from);
}
inline Lanes load_first(const bf16* from, int64_t count, float rest) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_bits(count), from);
  return (Lanes)_mm512_mask_mov_ps(_mm512_set1_ps(rest), first_bits(count),
                                   (__m512)widen((Halves)halves));
}
inline void store_first(Lanes x, float* to, int64_t count) {
  _mm512_mask_storeu_ps(to, first_bits(count), (__m512)x);
}
inline void store_first(Lanes x, bf16* to, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_bits(count), (__m256i)halved(x));
}
#else
template <class T>
inline Lanes load_first(const T* from, int64_t count, float rest) {
  if (count >= LANES) return load(from);
  T some[LANES];
  for (T& each : some) narrow(rest, each);
  std::memcpy(static_cast<void*>(some), from, count * sizeof(T));
  return load(some);
}
template <class T>
inline void store_first(Lanes x, T* to, int64_t count) {
  if (count >= LANES) return store(x, to);
  T some[LANES];
  store(x, some);
  std::memcpy(static_cast<void*>(to), some, count * sizeof(T));
}
#endif

template <class T>
inline Lanes round_lanes(Lanes x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return widen(halved(x));
}

// At least, at most; what is no number stays so.
#ifdef __AVX512F__
inline Lanes at_least(Lanes x, float low) {
  return (Lanes)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
}
inline Lanes at_most(Lanes x, float high) {
  return (Lanes)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
}
#else
inline Lanes at_least(Lanes x, float low) { return x < low ? Lanes{} + low : x; }
inline Lanes at_most(Lanes x, float high) { return x > high ? Lanes{} + high : x; }
#endif
inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }

// 2 to the power of what was added to ROUNDING, from -126 to 127.
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction
inline float power_of_2(float shifted) {
  uint32_t word;
  std::memcpy(&word, &shifted, 4);
  word = (word + 127) << 23;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}
inline Lanes power_of_2(Lanes shifted) { return (Lanes)(((Words)shifted + 127) << 23); }

// e^x for x <= 88, 1e-38 below -87: 2^(whole + rest), the latter by Cephes' polynomial. Wrong by a
// unit in the last place near 0, by |x| / 8 elsewhere; four times that without fused products.
template <class V>
inline V exponential(V x) {
  x = at_least(x, -87.0f);
  const V shifted = x * 1.44269504f + ROUNDING, rest = x * 1.44269504f - (shifted - ROUNDING);
  V sum = rest * 1.535336188e-4f + 1.339887440e-3f;
  sum = sum * rest + 9.618437357e-3f;
  sum = sum * rest + 5.550332471e-2f;
  sum = sum * rest + 2.402264791e-1f;
  sum = sum * rest + 6.931472028e-1f;
  return (sum * rest + 1.0f) * power_of_2(shifted);
}

// All lanes by halves: a chain of LANES steps would take as long as a row of attention.
#ifdef __AVX512F__
inline float sum_of_lanes(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest_lane(Lanes x) { return _mm512_reduce_max_ps((__m512)x); }
#else
template <class F>
inline float folded(Lanes x, F both) {
  float each[LANES];
  std::memcpy(each, &x, sizeof x);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) each[i] = both(each[i], each[half + i]);
  return each[0];
}
inline float sum_of_lanes(Lanes x) {
  return folded(x, [](float a, float b) { return a + b; });
}
inline float largest_lane(Lanes x) {
  return folded(x, [](float a, float b) { return a > b ? a : b; });
}
#endif

// The largest number; one that is none counts for nothing, and of none comes -infinity.
template <class T>
inline float largest(const T* x, int64_t count) {
  Lanes tops[4];
  for (Lanes& each : tops) each = Lanes{} - INFINITY;
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      const Lanes some = load(x + i + j * LANES);
      tops[j] = some > tops[j] ? some : tops[j];
    }
  for (; i < count; i += LANES) {
    const Lanes some = load_first(x + i, count - i, -INFINITY);
    tops[0] = some > tops[0] ? some : tops[0];
  }
  for (const Lanes& each : tops) tops[0] = each > tops[0] ? each : tops[0];
  return largest_lane(tops[0]);
}

// --- norm -----------------------------------------------------------------------------------

// RMSNorm of a stream, to which `added` is added first where there is one: `total`, which may be the
// stream itself.
template <class T>
void norm(const float* stream, const T* added, const float* weight, float* total, T* out,
          int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const float* x = stream + row * width;
    Lanes squares = {};
    for (int64_t i = 0; i < width; i += LANES) {
      Lanes some = load_first(x + i, width - i, 0);
      if (added) {
        some += load_first(added + row * width + i, width - i, 0);
        store_first(some, total + row * width + i, width - i);
      }
      squares += some * some;
    }
    if (added) x = total + row * width;
    const float scale = 1.0f / std::sqrt(sum_of_lanes(squares) / float(width) + eps);
    T* result = out + row * width;
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t left = width - i;
      const Lanes some = load_first(x + i, left, 0) * scale * load_first(weight + i, left, 0);
      store_first(some, result + i, left);
    }
  }
}

// --- SwiGLU ---------------------------------------------------------------------------------

// 1 / (1 + e^-x)
template <class V>
inline V sigmoid(V x) {
  return 1.0f / (1.0f + exponential(at_most(-x, 87.0f)));
}

template <class T>
void swiglu(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + row * 2 * width, *ups = gates + width;
    T* result = out + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      const Lanes gate = load(gates + i);
      store(round_lanes<T>(gate * sigmoid(gate)) * load(ups + i), result + i);
    }
    for (; i < width; i++) {
      const float gate = widen(gates[i]);
      narrow(round_to<T>(gate * sigmoid(gate)) * widen(ups[i]), result[i]);
    }
  }
}

}  // namespace
