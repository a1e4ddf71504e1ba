"""The Triton kernels. Nothing imports this module before a kernel is called.

Place on the road: triton.attention, triton.pages -> [triton.kernels].

Sizes in capitals are static. Letters as in `jpaged.attention`; G heads that share a
key; I items, each a tile of queries of one row over a span of its tokens; R partial
results. `settings` is i32[6]: layer, window, chunk, rows, width of a table, blocks.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
FP8_UNIT = tl.constexpr(256.0)  # see `_numbers`
# Below every score that a float32 model gives, and finite: -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e30)
PARTS = tl.constexpr(16)  # partial results that a merge reads at once


@triton.jit
def attend(
    q_ptr,  # [T, H, D]
    k_ptr,  # [L, N, K, P, D]
    v_ptr,  # [L, N, K, P, D]
    k_scale_ptr,  # f32[L, N, K, SCALES], of pages of 8 bits; otherwise not read
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
    QUERIES: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,  # of a tile: QUERIES times G, filled up
    TOKENS: tl.constexpr,  # of a tile of keys
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # 0 for none
    HAS_SINKS: tl.constexpr,
    SCALES: tl.constexpr,  # of a block and head, P or more; 0 of pages without
    PRECISION: tl.constexpr,
):
    """A tile of queries over the tokens it sees; rows with parts leave partials."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    num_rows = tl.load(settings_ptr + 3)
    if item >= tl.load(items_ptr + num_rows):
        return
    low, high = 0, num_rows
    while high - low > 1:  # the row whose first item is the last at or before this one
        middle = (low + high) // 2
        is_before = tl.load(items_ptr + middle) <= item
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    row = low
    nth = item - tl.load(items_ptr + row)
    part = tl.load(parts_ptr + row)
    is_split = tl.load(parts_ptr + row + 1) > part
    width = tl.load(settings_ptr + 4)
    first_query = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - first_query
    # A query `i` of the row sees `i + shift` tokens.
    shift = tl.minimum(tl.load(lens_ptr + row), width * BLOCK) - num_queries + 1
    window = tl.load(settings_ptr + 1)

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
    # Numbers of 8 bits are exact in these. Not float16 for values: a weight times a
    # value's scale has float32's range. For float32 see `_product`.
    KEYS: tl.constexpr = tl.float16 if q.dtype == tl.float16 else tl.bfloat16
    VALUES: tl.constexpr = tl.bfloat16
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    n = tl.arange(0, TOKENS)
    # The next tile's blocks are known a step ahead, so that its keys can be under way
    # while this tile's are computed. Entries past the length are not read.
    block = tl.load(table_ptr + (begin + n) // BLOCK, mask=begin + n < end, other=0)
    for start in range(begin, end, TOKENS):
        token = start + n
        is_token = token < end
        slot = pool + block.to(tl.int64) * size + token % BLOCK
        spot = slot * HEAD_DIM
        k = tl.load(k_ptr + spot[None, :] + d[:, None], mask=is_token[None, :], other=0)
        v = tl.load(v_ptr + spot[:, None] + d[None, :], mask=is_token[:, None], other=0)
        if SCALES > 0:
            slot += slot // BLOCK * (SCALES - BLOCK)
            k_scale = tl.load(k_scale_ptr + slot, mask=is_token, other=0.0)
            v_scale = tl.load(v_scale_ptr + slot, mask=is_token, other=0.0)
        ahead = token + TOKENS
        block = tl.load(table_ptr + ahead // BLOCK, mask=ahead < end, other=0)
        if SCALES > 0:
            k, v = _numbers(k, KEYS), _numbers(v, VALUES)
        scores = _product(q, k, PRECISION) * SCALE
        if SCALES > 0:
            scores *= _scales(k_scale, k_ptr)[None, :]
        if SOFT_CAP > 0:
            scores = SOFT_CAP * _tanh(scores / SOFT_CAP)
        scores = scores / LN_2
        seen = token[None, :] < visible[:, None]
        seen &= token[None, :] >= visible[:, None] - window
        seen &= is_token[None, :]
        scores = tl.where(seen, scores, LOWEST)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
        decay = tl.exp2(highest - new)
        total = total * decay + tl.sum(weights, 1)
        if SCALES > 0:
            weights *= _scales(v_scale, v_ptr)[None, :]
        acc = acc * decay[:, None]
        if q.dtype != tl.float32:
            weights = weights.to(v.dtype)
        acc += _product(weights, v, PRECISION)
        highest = new

    if is_split:
        some = tl.where(total > 0, total, 1.0)
        lse = tl.where(total > 0, highest + tl.log2(some), LOWEST)
        index = (part + nth).to(tl.int64) * HEADS + head
        part_ptr = part_out_ptr + index[:, None] * HEAD_DIM + d[None, :]
        tl.store(part_ptr, acc / some[:, None], mask=is_row[:, None])
        tl.store(part_lse_ptr + index, lse, mask=is_row)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0) / LN_2
            new = tl.maximum(highest, sink)
            decay = tl.where(total > 0, tl.exp2(highest - new), 0.0)
            acc = acc * decay[:, None]
            # A row that sees nothing stays empty, sink or not.
            total = tl.where(total > 0, total * decay + tl.exp2(sink - new), 0.0)
            highest = new
        some = tl.where(total > 0, total, 1.0)
        spot = out_ptr + place[:, None] + d[None, :]
        out = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(spot, out, mask=is_row[:, None])
        lse = tl.where(total > 0, (highest + tl.log2(some)) * LN_2, float("-inf"))
        index = (first_query + query).to(tl.int64) * HEADS + head
        tl.store(lse_ptr + index, lse, mask=is_row)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32.

    A float32 `a` meets numbers of 8 bits, which bfloat16 holds, as the three bfloat16
    that it is the sum of: each product is exact then, and the tensor cores' own. (As
    float32 both, such tiles spilled up to 9 KB of a thread's registers.)
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=PRECISION)
    high = a.to(b.dtype)
    rest = a - high.to(tl.float32)
    middle = rest.to(b.dtype)
    low = (rest - middle.to(tl.float32)).to(b.dtype)
    return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))


@triton.jit
def _numbers(bits, dtype: tl.constexpr):
    """Numbers of pages of 8 bits, exact in every `dtype`: int8's own; of fp8 a 256th.

    Shifted by 7, e4m3fn is float16 with a bias of 15 in place of 7, subnormal numbers
    too. It serves GPUs that convert no fp8. NaN alone is lost, and reads as 480.
    """
    if bits.dtype != tl.int8:
        wide = bits.to(tl.uint16)
        wide = ((wide << 8) & 0x8000) | ((wide << 7) & 0x3F80)
        bits = wide.to(tl.float16, bitcast=True)
    return bits.to(dtype)


@triton.jit
def _scales(scale, pages_ptr):
    """f32 scales of what `_numbers` gives; one that is infinite as NaN."""
    if pages_ptr.dtype.element_ty != tl.int8:
        scale *= FP8_UNIT
    # A key that is not finite must show, and a score of -inf would not.
    return scale + 0.0 * scale


@triton.jit
def _tanh(x):
    """tanh without a library: a series near 0, where the formula would cancel."""
    size = tl.abs(x)
    exp = tl.exp2(-2.0 * size / LN_2)
    far = (1.0 - exp) / (1.0 + exp)
    y = x * x
    near = size * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    positive = tl.where(size < 0.25, near, far)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def merge(
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
    """The outputs of rows that left partial results; one head of one row."""
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
def write(
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
    STRIDE: tl.constexpr,  # tokens from head to head, P or more
    SIZE: tl.constexpr,  # K * D, filled up to a power of two
):
    """One token's keys and values into its slot."""
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
def write_quantised(
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
    STRIDE: tl.constexpr,  # scales from head to head, P or more
    SIZE: tl.constexpr,  # K * D, filled up to a power of two
):
    """One token's keys and values, and their scales, into its slot."""
    where = slots_ptr, settings_ptr
    numbers = k_in, v_in, k_pages_ptr, v_pages_ptr
    write(k_ptr, v_ptr, *where, *numbers, KV_HEADS, HEAD_DIM, BLOCK, BLOCK, SIZE)
    # Scales are vectors of one number.
    scales = k_scales_in, v_scales_in, k_scales_ptr, v_scales_ptr
    rest: tl.constexpr = SIZE // HEAD_DIM
    write(k_scale_ptr, v_scale_ptr, *where, *scales, KV_HEADS, 1, BLOCK, STRIDE, rest)


@triton.jit
def copy(
    src_ptr,  # i32[C]
    dst_ptr,  # i32[C]
    settings_ptr,  # i32[2]: first layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    BLOCK_SIZE: tl.constexpr,  # numbers of a block, K * P * D
    SIZE: tl.constexpr,  # numbers of one program
):
    """A piece of one block of one layer, keys and values."""
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
def copy_quantised(
    src_ptr,  # i32[C]
    dst_ptr,  # i32[C]
    settings_ptr,  # i32[2]: first layer, blocks
    k_in,  # the same memory as k_pages_ptr
    v_in,
    k_scales_in,
    v_scales_in,
    k_pages_ptr,  # [L, N, K, P, D]
    v_pages_ptr,
    k_scales_ptr,  # f32[L, N, scales of a block]
    v_scales_ptr,
    BLOCK_SIZE: tl.constexpr,  # numbers of a block, K * P * D
    SCALES: tl.constexpr,  # of a block
    SIZE: tl.constexpr,  # numbers of one program
):
    """A piece of one block of one layer, keys, values and their scales."""
    where = src_ptr, dst_ptr, settings_ptr
    copy(*where, k_in, v_in, k_pages_ptr, v_pages_ptr, BLOCK_SIZE, SIZE)
    # A block has fewer scales than numbers, so the last pieces are empty.
    copy(*where, k_scales_in, v_scales_in, k_scales_ptr, v_scales_ptr, SCALES, SIZE)
