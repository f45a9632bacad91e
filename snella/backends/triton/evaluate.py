"""What the kernels share: the merged matrix, the factors of sparsification, places in memory."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers are written where they are used: Triton would check named constants at every launch.


@triton.jit
def rank_of(budgets, s, total):
    """How many entries of the slice are dropped."""
    if budgets is None:
        return 0
    else:
        return tl.minimum(tl.maximum(total - tl.load(budgets + s), 0), total).to(tl.int32)


@triton.jit
def scalars_of(
    scalars, s, PIECES: tl.constexpr, MIXED: tl.constexpr, TEMPERATURE: tl.constexpr,
    LEARNED: tl.constexpr,
):  # fmt: skip
    """The slice's scalars."""
    return scalars + s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)


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
def add_piece(
    squares, linear, scalars, p,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """D + c_p d_p."""
    coefficient = coefficient_of(scalars, p, MIXED, TEMPERATURE, LEARNED)
    coefficients = tl.zeros_like(linear) + coefficient
    return tl.fma(squares * tl.rsqrt(squares), coefficients, linear)


@triton.jit
def linear_of(
    a, b, scalars, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """D = Σ_p c_p d_p."""
    linear = tl.zeros((rows.shape[0], columns.shape[1]), tl.float32)
    for p in tl.static_range(PIECES):
        squares = squares_of(
            a + p * inputs * COORDINATES, b + p * outputs * COORDINATES,
            rows, columns, inputs, outputs, COORDINATES, TURNED,
        )  # fmt: skip
        linear = add_piece(squares, linear, scalars, p, MIXED, TEMPERATURE, LEARNED)
    return linear


@triton.jit
def inverse_temperature(scalars, TEMPERATURE: tl.constexpr):
    if TEMPERATURE:
        return 1.0 / tl.load(scalars + 2).to(tl.float32)
    else:
        return 1.0


@triton.jit
def turned_of(constants, s, inputs, PIECES: tl.constexpr, COORDINATES: tl.constexpr):
    """The slice's share of the constants: A with features last, (pieces, coordinates, inputs)."""
    return constants + s * (PIECES * COORDINATES + 2) * inputs


@triton.jit
def known_columns(turned, columns, inputs, PIECES: tl.constexpr, COORDINATES: tl.constexpr):
    """(shift, 1 / Σ exp) of columns; the shift is infinite beyond the matrix, so that exp is 0."""
    place = turned + PIECES * COORDINATES * inputs + columns
    shift = tl.load(place, columns < inputs, float("inf"))
    return shift, tl.load(place + inputs, columns < inputs, 0.0)


@triton.jit
def combined_columns(parts, columns, inputs, splits, slices, s):
    """The same from the parts of every column, at most 8: (shifts then sums, splits, slices)."""
    stride = slices * inputs
    parts += s * inputs
    shift = tl.full(columns.shape, float("-inf"), tl.float32)
    for j in tl.static_range(8):
        inside = columns < tl.where(j < splits, inputs, 0)
        part = tl.load(parts + j * stride + columns, inside, float("-inf"))
        shift = tl.maximum(shift, part)
    shift = tl.where(columns < inputs, shift, float("inf"))
    total = tl.zeros(columns.shape, tl.float32)
    for j in tl.static_range(8):
        inside = columns < tl.where(j < splits, inputs, 0)
        largest = tl.load(parts + j * stride + columns, inside, float("-inf"))
        part = tl.load(parts + (splits + j) * stride + columns, inside, 0.0)
        total = tl.fma(part, tl.exp(largest - shift), total)
    return shift, 1.0 / tl.where(columns < inputs, total, 1.0)


@triton.jit
def keep_columns(
    turned, columns, shift, normaliser, inputs, PIECES: tl.constexpr, COORDINATES: tl.constexpr
):
    """Write what ``known_columns`` reads."""
    place = turned + PIECES * COORDINATES * inputs + columns
    tl.store(place, shift, columns < inputs)
    tl.store(place + inputs, normaliser, columns < inputs)


@triton.jit
def with_softmax(
    linear, scalars, shift, normaliser, MIXED: tl.constexpr, TEMPERATURE: tl.constexpr
):
    """(exp of the shifted logits, merged) from D; the first has no use without a softmax."""
    if MIXED:
        scale = tl.load(scalars).to(tl.float32)
        offset = tl.load(scalars + 1).to(tl.float32)
        exponential = tl.exp(linear * inverse_temperature(scalars, TEMPERATURE) - shift)
        weight = tl.zeros_like(linear) + normaliser * scale
        return exponential, tl.fma(exponential, weight, linear + offset)
    else:
        return linear, linear


@triton.jit
def evaluate(
    a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """(exp of the shifted logits, merged) of a block."""
    linear = linear_of(
        a, b, scalars, rows, columns, inputs, outputs,
        PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, True,
    )  # fmt: skip
    return with_softmax(linear, scalars, shift, normaliser, MIXED, TEMPERATURE)


@triton.jit
def is_alive(selection, s, slices):
    """Whether anything of the slice is kept."""
    if selection is None:
        return True
    else:
        return tl.load(selection + 2 * slices + s) >= 0


@triton.jit
def factors_of(merged, flat, selection, slices, s, FORM: tl.constexpr):
    """(S / merged, ∂S/∂merged) as ``equations.sparsify.factors``.

    Entries equal to the threshold are kept before flat index ``cut``.
    """
    if FORM == "none":
        return tl.full(merged.shape, 1.0, tl.float32), tl.full(merged.shape, 1.0, tl.float32)
    else:
        threshold, cut = tl.load(selection + s), tl.load(selection + 2 * slices + s)
        magnitude, bits = tl.abs(merged), bits_of(merged)
        kept = (bits > threshold) | ((bits == threshold) & (flat < cut))
        if FORM == "paper":
            subtracted = tl.load(selection + slices + s).to(tl.float32, bitcast=True)
            amount = tl.where(kept, magnitude - subtracted, 0.0)
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
