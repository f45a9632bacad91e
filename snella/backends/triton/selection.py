"""The exact selection: a sample tells where to look, and what lies there is listed.

The last program of ``prepare`` evaluates 2048 entries, and from them guesses a window of magnitudes
that holds the threshold. ``merge`` counts the entries below the window, and lists those inside in
buckets, by the bits of their magnitudes, which order as integers. The program of it that finishes
last finds the threshold in one bucket. Should the guess be wrong, or a bucket overflow, it searches
the whole matrix instead: the sample decides on time only.

Workspace of a slice, integers behind the floats of ``work``: 2048 counts; entries below; programs
done; the window's low end, the binary logarithm of a bucket's width and the number of buckets; up
to 2064, free. After all slices' 2064, the buckets: (slices, 2048, CAPACITY) flat indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import bits_of, combined_columns, evaluate


@triton.jit
def workspace_of(work, total, inputs, splits, slices):
    """All slices' workspace, behind the merged matrices and the parts of columns."""
    place = work + slices * total.to(tl.int64) + 2 * splits * slices * inputs
    return place.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _value_of_rank(values, used, rank, start, width_bits):
    """The largest v in start … start + 2^width_bits with fewer than ``rank`` used values below."""
    found = start
    for i in range(width_bits):
        trial = found + (1 << (width_bits - 1 - i))
        below = tl.sum((used & (values < trial)).to(tl.int32))
        found = tl.where(below < rank, trial, found)
    return found


@triton.jit
def _values_of_ranks(values, first, last):
    """Lower bounds of the values of two ranks, to 2^14, in one search."""
    low, high = 0, 0
    for i in range(17):
        step = 1 << (30 - i)
        below = (values < low + step).to(tl.int32) + 65536 * (values < high + step).to(tl.int32)
        below = tl.sum(below)
        low = tl.where((below & 65535) < first, low + step, low)
        high = tl.where((below >> 16) < last, high + step, high)
    return low, high


@triton.jit
def choose_window(
    turned, b, scalars, parts, header, buckets, dropped, inputs, outputs, splits, slices, s,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Write the slice's window: 3.6 standard deviations around the rank in the sample.

    Where that reaches an end of the sample, the window goes on by 12 octaves below or 2 above, as
    few entries are that small or that large. The sample lies where the buckets will be.
    """
    total = inputs * outputs
    stride = (total // 2048) | 1
    for start in range(0, 2048, 512):  # not all at once, for the registers
        flat = ((start + tl.arange(0, 512)[:, None]) * stride) % total
        rows, columns = flat // inputs, flat % inputs
        column_shift, normaliser = 0.0, 0.0
        if MIXED:
            column_shift, normaliser = combined_columns(parts, columns, inputs, splits, slices, s)
        _, merged = evaluate(
            turned, b, scalars, column_shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        tl.store(buckets + start + tl.arange(0, 512)[:, None], bits_of(merged))
    tl.debug_barrier()
    bits = tl.load(buckets + tl.arange(0, 2048))
    middle = 2048.0 * dropped / total
    spread = 3.6 * tl.sqrt(middle * (1 - middle / 2048)) + 2
    first = tl.maximum(middle - spread, 1.0).to(tl.int32)
    last = tl.minimum(middle + spread, 2048.0).to(tl.int32)
    low, high = _values_of_ranks(bits, first, last)
    if middle - spread < 1:
        low = tl.maximum(low - (12 << 23), 0)
    if middle + spread > 2048:
        high = tl.minimum(high + (2 << 23), 0x7F800000)
    width, shift = high - low + (1 << 14), 0
    for i in range(20):
        shift = tl.where((2048 << shift) < width, i + 1, shift)
    tl.store(header + 2050, low)
    tl.store(header + 2051, shift)
    tl.store(header + 2052, tl.minimum((width >> shift) + 1, 2048))


@triton.jit
def count(header, buckets, bits, flat, inside, CAPACITY: tl.constexpr):
    """Count a block's entries below the window, and list those in it."""
    low, shift = tl.load(header + 2050), tl.load(header + 2051)
    below = tl.sum((inside & (bits < low)).to(tl.int32))
    tl.atomic_add(header + 2048, below, sem="relaxed")
    bucket = (bits - low) >> shift
    listed = inside & (bits >= low) & (bucket < tl.load(header + 2052))
    bucket = tl.where(listed, bucket, 0)
    slot = tl.atomic_add(header + bucket, 1, listed, sem="relaxed")
    tl.store(buckets + bucket * CAPACITY + slot, flat, listed & (slot < CAPACITY))


@triton.jit
def _histogram(merged, total, prefix, shift):
    """Of 8 bits from ``shift`` on, of entries whose higher bits are ``prefix``."""
    result = tl.zeros((256,), tl.int32)
    bins = tl.arange(0, 256)
    for start in range(0, total, 2048):
        flat = start + tl.arange(0, 2048)
        bits = bits_of(tl.load(merged + flat, flat < total, 0.0)) >> shift
        agrees = (flat < total) & ((bits >> 8) == prefix)
        outside = 2048 - tl.sum(agrees.to(tl.int32))
        counts = tl.histogram(tl.where(agrees, bits & 255, 0), 256)
        result += counts - tl.where(bins == 0, outside, 0)
    return result


@triton.jit
def _search(merged, dropped, total):
    """(threshold, subtracted, cut), by one program's passes over the whole matrix."""
    prefix, rank = 0, dropped
    for digit in range(4):
        cumulative = tl.cumsum(_histogram(merged, total, prefix, 24 - 8 * digit), 0)
        below = cumulative < rank
        prefix = (prefix << 8) | tl.sum(below.to(tl.int32))
        rank -= tl.max(tl.where(below, cumulative, 0))
    lower, kept_below = 0, 0
    for start in range(0, total, 2048):
        flat = start + tl.arange(0, 2048)
        bits = bits_of(tl.load(merged + flat, flat < total, 0.0))
        kept_below += tl.sum(((flat < total) & (bits <= prefix)).to(tl.int32))
        lower = tl.maximum(lower, tl.max(tl.where((flat < total) & (bits < prefix), bits, 0)))
    surplus, cut = kept_below - dropped, 0
    if surplus > 0:
        before = 0
        for start in range(0, total, 2048):
            flat = start + tl.arange(0, 2048)
            bits = bits_of(tl.load(merged + flat, flat < total, 0.0))
            ties = ((flat < total) & (bits == prefix)).to(tl.int32)
            kept = (ties > 0) & (before + tl.cumsum(ties, 0) <= surplus)
            cut = tl.maximum(cut, tl.max(tl.where(kept, flat + 1, 0)))
            before += tl.sum(ties)
    return prefix, tl.where(surplus > 0, lower, prefix), cut


@triton.jit
def _listed(merged, bucket, used_count, CAPACITY: tl.constexpr):
    """(which are used, flat indices, bits) of a bucket's entries."""
    index = tl.arange(0, CAPACITY)
    used = index < used_count
    flat = tl.load(bucket + index, used, 0)
    return used, flat, bits_of(tl.load(merged + flat, used, 0.0))


@triton.jit
def _search_bucket(
    merged, bucket, used_count, lower_bucket, lower_count, rank, start, shift,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """(threshold, subtracted, cut); the last is −1 if the bucket and the next below do not tell."""
    used, flat, bits = _listed(merged, bucket, used_count, CAPACITY)
    threshold = _value_of_rank(bits, used, rank, start, shift)
    surplus = tl.sum((used & (bits <= threshold)).to(tl.int32)) - rank
    subtracted, cut = threshold, 0
    if surplus > 0:
        subtracted = tl.max(tl.where(used & (bits < threshold), bits, -1))
        if (subtracted < 0) & (lower_count <= CAPACITY):
            used_below, _, bits_below = _listed(merged, lower_bucket, lower_count, CAPACITY)
            subtracted = tl.max(tl.where(used_below, bits_below, -1))
        ties = used & (bits == threshold)
        cut = _value_of_rank(flat, ties, surplus, 0, 31) + 1
        cut = tl.where(subtracted < 0, -1, cut)
    return threshold, subtracted, cut


@triton.jit
def select(merged, header, buckets, dropped, total, CAPACITY: tl.constexpr):
    """(threshold, subtracted, cut) of the slice, once all programs have counted."""
    low, shift = tl.load(header + 2050), tl.load(header + 2051)
    below = tl.load(header + 2048)
    index = tl.arange(0, 2048)
    counts = tl.load(header + index)
    cumulative = tl.cumsum(counts, 0)
    smaller = cumulative < dropped - below
    bucket = tl.sum(smaller.to(tl.int32))
    rank = dropped - below - tl.max(tl.where(smaller, cumulative, 0))
    used_count = tl.load(header + tl.minimum(bucket, 2047))
    lower = tl.maximum(tl.max(tl.where((index < bucket) & (counts > 0), index, -1)), 0)
    lower_count = tl.where(lower < bucket, tl.load(header + lower), 0)
    threshold, subtracted, cut = 0, 0, -1
    if (below < dropped) & (bucket < 2048) & (used_count <= CAPACITY):
        threshold, subtracted, cut = _search_bucket(
            merged, buckets + bucket * CAPACITY, used_count,
            buckets + lower * CAPACITY, lower_count,
            rank, low + (bucket << shift), shift, CAPACITY,
        )  # fmt: skip
    if cut < 0:
        threshold, subtracted, cut = _search(merged, dropped, total)
    return threshold, subtracted, cut
