// The three matrix products of training, in tiles of bf16 with sums in float.
//
// Both sides are packed first: strips of 32 rows or columns, [depth / 32][2][tile], zeros where
// there is nothing, so that tiles lie in one piece and those of a strip behind one another. The
// right side is packed whole; then each thread packs one strip of the left side after another, and
// multiplies it by as many strips of the right side as stay in its second cache.

#include "tiles.h"

#ifdef TILES
#include <omp.h>

namespace {

constexpr int64_t STRIP = 2 * SIDE, DEEP = 32, STEP = STRIP * DEEP;  // STEP: numbers of two tiles
constexpr int64_t SWEEP = 3 << 19;  // bytes of the right side that are read again and again

typedef __m512i Line;  // of a tile: 32 numbers of a row or, as the right side has it, 16 pairs

inline __mmask32 first_of(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// 32 numbers that lie together, rounded; 0 behind the first `count`.
inline Line together(const float* from, int64_t count) {
  const __mmask32 mask = first_of(count);
  return (Line)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16),
                                   _mm512_maskz_loadu_ps(__mmask16(mask), from));
}
inline Line together(const bf16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_of(count), from);
}

// 32 numbers of each of two rows as pairs, 16 to each place.
inline void pair(Line upper, Line lower, bf16* first, bf16* second) {
  const Line some = _mm512_unpacklo_epi16(upper, lower), rest = _mm512_unpackhi_epi16(upper, lower);
  const Line low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const Line high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  _mm512_store_si512(first, _mm512_permutex2var_epi64(some, low, rest));
  _mm512_store_si512(second, _mm512_permutex2var_epi64(some, high, rest));
}

// A tile's rows of pairs to columns of pairs, and back.
inline void turn(bf16* tile) {
  Line lines[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) lines[i] = _mm512_load_si512(tile + i * 32);
#pragma GCC unroll 4
  for (int half = 1; half < 16; half *= 2) {
    alignas(64) int32_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
      low[i] = i & half ? i - half + 16 : i;
      high[i] = i & half ? i + 16 : i + half;
    }
    const Line lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (!(i & half)) {
        const Line one = lines[i], other = lines[i + half];
        lines[i] = _mm512_permutex2var_epi32(one, lows, other);
        lines[i + half] = _mm512_permutex2var_epi32(one, highs, other);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, lines[i]);
}

// Rows of up to three matrices below one another.
template <class F>
struct Rows {
  const F* from[3];
  int64_t ends[2];  // of the first and of the second matrix; what is behind belongs to the third
  int64_t width;

  const F* operator()(int64_t row) const {
    if (row < ends[0]) return from[0] + row * width;
    return row < ends[1] ? from[1] + (row - ends[0]) * width : from[2] + (row - ends[1]) * width;
  }
};

// A side of a product, whose `outer` numbers are its rows or columns: [outer][depth] if ALONG, else
// [depth][outer].
template <bool ALONG, class F>
struct Side {
  Rows<F> rows;
  int64_t outer, depth;

  // A strip; RIGHT: as the right side of a product has it, in pairs.
  template <bool RIGHT>
  void pack(int64_t strip, bf16* to) const {
    const int64_t first = strip * STRIP, wide = outer - first;
    for (int64_t k = 0; k < depth; k += DEEP, to += STEP) {
      bf16* second = to + STEP / 2;
      if constexpr (ALONG) {
        for (int64_t i = 0; i < STRIP; i++)
          _mm512_store_si512(to + i * DEEP,
                             i < wide ? together(rows(first + i) + k, depth - k) : Line{});
      } else {
        auto row = [&](int64_t at) {
          return at < depth ? together(rows(at) + first, wide) : Line{};
        };
        for (int64_t i = 0; i < DEEP; i += 2)
          pair(row(k + i), row(k + i + 1), to + i * SIDE, second + i * SIDE);
      }
      if constexpr (ALONG == RIGHT) turn(to), turn(second);
    }
  }
};

template <bool ALONG, class F>
Side<ALONG, F> one(const F* from, int64_t outer, int64_t depth) {
  const int64_t all = ALONG ? outer : depth;
  return {{{from}, {all, all}, ALONG ? depth : outer}, outer, depth};
}

inline int64_t ceil_of(int64_t count, int64_t of) { return (count + of - 1) / of; }

// One strip times another. The order of loads and products was measured: where products and loads
// wait for one another, as if the core were shared, it takes 0.74 to 0.92 of the time of loads just
// before they are needed, and elsewhere as long. The right side is not to drive the left one from
// the first cache.
inline void multiply(const bf16* left, const bf16* right, int64_t steps, float (*sum)[STRIP]) {
  constexpr int64_t LINE = 64, NEXT = STEP / 2;
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++, left += STEP, right += STEP) {
    _tile_loadd(4, left, LINE);
    _tile_stream_loadd(6, right, LINE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, right + NEXT, LINE);
    _tile_loadd(5, left + NEXT, LINE);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, sum[0], sizeof *sum);
  _tile_stored(1, sum[0] + SIDE, sizeof *sum);
  _tile_stored(2, sum[SIDE], sizeof *sum);
  _tile_stored(3, sum[SIDE] + SIDE, sizeof *sum);
  settle();
}

// What others read soon goes through the caches, gradients of weights past them where they can.
inline void put(Lanes sums, bf16* to, int64_t count, bool) { store_first(sums, to, count); }
inline void put(Lanes sums, float* to, int64_t count, bool past) {
  if (past)
    _mm512_stream_ps(to, (__m512)sums);
  else
    store_first(sums, to, count);
}

template <class Left, class Right, class O>
void product(const Left& left, const Right& right, O* out, bf16* room, int threads) {
  const int64_t steps = ceil_of(left.depth, DEEP), size = steps * STEP;
  const int64_t downs = ceil_of(left.outer, STRIP), strips = ceil_of(right.outer, STRIP);
  // Sweeps over the left side are as long as one another, and there are parts for all threads.
  const int64_t most = std::max<int64_t>(1, SWEEP / (size * sizeof(bf16)));
  const int64_t least = std::min(strips, ceil_of(2 * threads, downs));
  const int64_t sweep = ceil_of(strips, std::max(least, ceil_of(strips, most)));
  const int64_t sweeps = ceil_of(strips, sweep);
  const bool past = right.outer % LANES == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips; s++) right.template pack<true>(s, room + s * size);
    Tiles held;
    held.set(SIDE, SIDE);
    alignas(64) float sum[STRIP][STRIP];
    bf16* packed = room + (strips + omp_get_thread_num()) * size;
#pragma omp for schedule(static) nowait
    for (int64_t part = 0; part < sweeps * downs; part++) {
      const int64_t down = part % downs, first = part / downs * sweep;
      const int64_t row = down * STRIP, rows = std::min(STRIP, left.outer - row);
      left.template pack<false>(down, packed);
      for (int64_t s = first; s < std::min(strips, first + sweep); s++) {
        multiply(packed, room + s * size, steps, sum);
        const int64_t column = s * STRIP, columns = std::min(STRIP, right.outer - column);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < columns; c += LANES)
            put(load(sum[r] + c), out + (row + r) * right.outer + column + c, columns - c, past);
      }
    }
    _mm_sfence();
  }
}

}  // namespace

#define EXPORT(NAME, F)                                                                            \
  void forward_##NAME(const bf16* x, const F* first, const F* second, const F* third, bf16* out,   \
                      bf16* room, int64_t tokens, int64_t inputs, int64_t outputs, int64_t end,    \
                      int64_t next, int threads) {                                                 \
    const Rows<F> weights{{first, second, third}, {end, next}, inputs};                            \
    product(one<true>(x, tokens, inputs), Side<true, F>{weights, outputs, inputs}, out, room,      \
            threads);                                                                              \
  }                                                                                                \
  void to_input_##NAME(const bf16* gradient, const F* first, const F* second, const F* third,      \
                       bf16* out, bf16* room, int64_t tokens, int64_t inputs, int64_t outputs,     \
                       int64_t end, int64_t next, int threads) {                                   \
    const Rows<F> weights{{first, second, third}, {end, next}, inputs};                            \
    product(one<true>(gradient, tokens, outputs), Side<false, F>{weights, inputs, outputs}, out,   \
            room, threads);                                                                        \
  }

extern "C" {
int may_use() { return may_use_tiles(); }
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
void to_weight(const bf16* gradient, const bf16* x, float* out, bf16* room, int64_t tokens,
               int64_t inputs, int64_t outputs, int threads) {
  product(one<false>(gradient, outputs, tokens), one<false>(x, inputs, tokens), out, room, threads);
}
}
#else
extern "C" {
int may_use() { return 0; }
}
#endif
