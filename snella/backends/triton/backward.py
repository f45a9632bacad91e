"""Kernels that contract ∂L/∂S with A and B, block by block, and sum the blocks in order."""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import (
    add_piece,
    coefficient_of,
    factors_of,
    inverse_temperature,
    is_alive,
    known_columns,
    scalars_of,
    squares_of,
    turned_of,
    with_softmax,
)


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
    b, scalars, constants, selection, dense, parts,
    scale, inputs, outputs, splits,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each block's share of the gradients; not written where nothing survives.

    With R = c_p ∂L/∂D / d_p, ∂L/∂A_i = A_i Σ_o R_oi − Σ_o R_oi B_o and ∂L/∂B_o = B_o Σ_i R_oi −
    Σ_i R_oi A_i, skinny matrix products, each of three in TF32, as exact as single precision.
    parts: what ``apply`` found, for mix-k; then of A, (blocks of rows, *a.shape); of B, (blocks of
    columns, *b.shape); of the scalars, (all blocks, slices, K). Grid: (blocks of columns, of rows,
    slices).
    """
    s, slices = tl.program_id(2), tl.num_programs(2)
    total = inputs * outputs
    weighted = parts
    parts += MIXED * splits * slices * inputs
    if is_alive(selection, s, slices):
        size_a, size_b = PIECES * inputs * COORDINATES, PIECES * outputs * COORDINATES
        b += s * size_b
        turned = turned_of(constants, s, inputs, PIECES, COORDINATES)
        scalars = scalars_of(scalars, s, PIECES, MIXED, TEMPERATURE, LEARNED)
        parts_b = parts + tl.num_programs(1) * slices * size_a
        parts_scalars = parts_b + tl.num_programs(0) * slices * size_b
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts_scalars = scalars_of(
            parts_scalars, block * slices + s, PIECES, MIXED, TEMPERATURE, LEARNED
        )
        parts_a = parts + (tl.program_id(1) * slices + s) * size_a
        parts_b += (tl.program_id(0) * slices + s) * size_b
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        turned_columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        flat = rows * inputs + columns
        shift, normaliser = 0.0, 0.0
        if MIXED:
            shift, normaliser = known_columns(turned, columns, inputs, PIECES, COORDINATES)
        lengths = ()
        linear = tl.zeros((ROWS, COLUMNS), tl.float32)
        for p in tl.static_range(PIECES):
            squares = squares_of(
                turned + p * inputs * COORDINATES, b + p * outputs * COORDINATES,
                rows, columns, inputs, outputs, COORDINATES, True,
            )  # fmt: skip
            lengths += (squares,)  # type: ignore[assignment]
            linear = add_piece(squares, linear, scalars, p, MIXED, TEMPERATURE, LEARNED)
        exponential, merged = with_softmax(linear, scalars, shift, normaliser, MIXED, TEMPERATURE)
        _, slope = factors_of(merged, flat, selection, slices, s, FORM)
        inside = (rows < outputs) & (columns < inputs)
        index = s.to(tl.int64) * total + flat
        grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
        if MIXED:
            sums = _column_sums(weighted + s * inputs, columns, inputs, splits, slices * inputs)
            tl.store(parts_scalars, tl.sum(grad * (exponential * normaliser)))
            tl.store(parts_scalars + 1, tl.sum(grad))
            inverse = inverse_temperature(scalars, TEMPERATURE)
            weight = normaliser * (tl.load(scalars).to(tl.float32) * inverse)
            logit = (grad - sums * normaliser) * exponential * weight
            logit = tl.where(inside, logit, 0.0)
            if TEMPERATURE:
                tl.store(parts_scalars + 2, -tl.sum(logit * linear) * inverse)
            grad += logit
        # Seven coordinates at a time, and ones for the sums of R itself.
        place = tl.arange(0, 8)[None, :]
        ones = place == 7
        for p in tl.static_range(PIECES):
            piece_a, piece_b = turned + p * inputs * COORDINATES, b + p * outputs * COORDINATES
            squares = lengths[p]
            ratio = grad * tl.rsqrt(squares)
            if LEARNED:
                tl.store(parts_scalars + 2 * MIXED + TEMPERATURE + p, tl.sum(ratio * squares))
            ratio *= coefficient_of(scalars, p, MIXED, TEMPERATURE, LEARNED)
            for first in tl.static_range(0, COORDINATES, 7):
                k = first + place
                of_a = (place < 7) & (k < COORDINATES) & (turned_columns < inputs)
                of_b = (place < 7) & (k < COORDINATES) & (rows < outputs)
                point_a = tl.load(piece_a + k * inputs + turned_columns, of_a, 0.0)
                point_b = tl.load(piece_b + rows * COORDINATES + k, of_b, 0.0).to(tl.float32)
                along_b = tl.dot(ratio, tl.where(ones, 1.0, point_a), input_precision="tf32x3")
                turned_ratio = tl.trans(ratio)
                along_a = tl.dot(
                    turned_ratio, tl.where(ones, 1.0, point_b), input_precision="tf32x3"
                )
                sum_a = tl.sum(tl.where(ones, along_a, 0.0), 1, keep_dims=True)
                sum_b = tl.sum(tl.where(ones, along_b, 0.0), 1, keep_dims=True)
                to_a = parts_a + (p * inputs + turned_columns) * COORDINATES + k
                tl.store(to_a, point_a * sum_a - along_a, of_a)
                to_b = parts_b + (p * outputs + rows) * COORDINATES + k
                tl.store(to_b, point_b * sum_b - along_b, of_b)


@triton.jit
def _sum_parts(
    parts, out, alive, start, size, stride, count, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[offset + i] = Σ_j parts[j, offset + i] for i from ``start``, or 0 if not alive."""
    index = start + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if alive:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, count, ROWS):
            part = first + tl.arange(0, ROWS)
            place = parts + part[:, None] * stride + offset + index[None, :]
            inside = (part[:, None] < count) & (index[None, :] < size)
            sums += tl.load(place, inside, 0.0)
        total = tl.sum(sums, 0)
    tl.store(out + offset + index, total, index < size)


@triton.jit
def gather(
    parts, selection, grad_a, grad_b, grad_scalars,
    size_a, size_b, column_blocks, row_blocks, before,
    SCALARS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum every block's share, from ``before`` on; sizes are a slice's. Grid: (blocks, slices)."""
    parts += before
    block, s, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks_a, blocks_b = tl.cdiv(size_a, BLOCK), tl.cdiv(size_b, BLOCK)
    alive = is_alive(selection, s, slices)
    parts_b = parts + row_blocks * slices * size_a
    parts_scalars = parts_b + column_blocks * slices * size_b
    if block < blocks_a:
        _sum_parts(
            parts, grad_a, alive, block * BLOCK, size_a,
            slices * size_a, row_blocks, s * size_a, 16, BLOCK,
        )  # fmt: skip
    elif block < blocks_a + blocks_b:
        _sum_parts(
            parts_b, grad_b, alive, (block - blocks_a) * BLOCK, size_b,
            slices * size_b, column_blocks, s * size_b, 16, BLOCK,
        )  # fmt: skip
    elif SCALARS > 0:
        _sum_parts(
            parts_scalars, grad_scalars, alive, (block - blocks_a - blocks_b) * 8, SCALARS,
            slices * SCALARS, column_blocks * row_blocks, s * SCALARS, 256, 8,
        )  # fmt: skip
