"""Kernels of the exact selection: radix search for the threshold, ties in flat order, W + S."""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import (
    add_update,
    bits_of,
    factors_of,
    histograms_of,
    state_of,
)


@triton.jit
def _locate(histogram, rank, BINS: tl.constexpr):
    """(the bin that holds the rank-th smallest entry, its rank among those of the bin)."""
    cumulative = tl.cumsum(tl.load(histogram + tl.arange(0, BINS)), 0)
    below = cumulative < rank
    return tl.sum(below.to(tl.int32)), rank - tl.max(tl.where(below, cumulative, 0))


@triton.jit
def second(merged, ranks, workspace, total, BLOCK: tl.constexpr):
    """Count bits 9 to 20 of entries whose first 8 are the threshold's. Grid: (blocks, slices)."""
    block, s = tl.program_id(0), tl.program_id(1)
    rank = tl.load(ranks + s)
    if (rank > 0) & (rank < total):
        first, histogram, _ = histograms_of(workspace, s)
        digit, rank = _locate(first, rank, 256)
        if block == 0:
            digit_place, rank_place, _, _, _, _ = state_of(workspace, s)
            tl.store(digit_place, digit)
            tl.store(rank_place, rank)
        flat = block * BLOCK + tl.arange(0, BLOCK)
        bits = bits_of(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
        agrees = (flat < total) & (bits >> 23 == digit)
        tl.atomic_add(histogram + ((bits >> 11) & 4095), 1, agrees, sem="relaxed")


@triton.jit
def third(merged, ranks, workspace, total, BLOCK: tl.constexpr):
    """Count bits 21 to 31 of entries whose first 20 are the threshold's; the largest below those.

    Grid: (blocks, slices).
    """
    block, s = tl.program_id(0), tl.program_id(1)
    rank = tl.load(ranks + s)
    if (rank > 0) & (rank < total):
        _, second, histogram = histograms_of(workspace, s)
        digit, rank, prefix_place, rank_place, lower_place, _ = state_of(workspace, s)
        bin, rank = _locate(second, tl.load(rank), 4096)
        prefix = (tl.load(digit) << 12) | bin
        if block == 0:
            tl.store(prefix_place, prefix)
            tl.store(rank_place, rank)
        flat = block * BLOCK + tl.arange(0, BLOCK)
        bits = bits_of(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
        agrees = (flat < total) & (bits >> 11 == prefix)
        tl.atomic_add(histogram + (bits & 2047), 1, agrees, sem="relaxed")
        lower = tl.max(tl.where((flat < total) & (bits >> 11 < prefix), bits, 0))
        tl.atomic_max(lower_place, lower, sem="relaxed")


@triton.jit
def select(
    merged, ranks, workspace, numbers, cuts, counts, total, BLOCK: tl.constexpr
):  # fmt: skip
    """Write threshold and subtracted magnitude; if entries tie there, count them in every block.

    counts: (slices, blocks). Grid: (blocks, slices).
    """
    block, s = tl.program_id(0), tl.program_id(1)
    blocks, slices = tl.num_programs(0), tl.num_programs(1)
    rank = tl.load(ranks + s)
    if (rank > 0) & (rank < total):
        _, _, histogram = histograms_of(workspace, s)
        _, _, prefix_place, rank_place, lower_place, surplus_place = state_of(workspace, s)
        prefix = tl.load(prefix_place) << 11
        digit, rank = _locate(histogram, tl.load(rank_place), 2048)
        threshold = prefix | digit
        surplus = tl.load(histogram + digit) - rank
        if block == 0:
            bins = tl.arange(0, 2048)
            occurs = (bins < digit) & (tl.load(histogram + bins) > 0)
            lower = tl.max(tl.where(occurs, prefix | bins, 0))
            lower = tl.maximum(lower, tl.load(lower_place))
            subtracted = tl.where(surplus > 0, lower, threshold)
            tl.store(numbers + s, threshold.to(tl.float32, bitcast=True))
            tl.store(numbers + slices + s, subtracted.to(tl.float32, bitcast=True))
            tl.store(cuts + s, 0)
            tl.store(surplus_place, surplus)
        if surplus > 0:
            flat = block * BLOCK + tl.arange(0, BLOCK)
            bits = bits_of(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
            ties = (flat < total) & (bits == threshold)
            tl.store(counts + s * blocks + block, tl.sum(ties.to(tl.int32)))
    elif block == 0:
        nothing = rank == total
        tl.store(numbers + s, tl.where(nothing, float("inf"), -1.0))
        tl.store(numbers + slices + s, tl.where(nothing, float("inf"), 0.0))
        tl.store(cuts + s, 0)


@triton.jit
def _find_cut(merged, flat, total, numbers, cuts, counts, surplus, s):
    """The flat index below which this block keeps ties; whoever holds the last kept one writes it.

    counts: of the slice. merged: the block.
    """
    block = tl.program_id(0)
    before = 0
    for start in range(0, block, 1024):
        earlier = start + tl.arange(0, 1024)
        before += tl.sum(tl.load(counts + earlier, earlier < block, 0))
    quota = surplus - before
    threshold = tl.load(numbers + s).to(tl.int32, bitcast=True)
    ties = ((flat < total) & (bits_of(merged) == threshold)).to(tl.int32)
    cut = tl.max(tl.where((ties > 0) & (tl.cumsum(ties, 0) <= quota), flat + 1, 0))
    if (quota > 0) & (quota <= tl.sum(ties)):
        tl.store(cuts + s, cut)
    return cut


@triton.jit
def finish(
    merged, ranks, workspace, numbers, cuts, counts, base, out, scale, total,
    FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = base + scale · S from the merged matrices. Grid: (blocks, slices)."""
    block, s = tl.program_id(0), tl.program_id(1)
    blocks, slices = tl.num_programs(0), tl.num_programs(1)
    rank = tl.load(ranks + s)
    flat = block * BLOCK + tl.arange(0, BLOCK)
    index = s.to(tl.int64) * total + flat
    value = tl.zeros((BLOCK,), tl.float32)
    amount = tl.zeros((BLOCK,), tl.float32)
    if rank < total:
        value = tl.load(merged + index, flat < total, 0.0)
        surplus = 0
        if rank > 0:
            _, _, _, _, _, surplus_place = state_of(workspace, s)
            surplus = tl.load(surplus_place)
        cut = 0
        if surplus > 0:
            cut = _find_cut(
                value, flat, total, numbers, cuts, counts + s * blocks, surplus, s
            )  # fmt: skip
        amount, _ = factors_of(value, flat, numbers, cut, slices, s, FORM)
    tl.store(out + index, add_update(base, value, amount, scale, index, flat < total), flat < total)
