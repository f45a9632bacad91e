"""Kernels that turn A, find the softmax's constants, and write merged matrices or W + S."""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import (
    add_update,
    bits_of,
    column_constants,
    evaluate,
    factors_of,
    histograms_of,
    inverse_temperature,
    linear_of,
    rank_of,
)


@triton.jit
def _column_part(
    a, b, scalars, ranks, softmax, columns, inputs, outputs, start, stop, stride,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Largest logit and, ``stride`` behind it, Σ exp of some columns from row start to stop."""
    if rank_of(ranks, tl.program_id(2)) < inputs * outputs:
        inverse = inverse_temperature(scalars, TEMPERATURE)
        largest = tl.full(columns.shape, float("-inf"), tl.float32)
        total = tl.zeros(columns.shape, tl.float32)
        for row in range(start, stop, ROWS):
            rows = row + tl.arange(0, ROWS)[:, None]
            linear = linear_of(
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
    if rank_of(ranks, s) < total:
        a += s * PIECES * inputs * COORDINATES
        b += s * PIECES * outputs * COORDINATES
        scalars += s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
        columns = column + tl.arange(0, COLUMNS)[None, :]
        rows = row + tl.arange(0, ROWS)[:, None]
        shift, normaliser = 0.0, 0.0
        if MIXED:
            shift, normaliser = column_constants(
                softmax + s * inputs, columns, inputs, splits, slices * inputs, row == 0, True
            )
        _, _, value = evaluate(
            a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        inside = (rows < outputs) & (columns < inputs)
        tl.store(merged + s.to(tl.int64) * total + rows * inputs + columns, value, inside)
        # Entries outside count as digit 0, and are taken off again.
        digits = tl.where(inside, bits_of(value) >> 23, 0)
        digits = tl.reshape(digits, (ROWS * COLUMNS,))
        count = tl.histogram(digits, 256)
        used = tl.minimum(ROWS, outputs - row) * tl.minimum(COLUMNS, inputs - column)
        bins = tl.arange(0, 256)
        count -= tl.where(bins == 0, ROWS * COLUMNS - used, 0)
        histogram, _, _ = histograms_of(workspace, s)
        tl.atomic_add(histogram + bins, count, count > 0, sem="relaxed")


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
    alive = rank_of(ranks, s) < total
    a += s * PIECES * inputs * COORDINATES
    b += s * PIECES * outputs * COORDINATES
    scalars += s * (2 * MIXED + TEMPERATURE + PIECES * LEARNED)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shift, normaliser, cut = 0.0, 0.0, 0
    if MIXED:
        shift, normaliser = column_constants(
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
            _, exponential, merged = evaluate(
                a, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
                PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
            )  # fmt: skip
            amount, slope = factors_of(merged, flat, numbers, cut, slices, s, FORM)
            if dense is not None:
                grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
                sums += tl.sum(grad * exponential, 0, keep_dims=True)
        if out is not None:
            tl.store(out + index, add_update(base, merged, amount, scale, index, inside), inside)
    if dense is not None:
        tl.store(weighted + (split * slices + s) * inputs + columns, sums, columns < inputs)
