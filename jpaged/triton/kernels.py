"""The Triton kernels. The first launch imports this module; nothing else does.

Pipeline: triton.attention, triton.pages -> [triton.kernels].

Sizes in capitals are static. Shape symbols as in `jpaged.attention`; G query heads per
key/value head; I items, each a tile of queries of one row over a span of its tokens; R
partial results. `settings` is i32[6]: layer, window, chunk, number of rows, width of
the block tables, number of blocks.
"""

# Triton compiles these functions and checks their types, which are not Python's; it is
# not installed where pyright runs.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
FP8_UNIT = tl.constexpr(256.0)  # see `_page_numbers`
# Below every score of a float32 model, and finite, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e30)
PARTS = tl.constexpr(16)  # partial results that a merge reads at a time


@triton.jit
def attend_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [L, N, K, P, D]
    v_ptr,  # [L, N, K, P, D]
    k_scale_ptr,  # f32[L, N, K, SCALES] of quantised pages; not read otherwise
    v_scale_ptr,
    tables_ptr,  # i32[S, M]
    lens_ptr,  # i32[S]
    starts_ptr,  # i32[S + 1], first query of each row
    items_ptr,  # i32[S + 1], first item of each row
    parts_ptr,  # i32[S + 1], first partial result of each row
    settings_ptr,
    sinks_ptr,  # f32[H]
    out_ptr,  # [T, H, D]
    lse_ptr,  # f32[T, H]
    part_out_ptr,  # f32[R, H, D]
    part_lse_ptr,  # f32[R, H], to base 2
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,  # per tile of queries
    ROWS: tl.constexpr,  # per tile of queries: QUERIES * G, rounded up
    TOKENS: tl.constexpr,  # per tile of keys
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # 0: none
    HAS_SINKS: tl.constexpr,
    SCALES: tl.constexpr,  # scales per block and head, at least P; 0: pages have none
    PRECISION: tl.constexpr,
):
    """Computes a tile of queries over the tokens that they see, or a part of those."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    num_rows = tl.load(settings_ptr + 3)
    if item >= tl.load(items_ptr + num_rows):
        return
    row = _row_of_item(items_ptr, item, num_rows)
    nth = item - tl.load(items_ptr + row)
    part = tl.load(parts_ptr + row)
    is_split = tl.load(parts_ptr + row + 1) > part
    width = tl.load(settings_ptr + 4)
    window = tl.load(settings_ptr + 1)
    first_query = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - first_query
    # Query `i` of the row sees `i + shift` tokens.
    shift = tl.minimum(tl.load(lens_ptr + row), width * BLOCK) - num_queries + 1

    G: tl.constexpr = HEADS // KV_HEADS
    r = tl.arange(0, ROWS)
    first = tl.where(is_split, 0, nth) * QUERIES
    query = first + r // G
    head = kv_head * G + r % G
    is_row = (r < QUERIES * G) & (query < num_queries)
    visible = tl.where(is_row, query + shift, 0)
    end = tl.maximum(tl.minimum(first + QUERIES, num_queries) - 1 + shift, 0)
    begin = tl.maximum(first + shift - window, 0)
    if is_split:
        chunk = tl.load(settings_ptr + 2)
        begin += nth * chunk
        end = tl.minimum(end, begin + chunk)

    d = tl.arange(0, HEAD_DIM)
    place = ((first_query + query).to(tl.int64) * HEADS + head) * HEAD_DIM
    q = tl.load(q_ptr + place[:, None] + d[None, :], mask=is_row[:, None], other=0.0)
    if SCALES == 0:
        q = q.to(k_ptr.dtype.element_ty)
    # 64 bits: a pool may have more than 2**31 elements.
    size: tl.constexpr = KV_HEADS * BLOCK
    pool = tl.load(settings_ptr).to(tl.int64) * tl.load(settings_ptr + 5) * size
    pool += kv_head * BLOCK
    table_ptr = tables_ptr + row.to(tl.int64) * width
    pages = k_ptr, v_ptr, k_scale_ptr, v_scale_ptr
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    n = tl.arange(0, TOKENS)
    # Each step loads the next tile's block numbers, so that the next tile's keys can be
    # copied while this tile is computed. Table entries past the length are not read.
    block = tl.load(table_ptr + (begin + n) // BLOCK, mask=begin + n < end, other=0)
    for start in range(begin, end, TOKENS):
        token = start + n
        slot = pool + block.to(tl.int64) * size + token % BLOCK
        k, v, k_scale, v_scale = _load_keys(
            *pages, slot, token < end, HEAD_DIM, BLOCK, TOKENS, SCALES
        )
        ahead = token + TOKENS
        block = tl.load(table_ptr + ahead // BLOCK, mask=ahead < end, other=0)
        scores = _log2_scores(q, k, k_scale, SCALE, SOFT_CAP, SCALES, PRECISION)
        seen = token[None, :] < visible[:, None]
        seen &= token[None, :] >= visible[:, None] - window
        seen &= (token < end)[None, :]
        highest, total, acc = _add_tile(
            highest, total, acc, scores, seen, v, v_scale, q.dtype, SCALES, PRECISION
        )

    if is_split:
        index = (part + nth).to(tl.int64) * HEADS + head
        parts = part_out_ptr, part_lse_ptr
        _store_part(*parts, index, is_row, highest, total, acc, HEAD_DIM)
    else:
        if HAS_SINKS:
            sinks = tl.load(sinks_ptr + head, mask=is_row, other=0.0) / LN_2
            highest, total, acc = _add_sinks(highest, total, acc, sinks)
        index = (first_query + query).to(tl.int64) * HEADS + head
        _store_output(out_ptr, lse_ptr, index, is_row, highest, total, acc, HEAD_DIM)


@triton.jit
def _row_of_item(items_ptr, item, num_rows):
    """The row of the tables whose first item is the last one at or before `item`."""
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(items_ptr + middle) <= item
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _load_keys(
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot,
    is_token,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Keys [D, TOKENS], values [TOKENS, D] and scales f32[TOKENS] at `slot`.

    Pages without scales have scales of 1, which nothing reads.
    """
    d = tl.arange(0, HEAD_DIM)
    spot = slot * HEAD_DIM
    k = tl.load(k_ptr + spot[None, :] + d[:, None], mask=is_token[None, :], other=0)
    v = tl.load(v_ptr + spot[:, None] + d[None, :], mask=is_token[:, None], other=0)
    if SCALES > 0:
        slot += slot // BLOCK * (SCALES - BLOCK)
        k_scale = tl.load(k_scale_ptr + slot, mask=is_token, other=0.0)
        v_scale = tl.load(v_scale_ptr + slot, mask=is_token, other=0.0)
    else:
        k_scale = tl.full([TOKENS], 1.0, tl.float32)
        v_scale = k_scale
    return k, v, k_scale, v_scale


@triton.jit
def _log2_scores(
    q,
    k,
    k_scale,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores to base 2 of all keys of a tile, f32[ROWS, TOKENS]."""
    PAGES: tl.constexpr = k.dtype
    if SCALES > 0:
        # Numbers of 8 bits are exact in both dtypes. For float32 see `_product`.
        KEYS: tl.constexpr = tl.float16 if q.dtype == tl.float16 else tl.bfloat16
        k = _page_numbers(k, KEYS)
    scores = _product(q, k, PRECISION) * SCALE
    if SCALES > 0:
        scores *= _page_scales(k_scale, PAGES)[None, :]
    if SOFT_CAP > 0:
        scores = SOFT_CAP * _tanh(scores / SOFT_CAP)
    return scores / LN_2


@triton.jit
def _add_tile(
    highest,
    total,
    acc,
    scores,
    seen,
    v,
    v_scale,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax after one more tile: maximum, sum of weights, weighted values.

    DTYPE is that of q. Values of 8 bits become bfloat16 and never float16, because a
    weight times a value's scale has the range of float32.
    """
    PAGES: tl.constexpr = v.dtype
    if SCALES > 0:
        v = _page_numbers(v, tl.bfloat16)
    scores = tl.where(seen, scores, LOWEST)
    new = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
    decay = tl.exp2(highest - new)
    total = total * decay + tl.sum(weights, 1)
    if SCALES > 0:
        weights *= _page_scales(v_scale, PAGES)[None, :]
    acc = acc * decay[:, None]
    if DTYPE != tl.float32:
        weights = weights.to(v.dtype)
    acc += _product(weights, v, PRECISION)
    return new, total, acc


@triton.jit
def _add_sinks(highest, total, acc, sinks):
    """The online softmax after a score per row that has no value.

    A row that sees nothing stays empty.
    """
    new = tl.maximum(highest, sinks)
    decay = tl.where(total > 0, tl.exp2(highest - new), 0.0)
    total = tl.where(total > 0, total * decay + tl.exp2(sinks - new), 0.0)
    return new, total, acc * decay[:, None]


@triton.jit
def _store_part(
    out_ptr, lse_ptr, index, is_row, highest, total, acc, HEAD_DIM: tl.constexpr
):
    """Stores a partial result at `index`, the log-sum-exp to base 2."""
    d = tl.arange(0, HEAD_DIM)
    some = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, highest + tl.log2(some), LOWEST)
    spot = out_ptr + index[:, None] * HEAD_DIM + d[None, :]
    tl.store(spot, acc / some[:, None], mask=is_row[:, None])
    tl.store(lse_ptr + index, lse, mask=is_row)


@triton.jit
def _store_output(
    out_ptr, lse_ptr, index, is_row, highest, total, acc, HEAD_DIM: tl.constexpr
):
    """Stores outputs and log-sum-exps at `index`: query * H + head."""
    d = tl.arange(0, HEAD_DIM)
    some = tl.where(total > 0, total, 1.0)
    spot = out_ptr + index[:, None] * HEAD_DIM + d[None, :]
    out = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(spot, out, mask=is_row[:, None])
    lse = tl.where(total > 0, (highest + tl.log2(some)) * LN_2, float("-inf"))
    tl.store(lse_ptr + index, lse, mask=is_row)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32.

    If `a` is float32 and `b` is bfloat16, which holds numbers of 8 bits, `a` is split
    into a sum of three bfloat16. Each product is then exact, and the tensor cores
    compute it. (With both as float32, a thread spilled up to 9 KB of registers.)
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=PRECISION)
    high = a.to(b.dtype)
    rest = a - high.to(tl.float32)
    middle = rest.to(b.dtype)
    low = (rest - middle.to(tl.float32)).to(b.dtype)
    return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))


@triton.jit
def _page_numbers(bits, dtype: tl.constexpr):
    """Numbers of quantised pages, exact in every `dtype`: int8, or fp8 divided by 256.

    Shifted left by 7, e4m3fn is a float16 with a bias of 15 in place of 7, also for
    subnormal numbers. This works on GPUs that cannot convert fp8. Only NaN is lost: it
    reads as 480.
    """
    if bits.dtype != tl.int8:
        wide = bits.to(tl.uint16)
        wide = ((wide << 8) & 0x8000) | ((wide << 7) & 0x3F80)
        bits = wide.to(tl.float16, bitcast=True)
    return bits.to(dtype)


@triton.jit
def _page_scales(scale, PAGES: tl.constexpr):
    """f32 scales of the numbers of `_page_numbers`; infinite scales become NaN."""
    if PAGES != tl.int8:
        scale *= FP8_UNIT
    # A key that is not finite must reach the output; a score of -inf would not.
    return scale + 0.0 * scale


@triton.jit
def _tanh(x):
    """tanh without a library: a series near 0, where the formula loses precision."""
    size = tl.abs(x)
    exp = tl.exp2(-2.0 * size / LN_2)
    far = (1.0 - exp) / (1.0 + exp)
    y = x * x
    near = size * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    positive = tl.where(size < 0.25, near, far)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def merge_kernel(
    part_out_ptr,  # f32[R, H, D]
    part_lse_ptr,  # f32[R, H], to base 2
    starts_ptr,  # i32[S + 1]
    parts_ptr,  # i32[S + 1]
    sinks_ptr,  # f32[H]
    out_in,  # the same memory as out_ptr
    lse_in,
    out_ptr,  # [T, H, D]
    lse_ptr,  # f32[T, H]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merges the partial results of one row and head, if the row has any."""
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(parts_ptr + row), tl.load(parts_ptr + row + 1)
    if begin >= end:
        return
    d = tl.arange(0, HEAD_DIM)
    highest = LOWEST + 0.0 * begin
    total = 0.0 * begin
    acc = tl.zeros([HEAD_DIM], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks_ptr + head) / LN_2
        total += 1.0
    for start in range(begin, end, PARTS):
        part = start + tl.arange(0, PARTS)
        index = part.to(tl.int64) * HEADS + head
        lse = tl.load(part_lse_ptr + index, mask=part < end, other=LOWEST)
        spot = part_out_ptr + index[:, None] * HEAD_DIM + d[None, :]
        out = tl.load(spot, mask=(part < end)[:, None], other=0.0)
        new = tl.maximum(highest, tl.max(lse, 0))
        decay = tl.exp2(highest - new)
        weights = tl.where(lse > LOWEST, tl.exp2(lse - new), 0.0)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * out, 0)
        highest = new
    index = tl.load(starts_ptr + row).to(tl.int64) * HEADS + head
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + index * HEAD_DIM + d, out)
    tl.store(lse_ptr + index, (highest + tl.log2(total)) * LN_2)


@triton.jit
def write_kernel(
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    slots_ptr,  # i32[T]
    settings_ptr,  # i32[2]: layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # tokens from one head to the next, at least P
    SIZE: tl.constexpr,  # K * D, rounded up to a power of two
):
    """Writes the key and value of one token to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    num_blocks = tl.load(settings_ptr + 1)
    block = slot // BLOCK
    i = tl.arange(0, SIZE)
    mask = (slot >= 0) & (block < num_blocks) & (i < KV_HEADS * HEAD_DIM)
    place = (tl.load(settings_ptr).to(tl.int64) * num_blocks + block) * KV_HEADS
    place = ((place + i // HEAD_DIM) * STRIDE + slot % BLOCK) * HEAD_DIM + i % HEAD_DIM
    from_ = token * (KV_HEADS * HEAD_DIM) + i
    tl.store(k_pages_ptr + place, tl.load(k_ptr + from_, mask=mask), mask=mask)
    tl.store(v_pages_ptr + place, tl.load(v_ptr + from_, mask=mask), mask=mask)


@triton.jit
def write_quantised_kernel(
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    k_scale_ptr,  # f32[T, K]
    v_scale_ptr,  # f32[T, K]
    slots_ptr,  # i32[T]
    settings_ptr,  # i32[2]: layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_scales_in,
    v_scales_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    k_scales_ptr,  # f32[L, N, K, STRIDE]
    v_scales_ptr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # scales from one head to the next, at least P
    SIZE: tl.constexpr,  # K * D, rounded up to a power of two
):
    """Writes the key and value of one token, and their scales, to its slot."""
    where = slots_ptr, settings_ptr
    numbers = k_in, v_in, k_pages_ptr, v_pages_ptr
    write_kernel(k_ptr, v_ptr, *where, *numbers, KV_HEADS, HEAD_DIM, BLOCK, BLOCK, SIZE)
    # A scale is a vector of one number.
    scales = k_scales_in, v_scales_in, k_scales_ptr, v_scales_ptr
    rest: tl.constexpr = SIZE // HEAD_DIM
    new = k_scale_ptr, v_scale_ptr
    write_kernel(*new, *where, *scales, KV_HEADS, 1, BLOCK, STRIDE, rest)


@triton.jit
def copy_kernel(
    src_ptr,  # i32[C]
    dst_ptr,  # i32[C]
    settings_ptr,  # i32[2]: first layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    BLOCK_SIZE: tl.constexpr,  # numbers per block, K * P * D
    SIZE: tl.constexpr,  # numbers per program
):
    """Copies a part of one block of one layer, keys and values."""
    pair = tl.program_id(0)
    layer = tl.load(settings_ptr) + tl.program_id(1)
    num_blocks = tl.load(settings_ptr + 1)
    src, dst = tl.load(src_ptr + pair), tl.load(dst_ptr + pair)
    is_pair = (src >= 0) & (dst >= 0) & (src < num_blocks) & (dst < num_blocks)
    i = tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    mask = is_pair & (i < BLOCK_SIZE)
    base = layer.to(tl.int64) * num_blocks
    from_, to = (base + src) * BLOCK_SIZE + i, (base + dst) * BLOCK_SIZE + i
    tl.store(k_pages_ptr + to, tl.load(k_pages_ptr + from_, mask=mask), mask=mask)
    tl.store(v_pages_ptr + to, tl.load(v_pages_ptr + from_, mask=mask), mask=mask)


@triton.jit
def copy_quantised_kernel(
    src_ptr,  # i32[C]
    dst_ptr,  # i32[C]
    settings_ptr,  # i32[2]: first layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_scales_in,
    v_scales_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    k_scales_ptr,  # f32[L, N, scales per block]
    v_scales_ptr,
    BLOCK_SIZE: tl.constexpr,  # numbers per block, K * P * D
    SCALES: tl.constexpr,  # scales per block
    SIZE: tl.constexpr,  # numbers per program
):
    """Copies a part of one block of one layer: keys, values and their scales."""
    where = src_ptr, dst_ptr, settings_ptr
    copy_kernel(*where, k_in, v_in, k_pages_ptr, v_pages_ptr, BLOCK_SIZE, SIZE)
    # A block has fewer scales than numbers, so the last programs copy none.
    scales = k_scales_in, v_scales_in, k_scales_ptr, v_scales_ptr
    copy_kernel(*where, *scales, SCALES, SIZE)
