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

#ifdef __AVX512BF16__
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

inline Halves halved(Lanes x) {  // as bf16; a NaN stays one
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

template <class T>
inline Lanes round_lanes(Lanes x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return widen(halved(x));
}

// e^x for x <= 88, to 2 units in the last place (Cephes' polynomial); 1e-38 below -87
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  float whole = std::floor(x * 1.44269504f + 0.5f);
  float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  uint32_t word = uint32_t(int32_t(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &word, 4);
  return sum * power;
}

typedef int32_t Numbers __attribute__((vector_size(LANES * 4)));

inline Lanes exponential(Lanes x) {
  constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  Lanes whole = (x * 1.44269504f + ROUNDING) - ROUNDING;
  Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  Numbers power = (__builtin_convertvector(whole, Numbers) + 127) << 23;
  return sum * (Lanes)power;
}

// Marks the first lanes of a vector.
inline Numbers first_of(int64_t count) {
  Numbers lane;
  for (int64_t i = 0; i < LANES; i++) lane[i] = int32_t(i);
  return lane < int32_t(count);
}

// All lanes by halves: a chain of LANES steps would take as long as a row of attention.
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
  float top = -INFINITY;
  for (; i < count; i++) top = std::max(top, widen(x[i]));
  for (const Lanes& each : tops) tops[0] = each > tops[0] ? each : tops[0];
  return std::max(top, largest_lane(tops[0]));
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
    if (added) {
      const T* more = added + row * width;
      float* sum = total + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; i++) sum[i] = x[i] + widen(more[i]);
      x = sum;
    }
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    float scale = 1.0f / std::sqrt(squares / float(width) + eps);
    T* result = out + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) narrow(x[i] * scale * weight[i], result[i]);
  }
}

// --- SwiGLU ---------------------------------------------------------------------------------

// 1 / (1 + e^-x)
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(std::min(-x, 87.0f))); }
inline Lanes sigmoid(Lanes x) {
  return 1.0f / (1.0f + exponential(x < -87.0f ? Lanes{} + 87.0f : -x));
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
