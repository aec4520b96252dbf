// The native step by itself, for `make sanitize`: bursts of random rows and prompts through random weights in shapes that
// reach every branch, by one to three threads that have to agree on every number. What a sanitizer finds ends it.

#include "step.cpp"

#include <cstdio>
#include <random>

namespace {

using std::vector;

struct Chance {
  std::mt19937_64 bits{1};
  int64_t below(int64_t limit) { return (int64_t)(bits() % (uint64_t)limit); }
  // bfloat16 in float32, as checkpoints have them: around 0, or around 1 for norms
  vector<float> weights(size_t count, float scale, float middle = 0) {
    vector<float> made(count);
    for (float &each : made) {
      each = middle + scale * std::normal_distribution<float>()(bits);
      uint32_t word;
      std::memcpy(&word, &each, 4), word &= 0xFFFF0000u, std::memcpy(&each, &word, 4);
    }
    return made;
  }
};

struct Network {
  vector<vector<float>> owned;
  vector<vector<const float *>> tables; // what of layers lies where; vectors that move keep their contents in place
  Weights weights;

  Network(const Shape &s, Chance &chance) {
    const int c = s.channels, q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    const auto one = [&](size_t count, float scale, float middle = 0) {
      return owned.emplace_back(chance.weights(count, scale, middle)).data();
    };
    const auto of_layers = [&](size_t count, float scale, float middle = 0) {
      vector<const float *> table;
      for (int l = 0; l < s.layers; l++) table.push_back(one(count, scale, middle));
      return tables.emplace_back(std::move(table)).data();
    };
    const float scale = 1 / std::sqrt((float)c);
    const size_t inner = (size_t)s.experts * (s.activation == 0 ? 2 : 1) * s.expert_size * c;
    weights.embedding = one((size_t)s.vocab * c, 1), weights.norm = one(c, 0.1f, 1);
    weights.head = one((size_t)s.vocab * c, scale);
    weights.attention_norm = of_layers(c, 0.1f, 1), weights.query = of_layers((size_t)q * c, scale);
    weights.key = of_layers((size_t)kv * c, scale), weights.value = of_layers((size_t)kv * c, scale);
    weights.out = of_layers((size_t)c * q, scale), weights.query_norm = of_layers(s.head_dim, 0.1f, 1);
    weights.key_norm = of_layers(s.head_dim, 0.1f, 1), weights.moe_norm = of_layers(c, 0.1f, 1);
    weights.router = of_layers((size_t)s.experts * c, scale), weights.gate_up = of_layers(inner, scale);
    weights.down = of_layers((size_t)s.experts * c * s.expert_size, scale);
  }
};

struct State {
  vector<float> keys, values;
  vector<int64_t> tokens, gate_weight;

  explicit State(const Shape &s)
      : keys((size_t)s.layers * s.slots * s.kv_heads * ((s.ring + 15) / 16 * 16) * s.head_dim), values(keys.size()),
        tokens((size_t)s.slots * 2 * s.layers * s.experts), gate_weight(tokens.size() / 2) {}
  Memory memory() { return {keys.data(), values.data(), tokens.data(), gate_weight.data()}; }
};

struct Told {
  vector<int64_t> token_ids, expert_ids;
  vector<uint8_t> finite;
  vector<float> expert_weights, logits;
  bool operator==(const Told &) const = default;
};

// Rows with every option on and off: in slots of their own and beyond the ring's end or not, or else some prompts in as
// many slots, each of which is read once; every other one draws after its last row.
Told burst(void *model, const Shape &s, int threads, int rows, int steps, int prompts, int64_t seed) {
  Chance chance{std::mt19937_64((uint64_t)seed)};
  vector<int64_t> ids(rows), slots(rows), positions(rows), top_k(rows), seeds(rows);
  vector<double> temperature(rows), top_p(rows), min_p(rows);
  vector<uint8_t> disabled((size_t)rows * s.layers * s.experts);
  for (int r = 0; r < rows; r++) {
    ids[r] = chance.below(s.vocab), slots[r] = r, positions[r] = chance.below(3 * s.ring), seeds[r] = chance.below(1 << 30);
    temperature[r] = 0.5 * chance.below(3), top_k[r] = chance.below(3) * 5;
    top_p[r] = chance.below(2) ? 1 : 0.8, min_p[r] = chance.below(2) ? 0 : 0.05;
    if (s.experts > s.chosen && r % 2) disabled[((size_t)r * s.layers) * s.experts + chance.below(s.experts)] = 1;
  }
  vector<int64_t> lengths(prompts);
  vector<uint8_t> draws(prompts);
  const int drawing = prompts ? (prompts + 1) / 2 : rows;
  for (int prompt = 0, row = 0, last = rows - drawing; prompt < prompts; prompt++) {
    lengths[prompt] = rows / prompts + (prompt < rows % prompts), draws[prompt] = prompt % 2 == 0;
    const int64_t start = chance.below(3 * s.ring);
    for (int64_t at = 0; at < lengths[prompt]; at++) {
      const int r = draws[prompt] && at + 1 == lengths[prompt] ? last++ : row++;
      slots[r] = prompt, positions[r] = start + at;
    }
  }
  const size_t drawn = (size_t)steps * drawing, routed = drawn * s.layers * s.chosen;
  const bool wants_logits = seed % 2, is_knocked_out = seed % 3 == 0;
  Told told{vector<int64_t>(drawn), vector<int64_t>(routed), vector<uint8_t>(drawn), vector<float>(routed),
            vector<float>(wants_logits ? drawn * s.vocab : 0)};
  Steps now{};
  now.rows = rows, now.steps = steps, now.drawing = drawing, now.prompts = prompts, now.team = threads;
  now.lengths = lengths.data(), now.draws = draws.data();
  now.ids = ids.data(), now.slots = slots.data(), now.positions = positions.data();
  now.disabled = is_knocked_out ? disabled.data() : nullptr;
  now.temperature = temperature.data(), now.top_p = top_p.data(), now.min_p = min_p.data();
  now.top_k = top_k.data(), now.seed = seeds.data();
  now.token_ids = told.token_ids.data(), now.finite = told.finite.data(), now.expert_ids = told.expert_ids.data();
  now.expert_weights = told.expert_weights.data(), now.logits = wants_logits ? told.logits.data() : nullptr;
  moescope_run(model, &now);
  return told;
}

bool is_sound(const Told &told, const Shape &s) {
  const auto within = [](const vector<int64_t> &all, int64_t limit) {
    return std::all_of(all.begin(), all.end(), [=](int64_t each) { return each >= 0 && each < limit; });
  };
  const bool are_finite = std::all_of(told.finite.begin(), told.finite.end(), [](uint8_t each) { return each == 1; });
  return are_finite && within(told.token_ids, s.vocab) && within(told.expert_ids, s.experts);
}

struct Result {
  int64_t fed = 0;
  vector<Told> told;
  vector<int64_t> tokens, gate_weight;
  bool operator==(const Result &) const = default;
};

Result walk_through(const Shape &s, const Network &network, int threads) {
  State state(s);
  const Memory memory = state.memory();
  void *model = moescope_new(&s, &network.weights, &memory, threads);
  if (!model) return {};
  Result result;
  int64_t seed = 0;
  for (int rows : {1, 2, 7, 9, s.slots})
    for (int steps : {1, 3, 16}) {
      result.told.push_back(burst(model, s, threads, rows, steps, 0, seed++));
      for (int prompts : {1, std::min(3, rows)}) result.told.push_back(burst(model, s, threads, 5 * rows, 1, prompts, seed++));
      result.fed += rows * steps + 10 * rows;
    }
  moescope_delete(model);
  result.tokens = state.tokens, result.gate_weight = state.gate_weight;
  return result;
}

} // namespace

int main() {
  //  vocab channels layers heads kv_heads head_dim experts chosen expert_size ring slots activation gates_over_all eps theta
  const Shape shapes[] = {
      {65, 32, 3, 2, 1, 32, 4, 2, 32, 32, 17, 0, 0, 1e-6f, 1e4},
      {64, 80, 1, 6, 3, 64, 6, 1, 48, 20, 17, 1, 1, 1e-6f, 1e4},
      {300, 48, 2, 2, 2, 32, 70, 7, 16, 37, 17, 2, 0, 1e-6f, 1e4},
      {65, 32, 2, 1, 1, 32, 1, 1, 16, 16, 17, 0, 1, 1e-6f, 1e4},
  };
  long tokens = 0;
  for (const Shape &s : shapes) {
    Chance chance;
    const Network network(s, chance);
    const Result alone = walk_through(s, network, 1);
    for (const Told &told : alone.told)
      if (!is_sound(told, s)) return std::puts("a number that cannot be"), 1;
    const int64_t routed = std::accumulate(alone.tokens.begin(), alone.tokens.end(), (int64_t)0);
    if (alone.told.empty() || routed != alone.fed * s.layers * s.chosen) return std::puts("the books do not balance"), 1;
    tokens += (long)alone.fed;
    for (int threads : {2, 3})
      if (walk_through(s, network, threads) != alone) return std::printf("%d threads differ from one\n", threads), 1;
  }
  std::printf("%ld tokens, the same by one, two and three threads\n", tokens);
}
