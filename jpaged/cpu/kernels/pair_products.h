// Products that multiply pairs of numbers of 16 bits: int8 and bfloat16 weights.
//
// Many processors have instructions that multiply adjacent 16-bit numbers in pairs and
// add both products to a 32-bit sum. Such an instruction does the work of two float32
// instructions. Rows k and k + 1 of the plain matrix are interleaved in registers to get
// such pairs.
//
// int8 weights: a row of x is converted to int16, with one scale for each kBlock k. The
// sums of a block are exact integers, and are added to float32 sums in ascending order.
// An input has an error of at most 2^-16 of the largest of its block; float32 results
// differ in the fifth digit. If a number of a block is infinite or NaN, the results of
// that row are NaN.
//
// bfloat16 weights and inputs: products are exact, sums are float32 in a fixed order.
//
// As in products.cc, a row's result depends on neither the other rows nor the threads.
#ifndef JPAGED_CPU_PAIR_PRODUCTS_H_
#define JPAGED_CPU_PAIR_PRODUCTS_H_

#include "products.h"

namespace jpaged {
namespace products {

// The arithmetic of pairs for a type of weights; void: there is none.
template <typename Weight>
struct PairsOf {
  using type = void;
};

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))

// A multiple of kMaxDepth.
constexpr int64_t kBlock = 256;  // 256 * 32767 * 128 < 2^31
constexpr float kLargest = 32767.0f;

// Numbers a of 16 bits of row k and b of row k + 1 as pairs. In each 128 bits, the first
// four columns go to pairs[0] and the other four to pairs[1]; see InOrder.
#if defined(__AVX512BW__)
inline void Interleave(__m512i a, __m512i b, IntVec* pairs) {
  pairs[0] = (IntVec)_mm512_unpacklo_epi16(a, b);
  pairs[1] = (IntVec)_mm512_unpackhi_epi16(a, b);
}
inline void InOrder(Vec* v) {
  const __m512 a = _mm512_shuffle_f32x4((__m512)v[0], (__m512)v[1], 0x44);
  const __m512 b = _mm512_shuffle_f32x4((__m512)v[0], (__m512)v[1], 0xee);
  v[0] = (Vec)_mm512_shuffle_f32x4(a, a, 0xd8);
  v[1] = (Vec)_mm512_shuffle_f32x4(b, b, 0xd8);
}
#else
inline void Interleave(__m256i a, __m256i b, IntVec* pairs) {
  pairs[0] = (IntVec)_mm256_unpacklo_epi16(a, b);
  pairs[1] = (IntVec)_mm256_unpackhi_epi16(a, b);
}
inline void InOrder(Vec* v) {
  const __m256 a = (__m256)v[0], b = (__m256)v[1];
  v[0] = (Vec)_mm256_permute2f128_ps(a, b, 0x20);
  v[1] = (Vec)_mm256_permute2f128_ps(a, b, 0x31);
}
#endif

struct Int8Pairs {
  using Weight = int8_t;
  using Total = IntVec;
  static constexpr bool kIsInteger = true;
  static bool Accepts(ffi::DataType) { return true; }

  // Pairs of 2 * kWidth columns.
  static void LoadPairs(const int8_t* first, const int8_t* second, IntVec* pairs) {
#if defined(__AVX512BW__)
    Interleave(_mm512_cvtepi8_epi16(LoadAs<__m256i>(first)),
               _mm512_cvtepi8_epi16(LoadAs<__m256i>(second)), pairs);
#else
    Interleave(_mm256_cvtepi8_epi16(LoadAs<__m128i>(first)),
               _mm256_cvtepi8_epi16(LoadAs<__m128i>(second)), pairs);
#endif
  }

  static IntVec Add(IntVec total, int32_t x, IntVec w) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)total, _mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVX512BW__)
    return total + (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVXVNNI__)
    return (IntVec)_mm256_dpwssd_avx_epi32((__m256i)total, _mm256_set1_epi32(x),
                                           (__m256i)w);
#else
    return total + (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(x), (__m256i)w);
#endif
  }
};
template <>
struct PairsOf<int8_t> {
  using type = Int8Pairs;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct BFloat16Pairs {
  using Weight = BFloat16;
  using Total = Vec;
  static constexpr bool kIsInteger = false;
  static bool Accepts(ffi::DataType x) { return x == ffi::BF16; }

  static void LoadPairs(const BFloat16* first, const BFloat16* second, IntVec* pairs) {
    Interleave(LoadAs<__m512i>(first), LoadAs<__m512i>(second), pairs);
  }

  static Vec Add(Vec total, int32_t x, IntVec w) {
    return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(x),
                                 (__m512bh)w);
  }
};
template <>
struct PairsOf<BFloat16> {
  using type = BFloat16Pairs;
};
#endif

// Adds the products of `count` pairs of k to totals [kRows, kVecs * kWidth], with x
// [count, kRows] of pairs. load(pair, out) loads kVecs vectors of weights.
template <typename Pairs, int kRows, int kVecs, typename LoadWeights>
void PairTile(const int32_t* x, int64_t count, float* totals, const LoadWeights& load) {
  using Total = typename Pairs::Total;
  Total total[kRows][kVecs];
  JPAGED_UNROLL
  for (int row = 0; row < kRows; ++row)
    JPAGED_UNROLL
    for (int v = 0; v < kVecs; ++v)
      total[row][v] = LoadAs<Total>(totals + (row * kVecs + v) * kWidth);
  for (int64_t pair = 0; pair < count; ++pair) {
    IntVec weights[kVecs];
    load(pair, weights);
    JPAGED_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int32_t factors = LoadAs<int32_t>(x + pair * kRows + row);
      JPAGED_UNROLL
      for (int v = 0; v < kVecs; ++v)
        total[row][v] = Pairs::Add(total[row][v], factors, weights[v]);
    }
  }
  JPAGED_UNROLL
  for (int row = 0; row < kRows; ++row)
    JPAGED_UNROLL
    for (int v = 0; v < kVecs; ++v)
      Store(totals + (row * kVecs + v) * kWidth, (Vec)total[row][v]);
}

// Converts `numbers` to int16 in `out`, scaled so that the largest magnitude becomes
// kLargest. Returns this magnitude; 0 if all numbers are zero; NaN if a number is
// infinite or NaN. `depth` is a multiple of kWidth.
inline float ToInt16(const float* numbers, int64_t depth, int16_t* out) {
  typedef int16_t Halves __attribute__((vector_size(2 * kWidth)));
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec most = Splat(0.0f), is_finite = Splat(0.0f);
  for (int64_t k = 0; k < depth; k += kWidth) {
    const Vec v = Load(numbers + k), magnitude = (Vec)((IntVec)v & 0x7fffffff);
    most = Select(magnitude > most, magnitude, most);
    is_finite += v * 0.0f;
  }
  float lanes[kWidth], largest = 0;
  Store(lanes, most);
  for (float lane : lanes) largest = std::max(largest, lane);
  const float problem = Sum(is_finite);
  if (problem != 0 || !(largest > 0)) {  // NaN is not 0
    std::memset(out, 0, depth * sizeof(int16_t));
    return problem;
  }
  for (int64_t k = 0; k < depth; k += kWidth) {
    // Divides first, because 1 / largest can overflow.
    const Vec rounded = Load(numbers + k) / largest * kLargest + magic;
    const Halves halves =
        __builtin_convertvector((IntVec)rounded - (IntVec)magic, Halves);
    std::memcpy(out + k, &halves, sizeof(halves));
  }
  return largest;
}

struct LineTag;
struct NumbersTag;
struct FactorsTag;
struct TotalsTag;
struct PanelTag;

// Products of the same rows x [M, K] with one or several matrices.
template <typename Pairs>
class PairProduct {
  using Weight = typename Pairs::Weight;

 public:
  PairProduct(int64_t rows, int64_t depth, const Numbers& x,
              std::vector<Matrix<Weight>> matrices)
      : rows_(rows),
        depth_(depth),
        num_pairs_((depth + 1) / 2),
        num_blocks_((depth + kBlock - 1) / kBlock),
        matrices_(std::move(matrices)) {
    const FlushSubnormals flush;
    int32_t* packed = reinterpret_cast<int32_t*>(Scratch<InputTag>(rows * num_pairs_));
    float* factors = Scratch<FactorsTag>(rows * num_blocks_);
    // Tile after tile; of a tile pair after pair, its rows side by side.
    ForTiles(rows, [&](int64_t start, auto count) {
      for (int64_t row = 0; row < count; ++row) {
        const int16_t* line = Line(x, start + row, factors + (start + row) * num_blocks_);
        int32_t* to = packed + start * num_pairs_ + row;
        for (int64_t pair = 0; pair < num_pairs_; ++pair)
          std::memcpy(to + pair * count, line + 2 * pair, 4);
      }
    });
    x_ = packed, factors_ = factors;
  }

  void Run(ffi::ThreadPool& pool) {
    if (rows_ <= kFewRows) return RunPanels<4>(pool);
    RunPanels<2>(pool);
  }

 private:
  static constexpr int64_t kFewRows = kMaxRows > 6 ? 4 : 2;

  // A row of x as numbers of 16 bits, with zeros behind it, and its factors.
  const int16_t* Line(const Numbers& x, int64_t row, float* factors) {
    const int64_t padded = (depth_ + kWidth) / kWidth * kWidth;
    int16_t* line = reinterpret_cast<int16_t*>(Scratch<LineTag>((padded + 1) / 2));
    if constexpr (Pairs::kIsInteger) {
      float* numbers = Scratch<NumbersTag>(padded);
      WithType(x, [&](const auto* from) {
        for (int64_t k = 0; k < depth_; ++k) numbers[k] = ToFloat(from[row * depth_ + k]);
      });
      std::fill(numbers + depth_, numbers + padded, 0.0f);
      for (int64_t k = 0; k < padded; k += kBlock) {
        const float largest =
            ToInt16(numbers + k, std::min(kBlock, padded - k), line + k);
        if (k < depth_) factors[k / kBlock] = largest;
      }
    } else {
      const BFloat16* from = static_cast<const BFloat16*>(x.data) + row * depth_;
      std::memcpy(line, from, depth_ * sizeof(BFloat16));
      std::memset(line + depth_, 0, (padded - depth_) * sizeof(BFloat16));
    }
    return line;
  }

  template <int kVecs>
  void RunPanels(ffi::ThreadPool& pool) {
    ForStrips(pool, matrices_, rows_, kVecs * kWidth,
              [&](const auto& matrix, int64_t first_panel, int64_t num_panels) {
                Strip<kVecs>(matrix, first_panel, num_panels);
              });
  }

  template <int kVecs>
  void Strip(const Matrix<Weight>& matrix, int64_t first_panel, int64_t num_panels) {
    constexpr int64_t kPanel = kVecs * kWidth;
    const int64_t start = first_panel * kPanel, columns = matrix.columns;
    const int64_t size = num_panels * rows_ * kPanel;
    float* totals = Scratch<TotalsTag>(size);  // zero has the same bits in both types
    std::fill(totals, totals + size, 0.0f);
    float* sums = totals;
    if constexpr (Pairs::kIsInteger) {
      sums = Scratch<SumsTag>(size);
      std::fill(sums, sums + size, 0.0f);
    }
    const int64_t step = rows_ <= 8 ? 16 : kMaxDepth;
    for (int64_t k = 0; k < depth_; k += step) {
      const Weight* line = matrix.w + k * columns + start;
      const Weight* ahead = k + step < depth_ ? line + step * columns : line;
      const int64_t count = std::min(step, depth_ - k);
      for (int64_t panel = 0; panel < num_panels; ++panel)
        Panel<kVecs>(line + panel * kPanel, ahead + panel * kPanel, k, count, columns,
                     std::min(kPanel, columns - start - panel * kPanel),
                     totals + panel * rows_ * kPanel);
      if constexpr (Pairs::kIsInteger)
        if ((k + step) % kBlock == 0 || k + step >= depth_)
          EndBlock<kVecs>(num_panels, k / kBlock, totals, sums);
    }
    for (int64_t i = 0; i < size; i += 2 * kWidth) {
      Vec v[2] = {Load(sums + i), Load(sums + i + kWidth)};
      InOrder(v);
      Store(sums + i, v[0]), Store(sums + i + kWidth, v[1]);
    }
    WriteStrip(matrix, rows_, start, std::min(num_panels * kPanel, columns - start),
               kPanel, sums);
  }

  // Adds the products of rows [k, k + count) of a panel of `width` columns.
  template <int kVecs>
  void Panel(const Weight* w, const Weight* ahead, int64_t k, int64_t count,
             int64_t columns, int64_t width, float* totals) {
    constexpr int64_t kPanel = kVecs * kWidth;
    int64_t stride = columns;
    if (width < kPanel || count % 2) {  // pads columns and rows with zeros
      constexpr int64_t kSize = kMaxDepth * kPanel;
      Weight* edge = reinterpret_cast<Weight*>(Scratch<EdgeTag>(kSize));
      std::memset(edge, 0, kSize * sizeof(Weight));
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(edge + i * kPanel, w + i * columns, width * sizeof(Weight));
      w = edge, stride = kPanel;
    }
    const int64_t pairs = (count + 1) / 2;
    const auto load = [=](int64_t pair, IntVec* weights) {
      const Weight* first = w + 2 * pair * stride;
      JPAGED_UNROLL
      for (int v = 0; v < kVecs; v += 2)
        Pairs::LoadPairs(first + v * kWidth, first + stride + v * kWidth, weights + v);
    };
    const auto prefetch = [=](int64_t pair) {
      const char* next = reinterpret_cast<const char*>(ahead + 2 * pair * columns);
      const int64_t below = columns * sizeof(Weight);
      for (int64_t i = 0; i < int64_t(kPanel * sizeof(Weight)); i += 64)
        __builtin_prefetch(next + i), __builtin_prefetch(next + below + i);
    };
    // Several tiles share weights that are interleaved once.
    const bool is_packed = rows_ > kMaxRows || (rows_ & (rows_ - 1)) != 0;
    IntVec* packed = nullptr;
    if (is_packed) {
      packed = reinterpret_cast<IntVec*>(Scratch<PanelTag>(kMaxDepth / 2 * kPanel));
      for (int64_t pair = 0; pair < pairs; ++pair) load(pair, packed + pair * kVecs);
    }
    const auto load_packed = [packed](int64_t pair, IntVec* weights) {
      JPAGED_UNROLL
      for (int v = 0; v < kVecs; ++v) weights[v] = packed[pair * kVecs + v];
    };
    ForTiles(rows_, [&](int64_t row, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      if constexpr (kVecs == 2 || kRows <= kFewRows) {
        const auto tile = [&](const auto& load) {
          PairTile<Pairs, kRows, kVecs>(x_ + row * num_pairs_ + k / 2 * kRows, pairs,
                                        totals + row * kPanel, load);
        };
        // Memory is read while the first tile is multiplied.
        const auto with_prefetch = [&](const auto& load) {
          tile([prefetch, load](int64_t pair, IntVec* weights) {
            prefetch(pair);
            load(pair, weights);
          });
        };
        if (!is_packed)
          with_prefetch(load);
        else if (row == 0)
          with_prefetch(load_packed);
        else
          tile(load_packed);
      }
    });
  }

  // Adds the integers of a block to the sums, and clears them.
  template <int kVecs>
  void EndBlock(int64_t num_panels, int64_t block, float* totals, float* sums) {
    constexpr float kUnit = 1.0f / kLargest;
    constexpr int64_t kPanel = kVecs * kWidth;
    for (int64_t panel = 0; panel < num_panels; ++panel)
      for (int64_t row = 0; row < rows_; ++row) {
        const float factor = factors_[row * num_blocks_ + block];
        const int64_t start = (panel * rows_ + row) * kPanel;
        for (int64_t i = start; i < start + kPanel; i += kWidth) {
          const IntVec total = LoadAs<IntVec>(totals + i);
          const Vec exact = __builtin_convertvector(total, Vec) * kUnit;
          Store(sums + i, Load(sums + i) + exact * factor);
          Store(totals + i, Splat(0.0f));
        }
      }
  }

  const int64_t rows_, depth_, num_pairs_, num_blocks_;
  const int32_t* x_;
  const float* factors_;
  const std::vector<Matrix<Weight>> matrices_;
};

#endif

}  // namespace products
}  // namespace jpaged

#endif  // JPAGED_CPU_PAIR_PRODUCTS_H_
