"""Triton kernels behind ``snella.gpu``: merged matrix, exact selection, update, and the way back.

A program sees a block of one slice's matrix: rows are outputs, columns inputs. Distances come from
differences, d² = Σ_k (B_ok − A_ik)², and are evaluated wherever they are needed: arithmetic is
cheaper than memory. Forward and backward must agree bit by bit on the merged matrix, or backward
would keep other entries; hence the one ``_evaluate``, fused multiply-adds only where written, and
sums over blocks in a fixed order. Only integers are added atomically: all results are
deterministic.

The threshold is found by its bits, 31 of a non-negative float, which order as integers: a histogram
of the first 8 tells them, then one of the next 12 among entries that agree so far, then one of the
last 11. Ties are then counted block by block in flat order. (snella.sparsify.Selection)

Names: a is A as ``prepare`` has turned it, (slices, pieces, coordinates, inputs); b is B, (slices,
pieces, outputs, coordinates); scalars (slices · K); ranks (slices), how many entries are dropped,
or None; softmax, numbers and cuts as in ``snella.gpu.Constants``; dense is ∂L/∂S, (slices, outputs,
inputs); PIECES … LEARNED are the choices of ``snella.kernels.Kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers are written where they are used: Triton would check named constants at every launch.


@triton.jit
def _histograms(workspace, s):
    """The slice's histograms of 256, 4096 and 2048 bins. (The layout of snella.gpu.WORDS.)"""
    workspace += s * 6416
    return workspace, workspace + 256, workspace + 4352


@triton.jit
def _state(workspace, s):
    """Where the search keeps the threshold's first 8 bits, the rank among entries that share them,
    its first 20 bits, the rank among those, the largest magnitude below, and the kept ties."""
    state = workspace + s * 6416 + 6400
    return state, state + 1, state + 2, state + 3, state + 4, state + 5


@triton.jit
def _rank(ranks, s):
    """How many entries of the slice are dropped."""
    if ranks is None:
        return 0
    else:
        return tl.load(ranks + s)


@triton.jit
def _bits(x):
    """Of the magnitude; they order like it, and NaN comes last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _difference(
    a, b, rows, columns, inputs, outputs, k, COORDINATES: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    """B_ok − A_ik of one piece; of the last row beyond it (a mask costs), with A = 0 beyond A."""
    left = tl.load(b + tl.minimum(rows, outputs - 1) * COORDINATES + k).to(tl.float32)
    place = k * inputs + columns if TURNED else columns * COORDINATES + k
    return left - tl.load(a + place, columns < inputs, 0.0).to(tl.float32)


@triton.jit
def _squares(
    a, b, rows, columns, inputs, outputs, COORDINATES: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    """d² of one piece."""
    squares = tl.zeros((rows.shape[0], columns.shape[1]), tl.float32)
    for k in tl.range(COORDINATES, loop_unroll_factor=4):
        difference = _difference(a, b, rows, columns, inputs, outputs, k, COORDINATES, TURNED)
        squares = tl.fma(difference, difference, squares)
    # The smallest normal number, as a true 0 may not divide: differences do not cancel, and where
    # points coincide the gradient still is 0. NaN stays.
    return tl.where(squares < 1.1754943508222875e-38, 1.1754943508222875e-38, squares)


@triton.jit
def _coefficient(scalars, p, MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr):
    """c_p: learned, or +0.1, −0.1, +0.1, …"""
    if LEARNED:
        return tl.load(scalars + 2 * MIXED + TEMPERATURE + p).to(tl.float32)
    else:
        return 0.1 - 0.2 * (p % 2)


@triton.jit
def _linear(
    a, b, scalars, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """D = Σ_p c_p d_p."""
    linear = tl.zeros((rows.shape[0], columns.shape[1]), tl.float32)
    for p in tl.static_range(PIECES):
        piece_a, piece_b = a + p * inputs * COORDINATES, b + p * outputs * COORDINATES
        squares = _squares(
            piece_a, piece_b, rows, columns, inputs, outputs, COORDINATES, TURNED
        )  # fmt: skip
        coefficient = _coefficient(scalars, p, MIXED, TEMPERATURE, LEARNED)
        coefficients = tl.zeros_like(linear) + coefficient
        linear = tl.fma(squares * tl.rsqrt(squares), coefficients, linear)
    return linear


@triton.jit
def _inverse_temperature(scalars, TEMPERATURE: tl.constexpr):
    if TEMPERATURE:
        return 1.0 / tl.load(scalars + 2).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _column_constants(softmax, columns, inputs, splits, stride, writes, COMBINE: tl.constexpr):
    """(shift, 1 / Σ exp) of every column, which are combined, and kept if ``writes``, or known.

    Beyond the matrix the shift is infinite, so that exp is 0 there. At most 8 splits.

    softmax: at the slice; stride: from row to row.
    """
    known = softmax + 2 * splits * stride + columns
    if COMBINE:
        shift = tl.full(columns.shape, float("-inf"), tl.float32)
        for j in tl.static_range(8):
            inside = columns < tl.where(j < splits, inputs, 0)
            part = tl.load(softmax + j * stride + columns, inside, float("-inf"))
            shift = tl.maximum(shift, part)
        shift = tl.where(columns < inputs, shift, float("inf"))
        total = tl.zeros(columns.shape, tl.float32)
        for j in tl.static_range(8):
            inside = columns < tl.where(j < splits, inputs, 0)
            largest = tl.load(softmax + j * stride + columns, inside, float("-inf"))
            part = tl.load(softmax + (splits + j) * stride + columns, inside, 0.0)
            total = tl.fma(part, tl.exp(largest - shift), total)
        normaliser = 1.0 / tl.where(columns < inputs, total, 1.0)
        if writes:
            tl.store(known, shift, columns < inputs)
            tl.store(known + stride, normaliser, columns < inputs)
        return shift, normaliser
    else:
        shift = tl.load(known, columns < inputs, float("inf"))
        return shift, tl.load(known + stride, columns < inputs, 0.0)


@triton.jit
def _evaluate(
    a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(D, exp of the shifted logits, merged); the second has no use without a softmax."""
    linear = _linear(
        a, b, scalars, rows, columns, inputs, outputs,
        PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, True,
    )  # fmt: skip
    if MIXED:
        scale = tl.load(scalars).to(tl.float32)
        offset = tl.load(scalars + 1).to(tl.float32)
        exponential = tl.exp(linear * _inverse_temperature(scalars, TEMPERATURE) - shift)
        weight = tl.zeros_like(linear) + normaliser * scale
        return linear, exponential, tl.fma(exponential, weight, linear + offset)
    else:
        return linear, linear, linear


@triton.jit
def _factors(merged, flat, numbers, cut, slices, s, FORM: tl.constexpr):
    """(S / merged, ∂S/∂merged) as ``snella.sparsify.factors``; numbers as in the file's docstring.

    Entries equal to the threshold are kept before flat index ``cut``.
    """
    magnitude = tl.abs(merged)
    if FORM == "none":
        return tl.full(merged.shape, 1.0, tl.float32), tl.full(merged.shape, 1.0, tl.float32)
    else:
        bits, threshold = _bits(merged), tl.load(numbers + s).to(tl.int32, bitcast=True)
        kept = (bits > threshold) | ((bits == threshold) & (flat < cut))
        if FORM == "paper":
            amount = tl.where(kept, magnitude - tl.load(numbers + slices + s), 0.0)
            return amount, tl.where(kept, magnitude + amount, 0.0)
        else:
            amount = tl.where(kept, magnitude, 0.0)
            return amount, amount


@triton.jit
def _add(base, merged, amount, scale, index, mask):
    """base + scale · S, in single precision."""
    update = merged * amount * scale
    if base is None:
        return update
    else:
        return tl.load(base + index, mask, 0.0).to(tl.float32) + update


@triton.jit
def _column_part(
    a, b, scalars, ranks, softmax, columns, inputs, outputs, start, stop, stride,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Largest logit and, ``stride`` behind it, Σ exp of some columns from row start to stop."""
    if _rank(ranks, tl.program_id(2)) < inputs * outputs:
        inverse = _inverse_temperature(scalars, TEMPERATURE)
        largest = tl.full(columns.shape, float("-inf"), tl.float32)
        total = tl.zeros(columns.shape, tl.float32)
        for row in range(start, stop, ROWS):
            rows = row + tl.arange(0, ROWS)[:, None]
            linear = _linear(
                a, b, scalars, rows, columns, inputs, outputs,
                PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, False,
            )  # fmt: skip
            logits = tl.where(rows < stop, linear * inverse, float("-inf"))
            shift = tl.maximum(largest, tl.max(logits, 0, keep_dims=True))
            total *= tl.exp(largest - shift)
            total += tl.sum(tl.exp(logits - shift), 0, keep_dims=True)
            largest = shift
        tl.store(softmax + columns, largest, columns < inputs)
        tl.store(softmax + stride + columns, total, columns < inputs)


@triton.jit
def prepare(
    a, b, scalars, ranks, turned, softmax, workspace, words, inputs, outputs, height,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn A, clear the workspace, and find shift and Σ exp of ``height`` rows of some columns.

    Grid: (blocks of columns, splits, slices).
    """
    split, s = tl.program_id(1), tl.program_id(2)
    splits, slices = tl.num_programs(1), tl.num_programs(2)
    if words > 0:
        program = (s * splits + split) * tl.num_programs(0) + tl.program_id(0)
        step = 1024 * tl.num_programs(0) * splits * slices
        for word in range(1024 * program, words, step):
            index = word + tl.arange(0, 1024)
            tl.store(workspace + index, 0, index < words)
    a += s * PIECES * inputs * COORDINATES
    b += s * PIECES * outputs * COORDINATES
    turned += s * PIECES * inputs * COORDINATES
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if split == 0:
        for p in tl.static_range(PIECES):
            for k in range(COORDINATES):
                source = a + (p * inputs + columns) * COORDINATES + k
                value = tl.load(source, columns < inputs, 0.0).to(tl.float32)
                place = turned + (p * COORDINATES + k) * inputs + columns
                tl.store(place, value, columns < inputs)
    if MIXED:
        _column_part(
            a, b, scalars + s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED), ranks,
            softmax + (split * slices + s) * inputs, columns, inputs, outputs,
            split * height, tl.minimum((split + 1) * height, outputs), splits * slices * inputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, ROWS,
        )  # fmt: skip


@triton.jit
def merge(
    a, b, scalars, ranks, softmax, merged, workspace, inputs, outputs, splits,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the merged matrices, and count the first 8 bits of their magnitudes.

    Grid: (blocks of columns, blocks of rows, slices).
    """
    column, row, s = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2)
    slices, total = tl.num_programs(2), inputs * outputs
    if _rank(ranks, s) < total:
        a += s * PIECES * inputs * COORDINATES
        b += s * PIECES * outputs * COORDINATES
        scalars += s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
        columns = column + tl.arange(0, COLUMNS)[None, :]
        rows = row + tl.arange(0, ROWS)[:, None]
        shift, normaliser = 0.0, 0.0
        if MIXED:
            shift, normaliser = _column_constants(
                softmax + s * inputs, columns, inputs, splits, slices * inputs, row == 0, True
            )
        _, _, value = _evaluate(
            a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        inside = (rows < outputs) & (columns < inputs)
        tl.store(merged + s.to(tl.int64) * total + rows * inputs + columns, value, inside)
        # Entries outside count as digit 0, and are taken off again.
        digits = tl.where(inside, _bits(value) >> 23, 0)
        digits = tl.reshape(digits, (ROWS * COLUMNS,))
        count = tl.histogram(digits, 256)
        used = tl.minimum(ROWS, outputs - row) * tl.minimum(COLUMNS, inputs - column)
        bins = tl.arange(0, 256)
        count -= tl.where(bins == 0, ROWS * COLUMNS - used, 0)
        histogram, _, _ = _histograms(workspace, s)
        tl.atomic_add(histogram + bins, count, count > 0, sem="relaxed")


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
        first, histogram, _ = _histograms(workspace, s)
        digit, rank = _locate(first, rank, 256)
        if block == 0:
            digit_place, rank_place, _, _, _, _ = _state(workspace, s)
            tl.store(digit_place, digit)
            tl.store(rank_place, rank)
        flat = block * BLOCK + tl.arange(0, BLOCK)
        bits = _bits(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
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
        _, second, histogram = _histograms(workspace, s)
        digit, rank, prefix_place, rank_place, lower_place, _ = _state(workspace, s)
        bin, rank = _locate(second, tl.load(rank), 4096)
        prefix = (tl.load(digit) << 12) | bin
        if block == 0:
            tl.store(prefix_place, prefix)
            tl.store(rank_place, rank)
        flat = block * BLOCK + tl.arange(0, BLOCK)
        bits = _bits(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
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
        _, _, histogram = _histograms(workspace, s)
        _, _, prefix_place, rank_place, lower_place, surplus_place = _state(workspace, s)
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
            bits = _bits(tl.load(merged + s.to(tl.int64) * total + flat, flat < total, 0.0))
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
    ties = ((flat < total) & (_bits(merged) == threshold)).to(tl.int32)
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
            _, _, _, _, _, surplus_place = _state(workspace, s)
            surplus = tl.load(surplus_place)
        cut = 0
        if surplus > 0:
            cut = _find_cut(
                value, flat, total, numbers, cuts, counts + s * blocks, surplus, s
            )  # fmt: skip
        amount, _ = _factors(value, flat, numbers, cut, slices, s, FORM)
    tl.store(out + index, _add(base, value, amount, scale, index, flat < total), flat < total)


@triton.jit
def apply(
    a, b, scalars, ranks, softmax, numbers, cuts, base, out, dense, weighted,
    scale, inputs, outputs, height,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    FORM: tl.constexpr, COMBINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = base + scale · S, evaluated; and Σ_o ∂L/∂merged · exp over ``height`` rows of columns.

    out: or None. dense: ∂L/∂S, or None, then also weighted. weighted: (splits, slices, inputs).
    Grid: (blocks of columns, splits, slices).
    """
    split, s = tl.program_id(1), tl.program_id(2)
    splits, slices = tl.num_programs(1), tl.num_programs(2)
    total = inputs * outputs
    alive = _rank(ranks, s) < total
    a += s * PIECES * inputs * COORDINATES
    b += s * PIECES * outputs * COORDINATES
    scalars += s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shift, normaliser, cut = 0.0, 0.0, 0
    if MIXED:
        shift, normaliser = _column_constants(
            softmax + s * inputs, columns, inputs, splits, slices * inputs, split == 0, COMBINE
        )
    if FORM != "none":
        cut = tl.load(cuts + s)
    sums = tl.zeros((1, COLUMNS), tl.float32)
    stop = tl.minimum((split + 1) * height, outputs)
    for row in range(split * height, stop, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        inside = (rows < stop) & (columns < inputs)
        flat = rows * inputs + columns
        index = s.to(tl.int64) * total + flat
        merged = tl.zeros((ROWS, COLUMNS), tl.float32)
        amount = tl.zeros((ROWS, COLUMNS), tl.float32)
        if alive:
            _, exponential, merged = _evaluate(
                a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
                PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
            )  # fmt: skip
            amount, slope = _factors(merged, flat, numbers, cut, slices, s, FORM)
            if dense is not None:
                grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
                sums += tl.sum(grad * exponential, 0, keep_dims=True)
        if out is not None:
            tl.store(out + index, _add(base, merged, amount, scale, index, inside), inside)
    if dense is not None:
        tl.store(weighted + (split * slices + s) * inputs + columns, sums, columns < inputs)


@triton.jit
def _column_sums(parts, columns, inputs, splits, stride):
    """Sum of the parts of every column, at most 8, in order."""
    total = tl.zeros(columns.shape, tl.float32)
    for j in tl.static_range(8):
        inside = columns < tl.where(j < splits, inputs, 0)
        total += tl.load(parts + j * stride + columns, inside, 0.0)
    return total


@triton.jit
def contract(
    a, b, scalars, ranks, softmax, numbers, cuts, dense, weighted, parts_a, parts_b, parts_scalars,
    scale, inputs, outputs, splits,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each block's share of the gradients; not written where nothing survives.

    parts_a: (blocks of rows, *a.shape); parts_b: (blocks of columns, *b.shape); parts_scalars:
    (all blocks, slices, K). Grid: (blocks of columns, blocks of rows, slices).
    """
    s, slices = tl.program_id(2), tl.num_programs(2)
    total = inputs * outputs
    if _rank(ranks, s) < total:
        size_a, size_b = PIECES * inputs * COORDINATES, PIECES * outputs * COORDINATES
        a += s * size_a
        b += s * size_b
        scalars += s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
        parts_a += (tl.program_id(1) * slices + s) * size_a
        parts_b += (tl.program_id(0) * slices + s) * size_b
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts_scalars += (block * slices + s) * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        flat = rows * inputs + columns
        shift, normaliser, cut = 0.0, 0.0, 0
        if MIXED:
            stride = slices * inputs
            shift, normaliser = _column_constants(
                softmax + s * inputs, columns, inputs, splits, stride, False, False
            )
        if FORM != "none":
            cut = tl.load(cuts + s)
        linear, exponential, merged = _evaluate(
            a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        _, slope = _factors(merged, flat, numbers, cut, slices, s, FORM)
        inside = (rows < outputs) & (columns < inputs)
        index = s.to(tl.int64) * total + flat
        grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
        if MIXED:
            sums = _column_sums(weighted + s * inputs, columns, inputs, splits, stride)
            tl.store(parts_scalars, tl.sum(grad * (exponential * normaliser)))
            tl.store(parts_scalars + 1, tl.sum(grad))
            inverse = _inverse_temperature(scalars, TEMPERATURE)
            weight = normaliser * (tl.load(scalars).to(tl.float32) * inverse)
            logit = (grad - sums * normaliser) * exponential * weight
            logit = tl.where(inside, logit, 0.0)
            if TEMPERATURE:
                tl.store(parts_scalars + 2, -tl.sum(logit * linear) * inverse)
            grad += logit
        for p in tl.static_range(PIECES):
            piece_a, piece_b = a + p * inputs * COORDINATES, b + p * outputs * COORDINATES
            squares = _squares(
                piece_a, piece_b, rows, columns, inputs, outputs, COORDINATES, True
            )  # fmt: skip
            ratio = grad * tl.rsqrt(squares)
            if LEARNED:
                place = parts_scalars + 2 * MIXED + TEMPERATURE + p
                tl.store(place, tl.sum(ratio * squares))
            ratio *= _coefficient(scalars, p, MIXED, TEMPERATURE, LEARNED)
            along_a = parts_a + p * inputs * COORDINATES + columns * COORDINATES
            along_b = parts_b + p * outputs * COORDINATES + rows * COORDINATES
            for k in tl.range(COORDINATES, loop_unroll_factor=4):
                share = ratio * _difference(
                    piece_a, piece_b, rows, columns, inputs, outputs, k, COORDINATES, True
                )
                tl.store(along_a + k, -tl.sum(share, 0, keep_dims=True), columns < inputs)
                tl.store(along_b + k, tl.sum(share, 1, keep_dims=True), rows < outputs)


@triton.jit
def _sum_parts(
    parts, out, alive, start, size, stride, count, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[offset + i] = Σ_j parts[j, offset + i] for i from ``start``, or 0 if not alive."""
    index = start + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if alive:
        for first in range(0, count, ROWS):
            part = first + tl.arange(0, ROWS)
            place = parts + part[:, None] * stride + offset + index[None, :]
            inside = (part[:, None] < count) & (index[None, :] < size)
            total += tl.sum(tl.load(place, inside, 0.0), 0)
    tl.store(out + offset + index, total, index < size)


@triton.jit
def gather(
    parts_a, parts_b, parts_scalars, ranks, grad_a, grad_b, grad_scalars,
    size_a, size_b, column_blocks, row_blocks, total,
    SCALARS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum every block's share; sizes are those of a slice. Grid: (blocks, slices)."""
    block, s, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks_a, blocks_b = tl.cdiv(size_a, BLOCK), tl.cdiv(size_b, BLOCK)
    alive = _rank(ranks, s) < total
    if block < blocks_a:
        _sum_parts(
            parts_a, grad_a, alive, block * BLOCK, size_a,
            slices * size_a, row_blocks, s * size_a, 32, BLOCK,
        )  # fmt: skip
    elif block < blocks_a + blocks_b:
        _sum_parts(
            parts_b, grad_b, alive, (block - blocks_a) * BLOCK, size_b,
            slices * size_b, column_blocks, s * size_b, 32, BLOCK,
        )  # fmt: skip
    elif SCALARS > 0:
        _sum_parts(
            parts_scalars, grad_scalars, alive, (block - blocks_a - blocks_b) * 8, SCALARS,
            slices * SCALARS, column_blocks * row_blocks, s * SCALARS, 256, 8,
        )  # fmt: skip
