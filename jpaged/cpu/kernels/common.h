// What all kernels share: vectors, numbers of other types, and threads.
//
// A kernel is called by XLA with buffers in host memory. Every size and index that comes
// from data is checked or clipped: a wrong address would end the user's process.
#ifndef JPAGED_CPU_COMMON_H_
#define JPAGED_CPU_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace jpaged {

namespace ffi = xla::ffi;

// Floats of one vector register.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));

// Before a loop over registers: without it, GCC keeps large arrays of them in memory.
#define JPAGED_UNROLL _Pragma("GCC unroll 16")

inline Vec Splat(float x) { return Vec{} + x; }

template <typename T>
inline T LoadAs(const void* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

inline Vec Load(const float* address) { return LoadAs<Vec>(address); }
inline void Store(float* address, Vec value) {
  std::memcpy(address, &value, sizeof(Vec));
}

// a * b + c in one rounding where the processor can: the compiler does the same with
// `sums += a * b` on vectors, so that a number has one result on all paths.
inline float MulAdd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec Select(IntVec mask, Vec yes, Vec no) {
  return (Vec)((mask & (IntVec)yes) | (~mask & (IntVec)no));
}

inline float Sum(Vec v) {
  float parts[kWidth];
  Store(parts, v);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87 and for -inf. NaN
// stays NaN.
inline Vec Exp(Vec x) {
  const IntVec is_tiny = x < -87.0f;
  const Vec clipped = Select(is_tiny, Splat(0.0f), x);
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clipped * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = clipped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec exponent = ((IntVec)shifted - (IntVec)magic + 127) << 23;
  return Select(is_tiny, Splat(0.0f), p * (Vec)exponent);
}

inline Vec Tanh(Vec x) {
  // By the exponential of a negative number, so that nothing overflows.
  const IntVec is_negative = x < 0.0f;
  const Vec e = Exp(Select(is_negative, x, -x) * 2.0f);
  const Vec t = (1.0f - e) / (1.0f + e);
  return Select(is_negative, -t, t);
}

// ---- numbers as they are stored
//
// GCC widens vectors of small numbers in many steps, hence the intrinsics.

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3fn

inline float ToFloat(float x) { return x; }
inline float ToFloat(int8_t x) { return x; }
inline float ToFloat(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  return LoadAs<float>(&bits);
}
inline float ToFloat(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    return LoadAs<float>(&bits);
  }
  // Subnormal numbers by a conversion: XLA's threads take subnormal floats for zero.
  if (magnitude < 0x400u) {
    const float value = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
  return LoadAs<float>(&bits);
}
inline float ToFloat(Float8 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude < 8u) {
    const float value = float(magnitude) * 0.001953125f;  // 2^-9
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((magnitude << 20) + (120u << 23));
  return LoadAs<float>(&bits);
}

template <typename T>
inline T FromFloat(float x);
template <>
inline float FromFloat(float x) { return x; }
template <>
inline BFloat16 FromFloat(float x) {  // to the nearest, ties to even
  uint32_t bits = LoadAs<uint32_t>(&x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {uint16_t(bits >> 16)};
}
template <>
inline Float16 FromFloat(float x) {
  uint32_t bits = LoadAs<uint32_t>(&x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: the sum rounds at the right bit
    const float rounded = LoadAs<float>(&bits) + 0.5f;
    return {uint16_t(sign | (LoadAs<uint32_t>(&rounded) - 0x3f000000u))};
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return {uint16_t(sign | (bits >> 13))};
}

template <typename T>
inline Vec LoadVec(const T* address) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = ToFloat(address[i]);
  return v;
}
template <>
inline Vec LoadVec(const float* address) { return Load(address); }
// kWidth numbers of 16 bits, widened with zeros.
inline IntVec LoadHalves(const void* address) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepu16_epi32(LoadAs<__m256i>(address));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu16_epi32(LoadAs<__m128i>(address));
#else
  typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));
  return __builtin_convertvector(LoadAs<Half>(address), IntVec);
#endif
}
template <>
inline Vec LoadVec(const BFloat16* address) {
  return (Vec)(LoadHalves(address) << 16);
}
template <>
inline Vec LoadVec(const Float16* address) {
  const IntVec bits = LoadHalves(address);
  const IntVec magnitude = bits & 0x7fff;
  // Subnormal numbers by a conversion: subnormal floats count as zero here.
  const Vec small = __builtin_convertvector(magnitude, Vec) * 5.9604644775390625e-8f;
  const IntVec rebased = (magnitude << 13) + (112 << 23);
  const IntVec normal = rebased + ((magnitude >= 0x7c00) & (112 << 23));
  const Vec value = Select(magnitude < 0x400, small, (Vec)normal);
  return (Vec)((IntVec)value | ((bits & 0x8000) << 16));
}
template <>
inline Vec LoadVec(const int8_t* address) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(LoadAs<__m128i>(address)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(address));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  const IntVec numbers = __builtin_convertvector(LoadAs<Bytes>(address), IntVec);
  return __builtin_convertvector(numbers, Vec);
#endif
}
template <>
inline Vec LoadVec(const Float8* address) {
#if defined(__AVX512F__)
  const IntVec bits = (IntVec)_mm512_cvtepu8_epi32(LoadAs<__m128i>(address));
#elif defined(__AVX2__)
  const IntVec bits = (IntVec)_mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(address)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  const IntVec bits = __builtin_convertvector(LoadAs<Bytes>(address), IntVec);
#endif
  const IntVec magnitude = bits & 0x7f;
  const Vec small = __builtin_convertvector(magnitude, Vec) * 0.001953125f;  // 2^-9
  const Vec normal = (Vec)((magnitude << 20) + (120 << 23));
  const Vec value = Select(magnitude < 8, small, normal);
  const Vec signed_value = (Vec)((IntVec)value | ((bits & 0x80) << 24));
  const Vec nan = Splat(std::numeric_limits<float>::quiet_NaN());
  return Select(magnitude == 0x7f, nan, signed_value);
}

// ---- threads

// Subnormal floats count as zero while it lives, on every thread alike. XLA's own
// operations treat them so too.
class FlushSubnormals {
 public:
  FlushSubnormals() {
#if defined(__SSE__)
    before_ = _mm_getcsr();
    _mm_setcsr(before_ | 0x8040);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
#endif
  }
  ~FlushSubnormals() {
#if defined(__SSE__)
    _mm_setcsr(before_);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(before_));
#endif
  }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#elif defined(__aarch64__)
  uint64_t before_;
#endif
};

// Calls work(i) for i from 0 to count - 1 on XLA's threads and this one, and returns when
// all calls have. Which thread runs which i varies; results must not depend on it.
//
// It waits for calls that run, never for threads that have not started: XLA's threads
// may all be in kernels like this one, waiting for each other.
//
// Throws std::bad_alloc if a call did.
template <typename Work>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Shared {
    explicit Shared(int64_t count) : count(count) {}
    const int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
    std::atomic<bool> has_failed{false};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const int64_t num_threads =
      std::min<int64_t>(std::max<int64_t>(pool.num_threads(), 1), count);
  if (num_threads <= 1) {
    const FlushSubnormals flush;
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  auto shared = std::make_shared<Shared>(count);
  // `work` is alive while any call is open, for this thread waits for it.
  auto run = [shared, &work] {
    const FlushSubnormals flush;
    for (int64_t i; (i = shared->next.fetch_add(1)) < shared->count;) {
      try {
        work(i);
      } catch (const std::bad_alloc&) {
        shared->has_failed.store(true);
      }
      if (shared->num_done.fetch_add(1) + 1 == shared->count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_one();
      }
    }
  };
  for (int64_t thread = 1; thread < num_threads; ++thread) pool.Schedule([run] { run(); });
  run();
  // The last calls are nearly done: looking for a while is cheaper than sleeping.
  for (int spin = 0; spin < 20000 && shared->num_done.load() < count; ++spin) {
#if defined(__SSE__)
    _mm_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->num_done.load() == count; });
  if (shared->has_failed.load()) throw std::bad_alloc();
}

// Returns what call() returns, or an error if there is no memory: an exception must not
// leave a kernel.
template <typename Call>
ffi::Error Guarded(const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jpaged: out of memory");
  }
}

// Memory of a thread that lasts from call to call, at a multiple of 64 bytes.
template <typename Tag>
inline float* Scratch(size_t size) {
  static thread_local std::vector<float> memory;
  if (memory.size() < size + 16) memory.resize(size + 16);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace jpaged

#endif  // JPAGED_CPU_COMMON_H_
