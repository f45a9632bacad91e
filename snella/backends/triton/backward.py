"""Kernels that contract ∂L/∂S with A and B, block by block, and sum the blocks in order."""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import (
    coefficient_of,
    column_constants,
    difference_of,
    evaluate,
    factors_of,
    inverse_temperature,
    rank_of,
    squares_of,
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
    if rank_of(ranks, s) < total:
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
            shift, normaliser = column_constants(
                softmax + s * inputs, columns, inputs, splits, stride, False, False
            )
        if FORM != "none":
            cut = tl.load(cuts + s)
        linear, exponential, merged = evaluate(
            a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        _, slope = factors_of(merged, flat, numbers, cut, slices, s, FORM)
        inside = (rows < outputs) & (columns < inputs)
        index = s.to(tl.int64) * total + flat
        grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
        if MIXED:
            sums = _column_sums(weighted + s * inputs, columns, inputs, splits, stride)
            tl.store(parts_scalars, tl.sum(grad * (exponential * normaliser)))
            tl.store(parts_scalars + 1, tl.sum(grad))
            inverse = inverse_temperature(scalars, TEMPERATURE)
            weight = normaliser * (tl.load(scalars).to(tl.float32) * inverse)
            logit = (grad - sums * normaliser) * exponential * weight
            logit = tl.where(inside, logit, 0.0)
            if TEMPERATURE:
                tl.store(parts_scalars + 2, -tl.sum(logit * linear) * inverse)
            grad += logit
        for p in tl.static_range(PIECES):
            piece_a, piece_b = a + p * inputs * COORDINATES, b + p * outputs * COORDINATES
            squares = squares_of(
                piece_a, piece_b, rows, columns, inputs, outputs, COORDINATES, True
            )  # fmt: skip
            ratio = grad * tl.rsqrt(squares)
            if LEARNED:
                place = parts_scalars + 2 * MIXED + TEMPERATURE + p
                tl.store(place, tl.sum(ratio * squares))
            ratio *= coefficient_of(scalars, p, MIXED, TEMPERATURE, LEARNED)
            along_a = parts_a + p * inputs * COORDINATES + columns * COORDINATES
            along_b = parts_b + p * outputs * COORDINATES + rows * COORDINATES
            for k in tl.range(COORDINATES, loop_unroll_factor=4):
                share = ratio * difference_of(
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
    alive = rank_of(ranks, s) < total
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
