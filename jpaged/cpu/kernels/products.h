// What the products of floats and of pairs share: matrices, strips and results.
#ifndef JPAGED_CPU_PRODUCTS_H_
#define JPAGED_CPU_PRODUCTS_H_

#include "common.h"

namespace jpaged {
namespace products {

#if defined(__SSE__) && !defined(__AVX512F__)
constexpr int kMaxRows = 6;  // of a tile: 16 registers
#else
constexpr int kMaxRows = 12;  // 32 registers
#endif

constexpr int64_t kMaxDepth = 32;       // matrix rows per step down a strip, at most
constexpr int64_t kStripBytes = 65536;  // of the sums of a strip of several panels

// Calls call(start, rows) for tiles of rows, the number of rows as a constant.
template <typename Call>
void ForTiles(int64_t rows, const Call& call) {
  int64_t row = 0;
  const auto tiles = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    if constexpr (kRows <= kMaxRows)
      for (; row + kRows <= rows; row += kRows) call(row, count);
  };
  // Tiles of 8 are the fastest for each row; those of 12 leave fewer rows behind.
  if (rows % 8 != 0) tiles(std::integral_constant<int, 12>());
  tiles(std::integral_constant<int, 8>());
  tiles(std::integral_constant<int, 6>());
  tiles(std::integral_constant<int, 4>());
  tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

struct Numbers {
  ffi::DataType type;  // float32, bfloat16 or float16
  void* data;
};

template <typename Call>
void WithType(const Numbers& numbers, const Call& call) {
  if (numbers.type == ffi::F32)
    call(static_cast<float*>(numbers.data));
  else if (numbers.type == ffi::BF16)
    call(static_cast<BFloat16*>(numbers.data));
  else
    call(static_cast<Float16*>(numbers.data));
}

struct InputTag;
struct SumsTag;
struct EdgeTag;

// A matrix w [K, N] with scales [N] or null, and its result y [M, N].
template <typename Weight>
struct Matrix {
  const Weight* w;
  const float* scales;
  Numbers y;
  int64_t columns;
};

// Calls strip(matrix, first panel, number of panels) for strips of all matrices on all
// threads, with `rows` rows of x. Strips are as wide as their sums allow, and as many as
// the threads share out evenly: long runs are read faster. A strip may begin in one
// matrix and end in another.
template <typename Weight, typename Strip>
void ForStrips(ffi::ThreadPool& pool, const std::vector<Matrix<Weight>>& matrices,
               int64_t rows, int64_t panel, const Strip& strip) {
  const auto panels = [panel](const auto& matrix) {
    return (matrix.columns + panel - 1) / panel;
  };
  int64_t num_panels = 0;
  for (const auto& matrix : matrices) num_panels += panels(matrix);
  if (num_panels == 0) return;
  const int64_t most = kStripBytes / (rows * panel * int64_t(sizeof(float)));
  const int64_t longest = std::max<int64_t>(most, 1);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t rounds = (num_panels + longest * threads - 1) / (longest * threads);
  const int64_t width =
      std::max<int64_t>((num_panels + rounds * threads - 1) / (rounds * threads), 1);
  ParallelFor(pool, (num_panels + width - 1) / width, [&](int64_t index) {
    int64_t first = index * width, end = first + width;
    for (const auto& matrix : matrices) {
      const int64_t count = panels(matrix);
      const int64_t start = std::max<int64_t>(first, 0), stop = std::min(count, end);
      if (start < stop) strip(matrix, start, stop - start);
      first -= count, end -= count;
    }
  });
}

// Writes sums [panels, M, panel] to `count` columns of the result from `start` on.
template <typename Weight>
void WriteStrip(const Matrix<Weight>& matrix, int64_t rows, int64_t start,
                int64_t count, int64_t panel, const float* sums) {
  const float* scales = matrix.scales;
  WithType(matrix.y, [&](auto* y) {
    using Number = std::remove_reference_t<decltype(*y)>;
    for (int64_t c = 0; c < count; c += panel) {
      const int64_t end = std::min(panel, count - c);
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = sums + (c / panel * rows + row) * panel;
        Number* to = y + row * matrix.columns + start + c;
        for (int64_t i = 0; i < end; ++i)
          to[i] = FromFloat<Number>(scales ? from[i] * scales[start + c + i] : from[i]);
      }
    }
  });
}

}  // namespace products
}  // namespace jpaged

#endif  // JPAGED_CPU_PRODUCTS_H_
