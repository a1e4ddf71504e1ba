// Paged attention: pages are read where they lie, and never gathered.
//
// A row of the batch has a block table, a number of visible tokens and one or more
// queries. The queries of one key/value head form the "lines" of a group: the query heads
// of a few queries. A group reads the row's visible tokens in chunks of kChunk with the
// online softmax, in spans of kSpan tokens, whose results are merged one after another.
// Spans of groups with few lines are shared out among the threads.
//
// Chunks and spans start at fixed multiples, and a line's sums have a fixed order. So a
// line's result depends on its own row alone, bit for bit: not on the batch, the threads,
// or which queries share a group.
//
// Sources: Kwon et al. 2023, section 4.1; Milakov and Gimelshein 2018.
#include "common.h"

namespace jpaged {
namespace attention {

constexpr int kChunk = 64;         // tokens that are scored before the softmax is updated
constexpr int64_t kSpan = 512;     // tokens of one part of a context
constexpr int kMaxLines = 64;      // lines of a group
constexpr int kMaxShared = 16;     // lines of a group whose spans are shared out
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Shape {
  int64_t num_rows, num_queries, num_heads, num_kv_heads, head_dim;
  int64_t num_blocks, block_size, max_blocks, scale_width, group;
};

struct Options {
  float scale, soft_cap;  // soft_cap 0: none
  const float* sinks;     // [H], or null
  int64_t window;         // a query sees its last `window` tokens
};

template <typename Page>
struct Pages {
  const Page *k, *v;  // of one layer, [N, K, P, D]
  const float *k_scale, *v_scale;  // [N, K, P'], or null
};

// A row of the batch.
struct Row {
  const int32_t* table;
  int64_t context_len, num_queries;
};

// Some queries of a row, for one key/value head.
struct Group {
  int64_t row, head, start, first_query, num_queries;  // `start`: the row's first query
  int64_t first_span, num_spans;
};

// The online softmax of a group's lines.
struct State {
  float *out, *maximum, *sum;  // [lines, D], [lines], [lines]
  static size_t Size(int64_t num_lines, int64_t head_dim) {
    return num_lines * (head_dim + 2) + 16;
  }
  static State At(float* memory, int64_t num_lines, int64_t head_dim) {
    float* maximum = memory + num_lines * head_dim;
    return {memory, maximum, maximum + num_lines};
  }
  void Clear(int64_t num_lines, int64_t head_dim) const {
    std::fill(out, out + num_lines * head_dim, 0.0f);
    std::fill(maximum, maximum + num_lines, kMinusInfinity);
    std::fill(sum, sum + num_lines, 0.0f);
  }
};

// Visible tokens [base + begin, base + end) of one chunk, and where they are stored.
template <typename Page>
struct Chunk {
  int64_t base = 0, begin = 0, end = 0;
  const Page* k[kChunk] = {};
  const Page* v[kChunk] = {};
  float k_scale[kChunk] = {}, v_scale[kChunk] = {};
};

// The same with keys and values as floats.
struct Tokens {
  int64_t base, begin, end;
  const float *k[kChunk], *v[kChunk];
  const float *k_scale, *v_scale;  // null: none
};

template <typename Page>
void FindTokens(const Shape& s, const Pages<Page>& pages, const Row& row, int64_t head,
                int64_t base, int64_t from, int64_t to, Chunk<Page>& chunk) {
  chunk.base = base;
  chunk.begin = std::max(from - base, int64_t{0});
  chunk.end = std::max(std::min(to - base, int64_t{kChunk}), chunk.begin);
  for (int64_t i = chunk.begin; i < chunk.end;) {
    const int64_t position = base + i, offset = position % s.block_size;
    const int64_t column = std::min(position / s.block_size, s.max_blocks - 1);
    const int64_t block =
        std::min<int64_t>(std::max(row.table[column], 0), s.num_blocks - 1);
    const int64_t slab = block * s.num_kv_heads + head;
    const int64_t stop = std::min(chunk.end, i + s.block_size - offset);
    for (int64_t at = offset; i < stop; ++i, ++at) {
      const int64_t token = (slab * s.block_size + at) * s.head_dim;
      chunk.k[i] = pages.k + token;
      chunk.v[i] = pages.v + token;
      if (pages.k_scale) {
        chunk.k_scale[i] = pages.k_scale[slab * s.scale_width + at];
        chunk.v_scale[i] = pages.v_scale[slab * s.scale_width + at];
      }
    }
  }
}

template <typename Page>
void AsFloats(const Page* from, int64_t size, float* to) {
  int64_t d = 0;
  for (; d + kWidth <= size; d += kWidth) Store(to + d, LoadVec(from + d));
  for (; d < size; ++d) to[d] = ToFloat(from[d]);
}

struct TokensTag;

template <typename Page>
void Convert(const Shape& s, const Chunk<Page>& chunk, bool has_scales, Tokens& tokens) {
  tokens.base = chunk.base, tokens.begin = chunk.begin, tokens.end = chunk.end;
  tokens.k_scale = has_scales ? chunk.k_scale : nullptr;
  tokens.v_scale = has_scales ? chunk.v_scale : nullptr;
  if constexpr (std::is_same_v<Page, float>) {
    std::copy(chunk.k, chunk.k + kChunk, tokens.k);
    std::copy(chunk.v, chunk.v + kChunk, tokens.v);
  } else {
    float* memory = Scratch<TokensTag>(2 * kChunk * s.head_dim);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      float *k = memory + 2 * i * s.head_dim, *v = k + s.head_dim;
      AsFloats(chunk.k[i], s.head_dim, k);
      AsFloats(chunk.v[i], s.head_dim, v);
      tokens.k[i] = k, tokens.v[i] = v;
    }
  }
}

template <typename Page>
inline void Prefetch(const Page* address, int64_t size) {
  const char* bytes = reinterpret_cast<const char*>(address);
  for (int64_t at = 0; at < size * int64_t(sizeof(Page)); at += 64)
    __builtin_prefetch(bytes + at);
}

// The sums of kWidth vectors, in one vector. Each step adds neighbouring lanes of two
// vectors; it leaves the sum of vector i in lane Reversed(i).
constexpr int Reversed(int index) {
  int reversed = 0;
  for (int bit = 1; bit < kWidth; bit *= 2) reversed = 2 * reversed + !!(index & bit);
  return reversed;
}

// The sums of neighbouring lanes of a and b, by turns of kStep.
template <int kStep, int... kLanes>
inline Vec AddPairs(Vec a, Vec b, std::integer_sequence<int, kLanes...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
             a, b, ((kLanes & ~kStep) + (kLanes & kStep ? kWidth : 0))...) +
         __builtin_shufflevector(
             a, b, ((kLanes | kStep) + (kLanes & kStep ? kWidth : 0))...);
#else
  const IntVec low = {((kLanes & ~kStep) + (kLanes & kStep ? kWidth : 0))...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + kStep);
#endif
}

template <int kStep>
inline void AddLanes(Vec* sums) {
  if constexpr (kStep < kWidth) {
    constexpr int kHalf = kWidth / (2 * kStep);
    for (int i = 0; i < kHalf; ++i) 
      sums[i] = AddPairs<kStep>(sums[i], sums[i + kHalf],
                                std::make_integer_sequence<int, kWidth>());
    AddLanes<2 * kStep>(sums);
  }
}

// scores[line][token]: dot products of the lines' queries [lines, D] and the keys.
template <typename Page>
void Score(const Shape& s, int64_t num_lines, const float* queries, const Tokens& tokens,
           const Chunk<Page>& next, float* scores) {
  for (int64_t base = tokens.begin / kWidth * kWidth; base < tokens.end; base += kWidth) {
    const float* keys[kWidth];  // in the order that the sums want
    for (int i = 0; i < kWidth; ++i)
      keys[Reversed(i)] =
          tokens.k[std::min(std::max(base + i, tokens.begin), tokens.end - 1)];
    const int64_t last = std::min(base + kWidth, next.end);
    for (int64_t i = std::max(base, next.begin); i < last; ++i)
      Prefetch(next.k[i], s.head_dim);
    for (int64_t line = 0; line < num_lines; ++line) {
      const float* query = queries + line * s.head_dim;
      Vec sums[kWidth];
      for (int i = 0; i < kWidth; ++i) sums[i] = Vec{};
      int64_t d = 0;
      for (; d + kWidth <= s.head_dim; d += kWidth) {
        const Vec part = Load(query + d);
        for (int i = 0; i < kWidth; ++i) sums[i] += part * Load(keys[i] + d);
      }
      for (; d < s.head_dim; ++d)
        for (int i = 0; i < kWidth; ++i)
          sums[i][0] = MulAdd(query[d], keys[i][d], sums[i][0]);
      AddLanes<1>(sums);
      if (tokens.k_scale) sums[0] *= Load(tokens.k_scale + base);
      Store(scores + line * kChunk + base, sums[0]);
    }
  }
}

// out[line] += sum over tokens of weights[line][token] * value, for kLines lines.
template <int kLines>
void AddValues(const Shape& s, const float* weights, const Tokens& tokens, float* out) {
  constexpr int kVecs = kLines <= 2 ? 8 : kLines <= 4 ? 4 : 2;
  int64_t d = 0;
  const auto add = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; d + kCount * kWidth <= s.head_dim; d += kCount * kWidth) {
      Vec sums[kLines][kCount];
      for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kCount; ++v)
          sums[line][v] = Load(out + line * s.head_dim + d + v * kWidth);
      for (int64_t token = tokens.begin; token < tokens.end; ++token) {
        Vec value[kCount];
        for (int v = 0; v < kCount; ++v)
          value[v] = Load(tokens.v[token] + d + v * kWidth);
        for (int line = 0; line < kLines; ++line)
          for (int v = 0; v < kCount; ++v)
            sums[line][v] += weights[line * kChunk + token] * value[v];
      }
      for (int line = 0; line < kLines; ++line)
        for (int v = 0; v < kCount; ++v)
          Store(out + line * s.head_dim + d + v * kWidth, sums[line][v]);
    }
  };
  add(std::integral_constant<int, kVecs>());
  if constexpr (kVecs > 4) add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 1>());
  for (; d < s.head_dim; ++d) {
    for (int line = 0; line < kLines; ++line) {
      float sum = out[line * s.head_dim + d];
      for (int64_t token = tokens.begin; token < tokens.end; ++token)
        sum = MulAdd(weights[line * kChunk + token], tokens.v[token][d], sum);
      out[line * s.head_dim + d] = sum;
    }
  }
}

template <typename Page>
void AddAllValues(const Shape& s, int64_t num_lines, const float* weights,
                  const Tokens& tokens, const Chunk<Page>& next, float* out) {
  for (int64_t i = next.begin; i < next.end; ++i) Prefetch(next.v[i], s.head_dim);
  for (; num_lines >= 8; num_lines -= 8) {
    AddValues<8>(s, weights, tokens, out);
    weights += 8 * kChunk, out += 8 * s.head_dim;
  }
  switch (num_lines) {
    case 7: return AddValues<7>(s, weights, tokens, out);
    case 6: return AddValues<6>(s, weights, tokens, out);
    case 5: return AddValues<5>(s, weights, tokens, out);
    case 4: return AddValues<4>(s, weights, tokens, out);
    case 3: return AddValues<3>(s, weights, tokens, out);
    case 2: return AddValues<2>(s, weights, tokens, out);
    case 1: return AddValues<1>(s, weights, tokens, out);
  }
}

// Turns one line's scores into weights, and updates its maximum, sum and output.
void Softmax(const Shape& s, const Options& options, const Tokens& tokens,
             int64_t visible_from, int64_t visible_to, float* scores, float& maximum,
             float& sum, float* out) {
  const int64_t from = std::max(visible_from - tokens.base, tokens.begin);
  const int64_t to = std::min(visible_to - tokens.base, tokens.end);
  const int64_t first = tokens.begin / kWidth * kWidth;
  if (to <= from) {
    std::fill(scores + first, scores + kChunk, 0.0f);
    return;
  }
  IntVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  Vec highest = Splat(kMinusInfinity);
  for (int64_t i = first; i < tokens.end; i += kWidth) {
    Vec x = Load(scores + i) * options.scale;
    if (options.soft_cap != 0.0f)
      x = Tanh(x / options.soft_cap) * options.soft_cap;
    // What the query does not see may be anything, NaN too.
    const IntVec is_seen = (lanes >= int32_t(from - i)) & (lanes < int32_t(to - i));
    x = Select(is_seen, x, Splat(kMinusInfinity));
    highest = Select(x > highest, x, highest);
    Store(scores + i, x);
  }
  float largest = maximum;
  for (int i = 0; i < kWidth; ++i) largest = std::max(largest, highest[i]);
  if (largest == kMinusInfinity) largest = 0.0f;  // of NaN only: it shows in the weights
  if (largest != maximum) {
    const float shrink = maximum == kMinusInfinity ? 0.0f : std::exp(maximum - largest);
    sum *= shrink;
    for (int64_t d = 0; d < s.head_dim; ++d) out[d] *= shrink;
    maximum = largest;
  }
  Vec total = Vec{};
  for (int64_t i = first; i < tokens.end; i += kWidth) {
    Vec weight = Exp(Load(scores + i) - maximum);
    total += weight;
    if (tokens.v_scale) {
      const IntVec is_seen = (lanes >= int32_t(from - i)) & (lanes < int32_t(to - i));
      weight = Select(is_seen, weight * Load(tokens.v_scale + i), Vec{});
    }
    Store(scores + i, weight);
  }
  sum += Sum(total);
}

// Tokens that the query with index `query` of a row sees: [from, to).
struct Visible {
  int64_t from, to;
};
Visible VisibleTo(const Options& options, const Row& row, int64_t query) {
  const int64_t to = row.context_len - (row.num_queries - 1 - query);
  return {std::max<int64_t>(to - options.window, 0), std::max<int64_t>(to, 0)};
}

// Tokens that some query of a group sees.
Visible VisibleTo(const Options& options, const Row& row, int64_t first_query,
                  int64_t num_queries) {
  return {VisibleTo(options, row, first_query).from,
          VisibleTo(options, row, first_query + num_queries - 1).to};
}

// Computes one span of a group.
template <typename Page>
void AttendSpan(const Shape& s, const Options& options, const Pages<Page>& pages,
                const Row& row, const Group& group, int64_t span, const float* queries,
                const State& state) {
  const int64_t num_lines = group.num_queries * s.group;
  state.Clear(num_lines, s.head_dim);
  const Visible visible = VisibleTo(options, row, group.first_query, group.num_queries);
  const int64_t from = std::max(visible.from, span * kSpan);
  const int64_t to = std::min(visible.to, (span + 1) * kSpan);
  if (from >= to) return;
  alignas(64) float scores[kMaxLines * kChunk];
  Chunk<Page> chunks[2];
  Tokens tokens;
  int current = 0;
  int64_t base = from / kChunk * kChunk;
  FindTokens(s, pages, row, group.head, base, from, to, chunks[0]);
  for (; base < to; base += kChunk, current = 1 - current) {
    Chunk<Page>& next = chunks[1 - current];
    next.begin = next.end = 0;
    if (base + kChunk < to)
      FindTokens(s, pages, row, group.head, base + kChunk, from, to, next);
    Convert(s, chunks[current], pages.k_scale != nullptr, tokens);
    Score(s, num_lines, queries, tokens, next, scores);
    for (int64_t line = 0; line < num_lines; ++line) {
      const Visible seen = VisibleTo(options, row, group.first_query + line / s.group);
      Softmax(s, options, tokens, seen.from, seen.to, scores + line * kChunk,
              state.maximum[line], state.sum[line], state.out + line * s.head_dim);
    }
    AddAllValues(s, num_lines, scores, tokens, next, state.out);
  }
}

// Merges the next span of a group into `state`.
void Merge(const Shape& s, int64_t num_lines, const State& span, const State& state) {
  for (int64_t line = 0; line < num_lines; ++line) {
    if (span.maximum[line] == kMinusInfinity) continue;
    float* out = state.out + line * s.head_dim;
    const float* more = span.out + line * s.head_dim;
    if (state.maximum[line] == kMinusInfinity) {
      std::copy(more, more + s.head_dim, out);
      state.maximum[line] = span.maximum[line];
      state.sum[line] = span.sum[line];
      continue;
    }
    const float maximum = std::max(state.maximum[line], span.maximum[line]);
    const float a = std::exp(state.maximum[line] - maximum);
    const float b = std::exp(span.maximum[line] - maximum);
    for (int64_t d = 0; d < s.head_dim; ++d) out[d] = MulAdd(b, more[d], a * out[d]);
    state.sum[line] = MulAdd(b, span.sum[line], a * state.sum[line]);
    state.maximum[line] = maximum;
  }
}

// Queries and outputs: [T, H, D] of float32, bfloat16 or float16.
struct Vectors {
  ffi::DataType type;
  char* data;
  int64_t size;  // D
};

template <typename Call>
void WithType(const Vectors& vectors, int64_t index, const Call& call) {
  const int64_t at = index * vectors.size;
  if (vectors.type == ffi::F32)
    call(reinterpret_cast<float*>(vectors.data) + at);
  else if (vectors.type == ffi::BF16)
    call(reinterpret_cast<BFloat16*>(vectors.data) + at);
  else
    call(reinterpret_cast<Float16*>(vectors.data) + at);
}

void Read(const Vectors& vectors, int64_t index, float* to) {
  WithType(vectors, index, [&](const auto* from) { AsFloats(from, vectors.size, to); });
}

void Write(const Vectors& vectors, int64_t index, const float* from, float scale) {
  WithType(vectors, index, [&](auto* to) {
    using Number = std::remove_reference_t<decltype(*to)>;
    for (int64_t d = 0; d < vectors.size; ++d) to[d] = FromFloat<Number>(from[d] * scale);
  });
}

// Writes one line's output and log-sum-exp.
void Finish(const Options& options, float maximum, float sum, int64_t head,
            const float* sums, const Vectors& out, int64_t at, float* lse) {
  const bool is_empty = maximum == kMinusInfinity;
  float scale = is_empty ? 0.0f : 1.0f / sum;
  float total = is_empty ? kMinusInfinity : maximum + std::log(sum);
  if (!is_empty && options.sinks) {
    const float sink = options.sinks[head];
    const float larger = std::max(total, sink);
    const float with_sink = larger + std::log(std::exp(total - larger) +
                                              std::exp(sink - larger));
    scale *= std::exp(total - with_sink);
    total = with_sink;
  }
  Write(out, at, sums, scale);
  lse[at] = total;
}

// Limits what comes from data, so that no address leaves its buffer.
int64_t Clip(int64_t value, int64_t low, int64_t high) {
  return std::min(std::max(value, low), high);
}

struct QueriesTag;
struct SpanTag;
struct StateTag;

// All rows of a call.
template <typename Page>
class Call {
 public:
  Call(const Shape& shape, const Options& options, const Pages<Page>& pages,
       const Vectors& q, const int32_t* tables, const int32_t* context_lens,
       const int32_t* starts, const Vectors& out, float* lse)
      : s(shape), options_(options), pages_(pages), q_(q), out_(out), lse_(lse) {
    std::vector<bool> has_row(s.num_queries, false);
    for (int64_t row = 0; row < s.num_rows; ++row) {
      const int64_t start = starts ? Clip(starts[row], 0, s.num_queries) : row;
      const int64_t end = starts ? Clip(starts[row + 1], start, s.num_queries) : row + 1;
      const int64_t length = Clip(context_lens[row], 0, s.max_blocks * s.block_size);
      rows_.push_back({tables + row * s.max_blocks, length, end - start});
      AddGroups(row, start);
      std::fill(has_row.begin() + start, has_row.begin() + end, true);
    }
    for (int64_t query = 0; query < s.num_queries; ++query)
      if (!has_row[query]) WriteZeros(query);
  }

  void Run(ffi::ThreadPool& pool) {
    std::vector<std::atomic<int64_t>> left(groups_.size());
    for (size_t g = 0; g < groups_.size(); ++g) left[g].store(groups_[g].num_spans);
    std::vector<float> shared(num_floats_);
    ParallelFor(pool, items_.size(), [&](int64_t index) {
      const Item& item = items_[index];
      const Group& group = groups_[item.group];
      const Row& row = rows_[group.row];
      const int64_t num_lines = group.num_queries * s.group;
      const size_t size = State::Size(num_lines, s.head_dim);
      float* queries = Scratch<QueriesTag>(num_lines * s.head_dim);
      for (int64_t line = 0; line < num_lines; ++line)
        Read(q_, Line(group, line), queries + line * s.head_dim);
      const State state = State::At(Scratch<StateTag>(size), num_lines, s.head_dim);
      const auto attend = [&](int64_t span, const State& to) {
        AttendSpan(s, options_, pages_, row, group, group.first_span + span, queries, to);
      };
      if (item.span < 0) {  // all spans
        attend(0, state);
        for (int64_t span = 1; span < group.num_spans; ++span) {
          const State more = State::At(Scratch<SpanTag>(size), num_lines, s.head_dim);
          attend(span, more);
          Merge(s, num_lines, more, state);
        }
      } else {
        const auto part = [&](int64_t span) {
          return State::At(shared.data() + item.memory + span * size, num_lines,
                           s.head_dim);
        };
        attend(item.span, part(item.span));
        // The thread that computes a group's last span merges them all.
        if (left[item.group].fetch_sub(1) != 1) return;
        state.Clear(num_lines, s.head_dim);
        for (int64_t span = 0; span < group.num_spans; ++span)
          Merge(s, num_lines, part(span), state);
      }
      for (int64_t line = 0; line < num_lines; ++line)
        Finish(options_, state.maximum[line], state.sum[line],
               group.head * s.group + line % s.group, state.out + line * s.head_dim, out_,
               Line(group, line), lse_);
    });
  }

 private:
  struct Item {
    int64_t group, span;  // span -1: all
    size_t memory;        // of the group's spans
  };

  void AddGroups(int64_t index, int64_t start) {
    const Row& row = rows_[index];
    const int64_t tile = std::max<int64_t>(1, kMaxLines / s.group);
    for (int64_t head = 0; head < s.num_kv_heads; ++head) {
      for (int64_t first = 0; first < row.num_queries; first += tile) {
        const int64_t count = std::min(tile, row.num_queries - first);
        const Visible visible = VisibleTo(options_, row, first, count);
        const int64_t first_span = visible.from / kSpan;
        const int64_t num_spans =
            std::max<int64_t>(1, (visible.to + kSpan - 1) / kSpan - first_span);
        const int64_t group = groups_.size(), num_lines = count * s.group;
        groups_.push_back({index, head, start, first, count, first_span, num_spans});
        if (num_spans == 1 || num_lines > kMaxShared) {
          items_.push_back({group, -1, 0});
          continue;
        }
        for (int64_t span = 0; span < num_spans; ++span)
          items_.push_back({group, span, num_floats_});
        num_floats_ += num_spans * State::Size(num_lines, s.head_dim);
      }
    }
  }

  // Index of a line's query and head in [T, H].
  int64_t Line(const Group& group, int64_t line) const {
    const int64_t query = group.start + group.first_query + line / s.group;
    return query * s.num_heads + group.head * s.group + line % s.group;
  }

  void WriteZeros(int64_t query) {
    const std::vector<float> zeros(s.head_dim, 0.0f);
    for (int64_t at = query * s.num_heads; at < (query + 1) * s.num_heads; ++at) {
      Write(out_, at, zeros.data(), 1.0f);
      lse_[at] = kMinusInfinity;
    }
  }

  const Shape s;
  const Options options_;
  const Pages<Page> pages_;
  const Vectors q_, out_;
  float* lse_;
  std::vector<Row> rows_;
  std::vector<Group> groups_;
  std::vector<Item> items_;
  size_t num_floats_ = 0;
};

// ---- the call from XLA

template <typename Page>
Pages<Page> OfLayer(const Shape& s, int64_t layer, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale) {
  const int64_t size = s.num_blocks * s.num_kv_heads * s.block_size * s.head_dim;
  const int64_t scales = layer * s.num_blocks * s.num_kv_heads * s.scale_width;
  const bool has_scales = s.scale_width > 0;
  return {static_cast<const Page*>(k.untyped_data()) + layer * size,
          static_cast<const Page*>(v.untyped_data()) + layer * size,
          has_scales ? k_scale.typed_data() + scales : nullptr,
          has_scales ? v_scale.typed_data() + scales : nullptr};
}

template <typename Dims>
bool Equal(const Dims& a, const Dims& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

bool IsFloat(ffi::DataType type) {
  return type == ffi::F32 || type == ffi::BF16 || type == ffi::F16;
}

// q [T, H, D], pages [L, N, K, P, D], tables [S, M], context_lens [S], starts [S + 1] or
// [0], integers: layer and window, numbers: scale and soft cap (0: none), sinks [H] or
// [0], scales [L, N, K, P'] or [0]; out [T, H, D], lse [T, H].
ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                     ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables,
                     ffi::Buffer<ffi::S32> context_lens, ffi::Buffer<ffi::S32> starts,
                     ffi::Buffer<ffi::S32> integers, ffi::Buffer<ffi::F32> numbers,
                     ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::F32> k_scale,
                     ffi::Buffer<ffi::F32> v_scale, ffi::Result<ffi::AnyBuffer> out,
                     ffi::ResultBuffer<ffi::F32> lse) {
  const auto wrong = [](const char* what) { return ffi::Error::InvalidArgument(what); };
  const auto qd = q.dimensions(), kd = k.dimensions(), td = tables.dimensions();
  if (qd.size() != 3 || kd.size() != 5 || td.size() != 2)
    return wrong("q, k_pages, block_tables: expected ranks 3, 5, 2");
  Shape s;
  s.num_rows = td[0], s.max_blocks = td[1];
  s.num_queries = qd[0], s.num_heads = qd[1], s.head_dim = qd[2];
  s.num_blocks = kd[1], s.num_kv_heads = kd[2], s.block_size = kd[3];
  if (s.num_kv_heads == 0 || s.num_heads % s.num_kv_heads || kd[4] != s.head_dim)
    return wrong("q: expected heads that fit those of the pages");
  s.group = s.num_heads / s.num_kv_heads;
  if (s.group < 1 || s.group > kMaxLines)
    return wrong("q: expected 1 to 64 heads for each key/value head");
  if (!Equal(kd, v.dimensions()) || k.element_type() != v.element_type())
    return wrong("v_pages: expected the shape and dtype of k_pages");
  if (kd[0] == 0 || s.num_blocks == 0 || s.block_size == 0 || s.max_blocks == 0)
    return wrong("k_pages, block_tables: expected some blocks");
  const bool is_ragged = starts.element_count() > 0;
  if (context_lens.element_count() != size_t(s.num_rows) ||
      (is_ragged ? starts.element_count() != size_t(s.num_rows + 1)
                 : s.num_queries != s.num_rows))
    return wrong("context_lens, query_start_loc: expected one entry for each row");
  if (integers.element_count() != 2 || numbers.element_count() != 2)
    return wrong("attention: expected layer and window, scale and soft cap");
  if (sinks.element_count() && sinks.element_count() != size_t(s.num_heads))
    return wrong("sinks: expected one for each head");
  const auto sd = k_scale.dimensions();
  s.scale_width = sd.size() == 4 ? sd[3] : 0;
  if (s.scale_width && (!Equal(sd, v_scale.dimensions()) || s.scale_width < s.block_size ||
                        sd[0] != kd[0] || sd[1] != kd[1] || sd[2] != kd[2]))
    return wrong("k_scale, v_scale: expected one for each token");
  if (!IsFloat(q.element_type()) || !IsFloat(out->element_type()))
    return wrong("q: expected float32, bfloat16 or float16");
  if (!Equal(out->dimensions(), qd) ||
      lse->element_count() != size_t(s.num_queries * s.num_heads))
    return wrong("attention: expected results in the shape of q");

  const int64_t layer = Clip(integers.typed_data()[0], 0, kd[0] - 1);
  const Options options{numbers.typed_data()[0], numbers.typed_data()[1],
                        sinks.element_count() ? sinks.typed_data() : nullptr,
                        std::max<int64_t>(integers.typed_data()[1], 0)};
  const Vectors from{q.element_type(), static_cast<char*>(q.untyped_data()), s.head_dim};
  const Vectors to{out->element_type(), static_cast<char*>(out->untyped_data()),
                   s.head_dim};
  const auto run = [&](auto page) {
    using Page = decltype(page);
    Call<Page>(s, options, OfLayer<Page>(s, layer, k, v, k_scale, v_scale), from,
               tables.typed_data(), context_lens.typed_data(),
               is_ragged ? starts.typed_data() : nullptr, to, lse->typed_data())
        .Run(pool);
    return ffi::Error::Success();
  };
  return Guarded([&] {
    switch (k.element_type()) {
      case ffi::F32: return run(float{});
      case ffi::BF16: case ffi::U16: return run(BFloat16{});
      case ffi::F16: return run(Float16{});
      case ffi::S8: return run(int8_t{});
      case ffi::U8: case ffi::F8E4M3FN: return run(Float8{});
      default:
        return wrong("k_pages: expected float32, bfloat16, float16, int8 or float8");
    }
  });
}

}  // namespace attention
}  // namespace jpaged

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JpagedAttention, jpaged::attention::Attention,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
