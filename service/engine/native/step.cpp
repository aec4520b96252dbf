// The decode step on a CPU: one token for each of B rows, drawn, some steps at a time. C interface, no dependencies.
//
// Weights lie as bfloat16, as in the checkpoint; products and sums are float32. A row's every sum runs in one order that
// depends on nothing but the model and the row itself, so its bits do not depend on its company or on the number of
// threads. All threads walk through the same phases; in each they share columns (of a product) or rows.
//
// Letters as in model/: B rows, L layers, C channels, H query heads, G key/value heads, D head size, R ring length,
// E experts, K experts per token, F expert size, V vocabulary.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16; // the numbers in one vector; so many columns of a matrix are a panel
#else
constexpr int LANES = 8;
#endif
constexpr int MOST_ROWS = 8; // that are multiplied at a time
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
using Lanes = std::make_integer_sequence<int, LANES>;

inline Vec load(const float *from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float *to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec pick(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }

template <int... FROM> inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FROM...);
#else
  return __builtin_shuffle(a, b, Ints{FROM...});
#endif
}

// Both vectors hold groups of SIZE lanes; each is halved onto itself, and the groups of a and b take turns.
template <int SIZE, int... LANE> inline Vec fold(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
  constexpr int HALF = SIZE / 2;
  return shuffle<(LANE / SIZE * SIZE + LANE % HALF + (LANE % SIZE < HALF ? 0 : LANES))...>(a, b) +
         shuffle<(LANE / SIZE * SIZE + LANE % HALF + (LANE % SIZE < HALF ? 0 : LANES) + HALF)...>(a, b);
}

// sums[i] = the sum of the lanes of x[i], for as many vectors as a vector has lanes.
template <int SIZE = LANES> inline Vec sums(const Vec *x) {
  if constexpr (SIZE == 1) {
    return x[0];
  } else {
    Vec half[SIZE / 2];
    for (int i = 0; i < SIZE / 2; i++) half[i] = fold<SIZE>(x[i], x[i + SIZE / 2], Lanes());
    return sums<SIZE / 2>(half);
  }
}

template <int WIDTH = LANES / 2, int... LANE> inline float sum(Vec x, std::integer_sequence<int, LANE...>) {
  x = x + shuffle<(LANE ^ WIDTH)...>(x, x);
  if constexpr (WIDTH == 1) return x[0];
  else return sum<WIDTH / 2>(x, Lanes());
}
inline float sum(Vec x) { return sum<>(x, Lanes()); }

// e^x within 2 units in the last place: Cephes' expf, a polynomial of degree 5 around a multiple of ln 2. NaN stays NaN.
inline Vec exp(Vec x) {
  x = pick(x < all(-87.3f), all(-87.3f), x);
  x = pick(x > all(88.3f), all(88.3f), x);
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Vec e = p * (r * r) + r + 1.0f;
  Ints power = ((Ints)shifted - 0x4B400000 + 127) << 23;
  return e * (Vec)power;
}

// Columns of a matrix (O, I) in panels of 16: for every pair of inputs 16 words, each with both inputs' bfloat16.
struct Panels {
  int inputs = 0, count = 0;
  std::vector<uint32_t> words;

  // rows(o) is where output o's inputs are, or null for one of padding
  template <typename Rows> void pack(int num_inputs, int num_outputs, Rows rows) {
    inputs = num_inputs, count = (num_outputs + LANES - 1) / LANES;
    words.assign((size_t)count * inputs / 2 * LANES, 0);
    for (int o = 0; o < count * LANES; o++) {
      const float *from = o < num_outputs ? rows(o) : nullptr;
      if (!from) continue;
      uint32_t *to = &words[(size_t)(o / LANES) * inputs / 2 * LANES + o % LANES];
      for (int i = 0; i < inputs; i += 2) {
        uint32_t low, high;
        std::memcpy(&low, from + i, 4), std::memcpy(&high, from + i + 1, 4);
        to[i / 2 * LANES] = low >> 16 | (high & 0xFFFF0000u);
      }
    }
  }
  const uint32_t *panel(int index) const { return &words[(size_t)index * inputs / 2 * LANES]; }
};

// ROWS rows times COUNT neighbouring panels. Every sum starts at zero and takes its inputs in order.
template <int ROWS, int COUNT>
inline void tile(const Panels &matrix, int first, const float *const *x, float *const *y) {
  const int pairs = matrix.inputs / 2;
  const uint32_t *words = matrix.panel(first);
  Vec sums[ROWS][COUNT] = {};
  for (int pair = 0; pair < pairs; pair++) {
    for (int p = 0; p < COUNT; p++) {
      Bits both;
      std::memcpy(&both, words + ((size_t)p * pairs + pair) * LANES, sizeof both);
      const Vec low = (Vec)(both << 16), high = (Vec)(both & 0xFFFF0000u);
      for (int r = 0; r < ROWS; r++) {
        sums[r][p] = low * x[r][2 * pair] + sums[r][p];
        sums[r][p] = high * x[r][2 * pair + 1] + sums[r][p];
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < COUNT; p++) store(y[r] + (first + p) * LANES, sums[r][p]);
}

template <int ROWS, int WIDEST>
inline void strip(const Panels &matrix, int begin, int end, const float *const *x, float *const *y) {
  for (; end - begin >= WIDEST; begin += WIDEST) tile<ROWS, WIDEST>(matrix, begin, x, y);
  if constexpr (WIDEST > 1) strip<ROWS, WIDEST / 2>(matrix, begin, end, x, y);
}

// y[r][o] = sum over i of matrix[o][i] * x[r][i], for the outputs of the panels from begin to end. What a row gets does
// not depend on how many rows there are: only the number of sums that are kept in registers does.
void multiply(const Panels &matrix, int begin, int end, const float *const *x, float *const *y, int rows) {
  for (int done = 0; done < rows; done += MOST_ROWS, x += MOST_ROWS, y += MOST_ROWS) {
    const int some = std::min(MOST_ROWS, rows - done);
    // Panels that several blocks of rows need stay in the cache when they are gone through panel by panel.
    switch (some) {
    case 1: strip<1, 8>(matrix, begin, end, x, y); break;
    case 2: strip<2, 4>(matrix, begin, end, x, y); break;
    case 3: strip<3, 4>(matrix, begin, end, x, y); break;
    case 4: strip<4, 4>(matrix, begin, end, x, y); break;
    case 5: strip<5, 2>(matrix, begin, end, x, y); break;
    case 6: strip<6, 2>(matrix, begin, end, x, y); break;
    case 7: strip<7, 2>(matrix, begin, end, x, y); break;
    default: strip<8, 2>(matrix, begin, end, x, y); break;
    }
  }
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// All meet; who waits spins for some microseconds and then sleeps, because the cores may be needed by others.
class Meeting {
public:
  explicit Meeting(int size) : size_(size) {}
  void wait() {
    if (size_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    until_changed(round_, round);
  }
  static void until_changed(std::atomic<uint32_t> &value, uint32_t from) {
    for (int spin = 0; spin < 2000; spin++) {
      if (value.load(std::memory_order_acquire) != from) return;
      pause();
    }
    while (value.load(std::memory_order_acquire) == from) value.wait(from, std::memory_order_acquire);
  }

private:
  const uint32_t size_;
  std::atomic<uint32_t> arrived_{0}, round_{0};
};

} // namespace

extern "C" {

// The sizes of a model, its cache and its counters; as in model/config.py.
struct Shape {
  int32_t vocab, channels, layers, heads, kv_heads, head_dim, experts, chosen, expert_size, ring, slots;
  int32_t activation; // 0 swiglu, 1 relu, 2 gelu
  int32_t gates_over_all;
  float eps;
  double rope_theta;
};

// Row-major float32 arrays in the layout of model/transformer.py; those of layers lie one after the other.
struct Weights {
  const float *embedding, *norm, *head;
  const float *const *attention_norm, *const *query, *const *key, *const *value, *const *out, *const *query_norm,
      *const *key_norm, *const *moe_norm, *const *router, *const *gate_up, *const *down;
};

// What lasts from step to step: keys and values (L, S, G, R, D); how many tokens each expert had in decode steps, and its
// gate weight in units of 2^-24, of slot 0, with the distance from slot to slot.
struct Memory {
  float *keys, *values;
  int64_t *tokens, *gate_weight;
  int64_t tokens_stride, gate_weight_stride;
};

// Some steps of B rows. ids, slots, positions (B,) say what is fed first; disabled (B, L, E) or null. The outputs are
// those of every step: token_ids and finite (steps, B), expert_ids and expert_weights (steps, B, L, K), logits (steps, B,
// V) or null.
struct Steps {
  int32_t rows, steps;
  const int64_t *ids, *slots, *positions;
  const uint8_t *disabled;
  const double *temperature, *top_p, *min_p;
  const int64_t *top_k, *seed;
  int64_t *token_ids;
  uint8_t *finite;
  int64_t *expert_ids;
  float *expert_weights;
  float *logits;
};
}

namespace {

struct Layer {
  std::vector<float> attention_norm, query_norm, key_norm, moe_norm;
  Panels qkv, out, router;
  std::vector<Panels> gate_up, down;
};

// What one thread needs for itself.
struct Scratch {
  std::vector<float> normed, inner, outer, scores;
  std::vector<const float *> x;
  std::vector<float *> y;
  std::vector<int> of_expert;             // choices (row * K + k), sorted by expert
  std::vector<int> ends;                  // of each expert's part of them
  std::vector<std::pair<double, int>> ranked;
  std::vector<double> mass;
};

class Model {
public:
  Model(const Shape &shape, const Weights &weights, const Memory &memory, int threads)
      : s(shape), memory(memory), threads(threads), meeting(threads), scratch(threads) {
    qkv_size = (s.heads + 2 * s.kv_heads) * s.head_dim;
    embedding.assign(weights.embedding, weights.embedding + (size_t)s.vocab * s.channels);
    norm.assign(weights.norm, weights.norm + s.channels);
    head.pack(s.channels, s.vocab, [&](int o) { return weights.head + (size_t)o * s.channels; });
    layers.resize(s.layers);
    for (int l = 0; l < s.layers; l++) pack(layers[l], weights, l);
    for (int i = 0; i < s.head_dim / 2; i++) frequencies.push_back(std::pow(s.rope_theta, -2.0 * i / s.head_dim));
    for (int t = 1; t < threads; t++) team.emplace_back([this, t] { work(t); });
  }

  ~Model() {
    job = nullptr;
    call();
    for (auto &thread : team) thread.join();
  }

  void run(const Steps &steps) {
    fit(steps.rows);
    job = &steps;
    call();
    walk(0);
  }

private:
  const Shape s;
  const Memory memory;
  const int threads;
  int qkv_size;
  std::vector<float> embedding, norm;
  Panels head;
  std::vector<Layer> layers;
  std::vector<double> frequencies;

  Meeting meeting;
  std::atomic<uint32_t> calls{0};
  const Steps *job = nullptr;
  std::vector<std::thread> team;
  std::vector<Scratch> scratch;
  // Shared by all threads: of each row the residual stream, queries with keys and values, what was attended, the inner
  // values of its experts, the router's and the head's logits.
  std::vector<float> x, qkv, attended, hidden, activated, router_logits, logits;
  std::vector<float> cosines, sines;
  std::vector<int64_t> ids, positions;

  void pack(Layer &layer, const Weights &w, int l) {
    const int c = s.channels, q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim, f = s.expert_size;
    const auto copy = [](const float *from, int count) { return std::vector<float>(from, from + count); };
    layer.attention_norm = copy(w.attention_norm[l], c), layer.moe_norm = copy(w.moe_norm[l], c);
    layer.query_norm = copy(w.query_norm[l], s.head_dim), layer.key_norm = copy(w.key_norm[l], s.head_dim);
    layer.qkv.pack(c, q + 2 * kv, [&](int o) {
      const float *from = o < q ? w.query[l] : o < q + kv ? w.key[l] : w.value[l];
      return from + (size_t)(o < q ? o : o < q + kv ? o - q : o - q - kv) * c;
    });
    layer.out.pack(q, c, [&](int o) { return w.out[l] + (size_t)o * q; });
    layer.router.pack(c, s.experts, [&](int o) { return w.router[l] + (size_t)o * c; });
    layer.gate_up.resize(s.experts), layer.down.resize(s.experts);
    const int matrices = s.activation == 0 ? 2 : 1;
    for (int e = 0; e < s.experts; e++) {
      // A panel of gates and the panel of ups that they multiply lie side by side.
      const float *inner = w.gate_up[l] + (size_t)e * matrices * f * c, *outer = w.down[l] + (size_t)e * c * f;
      layer.gate_up[e].pack(c, matrices * f, [&](int o) {
        const int panel = o / LANES, which = panel % matrices, column = panel / matrices * LANES + o % LANES;
        return inner + ((size_t)which * f + column) * c;
      });
      layer.down[e].pack(f, c, [&](int o) { return outer + (size_t)o * f; });
    }
  }

  void fit(int rows) {
    const size_t choices = (size_t)rows * s.chosen, inner = (size_t)s.expert_size * (s.activation == 0 ? 2 : 1);
    const auto grow = [](auto &vector, size_t size) { if (vector.size() < size) vector.resize(size); };
    grow(x, (size_t)rows * s.channels), grow(qkv, (size_t)rows * qkv_size);
    grow(attended, (size_t)rows * s.heads * s.head_dim), grow(hidden, choices * inner), grow(activated, choices * s.expert_size);
    grow(router_logits, (size_t)rows * padded(s.experts)), grow(logits, (size_t)rows * padded(s.vocab));
    grow(cosines, (size_t)rows * s.head_dim), grow(sines, (size_t)rows * s.head_dim);
    grow(ids, rows), grow(positions, rows);
    for (auto &own : scratch) {
      grow(own.normed, (size_t)rows * s.channels), grow(own.outer, choices * s.channels);
      grow(own.scores, (size_t)padded(s.ring) * (s.heads / s.kv_heads));
      grow(own.x, choices), grow(own.y, choices), grow(own.of_expert, choices), grow(own.ends, s.experts + 1);
    }
  }

  static int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

  void call() {
    calls.fetch_add(1, std::memory_order_release);
    calls.notify_all();
  }

  void work(int t) {
    for (uint32_t seen = 0;; seen++) {
      Meeting::until_changed(calls, seen);
      if (!job) return;
      walk(t);
    }
  }

  int begin(int count, int t) const { return count * t / threads; }
  int end(int count, int t) const { return count * (t + 1) / threads; }

  void walk(int t) {
    const Steps &now = *job;
    for (int step = 0; step < now.steps; step++) {
      for (int r = begin(now.rows, t); r < end(now.rows, t); r++) enter(now, step, r);
      meeting.wait();
      for (int l = 0; l < s.layers; l++) {
        attention(t, l);
        mixture(t, step, l);
      }
      predict(t, step);
    }
    meeting.wait(); // until then nobody may touch what the last step left
  }

  void enter(const Steps &now, int step, int r) {
    ids[r] = step ? now.token_ids[(size_t)(step - 1) * now.rows + r] : now.ids[r];
    positions[r] = now.positions[r] + step;
    std::memcpy(&x[(size_t)r * s.channels], &embedding[(size_t)ids[r] * s.channels], s.channels * sizeof(float));
    for (int i = 0; i < s.head_dim / 2; i++) {
      const double angle = (double)positions[r] * frequencies[i];
      cosines[r * s.head_dim / 2 + i] = (float)std::cos(angle), sines[r * s.head_dim / 2 + i] = (float)std::sin(angle);
    }
  }

  // RMSNorm (Zhang and Sennrich 2019) of size values.
  void normalise(const float *from, const std::vector<float> &weight, float *to, int size) const {
    Vec squares = {};
    for (int i = 0; i < size; i += LANES) squares = load(from + i) * load(from + i) + squares;
    const float reciprocal = 1.0f / std::sqrt(sum(squares) / size + s.eps);
    for (int i = 0; i < size; i += LANES) store(to + i, load(from + i) * reciprocal * load(&weight[i]));
  }

  // Every thread norms all rows for itself: that is quicker than to meet once more.
  void normalise_all(Scratch &own, const std::vector<float> &weight) const {
    for (int r = 0; r < job->rows; r++) {
      float *to = &own.normed[(size_t)r * s.channels];
      normalise(&x[(size_t)r * s.channels], weight, to, s.channels);
      own.x[r] = to;
    }
  }

  void attention(int t, int l) {
    Scratch &own = scratch[t];
    const Layer &layer = layers[l];
    const int rows = job->rows, width = s.heads * s.head_dim;
    normalise_all(own, layer.attention_norm);
    for (int r = 0; r < rows; r++) own.y[r] = &qkv[(size_t)r * qkv_size];
    multiply(layer.qkv, begin(layer.qkv.count, t), end(layer.qkv.count, t), own.x.data(), own.y.data(), rows);
    meeting.wait();
    for (int item = begin(rows * s.kv_heads, t); item < end(rows * s.kv_heads, t); item++)
      attend(own, layer, l, item / s.kv_heads, item % s.kv_heads);
    meeting.wait();
    for (int r = 0; r < rows; r++) own.x[r] = &attended[(size_t)r * width], own.y[r] = &own.outer[(size_t)r * s.channels];
    const int first = begin(layer.out.count, t), last = end(layer.out.count, t);
    multiply(layer.out, first, last, own.x.data(), own.y.data(), rows);
    for (int r = 0; r < rows; r++)
      for (int i = first * LANES; i < last * LANES; i += LANES) add(&x[(size_t)r * s.channels + i], load(own.y[r] + i));
    meeting.wait();
  }

  static void add(float *to, Vec what) { store(to, load(to) + what); }

  // Halves of a head are rotated against each other (Su et al. 2021, in GPT-NeoX's layout).
  void rotate(float *head, int r) const {
    const int half = s.head_dim / 2;
    const float *cosine = &cosines[r * half], *sine = &sines[r * half];
    for (int i = 0; i < half; i += LANES) {
      const Vec a = load(head + i), b = load(head + half + i), c = load(cosine + i), d = load(sine + i);
      store(head + i, a * c - b * d), store(head + half + i, b * c + a * d);
    }
  }

  // One key/value head of one row: norms, rotation, a place in the ring, and the query heads that share it.
  void attend(Scratch &own, const Layer &layer, int l, int r, int g) {
    const int d = s.head_dim, sharers = s.heads / s.kv_heads;
    float *row = &qkv[(size_t)r * qkv_size], *key = row + (s.heads + g) * d, *value = key + s.kv_heads * d;
    const size_t ring = (((size_t)l * s.slots + job->slots[r]) * s.kv_heads + g) * s.ring * d;
    const int64_t position = positions[r];
    normalise(key, layer.key_norm, key, d), rotate(key, r);
    float *const keys = memory.keys + ring, *const values = memory.values + ring;
    std::memcpy(keys + position % s.ring * d, key, d * sizeof(float));
    std::memcpy(values + position % s.ring * d, value, d * sizeof(float));
    const int held = (int)std::min<int64_t>(position + 1, s.ring);
    for (int h = 0; h < sharers; h++) {
      float *query = row + (g * sharers + h) * d;
      normalise(query, layer.query_norm, query, d), rotate(query, r);
      look(own, query, keys, values, held, &attended[((size_t)r * s.heads + g * sharers + h) * d]);
    }
  }

  void look(Scratch &own, const float *query, const float *key, const float *value, int held, float *to) const {
    const int d = s.head_dim, most = padded(held);
    float *scores = own.scores.data();
    const float scale = 1.0f / std::sqrt((float)d), never = -std::numeric_limits<float>::infinity();
    Vec highest = all(never);
    for (int p = 0; p < most; p += LANES) {
      Vec products[LANES] = {};
      for (int k = 0; k < LANES && p + k < held; k++)
        for (int i = 0; i < d; i += LANES)
          products[k] = load(query + i) * load(key + (size_t)(p + k) * d + i) + products[k];
      Vec score = sums(products) * scale;
      for (int k = std::max(0, held - p); k < LANES; k++) score[k] = never;
      store(scores + p, score);
      highest = pick(score > highest, score, highest);
    }
    float top = highest[0];
    for (int k = 1; k < LANES; k++) top = std::max(top, highest[k]);
    Vec total = {};
    for (int p = 0; p < most; p += LANES) {
      const Vec score = load(scores + p);
      const Vec e = pick(score == all(never), Vec{}, exp(score - top));
      store(scores + p, e), total = total + e;
    }
    const float reciprocal = 1.0f / sum(total);
    for (int i = 0; i < d; i += LANES) {
      Vec mix[4] = {}; // four sums, of every fourth position, so that none waits for the other
      int p = 0;
      for (; p + 4 <= held; p += 4)
        for (int k = 0; k < 4; k++) mix[k] = load(value + (size_t)(p + k) * d + i) * scores[p + k] + mix[k];
      for (; p < held; p++) mix[p % 4] = load(value + (size_t)p * d + i) * scores[p] + mix[p % 4];
      store(to + i, ((mix[0] + mix[1]) + (mix[2] + mix[3])) * reciprocal);
    }
  }

  void mixture(int t, int step, int l) {
    Scratch &own = scratch[t];
    const Layer &layer = layers[l];
    const int rows = job->rows, width = padded(s.experts);
    normalise_all(own, layer.moe_norm);
    for (int r = 0; r < rows; r++) own.y[r] = &router_logits[(size_t)r * width];
    multiply(layer.router, begin(layer.router.count, t), end(layer.router.count, t), own.x.data(), own.y.data(), rows);
    meeting.wait();
    for (int r = begin(rows, t); r < end(rows, t); r++) route(own, step, l, r);
    meeting.wait();
    group(own, step, l);
    inner(own, layer, t);
    meeting.wait();
    outer(own, layer, t, step, l);
    meeting.wait();
  }

  size_t choice(int step, int l, int r) const {
    return (((size_t)step * job->rows + r) * s.layers + l) * s.chosen;
  }

  // The K largest logits, ties to the lower expert, and a softmax over them or over all.
  void route(Scratch &own, int step, int l, int r) {
    float *logit = &router_logits[(size_t)r * padded(s.experts)];
    const uint8_t *gone = job->disabled ? job->disabled + ((size_t)r * s.layers + l) * s.experts : nullptr;
    own.ranked.resize(s.experts);
    for (int e = 0; e < s.experts; e++) {
      if (gone && gone[e]) logit[e] = -std::numeric_limits<float>::infinity();
      own.ranked[e] = {logit[e], e};
    }
    const auto better = [](auto &a, auto &b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
    std::partial_sort(own.ranked.begin(), own.ranked.begin() + s.chosen, own.ranked.end(), better);
    const float highest = (float)own.ranked[0].first;
    float total = 0;
    const int over = s.gates_over_all ? s.experts : s.chosen;
    for (int e = 0; e < over; e++) total += std::exp((float)own.ranked[e].first - highest);
    const int64_t slot = job->slots[r];
    for (int k = 0; k < s.chosen; k++) {
      const int e = own.ranked[k].second;
      const float weight = std::exp((float)own.ranked[k].first - highest) / total;
      job->expert_ids[choice(step, l, r) + k] = e, job->expert_weights[choice(step, l, r) + k] = weight;
      memory.tokens[slot * memory.tokens_stride + (size_t)l * s.experts + e]++;
      if (std::isfinite(weight))
        memory.gate_weight[slot * memory.gate_weight_stride + (size_t)l * s.experts + e] += std::llrint(weight * 0x1p24);
    }
  }

  // Sort all choices by expert.
  void group(Scratch &own, int step, int l) const {
    std::fill(own.ends.begin(), own.ends.end(), 0);
    for (int r = 0; r < job->rows; r++)
      for (int k = 0; k < s.chosen; k++) own.ends[job->expert_ids[choice(step, l, r) + k] + 1]++;
    std::partial_sum(own.ends.begin(), own.ends.end(), own.ends.begin());
    for (int r = 0; r < job->rows; r++)
      for (int k = 0; k < s.chosen; k++)
        own.of_expert[own.ends[job->expert_ids[choice(step, l, r) + k]]++] = r * s.chosen + k;
    // Each end has moved to where the next expert's part ends, so that [e - 1] is where e's begins.
  }

  template <typename Do> void each_expert(const Scratch &own, Do what) const {
    for (int e = 0, from = 0; e < s.experts; from = own.ends[e++])
      if (own.ends[e] > from) what(e, &own.of_expert[from], own.ends[e] - from);
  }

  void inner(Scratch &own, const Layer &layer, int t) {
    const int f = s.expert_size, matrices = s.activation == 0 ? 2 : 1, blocks = f / LANES;
    const int first = begin(blocks, t), last = end(blocks, t);
    each_expert(own, [&](int e, const int *choices, int count) {
      for (int n = 0; n < count; n++) {
        own.x[n] = &own.normed[(size_t)(choices[n] / s.chosen) * s.channels];
        own.y[n] = &hidden[(size_t)choices[n] * f * matrices];
      }
      multiply(layer.gate_up[e], first * matrices, last * matrices, own.x.data(), own.y.data(), count);
    });
    for (int n = 0; n < job->rows * s.chosen; n++)
      for (int b = first; b < last; b++)
        activate(&hidden[((size_t)n * blocks + b) * matrices * LANES], &activated[((size_t)n * blocks + b) * LANES]);
  }

  void activate(const float *from, float *to) const {
    const Vec v = load(from);
    if (s.activation == 0) {
      store(to, v / (exp(-v) + 1.0f) * load(from + LANES));
    } else if (s.activation == 1) {
      store(to, pick(v < Vec{}, Vec{}, v)); // NaN stays NaN
    } else {
      for (int i = 0; i < LANES; i++) to[i] = 0.5f * from[i] * (1.0f + std::erf(from[i] * 0.70710678f));
    }
  }

  void outer(Scratch &own, const Layer &layer, int t, int step, int l) {
    const int first = begin(layer.down[0].count, t), last = end(layer.down[0].count, t);
    each_expert(own, [&](int e, const int *choices, int count) {
      for (int n = 0; n < count; n++) {
        own.x[n] = &activated[(size_t)choices[n] * s.expert_size];
        own.y[n] = &own.outer[(size_t)choices[n] * s.channels];
      }
      multiply(layer.down[e], first, last, own.x.data(), own.y.data(), count);
    });
    for (int r = 0; r < job->rows; r++) {
      const float *weights = job->expert_weights + choice(step, l, r);
      for (int i = first * LANES; i < last * LANES; i += LANES) {
        Vec mix = {};
        for (int k = 0; k < s.chosen; k++)
          mix = load(&own.outer[((size_t)r * s.chosen + k) * s.channels + i]) * weights[k] + mix;
        add(&x[(size_t)r * s.channels + i], mix);
      }
    }
  }

  void predict(int t, int step) {
    Scratch &own = scratch[t];
    const int rows = job->rows, width = padded(s.vocab);
    normalise_all(own, norm);
    for (int r = 0; r < rows; r++) own.y[r] = &logits[(size_t)r * width];
    multiply(head, begin(head.count, t), end(head.count, t), own.x.data(), own.y.data(), rows);
    meeting.wait();
    for (int r = begin(rows, t); r < end(rows, t); r++) {
      const float *logit = &logits[(size_t)r * width];
      const size_t at = (size_t)step * rows + r;
      job->finite[at] = std::all_of(logit, logit + s.vocab, [](float x) { return std::isfinite(x); });
      job->token_ids[at] = job->finite[at] ? draw(own, logit, r) : 0;
      if (job->logits) std::memcpy(job->logits + at * s.vocab, logit, s.vocab * sizeof(float));
    }
    if (step + 1 < job->steps) meeting.wait();
  }

  // model/sampling.py, row by row.
  int64_t draw(Scratch &own, const float *logit, int r) const {
    const double temperature = job->temperature[r];
    if (temperature == 0) return std::max_element(logit, logit + s.vocab) - logit;
    likely(own, logit, temperature, job->top_k[r], job->top_p[r], job->min_p[r]);
    double total = 0;
    for (double mass : own.mass) total += mass;
    const double threshold = uniform(job->seed[r], positions[r] + 1) * total;
    double below = 0;
    int last = 0;
    for (int v = 0; v < s.vocab; v++) {
      below += own.mass[v];
      if (own.mass[v] > 0) last = v;
      if (below > threshold) return v;
    }
    return last;
  }

  void likely(Scratch &own, const float *logit, double temperature, int64_t top_k, double top_p, double min_p) const {
    const int v = s.vocab;
    const double highest = *std::max_element(logit, logit + v) / temperature;
    own.mass.resize(v), own.ranked.resize(v);
    for (int i = 0; i < v; i++) own.ranked[i] = {std::exp(logit[i] / temperature - highest), i};
    if (top_k > 0 || top_p < 1 || min_p > 0) {
      std::stable_sort(own.ranked.begin(), own.ranked.end(), [](auto &a, auto &b) { return a.first > b.first; });
      filter(own, top_k > 0 ? std::min<int64_t>(top_k, v) : v, top_p, min_p);
    }
    for (auto &[mass, id] : own.ranked) own.mass[id] = mass;
  }

  static void filter(Scratch &own, int64_t kept, double top_p, double min_p) {
    double total = 0, before = 0;
    for (int64_t i = 0; i < kept; i++) total += own.ranked[i].first;
    const double least = min_p * own.ranked[0].first / total;
    for (int64_t i = 0; i < (int64_t)own.ranked.size(); i++) {
      const double mass = i < kept ? own.ranked[i].first / total : 0;
      const bool stays = !(top_p < 1 && before >= top_p) && !(mass < least);
      before += mass;
      own.ranked[i].first = stays ? mass : 0;
    }
  }

  // splitmix64 (Steele, Lea and Flood 2014) of the position, in a stream chosen by the mixed seed.
  static double uniform(int64_t seed, int64_t position) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    const auto mix = [](uint64_t z) {
      z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
      z = (z ^ z >> 27) * 0x94D049BB133111EBu;
      return z ^ z >> 31;
    };
    return (double)(mix(mix((uint64_t)seed + golden) + (uint64_t)position * golden) >> 11) * 0x1p-53;
  }
};

} // namespace

extern "C" {

// Null where there is no memory or no thread to be had. The weights are copied; the memory has to outlive the model.
void *moescope_new(const Shape *shape, const Weights *weights, const Memory *memory, int32_t threads) {
  try {
    return new Model(*shape, *weights, *memory, threads);
  } catch (...) {
    return nullptr;
  }
}

void moescope_run(void *model, const Steps *steps) { static_cast<Model *>(model)->run(*steps); }

void moescope_delete(void *model) { delete static_cast<Model *>(model); }
}
