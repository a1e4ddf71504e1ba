// Norms and gates of a decoder's layers, on float32.
//
// XLA computes them in several passes, and of the exponential with scalar instructions.
// Each number depends on its own row alone, in a fixed order of sums.
#include "common.h"

namespace jpaged {
namespace elementwise {

constexpr int64_t kChunk = 8192;  // numbers that are worth a thread

inline bool SameShape(ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Calls call(at, load, store) for vectors of `size` numbers; the last one may be short.
template <typename Call>
void ForVectors(int64_t size, const Call& call) {
  int64_t at = 0;
  for (; at + kWidth <= size; at += kWidth)
    call(at, [](const float* from) { return Load(from); },
         [](float* to, Vec value) { Store(to, value); });
  const int64_t left = size - at;
  if (left == 0) return;
  call(at,
       [left](const float* from) {
         float part[kWidth] = {};
         std::memcpy(part, from, left * sizeof(float));
         return Load(part);
       },
       [left](float* to, Vec value) { std::memcpy(to, &value, left * sizeof(float)); });
}

// y = x / sqrt(mean of x^2 + eps) * w, for rows x [M, E] and w [E].
ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                   ffi::Buffer<ffi::F32> w, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || !SameShape(x, *y) || w.element_count() != size_t(dims[1]))
    return ffi::Error::InvalidArgument("rms_norm: expected shapes [M, E] and [E]");
  const int64_t rows = dims[0], size = dims[1];
  if (rows == 0 || size == 0) return ffi::Error::Success();
  const int64_t step = std::max<int64_t>(1, kChunk / size);
  return Guarded([&] {
    ParallelFor(pool, (rows + step - 1) / step, [&](int64_t part) {
      for (int64_t row = part * step; row < std::min(rows, (part + 1) * step); ++row) {
        const float* from = x.typed_data() + row * size;
        float* to = y->typed_data() + row * size;
        Vec sums[4] = {};
        ForVectors(size, [&](int64_t at, const auto& load, const auto&) {
          const Vec value = load(from + at);
          sums[at / kWidth % 4] += value * value;
        });
        const float total = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        const float factor = 1.0f / std::sqrt(total / float(size) + eps);
        ForVectors(size, [&](int64_t at, const auto& load, const auto& store) {
          store(to + at, load(from + at) * factor * load(w.typed_data() + at));
        });
      }
    });
    return ffi::Error::Success();
  });
}

// x / (1 + exp(-x)), by the exponential of a negative number: nothing overflows.
inline Vec Silu(Vec x) {
  const IntVec is_negative = x < 0.0f;
  const Vec e = Exp(Select(is_negative, x, -x));
  return Select(is_negative, x * e, x) / (1.0f + e);
}

inline Vec GeluTanh(Vec x) {
  const Vec inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + Tanh(inner));
}

// y = activation(gate) * up, of one shape. Activations: 0 is silu, 1 gelu with tanh.
ffi::Error Gated(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate,
                 ffi::Buffer<ffi::F32> up, ffi::ResultBuffer<ffi::F32> y,
                 int64_t activation) {
  if (!SameShape(gate, up) || !SameShape(gate, *y) || activation < 0 || activation > 1)
    return ffi::Error::InvalidArgument("gated: expected one shape, and an activation");
  const int64_t size = gate.element_count();
  return Guarded([&] {
    ParallelFor(pool, (size + kChunk - 1) / kChunk, [&](int64_t part) {
      const int64_t start = part * kChunk;
      const float *a = gate.typed_data() + start, *b = up.typed_data() + start;
      float* to = y->typed_data() + start;
      const auto run = [&](const auto& function) {
        ForVectors(std::min(kChunk, size - start),
                   [&](int64_t at, const auto& load, const auto& store) {
                     store(to + at, function(load(a + at)) * load(b + at));
                   });
      };
      if (activation == 0) return run(Silu);
      run(GeluTanh);
    });
    return ffi::Error::Success();
  });
}

}  // namespace elementwise
}  // namespace jpaged

XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedRmsNorm, jpaged::elementwise::RmsNorm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedGated, jpaged::elementwise::Gated,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("activation"));
