// The model on a CPU: the next token of each of B sequences, drawn, some steps at a time, or a prompt's next tokens. C
// interface, no dependencies.
//
// Weights lie as bfloat16, as in the checkpoint; products and sums are float32. A row is one token at one position of one
// slot. Its every sum runs in one order that depends on nothing but the model and the row itself, so its bits depend
// neither on its company, nor on the number of threads, nor on whether it was read in a prompt or drawn and fed. All
// threads walk through the same phases; in each they share columns (of a product) or rows.
//
// Letters as in model/: B rows, L layers, C channels, H query heads, G key/value heads, D head size, R ring length,
// E experts, K experts per token, F expert size, V vocabulary.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16; // the numbers in one vector; so many columns of a matrix are a panel
#else
constexpr int LANES = 8;
#endif
constexpr int MOST_ROWS = LANES == 16 ? 7 : 8; // that are multiplied at a time
constexpr int PROMPT_ROWS = 64; // of one prompt, that walk through the layers at a time
constexpr int MOST_PROMPT_ROWS = 256; // of several prompts
constexpr int RING_MULTIPLE = 16; // the memory's, whatever LANES is
constexpr int MOST_HEADS = 3; // that look at the same keys at a time
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
using Lanes = std::make_integer_sequence<int, LANES>;

// A vector that straddles two lines of the cache costs twice.
template <typename T> struct Aligned {
  static constexpr std::align_val_t LINE{64};
  using value_type = T;
  Aligned() = default;
  template <typename U> Aligned(const Aligned<U> &) {}
  T *allocate(size_t count) { return static_cast<T *>(::operator new(count * sizeof(T), LINE)); }
  void deallocate(T *at, size_t) { ::operator delete(at, LINE); }
  bool operator==(const Aligned &) const { return true; }
};
template <typename T> using Array = std::vector<T, Aligned<T>>;

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

// Columns of a matrix (O, I) in panels: for every pair of inputs a vector of words, each with both inputs' bfloat16.
struct Panels {
  int inputs = 0, count = 0;
  Array<uint32_t> words;

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

// ROWS rows times COUNT neighbouring panels. Every sum starts at zero and takes its inputs in order. Weights that come from
// afar for many rows would keep the multipliers waiting at every panel's beginning, so the next panels are fetched.
template <int ROWS, int COUNT, bool FETCHES>
inline void tile(const Panels &matrix, int first, const float *const *x, float *const *y) {
  const int pairs = matrix.inputs / 2;
  const uint32_t *words = matrix.panel(first), *next = words + (size_t)COUNT * pairs * LANES;
  Vec sums[ROWS][COUNT] = {};
  for (int pair = 0; pair < pairs; pair++) {
    for (int p = 0; p < COUNT; p++) {
      Bits both;
      std::memcpy(&both, words + ((size_t)p * pairs + pair) * LANES, sizeof both);
      if (FETCHES) __builtin_prefetch(next + ((size_t)pair * COUNT + p) * LANES);
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

template <int ROWS, int WIDEST, bool FETCHES>
inline void strip(const Panels &matrix, int begin, int end, const float *const *x, float *const *y) {
  for (; end - begin >= WIDEST; begin += WIDEST) tile<ROWS, WIDEST, FETCHES>(matrix, begin, x, y);
  if constexpr (WIDEST > 1) strip<ROWS, WIDEST / 2, FETCHES>(matrix, begin, end, x, y);
}

// So many panels at a time that there are sums enough to keep the multipliers busy, and few enough for the registers.
constexpr int widest(int rows) {
  return LANES == 16 ? (rows <= 3 ? 8 : rows <= 5 ? 4 : 2) : (rows == 1 ? 8 : rows <= 4 ? 4 / ((rows + 1) / 2) : 1);
}

template <bool FETCHES, int ROWS = MOST_ROWS>
void block(const Panels &matrix, int begin, int end, const float *const *x, float *const *y, int rows) {
  if (rows == ROWS) strip<ROWS, widest(ROWS), FETCHES && (ROWS > 3)>(matrix, begin, end, x, y);
  else if constexpr (ROWS > 1) block<FETCHES, ROWS - 1>(matrix, begin, end, x, y, rows);
}

// y[r][o] = sum over i of matrix[o][i] * x[r][i], for the outputs of the panels from begin to end, in blocks of about as
// many rows each. What a row gets does not depend on how many rows there are: only the number of sums that are kept in
// registers does.
void multiply(const Panels &matrix, int begin, int end, const float *const *x, float *const *y, int rows) {
  bool is_near = false; // once the first block has been there
  for (int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS; blocks > 0; blocks--, is_near = true) {
    const int some = rows / blocks;
    is_near ? block<false>(matrix, begin, end, x, y, some) : block<true>(matrix, begin, end, x, y, some);
    x += some, y += some, rows -= some;
  }
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The cores that a thread may run on, and the one that it runs on; nothing where that is not to be known.
class Cores {
public:
#if defined(__linux__)
  Cores() {
    if (sched_getaffinity(0, sizeof all_, &all_)) CPU_ZERO(&all_);
  }
  static int current() { return sched_getcpu(); }
  // Go elsewhere, if there is anywhere.
  void leave(int core) const {
    cpu_set_t rest = all_;
    CPU_CLR(core, &rest);
    if (CPU_COUNT(&rest)) sched_setaffinity(0, sizeof rest, &rest);
  }

private:
  cpu_set_t all_;
#else
  static int current() { return -1; }
  void leave(int) const {}
#endif
};

// Who waits for another thread spins for some microseconds and then sleeps, because the cores may be needed by others:
// after fewer, when the one that is waited for needs this very core, as is_in_the_way tells.
template <typename Tell> void until_changed(const std::atomic<uint32_t> &value, uint32_t from, Tell is_in_the_way) {
  for (int spin = 0; spin < 2000; spin++) {
    if (value.load(std::memory_order_acquire) != from) return;
    pause();
    if (spin == 100 && is_in_the_way()) break;
  }
  while (value.load(std::memory_order_acquire) == from) value.wait(from, std::memory_order_acquire);
}

// Where a team waits until all of it have come.
class Meeting {
public:
  template <typename Tell> void wait(uint32_t team, Tell is_in_the_way) {
    if (team == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      // Sequentially consistent, as in call(): else the new value may become visible only after the look for sleepers.
      round_.store(round + 1);
      round_.notify_all();
      return;
    }
    until_changed(round_, round, is_in_the_way);
  }

private:
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

// What lasts from call to call. Keys and values (L, S, G, R, D), with R rounded up to a multiple of 16; the order within
// a slot's ring is the step's own. Of each slot: how many tokens each expert had (S, 2, L, E), in prompts and in decode
// steps, and its gate weight in units of 2^-24 (S, L, E).
struct Memory {
  float *keys, *values;
  int64_t *tokens, *gate_weight;
};

// B rows: either some steps of as many sequences, or, once, successive tokens of the prompts of P slots. The last N rows
// draw. Those are all of a decode step. A prompt that draws (P,) does so with its last token, whose row comes behind the
// rows of all prompts: of lengths (P,) 3 and 2, both drawing, the rows are a0 a1 b0 a2 b1. Several prompts have 256 rows
// together at most. ids, slots, positions (B,) say what is fed first; disabled (B, L, E) or null; the options are (N,). The outputs are those of
// every step: token_ids and finite (steps, N), expert_ids and expert_weights (steps, N, L, K), logits (steps, N, V) or null.
struct Steps {
  int32_t rows, steps, drawing;
  int32_t prompts; // 0 for decode steps
  int32_t team; // how many threads share the work, at most those that there are
  const int64_t *lengths;
  const uint8_t *draws;
  const int64_t *ids, *slots, *positions;
  const uint8_t *disabled;
  const double *temperature, *top_p, *min_p;
  const int64_t *top_k, *seed;
  int64_t *token_ids;
  uint8_t *finite;
  int64_t *expert_ids;
  float *expert_weights;
  float *logits;
  double *seconds; // null, or where the time of the first thread goes: it is added to the parts of Part
};
}

namespace {

enum Part { QKV, ATTENTION, OUT, ROUTER, COUNTING, EXPERTS, HEAD, SAMPLING, REST, MEETING };
using Clock = std::chrono::steady_clock;

struct Layer {
  Array<float> attention_norm, query_norm, key_norm, moe_norm;
  Panels qkv, out, router;
  std::vector<Panels> gate_up, down;
};

// What one thread needs for itself. Choices are counted row * K + k.
struct Scratch {
  std::atomic<uint32_t> calls{0};
  std::atomic<int> core{-2}; // that it ran on when it last met the others
  Array<float> normed, outer, scores, router_logits;
  std::vector<const float *> x;
  std::vector<float *> y;
  std::vector<int> chosen; // each choice's expert
  std::vector<float> gates; // and its weight
  std::vector<int> of_expert; // choices, sorted by expert
  std::vector<int> ends; // of each expert's part of them
  std::vector<std::pair<double, int>> ranked;
  std::vector<double> mass;
};

// The rows that walk through the layers together: those of the call from first on, in one of its steps. Those from
// drawing on draw.
struct Pass {
  int step, first, rows, drawing;
};

class Model {
public:
  // Threads are started last, and stopped where one cannot be had.
  Model(const Shape &shape, const Weights &weights, const Memory &memory, int threads)
      : s(shape), memory(memory), qkv_size((s.heads + 2 * s.kv_heads) * s.head_dim), scratch(threads) {
    embedding.assign(weights.embedding, weights.embedding + (size_t)s.vocab * s.channels);
    norm.assign(weights.norm, weights.norm + s.channels);
    head.pack(s.channels, s.vocab, [&](int o) { return weights.head + (size_t)o * s.channels; });
    layers.resize(s.layers);
    for (int l = 0; l < s.layers; l++) pack(layers[l], weights, l);
    for (int i = 0; i < s.head_dim / 2; i++) frequencies.push_back(std::pow(s.rope_theta, -2.0 * i / s.head_dim));
    make_room(std::max(s.slots, MOST_PROMPT_ROWS));
    try {
      for (int t = 1; t < threads; t++) others.emplace_back([this, t] { work(t); });
    } catch (...) {
      dismiss();
      throw;
    }
  }

  ~Model() { dismiss(); }

  void run(const Steps &steps) {
    job = &steps;
    looked = Clock::now();
    call(steps.team);
    walk(0);
  }

private:
  const Shape s;
  const Memory memory;
  const int qkv_size;
  Array<float> embedding, norm;
  Panels head;
  std::vector<Layer> layers;
  std::vector<double> frequencies;

  const Cores cores;
  Meeting meeting;
  const Steps *job = nullptr;
  std::vector<Scratch> scratch;
  std::vector<std::thread> others;
  // Shared by all threads: of each row the residual stream, queries with keys and values, what was attended, the inner
  // values of its experts and the head's logits.
  Array<float> x, qkv, attended, hidden, activated, logits, cosines, sines;
  std::vector<int64_t> positions;
  Clock::time_point looked; // at the clock, by the first thread

  void pack(Layer &layer, const Weights &w, int l) {
    const int c = s.channels, d = s.head_dim, f = s.expert_size, q = s.heads / s.kv_heads * d;
    const auto copy = [](const float *from, int count) { return Array<float>(from, from + count); };
    layer.attention_norm = copy(w.attention_norm[l], c), layer.moe_norm = copy(w.moe_norm[l], c);
    layer.query_norm = copy(w.query_norm[l], d), layer.key_norm = copy(w.key_norm[l], d);
    // What belongs to one key/value head lies together: its queries, its key, its value.
    layer.qkv.pack(c, qkv_size, [&](int o) {
      const int g = o / (q + 2 * d), at = o % (q + 2 * d);
      return at < q ? w.query[l] + ((size_t)g * q + at) * c
                    : (at < q + d ? w.key[l] : w.value[l]) + ((size_t)g * d + (at - q) % d) * c;
    });
    layer.out.pack(s.heads * d, c, [&](int o) { return w.out[l] + (size_t)o * s.heads * d; });
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

  // Here and never later, so that a call cannot fail.
  void make_room(int rows) {
    const size_t choices = (size_t)rows * s.chosen, inner = (size_t)s.expert_size * (s.activation == 0 ? 2 : 1);
    x.resize((size_t)rows * s.channels), qkv.resize((size_t)rows * qkv_size);
    attended.resize((size_t)rows * s.heads * s.head_dim), logits.resize((size_t)rows * padded(s.vocab));
    hidden.resize(choices * inner), activated.resize(choices * s.expert_size);
    cosines.resize((size_t)rows * s.head_dim / 2), sines.resize((size_t)rows * s.head_dim / 2);
    positions.resize(rows);
    for (auto &own : scratch) {
      own.normed.resize((size_t)rows * s.channels), own.outer.resize(choices * s.channels);
      own.scores.resize((size_t)MOST_HEADS * padded(s.ring)), own.router_logits.resize((size_t)rows * padded(s.experts));
      own.x.resize(choices), own.y.resize(choices), own.chosen.resize(choices), own.gates.resize(choices);
      own.of_expert.resize(choices), own.ends.resize(s.experts + 1);
      own.ranked.resize(s.vocab), own.mass.resize(s.vocab);
    }
  }

  static int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

  void call(int team) {
    for (int t = 1; t < team; t++) {
      scratch[t].calls.fetch_add(1);
      scratch[t].calls.notify_one();
    }
  }

  void work(int t) {
    for (uint32_t seen = 0;; seen++) {
      until_changed(scratch[t].calls, seen, [] { return false; });
      if (!job) return;
      walk(t);
    }
  }

  void dismiss() {
    job = nullptr;
    call((int)others.size() + 1);
    for (auto &thread : others) thread.join();
  }

  int begin(int count, int t) const { return (int)((int64_t)count * t / job->team); }
  int end(int count, int t) const { return begin(count, t + 1); }

  // What was done since the last look at the clock was this part of the step.
  void lap(int t, Part part) {
    if (t > 0 || !job->seconds) return;
    const auto now = Clock::now();
    job->seconds[part] += std::chrono::duration<double>(now - looked).count();
    looked = now;
  }

  // Two threads of a team on one core wait for each other's turns, and look to the system as if they had little to do: it
  // leaves them there. So the later one goes.
  bool is_crowded(int t, int core, int team) const {
    const auto is_here = [&](const Scratch &other) { return other.core.load(std::memory_order_relaxed) == core; };
    if (std::any_of(scratch.begin(), scratch.begin() + t, is_here)) cores.leave(core);
    return std::count_if(scratch.begin(), scratch.begin() + team, is_here) > 1;
  }

  void meet(int t, Part part) {
    lap(t, part);
    const int core = Cores::current(), team = job->team; // read now: who comes last may take the job away
    scratch[t].core.store(core, std::memory_order_relaxed);
    meeting.wait(team, [&] { return core >= 0 && is_crowded(t, core, team); });
    lap(t, MEETING);
  }

  void walk(int t) {
    const Steps &now = *job;
    const int most = now.prompts == 1 ? PROMPT_ROWS : now.rows;
    for (int step = 0; step < now.steps; step++) {
      for (int first = 0; first < now.rows; first += most) {
        const int rows = std::min(most, now.rows - first);
        forward(t, {step, first, rows, std::clamp(now.rows - now.drawing - first, 0, rows)});
      }
    }
    meet(t, REST); // until then nobody may touch what the last step left
  }

  void forward(int t, const Pass &pass) {
    for (int r = begin(pass.rows, t); r < end(pass.rows, t); r++) enter(pass, r);
    meet(t, REST);
    for (int l = 0; l < s.layers; l++) {
      attention(t, pass, l);
      mixture(t, pass, l);
    }
    if (pass.drawing < pass.rows) predict(t, pass);
  }

  // Where in the outputs a row that draws has its place.
  size_t place(const Pass &pass, int r) const { return (size_t)pass.step * job->drawing + r - pass.drawing; }

  void enter(const Pass &pass, int r) {
    const int64_t id = pass.step ? job->token_ids[place(pass, r) - job->drawing] : job->ids[pass.first + r];
    positions[r] = job->positions[pass.first + r] + pass.step;
    std::memcpy(&x[(size_t)r * s.channels], &embedding[(size_t)id * s.channels], s.channels * sizeof(float));
    for (int i = 0; i < s.head_dim / 2; i++) {
      const double angle = (double)positions[r] * frequencies[i];
      cosines[r * s.head_dim / 2 + i] = (float)std::cos(angle), sines[r * s.head_dim / 2 + i] = (float)std::sin(angle);
    }
  }

  // RMSNorm (Zhang and Sennrich 2019) of size values.
  void normalise(const float *from, const Array<float> &weight, float *to, int size) const {
    Vec squares = {};
    for (int i = 0; i < size; i += LANES) squares = load(from + i) * load(from + i) + squares;
    const float reciprocal = 1.0f / std::sqrt(sum(squares) / size + s.eps);
    for (int i = 0; i < size; i += LANES) store(to + i, load(from + i) * reciprocal * load(&weight[i]));
  }

  // Every thread norms all rows for itself: that is quicker than to meet once more.
  void normalise_all(Scratch &own, const Array<float> &weight, int first, int rows) const {
    for (int r = first; r < rows; r++) {
      float *to = &own.normed[(size_t)r * s.channels];
      normalise(&x[(size_t)r * s.channels], weight, to, s.channels);
      own.x[r] = to;
    }
  }

  void attention(int t, const Pass &pass, int l) {
    Scratch &own = scratch[t];
    const Layer &layer = layers[l];
    const int rows = pass.rows, width = s.heads * s.head_dim;
    normalise_all(own, layer.attention_norm, 0, rows);
    for (int r = 0; r < rows; r++) own.y[r] = &qkv[(size_t)r * qkv_size];
    const int heads = s.kv_heads;
    // Where the heads can be shared out, each thread has computed all that it attends with, and need not wait.
    const bool by_head = heads % job->team == 0;
    const int units = by_head ? heads : layer.qkv.count, each = layer.qkv.count / units;
    multiply(layer.qkv, begin(units, t) * each, end(units, t) * each, own.x.data(), own.y.data(), rows);
    by_head ? lap(t, QKV) : meet(t, QKV);
    const int texts = job->prompts ? job->prompts : rows, items = texts * heads;
    for (int item = begin(items, t); item < end(items, t); item++)
      each_row(pass, item % texts, [&](int r) { attend(own, layer, pass, l, r, item / texts); });
    meet(t, ATTENTION);
    for (int r = 0; r < rows; r++) own.x[r] = &attended[(size_t)r * width], own.y[r] = &own.outer[(size_t)r * s.channels];
    const int first = begin(layer.out.count, t), last = end(layer.out.count, t);
    multiply(layer.out, first, last, own.x.data(), own.y.data(), rows);
    for (int r = 0; r < rows; r++)
      for (int i = first * LANES; i < last * LANES; i += LANES) add(&x[(size_t)r * s.channels + i], load(own.y[r] + i));
    meet(t, OUT);
  }

  // A text's rows in the order of their positions: a key takes the place of one that its predecessors have still to look at.
  template <typename Do> void each_row(const Pass &pass, int text, Do what) const {
    if (job->prompts < 2) {
      const int rows = job->prompts ? pass.rows : 1;
      for (int r = text; r < text + rows; r++) what(r);
      return;
    }
    int first = 0, last = pass.drawing;
    for (int other = 0; other < text; other++) {
      first += (int)job->lengths[other] - job->draws[other];
      last += job->draws[other];
    }
    for (int r = first; r < first + job->lengths[text] - job->draws[text]; r++) what(r);
    if (job->draws[text]) what(last);
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

  // Where a row's ring begins, for one key/value head.
  size_t where(const Pass &pass, int l, int r, int g) const {
    const size_t slot = (size_t)l * s.slots + job->slots[pass.first + r];
    return (slot * s.kv_heads + g) * ((s.ring + RING_MULTIPLE - 1) / RING_MULTIPLE * RING_MULTIPLE) * s.head_dim;
  }

  // One key/value head of one row: norms, rotation, a place in the ring, and the query heads that share it.
  void attend(Scratch &own, const Layer &layer, const Pass &pass, int l, int r, int g) {
    const int d = s.head_dim, sharers = s.heads / s.kv_heads;
    float *query = &qkv[(size_t)r * qkv_size + g * (sharers + 2) * d], *key = query + sharers * d, *value = key + d;
    const size_t ring = where(pass, l, r, g);
    float *const keys = memory.keys + ring, *const values = memory.values + ring;
    // The keys and values of many rows come from afar: the next ones are on their way while these are looked at. They are
    // fetched past the last level of the cache, or they would drive the weights out of it.
    const ptrdiff_t ahead = (ptrdiff_t)where(pass, l, std::min(r + 1, pass.rows - 1), g) - (ptrdiff_t)ring;
    const int at = (int)(positions[r] % s.ring), held = (int)std::min<int64_t>(positions[r] + 1, s.ring);
    normalise(key, layer.key_norm, key, d), rotate(key, r);
    // Keys lie like a matrix in panels: of as many positions as a vector has lanes, one dimension after the other.
    for (int i = 0; i < d; i++) keys[((size_t)at / LANES * d + i) * LANES + at % LANES] = key[i];
    std::memcpy(values + (size_t)at * d, value, d * sizeof(float));
    for (int h = 0; h < sharers; h++) normalise(query + h * d, layer.query_norm, query + h * d, d), rotate(query + h * d, r);
    float *to = &attended[((size_t)r * s.heads + g * sharers) * d];
    for (int h = 0; h < sharers; h += MOST_HEADS, query += MOST_HEADS * d, to += MOST_HEADS * d) {
      switch (std::min(MOST_HEADS, sharers - h)) {
      case 1: look<1>(own, query, keys, values, held, ahead, to); break;
      case 2: look<2>(own, query, keys, values, held, ahead, to); break;
      default: look<3>(own, query, keys, values, held, ahead, to); break;
      }
    }
  }

  // Neighbouring query heads look at the same keys and mix the same values.
  template <int HEADS>
  void look(Scratch &own, const float *query, const float *key, const float *value, int held, ptrdiff_t ahead,
            float *to) const {
    const int width = padded(s.ring), panels = padded(held) / LANES;
    float *scores = own.scores.data();
    int panel = 0;
    for (; panel + 4 <= panels; panel += 4) score<HEADS, 4>(query, key, panel, ahead, scores);
    for (; panel < panels; panel++) score<HEADS, 1>(query, key, panel, ahead, scores);
    float reciprocals[HEADS];
    for (int h = 0; h < HEADS; h++) reciprocals[h] = soften(scores + h * width, held);
    for (int i = 0; i < s.head_dim; i += 2 * LANES) mix<HEADS>(scores, reciprocals, value + i, held, ahead, to + i);
  }

  template <int HEADS, int COUNT>
  void score(const float *query, const float *key, int panel, ptrdiff_t ahead, float *scores) const {
    const int d = s.head_dim, width = padded(s.ring);
    const float scale = 1.0f / std::sqrt((float)d);
    Vec products[HEADS][COUNT] = {};
    for (int i = 0; i < d; i++) {
      for (int p = 0; p < COUNT; p++) {
        const float *from = key + ((size_t)(panel + p) * d + i) * LANES;
        const Vec keys = load(from);
        __builtin_prefetch(from + ahead, 0, 0);
        for (int h = 0; h < HEADS; h++) products[h][p] = keys * query[h * d + i] + products[h][p];
      }
    }
    for (int h = 0; h < HEADS; h++)
      for (int p = 0; p < COUNT; p++) store(scores + h * width + (panel + p) * LANES, products[h][p] * scale);
  }

  // Scores become e^(score - highest), and 0 where nothing is held; returns 1 over their sum.
  static float soften(float *scores, int held) {
    const int most = padded(held);
    const float never = -std::numeric_limits<float>::infinity();
    for (int p = held; p < most; p++) scores[p] = never;
    Vec highest = load(scores);
    for (int p = LANES; p < most; p += LANES) highest = pick(load(scores + p) > highest, load(scores + p), highest);
    float top = highest[0];
    for (int k = 1; k < LANES; k++) top = std::max(top, highest[k]);
    Vec total = {};
    for (int p = 0; p < most; p += LANES) {
      const Vec score = load(scores + p), e = pick(score == all(never), Vec{}, exp(score - top));
      store(scores + p, e), total = total + e;
    }
    return 1.0f / sum(total);
  }

  // Two vectors of each head's result. Even and odd positions have sums of their own, so that none waits for the other.
  template <int HEADS>
  void mix(const float *weights, const float *reciprocals, const float *value, int held, ptrdiff_t ahead,
           float *to) const {
    const int d = s.head_dim, width = padded(s.ring);
    Vec sums[2][HEADS][2] = {};
    const auto take = [&](int p, Vec (&sum)[HEADS][2]) {
      for (int v = 0; v < 2; v++) {
        const float *from = value + (size_t)p * d + v * LANES;
        const Vec values = load(from);
        __builtin_prefetch(from + ahead, 0, 0);
        for (int h = 0; h < HEADS; h++) sum[h][v] = values * weights[h * width + p] + sum[h][v];
      }
    };
    int p = 0;
    for (; p + 2 <= held; p += 2) take(p, sums[0]), take(p + 1, sums[1]);
    if (p < held) take(p, sums[0]);
    for (int h = 0; h < HEADS; h++)
      for (int v = 0; v < 2; v++) store(to + h * d + v * LANES, (sums[0][h][v] + sums[1][h][v]) * reciprocals[h]);
  }

  void mixture(int t, const Pass &pass, int l) {
    Scratch &own = scratch[t];
    const Layer &layer = layers[l];
    normalise_all(own, layer.moe_norm, 0, pass.rows);
    for (int r = 0; r < pass.rows; r++) own.y[r] = &own.router_logits[(size_t)r * padded(s.experts)];
    // Every thread routes all rows for itself, as with norms.
    multiply(layer.router, 0, layer.router.count, own.x.data(), own.y.data(), pass.rows);
    for (int r = 0; r < pass.rows; r++) route(own, pass, l, r);
    lap(t, ROUTER);
    // No two threads may write in one slot's books, and a prompt has but one slot.
    const bool alone = job->prompts > 0, has_turn = l % job->team == t;
    for (int r = alone ? 0 : begin(pass.rows, t); r < (alone ? has_turn * pass.rows : end(pass.rows, t)); r++)
      enter_in_the_books(own, pass, l, r);
    lap(t, COUNTING);
    // What the last layer makes of a row that does not draw is nobody's business.
    const int from = l + 1 < s.layers ? 0 : pass.drawing;
    if (from == pass.rows) return meet(t, REST);
    group(own, from, pass.rows);
    inner(own, layer, t, from, pass.rows);
    meet(t, EXPERTS);
    outer(own, layer, t, from, pass.rows);
    meet(t, EXPERTS);
  }

  // The K largest logits, ties to the lower expert, and a softmax over them or over all.
  void route(Scratch &own, const Pass &pass, int l, int r) const {
    float *logit = &own.router_logits[(size_t)r * padded(s.experts)], *gates = &own.gates[(size_t)r * s.chosen];
    int *best = &own.chosen[(size_t)r * s.chosen];
    if (job->disabled) {
      const uint8_t *gone = job->disabled + ((size_t)(pass.first + r) * s.layers + l) * s.experts;
      for (int e = 0; e < s.experts; e++)
        if (gone[e]) logit[e] = -std::numeric_limits<float>::infinity();
    }
    for (int e = 0; e < s.experts; e++) {
      int k = std::min(e, s.chosen);
      if (k == s.chosen && !(logit[e] > logit[best[k - 1]])) continue;
      for (k = std::min(k, s.chosen - 1); k > 0 && logit[e] > logit[best[k - 1]]; k--) best[k] = best[k - 1];
      best[k] = e;
    }
    const float highest = logit[best[0]];
    float total = 0;
    for (int k = 0; k < s.chosen; k++) total += gates[k] = std::exp(logit[best[k]] - highest);
    if (s.gates_over_all) total = std::accumulate(logit, logit + s.experts, 0.0f, [&](float sum, float x) {
      return sum + std::exp(x - highest);
    });
    for (int k = 0; k < s.chosen; k++) gates[k] /= total;
  }

  void enter_in_the_books(const Scratch &own, const Pass &pass, int l, int r) {
    const size_t slot = job->slots[pass.first + r], phase = job->prompts ? 0 : 1;
    int64_t *tokens = memory.tokens + ((slot * 2 + phase) * s.layers + l) * s.experts;
    int64_t *gate_weight = memory.gate_weight + (slot * s.layers + l) * s.experts;
    for (int k = 0; k < s.chosen; k++) {
      const int e = own.chosen[r * s.chosen + k];
      const float gate = own.gates[r * s.chosen + k];
      tokens[e]++;
      if (std::isfinite(gate)) gate_weight[e] += std::llrint(gate * 0x1p24);
      if (r < pass.drawing) continue;
      const size_t at = (place(pass, r) * s.layers + l) * s.chosen + k;
      job->expert_ids[at] = e, job->expert_weights[at] = gate;
    }
  }

  // Sort the choices of some rows by expert.
  void group(Scratch &own, int from, int rows) const {
    std::fill(own.ends.begin(), own.ends.end(), 0);
    for (int n = from * s.chosen; n < rows * s.chosen; n++) own.ends[own.chosen[n] + 1]++;
    std::partial_sum(own.ends.begin(), own.ends.end(), own.ends.begin());
    for (int n = from * s.chosen; n < rows * s.chosen; n++) own.of_expert[own.ends[own.chosen[n]]++] = n;
    // Each end has moved to where the next expert's part ends, so that [e - 1] is where e's begins.
  }

  template <typename Do> void each_expert(const Scratch &own, Do what) const {
    for (int e = 0, from = 0; e < s.experts; from = own.ends[e++])
      if (own.ends[e] > from) what(e, &own.of_expert[from], own.ends[e] - from);
  }

  void inner(Scratch &own, const Layer &layer, int t, int from, int rows) {
    const int f = s.expert_size, matrices = s.activation == 0 ? 2 : 1, blocks = f / LANES;
    const int first = begin(blocks, t), last = end(blocks, t);
    each_expert(own, [&](int e, const int *choices, int count) {
      for (int n = 0; n < count; n++) {
        own.x[n] = &own.normed[(size_t)(choices[n] / s.chosen) * s.channels];
        own.y[n] = &hidden[(size_t)choices[n] * f * matrices];
      }
      multiply(layer.gate_up[e], first * matrices, last * matrices, own.x.data(), own.y.data(), count);
    });
    for (int n = from * s.chosen; n < rows * s.chosen; n++)
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

  void outer(Scratch &own, const Layer &layer, int t, int from, int rows) {
    const int first = begin(layer.down[0].count, t), last = end(layer.down[0].count, t);
    each_expert(own, [&](int e, const int *choices, int count) {
      for (int n = 0; n < count; n++) {
        own.x[n] = &activated[(size_t)choices[n] * s.expert_size];
        own.y[n] = &own.outer[(size_t)choices[n] * s.channels];
      }
      multiply(layer.down[e], first, last, own.x.data(), own.y.data(), count);
    });
    for (int r = from; r < rows; r++) {
      for (int i = first * LANES; i < last * LANES; i += LANES) {
        Vec mix = {};
        for (int n = r * s.chosen; n < (r + 1) * s.chosen; n++)
          mix = load(&own.outer[(size_t)n * s.channels + i]) * own.gates[n] + mix;
        add(&x[(size_t)r * s.channels + i], mix);
      }
    }
  }

  void predict(int t, const Pass &pass) {
    Scratch &own = scratch[t];
    const int width = padded(s.vocab), drawing = pass.rows - pass.drawing;
    normalise_all(own, norm, pass.drawing, pass.rows);
    for (int r = pass.drawing; r < pass.rows; r++) own.y[r] = &logits[(size_t)r * width];
    const float *const *from = own.x.data() + pass.drawing;
    multiply(head, begin(head.count, t), end(head.count, t), from, own.y.data() + pass.drawing, drawing);
    meet(t, HEAD);
    for (int r = pass.drawing + begin(drawing, t); r < pass.drawing + end(drawing, t); r++) {
      const float *logit = &logits[(size_t)r * width];
      const size_t at = place(pass, r);
      job->finite[at] = std::all_of(logit, logit + s.vocab, [](float x) { return std::isfinite(x); });
      job->token_ids[at] = job->finite[at] ? draw(own, logit, r - pass.drawing, positions[r] + 1) : 0;
      if (job->logits) std::memcpy(job->logits + at * s.vocab, logit, s.vocab * sizeof(float));
    }
    if (pass.step + 1 < job->steps) meet(t, SAMPLING);
    else lap(t, SAMPLING);
  }

  // model/sampling.py, row by row: the token at a position, with the options of the nth row that draws.
  int64_t draw(Scratch &own, const float *logit, int n, int64_t position) const {
    const double temperature = job->temperature[n];
    if (temperature == 0) return std::max_element(logit, logit + s.vocab) - logit;
    likely(own, logit, temperature, job->top_k[n], job->top_p[n], job->min_p[n]);
    double total = 0;
    for (double mass : own.mass) total += mass;
    const double threshold = uniform(job->seed[n], position) * total;
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
    for (int i = 0; i < v; i++) own.ranked[i] = {std::exp(logit[i] / temperature - highest), i};
    if (top_k > 0 || top_p < 1 || min_p > 0) {
      const auto better = [](auto &a, auto &b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
      std::sort(own.ranked.begin(), own.ranked.end(), better);
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
