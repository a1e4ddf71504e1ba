// Products of few rows with a weight matrix: y = x w, w [K, N] as the model stores it.
//
// A decode step multiplies a few rows with every weight, so reading the weights is what
// takes time. Each thread takes columns and walks down the matrix, with the results of
// its rows and columns in registers. Every result is summed over k in ascending order in
// float32, so a row's result depends on neither the other rows nor the threads.
#include "common.h"

namespace jpaged {
namespace products {

struct InputTag;
struct OutputTag;

constexpr int kAhead = 12;  // rows of the matrix that are fetched ahead

// y [kRows, kVecs * kWidth] = x [kRows, K] w [K, columns], w and y with strides.
template <int kRows, int kVecs, typename Weight>
void Tile(const float* x, int64_t depth, const Weight* w, int64_t stride, float* y,
          int64_t y_stride) {
  Vec sums[kRows][kVecs];
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVecs; ++v) sums[row][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const Weight* at = w + k * stride;
    const char* ahead = reinterpret_cast<const char*>(at + kAhead * stride);
    for (size_t byte = 0; byte < kVecs * kWidth * sizeof(Weight); byte += 64)
      __builtin_prefetch(ahead + byte);
    Vec weights[kVecs];
    for (int v = 0; v < kVecs; ++v) weights[v] = LoadVec(at + v * kWidth);
    for (int row = 0; row < kRows; ++row) {
      const float scale = x[row * depth + k];
      for (int v = 0; v < kVecs; ++v) sums[row][v] += scale * weights[v];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVecs; ++v) Store(y + row * y_stride + v * kWidth, sums[row][v]);
}

// One row: the results lie in memory, so that the weights are read in long runs.
template <typename Weight>
void OneRow(const float* x, int64_t depth, const Weight* w, int64_t stride,
            int64_t columns, float* y) {
  std::fill(y, y + columns, 0.0f);
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    const Weight *w0 = w + k * stride, *w1 = w0 + stride, *w2 = w1 + stride,
                 *w3 = w2 + stride;
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      Vec sum = Load(y + c);
      sum += x[k] * LoadVec(w0 + c);
      sum += x[k + 1] * LoadVec(w1 + c);
      sum += x[k + 2] * LoadVec(w2 + c);
      sum += x[k + 3] * LoadVec(w3 + c);
      Store(y + c, sum);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < 4; ++i)
        y[c] = MulAdd(x[k + i], ToFloat(w[(k + i) * stride + c]), y[c]);
  }
  for (; k < depth; ++k)
    for (int64_t c = 0; c < columns; ++c)
      y[c] = MulAdd(x[k], ToFloat(w[k * stride + c]), y[c]);
}

template <int kVecs, typename Weight>
void Columns(const float* x, int64_t rows, int64_t depth, const Weight* w, int64_t stride,
             float* y, int64_t y_stride) {
  int64_t row = 0;
  const auto tile = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; row + kRows <= rows; row += kRows)
      Tile<kRows, kVecs>(x + row * depth, depth, w, stride, y + row * y_stride, y_stride);
  };
  if (kVecs <= 2) {
    tile(std::integral_constant<int, kVecs <= 2 ? 12 : 1>());
    tile(std::integral_constant<int, kVecs <= 2 ? 8 : 1>());
    tile(std::integral_constant<int, kVecs <= 2 ? 6 : 1>());
  }
  tile(std::integral_constant<int, 4>());
  tile(std::integral_constant<int, 2>());
  tile(std::integral_constant<int, 1>());
}

template <typename Weight>
void Product(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t depth,
             const Weight* w, int64_t columns, float* y) {
  const int64_t num_threads = std::max<int64_t>(pool.num_threads(), 1);
  if (rows == 1) {
    // A few parts for each thread, of whole cache lines.
    int64_t part = (columns + 4 * num_threads - 1) / (4 * num_threads);
    part = std::max<int64_t>((part + 63) / 64 * 64, 64);
    ParallelFor(pool, (columns + part - 1) / part, [&](int64_t index) {
      const int64_t start = index * part, count = std::min(part, columns - start);
      OneRow(x, depth, w + start, columns, count, y + start);
    });
    return;
  }
  constexpr int64_t kPanel = 2 * kWidth;
  const int64_t num_panels = (columns + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(1, num_panels / (8 * num_threads));
  ParallelFor(pool, (num_panels + grain - 1) / grain, [&](int64_t index) {
    const int64_t end = std::min(columns, (index + 1) * grain * kPanel);
    int64_t c = index * grain * kPanel;
    if (rows <= 4)
      for (; c + 2 * kPanel <= end; c += 2 * kPanel)
        Columns<4>(x, rows, depth, w + c, columns, y + c, columns);
    for (; c + kPanel <= end; c += kPanel)
      Columns<2>(x, rows, depth, w + c, columns, y + c, columns);
    for (; c + kWidth <= end; c += kWidth)
      Columns<1>(x, rows, depth, w + c, columns, y + c, columns);
    for (; c < end; ++c) {
      for (int64_t row = 0; row < rows; ++row) {
        float sum = 0.0f;
        for (int64_t k = 0; k < depth; ++k)
          sum = MulAdd(x[row * depth + k], ToFloat(w[k * columns + c]), sum);
        y[row * columns + c] = sum;
      }
    }
  });
}

// x [M, K] of float32 or bfloat16, w [K, N], scales [N] of int8 or none; y [M, N].
ffi::Error MatMul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                  ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> y) {
  const auto xd = x.dimensions(), wd = w.dimensions(), yd = y->dimensions();
  if (xd.size() != 2 || wd.size() != 2 || yd.size() != 2 || xd[1] != wd[0] ||
      yd[0] != xd[0] || yd[1] != wd[1])
    return ffi::Error::InvalidArgument("matmul: shapes do not fit");
  const int64_t rows = xd[0], depth = xd[1], columns = wd[1];
  const bool has_scales = scales.element_count() > 0;
  if (has_scales && scales.element_count() != size_t(columns))
    return ffi::Error::InvalidArgument("matmul: expected a scale for each column");
  const float* from;
  if (x.element_type() == ffi::F32) {
    from = static_cast<const float*>(x.untyped_data());
  } else if (x.element_type() == ffi::BF16) {
    float* floats = Scratch<InputTag>(rows * depth);
    const auto* numbers = static_cast<const BFloat16*>(x.untyped_data());
    for (int64_t i = 0; i < rows * depth; ++i) floats[i] = ToFloat(numbers[i]);
    from = floats;
  } else {
    return ffi::Error::InvalidArgument("matmul: x of an unexpected dtype");
  }
  const bool is_float = y->element_type() == ffi::F32;
  if (!is_float && y->element_type() != ffi::BF16)
    return ffi::Error::InvalidArgument("matmul: y of an unexpected dtype");
  float* to = is_float ? static_cast<float*>(y->untyped_data())
                       : Scratch<OutputTag>(rows * columns);
  switch (w.element_type()) {
    case ffi::F32:
      Product(pool, from, rows, depth, static_cast<const float*>(w.untyped_data()),
              columns, to);
      break;
    case ffi::BF16:
      Product(pool, from, rows, depth, static_cast<const BFloat16*>(w.untyped_data()),
              columns, to);
      break;
    case ffi::S8:
      Product(pool, from, rows, depth, static_cast<const int8_t*>(w.untyped_data()),
              columns, to);
      break;
    default: return ffi::Error::InvalidArgument("matmul: w of an unexpected dtype");
  }
  if (has_scales) {
    const float* scale = scales.typed_data();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < columns; ++c) to[row * columns + c] *= scale[c];
  }
  if (!is_float) {
    auto* numbers = static_cast<BFloat16*>(y->untyped_data());
    for (int64_t i = 0; i < rows * columns; ++i) numbers[i] = FromFloat<BFloat16>(to[i]);
  }
  return ffi::Error::Success();
}

}  // namespace products
}  // namespace jpaged

XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedMatMul, jpaged::products::MatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
