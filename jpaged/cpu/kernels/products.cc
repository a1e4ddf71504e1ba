// Products of few rows with weight matrices: y = x w, w [K, N] as the model stores it.
//
// A decode step multiplies a few rows with every weight, so reading the weights is what
// takes time. A thread takes a strip of columns and walks down the matrix, some rows at
// a time, so that it reads runs of a kilobyte and few pages at once. Panels of the strip
// are multiplied with tiles of rows, whose sums are in registers; between two steps down
// the sums are in the thread's own memory.
//
// Every result is summed over k in ascending order in float32, one rounding for each
// product and sum, so a row's result depends on neither the other rows nor the threads.
//
// This file has the arithmetic of float32, for all types, and the calls from XLA. int8
// weights, and bfloat16 weights and inputs, are multiplied in pairs where the processor
// can (pair_products.h).
#include <type_traits>

#include "pair_products.h"
#include "products.h"

namespace jpaged {
namespace products {

// Sums [kRows, kVecs * kWidth] += x w, with x [count, kRows] and w [count, stride].
// `ahead` has the weights that are multiplied next, with the same stride.
template <int kRows, int kVecs, typename Weight>
void Tile(const float* x, int64_t count, const Weight* w, int64_t stride,
          const Weight* ahead, int64_t ahead_stride, float* sums) {
  constexpr int64_t kBytes = kVecs * kWidth * sizeof(Weight);
  Vec total[kRows][kVecs];
  JPAGED_UNROLL
  for (int row = 0; row < kRows; ++row)
    JPAGED_UNROLL
    for (int v = 0; v < kVecs; ++v)
      total[row][v] = Load(sums + (row * kVecs + v) * kWidth);
  for (int64_t k = 0; k < count; ++k) {
    const char* next = reinterpret_cast<const char*>(ahead + k * ahead_stride);
    for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(next + byte);
    Vec weights[kVecs];
    JPAGED_UNROLL
    for (int v = 0; v < kVecs; ++v) weights[v] = LoadVec(w + k * stride + v * kWidth);
    JPAGED_UNROLL
    for (int row = 0; row < kRows; ++row)
      JPAGED_UNROLL
      for (int v = 0; v < kVecs; ++v)
        total[row][v] += x[k * kRows + row] * weights[v];
  }
  JPAGED_UNROLL
  for (int row = 0; row < kRows; ++row)
    JPAGED_UNROLL
    for (int v = 0; v < kVecs; ++v)
      Store(sums + (row * kVecs + v) * kWidth, total[row][v]);
}

// Products of the same rows x [M, K] with one or several matrices.
template <typename Weight>
class Product {
 public:
  Product(int64_t rows, int64_t depth, const Numbers& x,
          std::vector<Matrix<Weight>> matrices)
      : rows_(rows), depth_(depth), matrices_(std::move(matrices)) {
    // Tile after tile; of a tile k after k, its rows side by side.
    float* packed = Scratch<InputTag>(rows * depth);
    WithType(x, [&](const auto* numbers) {
      ForTiles(rows, [&](int64_t start, auto count) {
        for (int64_t row = 0; row < count; ++row)
          for (int64_t k = 0; k < depth; ++k)
            packed[start * depth + k * count + row] =
                ToFloat(numbers[(start + row) * depth + k]);
      });
    });
    x_ = packed;
  }

  void Run(ffi::ThreadPool& pool) {
    if (rows_ <= 4) return RunPanels<4>(pool);
    RunPanels<2>(pool);
  }

 private:
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
    float* sums = Scratch<SumsTag>(num_panels * rows_ * kPanel);
    std::fill(sums, sums + num_panels * rows_ * kPanel, 0.0f);
    // With few rows, fewer runs are read faster.
    const int64_t step = rows_ <= 8 ? 8 : rows_ <= 16 ? 16 : kMaxDepth;
    for (int64_t k = 0; k < depth_; k += step) {
      const int64_t count = std::min(step, depth_ - k);
      const Weight* line = matrix.w + k * columns + start;
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const Weight* w = line + panel * kPanel;
        const bool is_last = panel + 1 == num_panels;
        const Weight* ahead = is_last ? line + step * columns : w + kPanel;
        int64_t stride = columns;
        const int64_t left = columns - start - panel * kPanel;
        if (left < kPanel) {  // behind the last column are zeros
          Weight* edge = reinterpret_cast<Weight*>(Scratch<EdgeTag>(kMaxDepth * kPanel));
          std::memset(edge, 0, kMaxDepth * kPanel * sizeof(Weight));
          for (int64_t i = 0; i < count; ++i)
            std::memcpy(edge + i * kPanel, w + i * columns, left * sizeof(Weight));
          w = edge, stride = kPanel;
        }
        ForTiles(rows_, [&](int64_t row, auto rows) {
          constexpr int kRows = decltype(rows)::value;
          if constexpr (kVecs == 2 || kRows <= 4)
            Tile<kRows, kVecs>(x_ + row * depth_ + k * kRows, count, w, stride, ahead,
                               columns, sums + (panel * rows_ + row) * kPanel);
        });
      }
    }
    WriteStrip(matrix, rows_, start, std::min(num_panels * kPanel, columns - start),
               kPanel, sums);
  }

  const int64_t rows_, depth_;
  const float* x_;
  const std::vector<Matrix<Weight>> matrices_;
};

// Multiplies by pairs where there is such a kernel, and otherwise in float32.
template <typename Weight>
void Multiply(int64_t rows, int64_t depth, const Numbers& x,
              std::vector<Matrix<Weight>> matrices, ffi::ThreadPool& pool) {
  using Arithmetic = typename PairsOf<Weight>::type;
  if constexpr (!std::is_void_v<Arithmetic>)
    if (Arithmetic::Accepts(x.type))
      return PairProduct<Arithmetic>(rows, depth, x, std::move(matrices)).Run(pool);
  Product<Weight>(rows, depth, x, std::move(matrices)).Run(pool);
}

inline bool IsFloat(ffi::DataType type) {
  return type == ffi::F32 || type == ffi::BF16 || type == ffi::F16;
}

// Calls call(w) with the data of w in its type.
template <typename Call>
ffi::Error WithWeights(ffi::AnyBuffer w, const Call& call) {
  const void* data = w.untyped_data();
  switch (w.element_type()) {
    case ffi::F32: return call(static_cast<const float*>(data));
    case ffi::BF16: return call(static_cast<const BFloat16*>(data));
    case ffi::F16: return call(static_cast<const Float16*>(data));
    case ffi::S8: return call(static_cast<const int8_t*>(data));
    default:
      return ffi::Error::InvalidArgument("matmul: expected w of floats or int8");
  }
}

// An array of floats [M, columns] from row `start` on.
inline Numbers Rows(ffi::AnyBuffer array, int64_t start, int64_t columns) {
  const int64_t bytes = array.element_type() == ffi::F32 ? 4 : 2;
  return {array.element_type(),
          static_cast<char*>(array.untyped_data()) + start * columns * bytes};
}

inline ffi::Error CheckProduct(ffi::AnyBuffer x, ffi::AnyBuffer w,
                               ffi::Buffer<ffi::F32> scales, ffi::AnyBuffer y) {
  const auto xd = x.dimensions(), wd = w.dimensions(), yd = y.dimensions();
  if (xd.size() != 2 || wd.size() != 2 || yd.size() != 2 || xd[1] != wd[0] ||
      yd[0] != xd[0] || yd[1] != wd[1])
    return ffi::Error::InvalidArgument("matmul: expected shapes [M, K], [K, N], [M, N]");
  if (scales.element_count() && scales.element_count() != size_t(wd[1]))
    return ffi::Error::InvalidArgument("matmul: expected a scale for each column");
  if (!IsFloat(x.element_type()) || !IsFloat(y.element_type()))
    return ffi::Error::InvalidArgument("matmul: expected x and y of floats");
  return ffi::Error::Success();
}

// x [M, K] of floats; then for each matrix w [K, N] and scales [N] or [0], and as a
// result y [M, N] of floats. All matrices have one type.
inline ffi::Error MatMul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  const size_t count = results.size();
  if (count == 0 || args.size() != 2 * count)
    return ffi::Error::InvalidArgument("matmul: expected a matrix for each result");
  std::vector<ffi::AnyBuffer> ws, ys;
  std::vector<const float*> scales;
  for (size_t i = 0; i < count; ++i) {
    const auto w = args.get<ffi::AnyBuffer>(2 * i);
    const auto factors = args.get<ffi::Buffer<ffi::F32>>(2 * i + 1);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!w.has_value() || !factors.has_value() || !y.has_value())
      return ffi::Error::InvalidArgument("matmul: expected float32 scales");
    const ffi::Error error = CheckProduct(x, *w, *factors, **y);
    if (error.failure()) return error;
    if (i > 0 && w->element_type() != ws[0].element_type())
      return ffi::Error::InvalidArgument("matmul: expected matrices of one type");
    ws.push_back(*w), ys.push_back(**y);
    scales.push_back(factors->element_count() ? factors->typed_data() : nullptr);
  }
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  if (rows == 0) return ffi::Error::Success();
  return Guarded([&] {
    return WithWeights(ws[0], [&](const auto* first) {
      using Weight = std::remove_const_t<std::remove_reference_t<decltype(*first)>>;
      std::vector<Matrix<Weight>> matrices;
      for (size_t i = 0; i < count; ++i) {
        const int64_t columns = ws[i].dimensions()[1];
        matrices.push_back({static_cast<const Weight*>(ws[i].untyped_data()), scales[i],
                            Rows(ys[i], 0, columns), columns});
      }
      Multiply(rows, depth, Rows(x, 0, depth), std::move(matrices), pool);
      return ffi::Error::Success();
    });
  });
}

// Groups of rows with a matrix each: x [T, K], w [X, K, N], scales [X, N] or [0, 0],
// counts [X] of rows. Rows past their sum are zeros.
inline ffi::Error GroupedMatMul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                                ffi::Buffer<ffi::F32> scales,
                                ffi::Buffer<ffi::S32> counts,
                                ffi::Result<ffi::AnyBuffer> y) {
  const auto xd = x.dimensions(), wd = w.dimensions(), yd = y->dimensions();
  if (xd.size() != 2 || wd.size() != 3 || yd.size() != 2 || xd[1] != wd[1] ||
      yd[0] != xd[0] || yd[1] != wd[2] || counts.element_count() != size_t(wd[0]))
    return ffi::Error::InvalidArgument(
        "grouped_matmul: expected shapes [T, K], [X, K, N], [X], [T, N]");
  if (scales.element_count() && scales.element_count() != size_t(wd[0] * wd[2]))
    return ffi::Error::InvalidArgument("grouped_matmul: expected a scale for each column");
  if (!IsFloat(x.element_type()) || !IsFloat(y->element_type()))
    return ffi::Error::InvalidArgument("grouped_matmul: expected x and y of floats");
  const int64_t num_rows = xd[0], depth = xd[1], columns = wd[2];
  if (num_rows == 0 || columns == 0) return ffi::Error::Success();
  return Guarded([&] {
    return WithWeights(w, [&](const auto* weights) {
      int64_t start = 0;
      for (int64_t group = 0; group < wd[0]; ++group) {
        const int64_t count = std::min<int64_t>(
            std::max<int64_t>(counts.typed_data()[group], 0), num_rows - start);
        if (count == 0) continue;
        using Weight = std::remove_const_t<std::remove_reference_t<decltype(*weights)>>;
        std::vector<Matrix<Weight>> matrix = {{
            weights + group * depth * columns,
            scales.element_count() ? scales.typed_data() + group * columns : nullptr,
            Rows(*y, start, columns), columns}};
        Multiply(count, depth, Rows(x, start, depth), std::move(matrix), pool);
        start += count;
      }
      const Numbers rest = Rows(*y, start, columns);
      const size_t bytes = y->element_type() == ffi::F32 ? 4 : 2;
      std::memset(rest.data, 0, size_t((num_rows - start) * columns) * bytes);
      return ffi::Error::Success();
    });
  });
}

}  // namespace products
}  // namespace jpaged

// Whether int8 weights are multiplied in pairs on this build's processors.
extern "C" int JpagedHasInt8Pairs() {
  using Pairs = jpaged::products::PairsOf<int8_t>::type;
  return !std::is_void_v<Pairs>;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedMatMul, jpaged::products::MatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedGroupedMatMul, jpaged::products::GroupedMatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
