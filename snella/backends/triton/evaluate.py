"""What the kernels share: the merged matrix, the factors of sparsification, the workspace."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers are written where they are used: Triton would check named constants at every launch.


@triton.jit
def histograms_of(workspace, s):
    """The slice's histograms of 256, 4096 and 2048 bins. (The layout of gpu.WORDS.)"""
    workspace += s * 6416
    return workspace, workspace + 256, workspace + 4352


@triton.jit
def state_of(workspace, s):
    """Where the search keeps the threshold's first 8 bits, the rank among entries that share them,
    its first 20 bits, the rank among those, the largest magnitude below, and the kept ties."""
    state = workspace + s * 6416 + 6400
    return state, state + 1, state + 2, state + 3, state + 4, state + 5


@triton.jit
def rank_of(ranks, s):
    """How many entries of the slice are dropped."""
    if ranks is None:
        return 0
    else:
        return tl.load(ranks + s)


@triton.jit
def bits_of(x):
    """Of the magnitude; they order like it, and NaN comes last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def difference_of(
    a, b, rows, columns, inputs, outputs, k, COORDINATES: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    """B_ok − A_ik of one piece; of the last row beyond it (a mask costs), with A = 0 beyond A."""
    left = tl.load(b + tl.minimum(rows, outputs - 1) * COORDINATES + k).to(tl.float32)
    place = k * inputs + columns if TURNED else columns * COORDINATES + k
    return left - tl.load(a + place, columns < inputs, 0.0).to(tl.float32)


@triton.jit
def squares_of(
    a, b, rows, columns, inputs, outputs, COORDINATES: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    """d² of one piece."""
    squares = tl.zeros((rows.shape[0], columns.shape[1]), tl.float32)
    for k in tl.range(COORDINATES, loop_unroll_factor=4):
        difference = difference_of(a, b, rows, columns, inputs, outputs, k, COORDINATES, TURNED)
        squares = tl.fma(difference, difference, squares)
    # The smallest normal number, as a true 0 may not divide: differences do not cancel, and where
    # points coincide the gradient still is 0. NaN stays.
    return tl.where(squares < 1.1754943508222875e-38, 1.1754943508222875e-38, squares)


@triton.jit
def coefficient_of(
    scalars, p, MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr
):
    """c_p: learned, or +0.1, −0.1, +0.1, …"""
    if LEARNED:
        return tl.load(scalars + 2 * MIXED + TEMPERATURE + p).to(tl.float32)
    else:
        return 0.1 - 0.2 * (p % 2)


@triton.jit
def linear_of(
    a, b, scalars, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """D = Σ_p c_p d_p."""
    linear = tl.zeros((rows.shape[0], columns.shape[1]), tl.float32)
    for p in tl.static_range(PIECES):
        piece_a, piece_b = a + p * inputs * COORDINATES, b + p * outputs * COORDINATES
        squares = squares_of(
            piece_a, piece_b, rows, columns, inputs, outputs, COORDINATES, TURNED
        )  # fmt: skip
        coefficient = coefficient_of(scalars, p, MIXED, TEMPERATURE, LEARNED)
        coefficients = tl.zeros_like(linear) + coefficient
        linear = tl.fma(squares * tl.rsqrt(squares), coefficients, linear)
    return linear


@triton.jit
def inverse_temperature(scalars, TEMPERATURE: tl.constexpr):
    if TEMPERATURE:
        return 1.0 / tl.load(scalars + 2).to(tl.float32)
    else:
        return 1.0


@triton.jit
def column_constants(softmax, columns, inputs, splits, stride, writes, COMBINE: tl.constexpr):
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
def evaluate(
    a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(D, exp of the shifted logits, merged); the second has no use without a softmax."""
    linear = linear_of(
        a, b, scalars, rows, columns, inputs, outputs,
        PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, True,
    )  # fmt: skip
    if MIXED:
        scale = tl.load(scalars).to(tl.float32)
        offset = tl.load(scalars + 1).to(tl.float32)
        exponential = tl.exp(linear * inverse_temperature(scalars, TEMPERATURE) - shift)
        weight = tl.zeros_like(linear) + normaliser * scale
        return linear, exponential, tl.fma(exponential, weight, linear + offset)
    else:
        return linear, linear, linear


@triton.jit
def factors_of(merged, flat, numbers, cut, slices, s, FORM: tl.constexpr):
    """(S / merged, ∂S/∂merged) as ``equations.sparsify.factors``; numbers as above.

    Entries equal to the threshold are kept before flat index ``cut``.
    """
    magnitude = tl.abs(merged)
    if FORM == "none":
        return tl.full(merged.shape, 1.0, tl.float32), tl.full(merged.shape, 1.0, tl.float32)
    else:
        bits, threshold = bits_of(merged), tl.load(numbers + s).to(tl.int32, bitcast=True)
        kept = (bits > threshold) | ((bits == threshold) & (flat < cut))
        if FORM == "paper":
            amount = tl.where(kept, magnitude - tl.load(numbers + slices + s), 0.0)
            return amount, tl.where(kept, magnitude + amount, 0.0)
        else:
            amount = tl.where(kept, magnitude, 0.0)
            return amount, amount


@triton.jit
def add_update(base, merged, amount, scale, index, mask):
    """base + scale · S, in single precision."""
    update = merged * amount * scale
    if base is None:
        return update
    else:
        return tl.load(base + index, mask, 0.0).to(tl.float32) + update
