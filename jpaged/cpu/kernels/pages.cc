// Page updates in place: tokens into slots, blocks onto blocks.
//
// The pools are operands that alias the results, so XLA copies nothing. Numbers are moved
// as bytes: pages and values have the same type. Pools come in pairs, keys and values or
// their scales; each is [L, N, K, ...] if `stacked` is 1, and [N, K, ...] if it is 0.
#include "common.h"

namespace jpaged {
namespace pages {

struct Pool {
  char* data;
  int64_t num_layers, num_blocks, num_heads;
  int64_t block_bytes, head_bytes;  // of a block of all heads, of one head of it
};

inline int64_t ItemSize(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return 4;
    case ffi::BF16: case ffi::F16: case ffi::U16: return 2;
    case ffi::S8: case ffi::U8: case ffi::F8E4M3FN: return 1;
    default: return 0;
  }
}

// The dimensions of one layer of pages.
inline ffi::Span<const int64_t> OfLayer(ffi::AnyBuffer pages, int64_t stacked) {
  const auto all = pages.dimensions();
  return {all.begin() + stacked, all.size() - stacked};
}

// The pool of a result. If XLA gave it memory of its own, the operand is copied there.
inline Pool PoolOf(ffi::AnyBuffer operand, ffi::Result<ffi::AnyBuffer> result,
                   int64_t stacked) {
  if (result->untyped_data() != operand.untyped_data())
    std::memcpy(result->untyped_data(), operand.untyped_data(), operand.size_bytes());
  const auto dims = OfLayer(operand, stacked);
  Pool pool{static_cast<char*>(result->untyped_data()),
            stacked ? operand.dimensions()[0] : 1, dims[0], dims[1], 0, 0};
  pool.head_bytes = ItemSize(operand.element_type());
  for (size_t i = 2; i < dims.size(); ++i) pool.head_bytes *= dims[i];
  pool.block_bytes = pool.num_heads * pool.head_bytes;
  return pool;
}

inline bool SameShape(ffi::AnyBuffer a, ffi::AnyBuffer b) {
  const auto ad = a.dimensions(), bd = b.dimensions();
  return a.element_type() == b.element_type() &&
         std::equal(ad.begin(), ad.end(), bd.begin(), bd.end());
}

// Whether pages [N, K, P, D] or scales [N, K, P] have a known type.
inline bool IsPool(ffi::AnyBuffer pages, int64_t stacked) {
  const int64_t rank = pages.dimensions().size() - stacked;
  return (stacked == 0 || stacked == 1) && rank >= 3 && rank <= 4 &&
         ItemSize(pages.element_type());
}

// Whether values [T, K, ...] fit pages [N, K, P, ...] of blocks of block_size tokens.
inline bool Fits(ffi::AnyBuffer pages, ffi::AnyBuffer values, size_t num_tokens,
                 int64_t block_size, int64_t stacked) {
  if (!IsPool(pages, stacked)) return false;
  const auto pd = OfLayer(pages, stacked), vd = values.dimensions();
  return vd.size() + 1 == pd.size() && size_t(vd[0]) == num_tokens && vd[1] == pd[1] &&
         (pd.size() == 3 || pd[3] == vd[2]) && block_size >= 1 && pd[2] >= block_size &&
         values.element_type() == pages.element_type();
}

// Writes values [T, K, ...] of one number or one vector for each head into slots.
inline void WriteTokens(ffi::ThreadPool& threads, const Pool& pool, int64_t layer,
                        ffi::AnyBuffer values, int64_t block_size,
                        const int32_t* slots) {
  const auto dims = values.dimensions();
  const int64_t num_tokens = dims[0];
  const int64_t bytes =
      ItemSize(values.element_type()) * (dims.size() == 3 ? dims[2] : 1);
  const char* data = static_cast<const char*>(values.untyped_data());
  constexpr int64_t kTokens = 256;
  ParallelFor(threads, (num_tokens + kTokens - 1) / kTokens, [&](int64_t part) {
    const int64_t end = std::min(num_tokens, (part + 1) * kTokens);
    for (int64_t token = part * kTokens; token < end; ++token) {
      const int64_t slot = slots[token];
      if (slot < 0 || slot >= pool.num_blocks * block_size) continue;
      char* block = pool.data + (layer * pool.num_blocks + slot / block_size) *
                                    pool.block_bytes;
      for (int64_t head = 0; head < pool.num_heads; ++head)
        std::memcpy(block + head * pool.head_bytes + slot % block_size * bytes,
                    data + (token * pool.num_heads + head) * bytes, bytes);
    }
  });
}

inline ffi::Error WriteKv(ffi::ThreadPool threads, ffi::AnyBuffer k_pages,
                          ffi::AnyBuffer v_pages, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> layer,
                          ffi::Result<ffi::AnyBuffer> k_out,
                          ffi::Result<ffi::AnyBuffer> v_out, int64_t block_size,
                          int64_t stacked) {
  if (!Fits(k_pages, k, slots.element_count(), block_size, stacked) ||
      !Fits(v_pages, v, slots.element_count(), block_size, stacked) ||
      !SameShape(k_pages, *k_out) || !SameShape(v_pages, *v_out) ||
      layer.element_count() != 1)
    return ffi::Error::InvalidArgument("write_kv: pages and values do not fit");
  return Guarded([&] {
    const int64_t index = layer.typed_data()[0];
    const auto write = [&](const Pool& pool, ffi::AnyBuffer values) {
      if (index >= 0 && index < pool.num_layers)
        WriteTokens(threads, pool, index, values, block_size, slots.typed_data());
    };
    write(PoolOf(k_pages, k_out, stacked), k);
    write(PoolOf(v_pages, v_out, stacked), v);
    return ffi::Error::Success();
  });
}

using Pairs = std::vector<std::pair<int64_t, int64_t>>;  // source, target

// Copies blocks in layers `first` to `end`. All sources are read before any target is
// written, so pairs that overlap go through memory of their own.
inline void Copy(ffi::ThreadPool& threads, const Pool& pool, const Pairs& pairs,
                 int64_t first, int64_t end) {
  std::vector<bool> is_target(pool.num_blocks, false);
  for (const auto& pair : pairs) is_target[pair.second] = true;
  bool overlaps = false;
  for (const auto& pair : pairs) overlaps |= is_target[pair.first];
  const size_t bytes = pool.block_bytes;
  ParallelFor(threads, end - first, [&](int64_t index) {
    char* layer = pool.data + (first + index) * pool.num_blocks * pool.block_bytes;
    if (!overlaps) {
      for (const auto& [from, to] : pairs)
        std::memcpy(layer + to * bytes, layer + from * bytes, bytes);
      return;
    }
    std::vector<char> read(pairs.size() * bytes);
    for (size_t i = 0; i < pairs.size(); ++i)
      std::memcpy(read.data() + i * bytes, layer + pairs[i].first * bytes, bytes);
    for (size_t i = 0; i < pairs.size(); ++i)
      std::memcpy(layer + pairs[i].second * bytes, read.data() + i * bytes, bytes);
  });
}

// Copies block src[i] to block dst[i] in one layer, or in all layers if `layer` is empty.
inline ffi::Error CopyBlocks(ffi::ThreadPool threads, ffi::AnyBuffer k_pages,
                             ffi::AnyBuffer v_pages, ffi::Buffer<ffi::S32> src,
                             ffi::Buffer<ffi::S32> dst, ffi::Buffer<ffi::S32> layer,
                             ffi::Result<ffi::AnyBuffer> k_out,
                             ffi::Result<ffi::AnyBuffer> v_out, int64_t stacked) {
  if (!IsPool(k_pages, stacked) || !IsPool(v_pages, stacked) ||
      !SameShape(k_pages, *k_out) || !SameShape(v_pages, *v_out) ||
      src.element_count() != dst.element_count() || layer.element_count() > 1)
    return ffi::Error::InvalidArgument("copy_blocks: pages and pairs do not fit");
  return Guarded([&] {
    const auto copy = [&](const Pool& pool) {
      Pairs pairs;
      for (size_t i = 0; i < src.element_count(); ++i) {
        const int64_t from = src.typed_data()[i], to = dst.typed_data()[i];
        if (from >= 0 && to >= 0 && to < pool.num_blocks)
          pairs.push_back({std::min(from, pool.num_blocks - 1), to});
      }
      const bool is_one = layer.element_count() == 1;
      const int64_t first = is_one ? layer.typed_data()[0] : 0;
      const int64_t end = is_one ? first + 1 : pool.num_layers;
      if (!pairs.empty() && first >= 0 && end <= pool.num_layers)
        Copy(threads, pool, pairs, first, end);
    };
    copy(PoolOf(k_pages, k_out, stacked));
    copy(PoolOf(v_pages, v_out, stacked));
    return ffi::Error::Success();
  });
}

}  // namespace pages
}  // namespace jpaged

XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedWriteKv, jpaged::pages::WriteKv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("block_size")
                                  .Attr<int64_t>("stacked"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpagedCopyBlocks, jpaged::pages::CopyBlocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("stacked"));
