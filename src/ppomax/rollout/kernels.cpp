// The parts of a block as the engine reads it: products, and in one pass each what lies between.
//
// T is as in compiled.h. A row's numbers depend on no other row.

#include <functional>
#include <memory>
#include <vector>

#include "tiles.h"

#ifdef __AVX512BF16__
#define BF16_PRODUCTS
#endif

namespace {

constexpr int64_t GROUP = 4;  // query heads that read a key together
constexpr int64_t TILE = 32;  // positions read together; kernels.py rounds a cache's length to it

// Asks for memory that will be read soon; beyond what is there nothing happens.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// --- products -------------------------------------------------------------------------------

// ROWS x COLUMNS sums stay in registers while their inputs pass by; PANEL outputs are packed
// together, [panels][inputs / DEPTH][PANEL][DEPTH], so that weights are read in one stream.
#ifdef __AVX512F__
constexpr int64_t ROWS = 8, COLUMNS = 3;
#else
constexpr int64_t ROWS = 6, COLUMNS = 2;
#endif
constexpr int64_t LINES = LANES * COLUMNS * 4 / 64;  // cache lines of one step

template <class T>
constexpr int64_t PANEL = LANES * COLUMNS;
#ifdef TILES
template <>
constexpr int64_t PANEL<bf16> = 32;  // two tiles side by side
#endif

template <class T>
struct Unit;

template <>
struct Unit<float> {
  static constexpr int64_t DEPTH = 1;
  typedef Lanes Weights;
  typedef float Input;
  static Weights read(const float* from) { return load(from); }
  static Input input(const float* from) { return *from; }
  static Lanes add(Lanes sum, Input x, Weights w) { return sum + x * w; }
};

#ifdef BF16_PRODUCTS
template <>
struct Unit<bf16> {
  static constexpr int64_t DEPTH = 2;
  typedef __m512bh Weights;
  typedef __m512bh Input;
  static Weights read(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Input input(const bf16* from) {
    int32_t pair;
    std::memcpy(&pair, from, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Lanes add(Lanes sum, Input x, Weights w) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, x, w);
  }
};
#endif

// Inputs that are read together; those of a matrix are packed as a multiple, the last ones zeros.
template <class T>
constexpr int64_t STEP = Unit<T>::DEPTH;
#ifdef TILES
template <>
constexpr int64_t STEP<bf16> = 32;  // a tile's
#endif

template <class T>
inline int64_t panel_size(int64_t inputs) {
  return (inputs + STEP<T> - 1) / STEP<T> * STEP<T> * PANEL<T>;
}

typedef uint32_t __attribute__((may_alias)) Word;

// `outputs` rows of W to the places that begin with row `first` of what is packed, rounded to T.
template <class T, class F>
void pack(const F* weight, T* packed, int64_t first, int64_t outputs, int64_t inputs, int threads) {
  constexpr int64_t DEPTH = Unit<T>::DEPTH, PART = 64, PANEL = ::PANEL<T>;  // DEPTH: of one word
  const int64_t end = first + outputs;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = first / PANEL; p <= (end - 1) / PANEL; p++) {
    const int64_t low = std::max(first, p * PANEL), high = std::min(end, (p + 1) * PANEL);
    Word* words = reinterpret_cast<Word*>(packed + p * panel_size<T>(inputs));
    Word part[PANEL][PART / DEPTH];
    for (int64_t k = 0; k < inputs; k += PART) {
      const int64_t count = std::min(PART, inputs - k);
      for (int64_t row = low; row < high; row++) {
        const F* from = weight + (row - first) * inputs + k;
        T rounded[PART];
        for (int64_t i = 0; i < count; i++) narrow(widen(from[i]), rounded[i]);
        std::memcpy(part[row - p * PANEL], rounded, count * sizeof(T));
      }
      for (int64_t i = 0; i < count / DEPTH; i++)
        for (int64_t row = low - p * PANEL; row < high - p * PANEL; row++)
          words[(k / DEPTH + i) * PANEL + row] = part[row][i];
    }
  }
}

// R rows times one panel. Meanwhile `lines` cache lines a step of what comes next are fetched.
template <class T, int R>
inline void tile(const T* x, const T* panel, int64_t inputs, const char* ahead, int lines,
                 float (*out)[PANEL<T>]) {
  constexpr int64_t DEPTH = Unit<T>::DEPTH;
  Lanes sum[R][COLUMNS] = {};
  for (int64_t k = 0; k < inputs / DEPTH; k++) {
    typename Unit<T>::Weights weights[COLUMNS];
    for (int c = 0; c < COLUMNS; c++)
      weights[c] = Unit<T>::read(panel + (k * COLUMNS + c) * LANES * DEPTH);
    for (int line = 0; line < lines; line++)
      __builtin_prefetch(ahead + (k * LINES + line) * 64, 0, 2);
    for (int r = 0; r < R; r++) {
      typename Unit<T>::Input input = Unit<T>::input(x + r * inputs + k * DEPTH);
      for (int c = 0; c < COLUMNS; c++) sum[r][c] = Unit<T>::add(sum[r][c], input, weights[c]);
    }
  }
  for (int r = 0; r < R; r++) std::memcpy(out[r], sum[r], sizeof sum[r]);
}

template <class T, int R = ROWS>
inline void tile_of(int64_t rows, const T* x, const T* panel, int64_t inputs, const char* ahead,
                    int lines, float (*out)[PANEL<T>]) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<T, R>(x, panel, inputs, ahead, lines, out);
    else
      tile_of<T, R - 1>(rows, x, panel, inputs, ahead, lines, out);
  }
}

// Rows from block b on times one panel, while the block's share of the panel that comes next is
// fetched. A block alone fetches nothing: it reads a panel as fast as it comes.
template <class T>
inline void block(int64_t b, const T* x, int64_t rows, const T* panel, const T* next,
                  int64_t inputs, float (*sum)[PANEL<T>]) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS, takers = std::min(blocks, LINES);
  const int64_t share = b * LINES / takers, count = std::min(ROWS, rows - b * ROWS);
  const char* ahead = reinterpret_cast<const char*>(next) + share * 64;
  const T* from = x + b * ROWS * inputs;
  switch (blocks == 1 || b >= takers ? 0 : (b + 1) * LINES / takers - share) {
    case 0: tile_of(count, from, panel, inputs, ahead, 0, sum); break;
    case 1: tile_of(count, from, panel, inputs, ahead, 1, sum); break;
    default: tile_of(count, from, panel, inputs, ahead, 2, sum);
  }
}

#ifdef TILES
constexpr int64_t AHEAD = 8192;  // bytes of a panel's stream

// Up to 2 * SIDE rows times one panel; why in this order, says models/products.cpp.
inline void tiles(int64_t rows, const bf16* x, const bf16* panel, int64_t inputs, Tiles& held,
                  float (*out)[PANEL<bf16>]) {
  constexpr int64_t WIDTH = PANEL<bf16>, DEEP = STEP<bf16>;
  const bool both = rows > SIDE;
  held.set(both ? SIDE : rows, both ? rows - SIDE : 0);
  settle();
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  auto add = [&](const bf16* from, int64_t apart, const bf16* weights) {
    fetch(reinterpret_cast<const char*>(weights) + AHEAD, DEEP * WIDTH * sizeof(bf16));
    _tile_loadd(4, from, apart * sizeof(bf16));
    _tile_stream_loadd(6, weights, 2 * WIDTH * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, weights + WIDTH, 2 * WIDTH * sizeof(bf16));
    if (both) _tile_loadd(5, from + SIDE * apart, apart * sizeof(bf16));
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_dpbf16ps(3, 5, 7);
      _tile_dpbf16ps(2, 5, 6);
    }
  };
  const int64_t whole = inputs / DEEP * DEEP, left = inputs - whole;
  for (int64_t k = 0; k < whole; k += DEEP) add(x + k, inputs, panel + k * WIDTH);
  if (left) {
    bf16 last[2 * SIDE][DEEP] = {};
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(last[r], x + r * inputs + whole, left * sizeof(bf16));
    settle();
    add(last[0], DEEP, panel + whole * WIDTH);
  }
  _tile_stored(0, out[0], sizeof *out);
  _tile_stored(1, out[0] + SIDE, sizeof *out);
  if (both) {
    _tile_stored(2, out[SIDE], sizeof *out);
    _tile_stored(3, out[SIDE] + SIDE, sizeof *out);
  }
}
#endif

// x W + b, rounded to T; kept as O, T or float.
template <class T, class O>
void product(const T* x, const T* packed, const T* bias, O* out, int64_t rows, int64_t inputs,
             int64_t outputs, int threads) {
  constexpr int64_t PANEL = ::PANEL<T>;
  const int64_t panels = (outputs + PANEL - 1) / PANEL, size = panel_size<T>(inputs);
#pragma omp parallel num_threads(threads)
  {
    float offset[PANEL];
    auto write = [&](int64_t row, int64_t count, int64_t first, const float (*sum)[PANEL]) {
      const int64_t width = std::min(PANEL, outputs - first);
      for (int64_t r = 0; r < count; r++) {
        O* to = out + (row + r) * outputs + first;
        for (int64_t c = 0; c < width; c += LANES)
          store_first(round_lanes<T>(load(sum[r] + c) + load(offset + c)), to + c, width - c);
      }
    };
    auto begin = [&](int64_t p) {
      for (int64_t c = 0; c < PANEL; c++)
        offset[c] = bias && p * PANEL + c < outputs ? widen(bias[p * PANEL + c]) : 0.0f;
    };
#ifdef TILES
    if constexpr (sizeof(T) == 2) {
      Tiles held;
      float sum[2 * SIDE][PANEL];
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; p++) {
        begin(p);
        for (int64_t row = 0; row < rows; row += 2 * SIDE) {
          const int64_t count = std::min(2 * SIDE, rows - row);
          tiles(count, x + row * inputs, packed + p * size, inputs, held, sum);
          write(row, count, p * PANEL, sum);
        }
      }
    } else
#endif
    {
      float sum[ROWS][PANEL];
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; p++) {
        const T *panel = packed + p * size, *next = p + 1 < panels ? panel + size : panel;
        begin(p);
        for (int64_t row = 0; row < rows; row += ROWS) {
          block(row / ROWS, x, rows, panel, next, inputs, sum);
          write(row, std::min(ROWS, rows - row), p * PANEL, sum);
        }
      }
    }
  }
}

// --- attention ------------------------------------------------------------------------------

struct Shape {
  int64_t rows, heads, kv_heads, dim, length;  // length: of the cache, a multiple of TILE
  int64_t slot = 0;                            // the first row's, where none are given
};

// A head, normalised by itself where there are weights for that, and rotated.
template <class T>
inline void rotate(const T* from, const float* weight, const float* cos, const float* sin,
                   int64_t dim, float eps, float scale, float* out, float* scratch) {
  float own = 1;
  if (weight) {
    float squares = 0;
    for (int64_t i = 0; i < dim; i++) squares += widen(from[i]) * widen(from[i]);
    own = 1.0f / std::sqrt(squares / float(dim) + eps);
  }
  for (int64_t i = 0; i < dim; i++)
    scratch[i] = weight ? widen(from[i]) * own * weight[i] : widen(from[i]);
  const int64_t half = dim / 2;
  const float *low = scratch, *high = scratch + half;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Lanes first = load(low + i), second = load(high + i);
    store(round_lanes<T>((first * load(cos + i) + second * load(sin + i)) * scale), out + i);
    store(round_lanes<T>((second * load(cos + half + i) + first * load(sin + half + i)) * scale),
          out + half + i);
  }
  for (; i < half; i++) {
    out[i] = round_to<T>((low[i] * cos[i] + high[i] * sin[i]) * scale);
    out[half + i] = round_to<T>((high[i] * cos[half + i] + low[i] * sin[half + i]) * scale);
  }
}

// scores[g][t] = sum_d queries[g][d] keys[d][t], for G heads and all positions below `span`,
// rounded up to whole tiles (what lies beyond is never used). The next text's keys are fetched.
template <class T, int G>
inline void score(const float* queries, const T* keys, float* scores, int64_t dim, int64_t length,
                  int64_t span) {
  constexpr int64_t STEP = 2 * LANES;
  static_assert(TILE % STEP == 0);
  for (int64_t t = 0; t < span; t += STEP) {
    Lanes sum[G][2] = {};
    for (int64_t d = 0; d < dim; d++) {
      const T* row = keys + d * length + t;
      fetch(row + dim * length, STEP * sizeof(T));
      Lanes first = load(row), second = load(row + LANES);
      for (int g = 0; g < G; g++) {
        sum[g][0] += queries[g * dim + d] * first;
        sum[g][1] += queries[g * dim + d] * second;
      }
    }
    for (int g = 0; g < G; g++) std::memcpy(scores + g * length + t, sum[g], sizeof sum[g]);
  }
}

// out[g][d] = sum_t shares[g][t] values[t][d] / total[g], for V * LANES values of d; fetches as above.
template <class T, int G, int V>
inline void mix(const float* shares, const float* total, const T* values, T* out, int64_t dim,
                int64_t length, int64_t span) {
  Lanes sum[G][V] = {};
  for (int64_t t = 0; t < span; t++) {
    Lanes value[V];
    fetch(values + (length + t) * dim, V * LANES * sizeof(T));
    for (int v = 0; v < V; v++) value[v] = load(values + t * dim + v * LANES);
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) sum[g][v] += shares[g * length + t] * value[v];
  }
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) store(sum[g][v] / total[g], out + g * dim + v * LANES);
}

// G query heads that share keys, one text.
template <class T, int G>
void heads(const float* queries, const T* keys, const T* values, T* out, float* scores, int64_t dim,
           int64_t length, int64_t span) {
  score<T, G>(queries, keys, scores, dim, length, span);
  float total[G];
  for (int g = 0; g < G; g++) {
    float *row = scores + g * length, top = largest(row, span);
    for (int64_t t = span; t % LANES; t++) row[t] = -INFINITY;
    Lanes sums = {};
    for (int64_t t = 0; t < span; t += LANES) {
      const Lanes some = exponential(load(row + t) - top);
      store(some, row + t);
      sums += some;
    }
    total[g] = sum_of_lanes(sums);
  }
  int64_t d = 0;
  constexpr int V = LANES == 16 ? 4 : 2;  // with G, sums that fit the registers
  for (; d + V * LANES <= dim; d += V * LANES)
    mix<T, G, V>(scores, total, values + d, out + d, dim, length, span);
  for (; d + LANES <= dim; d += LANES)
    mix<T, G, 1>(scores, total, values + d, out + d, dim, length, span);
  for (; d < dim; d++)
    for (int g = 0; g < G; g++) {
      float sum = 0;
      for (int64_t t = 0; t < span; t++) sum += scores[g * length + t] * widen(values[t * dim + d]);
      narrow(sum / total[g], out[g * dim + d]);
    }
}

// Row i is a token at `positions[i]` of the text in `slots[i]`, without slots in `shape.slot + i`.
// With slots, rows may be of one text: all are written to the cache before any is read.
template <class T>
void attend(const T* qkv, const float* qk_norm, const float* cos, const float* sin,
            const int64_t* positions, const int64_t* slots, T* keys, T* values, T* out,
            const Shape& shape, float eps, int threads) {
  const int64_t all = shape.heads, kv_heads = shape.kv_heads, dim = shape.dim;
  const int64_t length = shape.length, items = shape.rows * kv_heads;
  const int64_t shared = all / kv_heads, width = (all + 2 * kv_heads) * dim;
  const float scale = 1.0f / std::sqrt(float(dim));
  auto place = [&](int64_t item) {
    const int64_t slot = slots ? slots[item / kv_heads] : shape.slot + item / kv_heads;
    return (slot * kv_heads + item % kv_heads) * dim * length;
  };
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(GROUP * length + (shared + 2) * dim);
    float *scores = room.data(), *queries = scores + GROUP * length, *key = queries + shared * dim,
          *scratch = key + dim;
    auto write = [&](int64_t item) {
      const int64_t row = item / kv_heads, head = all + item % kv_heads, at = positions[row];
      const T* from = qkv + row * width + head * dim;
      T* own = keys + place(item) + at;
      rotate(from, qk_norm ? qk_norm + head * dim : nullptr, cos + at * dim, sin + at * dim, dim,
             eps, 1.0f, key, scratch);
      for (int64_t d = 0; d < dim; d++) narrow(key[d], own[d * length]);
      std::memcpy(values + place(item) + at * dim, from + kv_heads * dim, dim * sizeof(T));
    };
    if (slots) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; item++) write(item);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; item++) {
      if (!slots) write(item);  // nobody else reads it
      const int64_t row = item / kv_heads, first = item % kv_heads * shared, at = positions[row];
      const T *own_keys = keys + place(item), *own_values = values + place(item);
      for (int64_t g = 0; g < shared; g++)
        rotate(qkv + row * width + (first + g) * dim,
               qk_norm ? qk_norm + (first + g) * dim : nullptr, cos + at * dim, sin + at * dim, dim,
               eps, scale, queries + g * dim, scratch);
      for (int64_t g = 0; g < shared; g += GROUP) {
        T* into = out + (row * all + first + g) * dim;
        const float* from = queries + g * dim;
        const int64_t span = at + 1;
        switch (std::min(GROUP, shared - g)) {
          case 1: heads<T, 1>(from, own_keys, own_values, into, scores, dim, length, span); break;
          case 2: heads<T, 2>(from, own_keys, own_values, into, scores, dim, length, span); break;
          case 3: heads<T, 3>(from, own_keys, own_values, into, scores, dim, length, span); break;
          default: heads<T, 4>(from, own_keys, own_values, into, scores, dim, length, span);
        }
      }
    }
  }
}

// --- all blocks -----------------------------------------------------------------------------

// What a block reads and where it keeps keys and values; kernels.py writes it as a row of addresses.
template <class T>
struct Layer {
  const float* attention_norm;
  const T *qkv, *qkv_bias;
  const float* qk_norm;
  const T *out, *out_bias;
  const float* mlp_norm;
  const T *gate_up, *down;  // no model that is read so has biases here
  T *keys, *values;
};

// Tokens through all blocks, as the functions above would take them one by one.
template <class T>
void pass(const Layer<T>* layers, int64_t count, float* stream, const float* cos, const float* sin,
          const int64_t* positions, const int64_t* slots, const Shape& shape, int64_t hidden,
          int64_t inner, float eps, int threads) {
  const int64_t rows = shape.rows, mixing = shape.heads * shape.dim;
  const int64_t width = mixing + 2 * shape.kv_heads * shape.dim;
  std::unique_ptr<T[]> normed(new T[rows * hidden]), qkv(new T[rows * width]),
      read_heads(new T[rows * mixing]), added(new T[rows * hidden]), gate_up(new T[rows * 2 * inner]),
      active(new T[rows * inner]);
  auto add_and_norm = [&](const T* more, const float* weight) {
    norm(stream, more, weight, stream, normed.get(), rows, hidden, eps, threads);
  };
  for (int64_t l = 0; l < count; l++) {
    const Layer<T>& own = layers[l];
    add_and_norm(l ? added.get() : nullptr, own.attention_norm);
    product(normed.get(), own.qkv, own.qkv_bias, qkv.get(), rows, hidden, width, threads);
    attend(qkv.get(), own.qk_norm, cos, sin, positions, slots, own.keys, own.values,
           read_heads.get(), shape, eps, threads);
    product(read_heads.get(), own.out, own.out_bias, added.get(), rows, mixing, hidden, threads);
    add_and_norm(added.get(), own.mlp_norm);
    product<T>(normed.get(), own.gate_up, nullptr, gate_up.get(), rows, hidden, 2 * inner, threads);
    swiglu(gate_up.get(), active.get(), rows, inner, threads);
    product<T>(active.get(), own.down, nullptr, added.get(), rows, inner, hidden, threads);
  }
  if (count)
    for (int64_t i = 0; i < rows * hidden; i++) stream[i] += widen(added[i]);
}

constexpr int64_t SMALL = 4 << 20;  // bytes of weights that each thread reads for itself

// The same. Of a small model each thread takes rows of its own through all blocks: waiting for one
// another after each part takes a third of a step (docs/LOG.md). Of a large one, and where rows are
// few, it takes its share of the weights, which are then read once.
template <class T>
void read(const Layer<T>* layers, int64_t count, float* stream, const float* cos, const float* sin,
          const int64_t* positions, const int64_t* slots, const Shape& shape, int64_t hidden,
          int64_t inner, float eps, int threads) {
  const int64_t outputs = 2 * (shape.heads + shape.kv_heads) * shape.dim + 3 * inner;
  const bool small = count * hidden * outputs * int64_t(sizeof(T)) <= SMALL;
  if (slots || !small || shape.rows < ROWS * threads)  // with slots rows read one another
    return pass(layers, count, stream, cos, sin, positions, slots, shape, hidden, inner, eps,
                threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t first = shape.rows * thread / threads, end = shape.rows * (thread + 1) / threads;
    Shape own = shape;
    own.rows = end - first, own.slot = first;
    pass(layers, count, stream + first * hidden, cos, sin, positions + first, nullptr, own, hidden,
         inner, eps, 1);
  }
}

// --- the most likely tokens -----------------------------------------------------------------

// A float's bits as a number in its order; NaNs are above or below all, by their sign.
inline int32_t rank_of(float x) {
  int32_t word;
  std::memcpy(&word, &x, 4);
  return word ^ (word < 0 ? 0x7FFFFFFF : 0);
}

// A row of logits, and what is found in it.
struct Row {
  const float* x;
  int64_t vocab;
  float top;
  double sum;  // of exp(x - top); one of floats would lose a long tail beside the largest
};

// The sum of exp(x - top).
inline double weigh(const float* x, int64_t vocab, float top) {
  constexpr int64_t PART = 128;
  double sum = 0;
  for (int64_t first = 0; first < vocab; first += PART) {
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < std::min(first + PART, vocab); i++) part += exponential(x[i] - top);
    sum += part;
  }
  return sum;
}

inline Row read_row(const float* x, int64_t vocab) {
  const float top = largest(x, vocab);
  return {x, vocab, top, weigh(x, vocab, top)};
}

inline float normaliser_of(const Row& row) { return float(row.top + std::log(row.sum)); }

// The `count` largest logits, of equals the first, in no order: a rank above the id's complement.
// The vocabulary is cut into runs, entry i of run j at i * runs + j: no logit below the count-th
// largest of the runs' maxima can be among them.
struct Search {
  static constexpr int64_t RUN = 16;
  std::vector<int32_t> best;
  std::vector<uint64_t> found;

  static int64_t id(uint64_t key) { return uint32_t(~key); }

  void operator()(const float* x, int64_t vocab, int64_t count) {
    const int64_t runs = vocab / RUN;
    const int32_t least = runs < count ? INT32_MIN : bound(x, runs, count);
    found.clear();
    for (int64_t first = 0; first < vocab; first += RUN) {
      const int64_t end = std::min(first + RUN, vocab);
      int some = 0;
#pragma omp simd reduction(| : some)
      for (int64_t i = first; i < end; i++) some |= rank_of(x[i]) >= least;
      if (some)
        for (int64_t i = first; i < end; i++)
          if (rank_of(x[i]) >= least)
            found.push_back(uint64_t(uint32_t(rank_of(x[i])) ^ 0x80000000u) << 32 | uint32_t(~i));
    }
    if (count < int64_t(found.size()))
      std::nth_element(found.begin(), found.begin() + count, found.end(), std::greater<uint64_t>());
    found.resize(count);
  }

  // A rank that at least `count` of the runs' maxima reach, and not many more.
  int32_t bound(const float* x, int64_t runs, int64_t count) {
    best.resize(runs);
    int32_t* top = best.data();
    for (int64_t j = 0; j < runs; j++) top[j] = rank_of(x[j]);
    for (int64_t i = 1; i < RUN; i++)
      for (int64_t j = 0; j < runs; j++) top[j] = std::max(top[j], rank_of(x[i * runs + j]));
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      int64_t reach = 0;
#pragma omp simd reduction(+ : reach)
      for (int64_t j = 0; j < runs; j++) reach += top[j] >= int32_t(middle);
      if (reach < count)
        high = middle - 1;
      else
        low = middle;
      if (reach >= count && reach <= count + count / 8) break;
    }
    return int32_t(low);
  }
};

// The `count` largest logits of each row, largest first, and the log of the sum of exponentials.
void find_most_likely(const float* logits, float* values, int64_t* ids, float* normaliser,
                      int64_t rows, int64_t vocab, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Search search;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const float* x = logits + row * vocab;
      normaliser[row] = normaliser_of(read_row(x, vocab));
      search(x, vocab, count);
      std::sort(search.found.begin(), search.found.end(), std::greater<uint64_t>());
      for (int64_t i = 0; i < count; i++) {
        ids[row * count + i] = Search::id(search.found[i]);
        values[row * count + i] = x[ids[row * count + i]];
      }
    }
  }
}

// --- a draw ---------------------------------------------------------------------------------

// The finaliser of SplitMix64, as in sampling.py.
inline uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Noise of the tokens of one reply and step.
struct Noise {
  uint64_t state;

  Noise(int64_t seed, int64_t step, int64_t stream)
      : state(mixed(uint64_t(seed) + 0x9E3779B97F4A7C15u * uint64_t(step * 2 + stream + 1))) {}

  double uniform(int64_t id) const {
    const uint64_t bits = mixed(state ^ mixed(uint64_t(id) * 0xD1342543DE82EF95u + 1));
    return (double(bits >> 11) + 0.5) * 0x1p-53;
  }
};

inline double gumbel(double uniform) { return -std::log(-std::log(uniform)); }

// The largest x + Gumbel noise so far. It needs a logarithm only of those that may be the largest:
// -log(u) is at least 1 - u, and x + noise above the best means -log(u) < exp(x - best).
struct Race {
  static constexpr int64_t SPAN = 64;
  const Row& row;
  double best = -INFINITY, limit = INFINITY;
  int64_t winner = 0;

  void enter(int64_t id, const Noise& noise) {
    const double uniform = noise.uniform(id);
    if (1 - uniform > limit * exponential(row.x[id] - row.top)) return;
    const double noisy = row.x[id] + gumbel(uniform);
    if (!(noisy > best)) return;
    best = noisy, winner = id;
    limit = std::exp(row.top - best) * 1.0001;  // above what the exponential rounds
  }

  void enter_all(const Noise& noise) {
    for (int64_t first = 0; first < row.vocab; first += SPAN) {
      const int64_t end = std::min(first + SPAN, row.vocab);
      int some = 0;
#pragma omp simd reduction(| : some)
      for (int64_t id = first; id < end; id++)
        some |= !(1 - noise.uniform(id) > limit * exponential(row.x[id] - row.top));
      if (some)
        for (int64_t id = first; id < end; id++) enter(id, noise);
    }
  }
};

// A token of softmax(x): the `count` most likely one by one, the tail as one variable of its mass, from
// which is drawn where that is the largest; as in sampling.py.
inline int64_t draw_with_tail(const Row& row, int64_t count, int64_t seed, int64_t step,
                              Search& search, std::vector<float>& tail) {
  search(row.x, row.vocab, count);
  Race race{row};
  race.winner = Search::id(search.found[0]);
  const Noise noise(seed, step, 0);
  double inside = 0;
  for (uint64_t key : search.found) {
    race.enter(Search::id(key), noise);
    inside += exponential(row.x[Search::id(key)] - row.top);
  }
  const double of_tail = row.top + gumbel(noise.uniform(-1));
  const double rounding = 5e-5 * row.sum;  // above that of both sums
  if (!(of_tail + std::log(row.sum - inside + rounding) > race.best)) return race.winner;
  tail.assign(row.x, row.x + row.vocab);
  for (uint64_t key : search.found) tail[Search::id(key)] = -INFINITY;
  if (!(of_tail + std::log(weigh(tail.data(), row.vocab, row.top)) > race.best))
    return race.winner;
  const Row rest{tail.data(), row.vocab, row.top, 0};
  Race further{rest};
  further.winner = race.winner;
  further.enter_all(Noise(seed, step, 1));
  return further.winner;
}

// One of softmax(logits / temperature) for each row; all tokens one by one where `count` is all.
void draw(const float* logits, const int64_t* seeds, const int64_t* steps, int64_t* tokens,
          float* logprobs, int64_t rows, int64_t vocab, int64_t count, float temperature,
          int threads) {
#pragma omp parallel num_threads(threads)
  {
    Search search;
    std::vector<float> scaled(temperature == 1.0f ? 0 : vocab), tail;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < rows; each++) {
      const float* x = logits + each * vocab;
      if (temperature != 1.0f) {
        for (int64_t i = 0; i < vocab; i++) scaled[i] = x[i] / temperature;
        x = scaled.data();
      }
      const Row row = read_row(x, vocab);
      if (count < vocab)
        tokens[each] = draw_with_tail(row, count, seeds[each], steps[each], search, tail);
      else {
        Race race{row};
        race.enter_all(Noise(seeds[each], steps[each], 0));
        tokens[each] = race.winner;
      }
      logprobs[each] = x[tokens[each]] - normaliser_of(row);
    }
  }
}

// Outputs that are packed together, 0 where products cannot be computed.
template <class T>
int64_t panel() {
#ifdef TILES
  if (sizeof(T) == 2 && !may_use_tiles()) return 0;
#endif
  return PANEL<T>;
}

}  // namespace

#define EXPORT(NAME, T)                                                                            \
  void norm_##NAME(float* stream, const T* added, const float* weight, T* out, int64_t rows,       \
                   int64_t width, float eps, int threads) {                                        \
    norm(stream, added, weight, stream, out, rows, width, eps, threads);                           \
  }                                                                                                \
  void swiglu_##NAME(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {         \
    swiglu(gate_up, out, rows, width, threads);                                                    \
  }                                                                                                \
  void attend_##NAME(const T* qkv, const float* qk_norm, const float* cos, const float* sin,       \
                     const int64_t* positions, const int64_t* slots, T* keys, T* values, T* out,   \
                     int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t length,   \
                     float eps, int threads) {                                                     \
    attend(qkv, qk_norm, cos, sin, positions, slots, keys, values, out,                            \
           Shape{rows, heads, kv_heads, dim, length}, eps, threads);                               \
  }

#define EXPORT_PRODUCT(NAME, T)                                                                    \
  int64_t panel_##NAME() { return panel<T>(); }                                                    \
  int64_t step_##NAME() { return STEP<T>; }                                                        \
  void pack_##NAME(const float* weight, T* packed, int64_t first, int64_t outputs, int64_t inputs, \
                   int threads) {                                                                  \
    pack(weight, packed, first, outputs, inputs, threads);                                         \
  }                                                                                                \
  void pack_rounded_##NAME(const T* weight, T* packed, int64_t first, int64_t outputs,             \
                           int64_t inputs, int threads) {                                          \
    pack(weight, packed, first, outputs, inputs, threads);                                         \
  }                                                                                                \
  void product_##NAME(const T* x, const T* packed, const T* bias, T* out, int64_t rows,            \
                      int64_t inputs, int64_t outputs, int threads) {                              \
    product(x, packed, bias, out, rows, inputs, outputs, threads);                                 \
  }                                                                                                \
  void read_##NAME(const void* layers, float* stream, const float* cos, const float* sin,          \
                   const int64_t* positions, const int64_t* slots, int64_t count, int64_t rows,    \
                   int64_t heads, int64_t kv_heads, int64_t dim, int64_t length, int64_t hidden,   \
                   int64_t inner, float eps, int threads) {                                        \
    read(static_cast<const Layer<T>*>(layers), count, stream, cos, sin, positions, slots,          \
         Shape{rows, heads, kv_heads, dim, length}, hidden, inner, eps, threads);                  \
  }                                                                                                \
  void logits_##NAME(const T* x, const T* packed, const T* bias, float* out, int64_t rows,         \
                     int64_t inputs, int64_t outputs, int threads) {                               \
    product(x, packed, bias, out, rows, inputs, outputs, threads);                                 \
  }

extern "C" {
void most_likely(const float* logits, float* values, int64_t* ids, float* normaliser, int64_t rows,
                 int64_t vocab, int64_t count, int threads) {
  find_most_likely(logits, values, ids, normaliser, rows, vocab, count, threads);
}
void draw_plain(const float* logits, const int64_t* seeds, const int64_t* steps, int64_t* tokens,
                float* logprobs, int64_t rows, int64_t vocab, int64_t count, float temperature,
                int threads) {
  draw(logits, seeds, steps, tokens, logprobs, rows, vocab, count, temperature, threads);
}
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
EXPORT_PRODUCT(float32, float)
#ifdef BF16_PRODUCTS
EXPORT_PRODUCT(bfloat16, bf16)
#endif
}
