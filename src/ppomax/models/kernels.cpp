// What lies between the matrix products of a block in training, forward and backward, one pass each.
//
// T is as in compiled.h. Sums over tokens are taken by thread, so they depend on how many there are.

#include <omp.h>

#include <vector>

#include "compiled.h"

namespace {

// --- norm and SwiGLU, backward --------------------------------------------------------------

// out = around + d norm(x) / d x of the gradient, and its rounding; `to_weight` is summed over rows.
template <class T>
void norm_backward(const float* x, const float* weight, const T* gradient, const float* around,
                   float* out, T* rounded, float* to_weight, int64_t rows, int64_t width, float eps,
                   int threads) {
  std::vector<float> sums(threads * width);
#pragma omp parallel num_threads(threads)
  {
    float* own = sums.data() + omp_get_thread_num() * width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const float *from = x + row * width, *past = around + row * width;
      const T* given = gradient + row * width;
      Lanes squares = {}, alongs = {};
      for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        const Lanes some = load_first(from + i, left, 0);
        squares += some * some;
        alongs += some * load_first(weight + i, left, 0) * load_first(given + i, left, 0);
      }
      const float scale = 1.0f / std::sqrt(sum_of_lanes(squares) / float(width) + eps);
      const float back = scale * scale * scale * sum_of_lanes(alongs) / float(width);
      for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        const Lanes some = load_first(from + i, left, 0), slope = load_first(given + i, left, 0);
        const Lanes result = load_first(past + i, left, 0) - some * back +
                             slope * load_first(weight + i, left, 0) * scale;
        store_first(load_first(own + i, left, 0) + slope * some * scale, own + i, left);
        store_first(result, out + row * width + i, left);
        if (rounded) store_first(result, rounded + row * width + i, left);
      }
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    float sum = 0;
    for (int thread = 0; thread < threads; thread++) sum += sums[thread * width + i];
    to_weight[i] = sum;
  }
}

// The gradient of gate and up, side by side, and the product that forward made of them.
template <class T>
void swiglu_backward(const T* gate_up, const T* gradient, T* to_gate_up, T* product, int64_t rows,
                     int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + row * 2 * width, *ups = gates + width;
    const T* given = gradient + row * width;
    T *to_gate = to_gate_up + row * 2 * width, *to_up = to_gate + width;
    T* made = product + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      const Lanes gate = load(gates + i), up = load(ups + i), slope = load(given + i);
      const Lanes open = sigmoid(gate), active = round_lanes<T>(gate * open);
      store(active * up, made + i);
      store(slope * active, to_up + i);
      store(slope * up * open * (1.0f + gate * (1.0f - open)), to_gate + i);
    }
    for (; i < width; i++) {
      const float gate = widen(gates[i]), up = widen(ups[i]), slope = widen(given[i]);
      const float open = sigmoid(gate), active = round_to<T>(gate * open);
      narrow(active * up, made[i]);
      narrow(slope * active, to_up[i]);
      narrow(slope * up * open * (1.0f + gate * (1.0f - open)), to_gate[i]);
    }
  }
}

// --- attention ------------------------------------------------------------------------------

// Texts as heads are mixed, [batch, heads, length, dim], and the rows of what is the same for several
// of them: row r stands first at places[r] = text * length + position, and in counts[r] texts, one
// after the other; of a text lengths[text] positions are rows. Without places each place is a row.
struct Heads {
  int64_t batch, length, heads, kv_heads, dim;
  int64_t rows, turns;  // and how many of the rows' cosines and sines there are: one text's or all
  const int64_t *places, *counts, *lengths;

  int64_t place(int64_t row) const { return places ? places[row] : row; }
  int64_t count(int64_t row) const { return counts ? counts[row] : 1; }
  int64_t of(int64_t part) const { return part ? kv_heads : heads; }
};

// Calls `each(row's head among the projections, part of a head, where it stands first, texts that
// have it, from one to the next, cosines, sines)`.
template <class F>
void each_head(const Heads& shape, const float* cos, const float* sin, int threads, F each) {
  const int64_t all = shape.heads + 2 * shape.kv_heads, dim = shape.dim, length = shape.length;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t place = shape.place(row), text = place / length, at = place % length;
    const int64_t count = shape.count(row), turn = row % shape.turns * dim;
    for (int64_t part = 0, head = 0; part < 3; part++)
      for (int64_t own = 0; own < shape.of(part); own++, head++)
        each((row * all + head) * dim, part, ((text * shape.of(part) + own) * length + at) * dim,
             count, shape.of(part) * length * dim, cos + turn, sin + turn);
  }
}

// Zeros where a text has ended: what is masked must be finite.
template <class T>
void clear_ends(T* x, int64_t heads, const Heads& shape, int threads) {
  if (!shape.lengths) return;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t head = 0; head < shape.batch * heads; head++) {
    const int64_t past = shape.lengths[head / heads], left = shape.length - past;
    std::memset(static_cast<void*>(x + (head * shape.length + past) * shape.dim), 0,
                left * shape.dim * sizeof(T));
  }
}

// Norms of each query and each key head by itself, weights [dim] or none.
struct HeadNorms {
  const float *q, *k;
  float eps;

  const float* of(int64_t part) const { return part == 0 ? q : part == 1 ? k : nullptr; }
  template <class T>
  float scale(const T* x, int64_t dim) const {
    Lanes squares = {};
    for (int64_t i = 0; i < dim; i += LANES) {
      const Lanes some = load_first(x + i, dim - i, 0);
      squares += some * some;
    }
    return 1.0f / std::sqrt(sum_of_lanes(squares) / float(dim) + eps);
  }
};

// Queries, keys and values side by side to one tensor each, queries and keys normed where they have
// norms, and rotated.
template <class T>
void split_heads(const T* qkv, const float* cos, const float* sin, const HeadNorms& norms, T* q,
                 T* k, T* v, const Heads& shape, int threads) {
  const int64_t dim = shape.dim, half = dim / 2;
  each_head(shape, cos, sin, threads,
            [&](int64_t place, int64_t part, int64_t apart, int64_t count, int64_t next,
                const float* c, const float* s) {
    const T* from = qkv + place;
    T* to = (part == 0 ? q : part == 1 ? k : v) + apart;
    if (part == 2)
      std::memcpy(to, from, dim * sizeof(T));
    else {
      const float* weight = norms.of(part);
      const float scale = weight ? norms.scale(from, dim) : 1.0f;
      for (int64_t i = 0, left = half; left > 0; i += LANES, left -= LANES) {
        Lanes low = load_first(from + i, left, 0), high = load_first(from + half + i, left, 0);
        if (weight) {
          low *= scale * load_first(weight + i, left, 0);
          high *= scale * load_first(weight + half + i, left, 0);
        }
        const Lanes cl = load_first(c + i, left, 0), ch = load_first(c + half + i, left, 0);
        const Lanes sl = load_first(s + i, left, 0), sh = load_first(s + half + i, left, 0);
        store_first(low * cl - high * sl, to + i, left);
        store_first(high * ch + low * sh, to + half + i, left);
      }
    }
    for (int64_t text = 1; text < count; text++)
      std::memcpy(to + text * next, to, dim * sizeof(T));
  });
  clear_ends(q, shape.heads, shape, threads);
  clear_ends(k, shape.kv_heads, shape, threads);
  clear_ends(v, shape.kv_heads, shape, threads);
}

// The way back, of gradients, to what was `read`; those of the norms' weights, [2, dim], are summed
// over heads and tokens. Of keys and values they are summed over the texts that have them; of a
// query only the first text's is read, as forward does.
template <class T>
void join_heads(const T* q, const T* k, const T* v, const T* read, const float* cos,
                const float* sin, const HeadNorms& norms, T* qkv, float* to_weights,
                const Heads& shape, int threads) {
  const int64_t dim = shape.dim, half = dim / 2;
  std::vector<float> sums(norms.q ? threads * 2 * dim : 0), slopes(threads * dim),
      totals(threads * dim);
  each_head(shape, cos, sin, threads,
            [&](int64_t place, int64_t part, int64_t apart, int64_t count, int64_t next,
                const float* c, const float* s) {
    const T* given = (part == 0 ? q : part == 1 ? k : v) + apart;
    T* to = qkv + place;
    const int64_t thread = omp_get_thread_num();
    auto rotate_back = [&](const auto* from, auto* out) {
      for (int64_t i = 0, left = half; left > 0; i += LANES, left -= LANES) {
        const Lanes low = load_first(from + i, left, 0), high = load_first(from + half + i, left, 0);
        const Lanes cl = load_first(c + i, left, 0), ch = load_first(c + half + i, left, 0);
        const Lanes sl = load_first(s + i, left, 0), sh = load_first(s + half + i, left, 0);
        store_first(low * cl + high * sh, out + i, left);
        store_first(high * ch - low * sl, out + half + i, left);
      }
    };
    auto back = [&](const auto* from) {
      const float* weight = norms.of(part);
      if (part == 2) {
        for (int64_t i = 0, left = dim; left > 0; i += LANES, left -= LANES)
          store_first(load_first(from + i, left, 0), to + i, left);
        return;
      }
      if (!weight) {
        rotate_back(from, to);
        return;
      }
      float *slope = slopes.data() + thread * dim, *own = sums.data() + (thread * 2 + part) * dim;
      rotate_back(from, slope);
      const T* x = read + place;
      const float scale = norms.scale(x, dim);
      Lanes alongs = {};
      for (int64_t i = 0, left = dim; left > 0; i += LANES, left -= LANES)
        alongs += load_first(x + i, left, 0) * load_first(weight + i, left, 0) *
                  load_first(slope + i, left, 0);
      const float along = scale * scale * scale * sum_of_lanes(alongs) / float(dim);
      for (int64_t i = 0, left = dim; left > 0; i += LANES, left -= LANES) {
        const Lanes some = load_first(x + i, left, 0), each = load_first(slope + i, left, 0);
        store_first(load_first(own + i, left, 0) + each * some * scale, own + i, left);
        store_first(each * load_first(weight + i, left, 0) * scale - some * along, to + i, left);
      }
    };
    if (count == 1 || part == 0) {
      back(given);
      return;
    }
    float* total = totals.data() + thread * dim;
    for (int64_t i = 0, left = dim; left > 0; i += LANES, left -= LANES) {
      Lanes sum = {};
      for (int64_t text = 0; text < count; text++)
        sum += load_first(given + text * next + i, left, 0);
      store_first(sum, total + i, left);
    }
    back(static_cast<const float*>(total));
  });
  if (norms.q)
    for (int64_t i = 0; i < 2 * dim; i++) {
      to_weights[i] = 0;
      for (int thread = 0; thread < threads; thread++) to_weights[i] += sums[thread * 2 * dim + i];
    }
}

// Heads of the rows' first places side by side, [rows, heads * dim].
template <class T>
void gather_heads(const T* heads, T* out, const Heads& shape, int threads) {
  const int64_t length = shape.length, dim = shape.dim;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t text = shape.place(row) / length, at = shape.place(row) % length;
    for (int64_t head = 0; head < shape.heads; head++)
      std::memcpy(out + (row * shape.heads + head) * dim,
                  heads + ((text * shape.heads + head) * length + at) * dim, dim * sizeof(T));
  }
}

// The way back; zeros at every other place.
template <class T>
void scatter_heads(const T* rows, T* heads, const Heads& shape, int threads) {
  const int64_t length = shape.length, dim = shape.dim;
  if (shape.places) {
    const int64_t size = shape.heads * length * dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t text = 0; text < shape.batch; text++)
      std::memset(static_cast<void*>(heads + text * size), 0, size * sizeof(T));
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t text = shape.place(row) / length, at = shape.place(row) % length;
    for (int64_t head = 0; head < shape.heads; head++)
      std::memcpy(heads + ((text * shape.heads + head) * length + at) * dim,
                  rows + (row * shape.heads + head) * dim, dim * sizeof(T));
  }
}

constexpr int64_t TILE = 8;  // rows of scores that take turns: one alone would wait for itself

// Scores to shares in place, [rows * heads * length, length], a query's row after the other; it sees
// itself and what stands before it.
template <class T>
void softmax(T* scores, int64_t rows, int64_t length, int threads) {
  const int64_t wide = (length + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(TILE * wide);
    float tops[TILE], sums[TILE];
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += TILE) {
      const int64_t count = std::min(TILE, rows - first);
      auto each = [&](auto step) {
        for (int64_t j = 0; j < count; j++) {
          const int64_t row = first + j;
          step(j, room.data() + j * wide, scores + row * length, row % length + 1);
        }
      };
      each([&](int64_t j, float* x, const T* own, int64_t span) {
        Lanes top = Lanes{} - INFINITY;
        for (int64_t i = 0; i < span; i += LANES) {
          const Lanes some = load_first(own + i, span - i, -INFINITY);
          store(some, x + i);
          top = some > top ? some : top;
        }
        tops[j] = largest_lane(top);
      });
      each([&](int64_t j, float* x, const T*, int64_t span) {
        Lanes sum = {};
        for (int64_t i = 0; i < span; i += LANES) {
          const Lanes some = exponential(load(x + i) - tops[j]);
          store(some, x + i);
          sum += some;
        }
        sums[j] = sum_of_lanes(sum);
      });
      each([&](int64_t j, const float* x, T* own, int64_t span) {
        const float inverse = 1.0f / sums[j];
        for (int64_t i = 0; i < span; i += LANES)
          store_first(load_first(x + i, span - i, 0) * inverse, own + i, span - i);
        std::memset(static_cast<void*>(own + span), 0, (length - span) * sizeof(T));
      });
    }
  }
}

// The gradient of shares to that of unscaled scores, in place.
template <class T>
void softmax_backward(const T* shares, T* gradient, int64_t rows, int64_t length, float scale,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const T* share = shares + row * length;
    T* own = gradient + row * length;
    const int64_t span = row % length + 1;
    Lanes sums = {};
    for (int64_t i = 0; i < span; i += LANES)
      sums += load_first(share + i, span - i, 0) * load_first(own + i, span - i, 0);
    const float along = sum_of_lanes(sums);
    for (int64_t i = 0; i < span; i += LANES) {
      const Lanes slope = load_first(own + i, span - i, 0) - along;
      store_first(load_first(share + i, span - i, 0) * slope * scale, own + i, span - i);
    }
    std::memset(static_cast<void*>(own + span), 0, (length - span) * sizeof(T));
  }
}

// --- log-probs ------------------------------------------------------------------------------

constexpr int64_t PART = 128;  // of a vocabulary: summed in float, their sums in double

template <class F>
inline double sum_of(int64_t count, F term) {
  double sum = 0;
  for (int64_t first = 0; first < count; first += PART) {
    float part = 0;
    const int64_t end = std::min(first + PART, count);
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < end; i++) part += term(i);
    sum += part;
  }
  return sum;
}

// What is known of a token's distribution after a part of the vocabulary.
struct Sums {
  double top;       // the largest logit
  double total;     // of e^((x - top) / temperature)
  double plain;     // of e^(x - top); at temperature 1 not taken
  double weighted;  // of e^((x - top) / temperature) (x - top) / temperature
  double target;    // the target's logit
};

// Adds the logits of `width` tokens from `first` on to what is known of each row.
template <class T>
void logprobs(const T* logits, const int64_t* targets, Sums* sums, int64_t rows, int64_t width,
              int64_t first, int64_t entropy, float temperature, int threads) {
  const float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const T* x = logits + row * width;
    Sums& own = sums[row];
    const double higher = std::max(own.top, double(largest(x, width)));
    if (higher > own.top && own.total > 0) {  // what was summed stands lower by so much
      const double step = higher - own.top, scaled = step * inverse;
      own.weighted = std::exp(-scaled) * (own.weighted - own.total * scaled);
      own.total *= std::exp(-scaled);
      own.plain *= std::exp(-step);
    }
    own.top = higher;
    const float top = float(higher);
    own.total += sum_of(width, [&](int64_t i) {
      return exponential((widen(x[i]) - top) * inverse);
    });
    if (temperature != 1.0f)
      own.plain += sum_of(width, [&](int64_t i) { return exponential(widen(x[i]) - top); });
    if (entropy)
      own.weighted += sum_of(width, [&](int64_t i) {
        const float below = (widen(x[i]) - top) * inverse;
        return exponential(below) * below;
      });
    const int64_t target = targets[row] - first;
    if (target >= 0 && target < width) own.target = widen(x[target]);
  }
}

// Logits of `width` tokens from `first` on to their gradient, in place. d logprob / d logits =
// onehot - p, of the entropy -p (log p + H), both over the temperature.
template <class T>
void logprobs_backward(T* logits, const int64_t* targets, const float* normaliser,
                       const float* entropy, const float* to_logprob, const float* to_entropy,
                       int64_t rows, int64_t width, int64_t first, float temperature,
                       int threads) {
  const float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    T* x = logits + row * width;
    const float level = normaliser[row], slope = to_logprob[row] * inverse;
    const int64_t target = targets[row] - first;
    const bool here = target >= 0 && target < width;
    const float at_target = here ? widen(x[target]) * inverse - level : 0.0f;
    auto gradient = [=](float own) {  // of a token with this log-prob, which is not the target
      const float more = to_entropy ? (own + entropy[row]) * to_entropy[row] * inverse : 0.0f;
      return -exponential(own) * (slope + more);
    };
    if (to_entropy)
#pragma omp simd
      for (int64_t i = 0; i < width; i++) narrow(gradient(widen(x[i]) * inverse - level), x[i]);
    else
#pragma omp simd
      for (int64_t i = 0; i < width; i++)
        narrow(-exponential(widen(x[i]) * inverse - level) * slope, x[i]);
    if (here) narrow(gradient(at_target) + slope, x[target]);
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                            \
  void norm_##NAME(const float* stream, const T* added, const float* weight, float* total, T* out, \
                   int64_t rows, int64_t width, float eps, int threads) {                          \
    norm(stream, added, weight, total, out, rows, width, eps, threads);                            \
  }                                                                                                \
  void norm_backward_##NAME(const float* x, const float* weight, const T* gradient,                \
                            const float* around, float* out, T* rounded, float* to_weight,         \
                            int64_t rows, int64_t width, float eps, int threads) {                 \
    norm_backward(x, weight, gradient, around, out, rounded, to_weight, rows, width, eps,          \
                  threads);                                                                        \
  }                                                                                                \
  void swiglu_##NAME(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {         \
    swiglu(gate_up, out, rows, width, threads);                                                    \
  }                                                                                                \
  void swiglu_backward_##NAME(const T* gate_up, const T* gradient, T* to_gate_up, T* product,      \
                              int64_t rows, int64_t width, int threads) {                          \
    swiglu_backward(gate_up, gradient, to_gate_up, product, rows, width, threads);                 \
  }                                                                                                \
  void split_heads_##NAME(const T* qkv, const float* cos, const float* sin, const float* q_norm,   \
                          const float* k_norm, T* q, T* k, T* v, const int64_t* places,            \
                          const int64_t* counts, const int64_t* lengths, int64_t batch,            \
                          int64_t length, int64_t heads, int64_t kv_heads, int64_t dim,            \
                          int64_t rows, int64_t turns, float eps, int threads) {                   \
    const Heads shape{batch, length, heads, kv_heads, dim, rows, turns, places, counts, lengths};  \
    split_heads(qkv, cos, sin, HeadNorms{q_norm, k_norm, eps}, q, k, v, shape, threads);           \
  }                                                                                                \
  void join_heads_##NAME(const T* q, const T* k, const T* v, const T* read, const float* cos,      \
                         const float* sin, const float* q_norm, const float* k_norm, T* qkv,       \
                         float* to_weights, const int64_t* places, const int64_t* counts,          \
                         const int64_t* lengths, int64_t batch, int64_t length, int64_t heads,     \
                         int64_t kv_heads, int64_t dim, int64_t rows, int64_t turns, float eps,    \
                         int threads) {                                                            \
    const Heads shape{batch, length, heads, kv_heads, dim, rows, turns, places, counts, lengths};  \
    join_heads(q, k, v, read, cos, sin, HeadNorms{q_norm, k_norm, eps}, qkv, to_weights, shape,    \
               threads);                                                                           \
  }                                                                                                \
  void gather_heads_##NAME(const T* given, T* out, const int64_t* places, int64_t batch,           \
                           int64_t length, int64_t heads, int64_t dim, int64_t rows,               \
                           int threads) {                                                          \
    gather_heads(given, out, Heads{batch, length, heads, 0, dim, rows, 0, places}, threads);       \
  }                                                                                                \
  void scatter_heads_##NAME(const T* given, T* out, const int64_t* places, int64_t batch,          \
                            int64_t length, int64_t heads, int64_t dim, int64_t rows,              \
                            int threads) {                                                         \
    scatter_heads(given, out, Heads{batch, length, heads, 0, dim, rows, 0, places}, threads);      \
  }                                                                                                \
  void softmax_##NAME(T* scores, int64_t rows, int64_t length, int threads) {                      \
    softmax(scores, rows, length, threads);                                                        \
  }                                                                                                \
  void softmax_backward_##NAME(const T* shares, T* gradient, int64_t rows, int64_t length,         \
                               float scale, int threads) {                                         \
    softmax_backward(shares, gradient, rows, length, scale, threads);                              \
  }                                                                                                \
  void logprobs_##NAME(const T* logits, const int64_t* targets, Sums* sums, int64_t rows,          \
                       int64_t width, int64_t first, int64_t entropy, float temperature,           \
                       int threads) {                                                              \
    logprobs(logits, targets, sums, rows, width, first, entropy, temperature, threads);            \
  }                                                                                                \
  void logprobs_backward_##NAME(T* logits, const int64_t* targets, const float* normaliser,        \
                                const float* entropy, const float* to_logprob,                     \
                                const float* to_entropy, int64_t rows, int64_t width,              \
                                int64_t first, float temperature, int threads) {                   \
    logprobs_backward(logits, targets, normaliser, entropy, to_logprob, to_entropy, rows, width,   \
                      first, temperature, threads);                                                \
  }

extern "C" {
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
}
