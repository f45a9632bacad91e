"""Kernels that turn A, find the softmax's constants and the selection, and write W + S."""

from __future__ import annotations

import triton
import triton.language as tl

from snella.backends.triton.evaluate import (
    add_update,
    bits_of,
    combined_columns,
    evaluate,
    factors_of,
    inverse_temperature,
    is_alive,
    keep_columns,
    known_columns,
    linear_of,
    rank_of,
    scalars_of,
    turned_of,
)
from snella.backends.triton.selection import choose_window, count, select, workspace_of


@triton.jit
def _shifted_sums(
    a, b, scalars, columns, inputs, outputs, start, stop,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(largest logit, Σ exp of the logits less it) of some columns, where exp would overflow."""
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
    return largest, total


@triton.jit
def _column_part(
    a, b, scalars, parts, columns, inputs, outputs, start, stop, stride,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Shift and, ``stride`` behind it, Σ exp of some columns from row start to stop."""
    inverse = inverse_temperature(scalars, TEMPERATURE)
    exponentials = tl.zeros((ROWS, columns.shape[1]), tl.float32)
    for row in range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        linear = linear_of(
            a, b, scalars, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, False,
        )  # fmt: skip
        exponentials += tl.where(rows < stop, tl.exp(linear * inverse), 0.0)
    total = tl.sum(exponentials, 0, keep_dims=True)
    shift = tl.zeros(columns.shape, tl.float32)
    # Without a shift the sum is as good, unless it shows that terms were too large or too small.
    good = (columns >= inputs) | ((total > 1e-20) & (total < 1e30))
    if tl.min(good.to(tl.int32)) == 0:
        shift, total = _shifted_sums(
            a, b, scalars, columns, inputs, outputs, start, stop,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, ROWS,
        )  # fmt: skip
    tl.store(parts + columns, shift, columns < inputs)
    tl.store(parts + stride + columns, total, columns < inputs)


@triton.jit
def prepare(
    a, b, scalars, budgets, constants, work, done, inputs, outputs, height,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn A, and find shift and Σ exp of ``height`` rows of some columns.

    With budgets also clear the workspace and choose the window. done: (slices) zeros, and so they
    stay. work: floats, the merged matrices, then parts for ``combined_columns``, then the workspace
    of ``selection``. Grid: (blocks of columns, splits, slices).
    """
    block, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, slices = tl.num_programs(1), tl.num_programs(2)
    programs = tl.num_programs(0) * splits
    total = inputs * outputs
    parts = work + slices * total
    dropped = rank_of(budgets, s, total)
    if budgets is not None:
        workspace = workspace_of(work, total, inputs, splits, slices)
        header = workspace + s * 2064
        for start in range(0, 2053, programs * 256):
            word = start + (split * tl.num_programs(0) + block) * 256 + tl.arange(0, 256)
            tl.store(header + word, 0, word < 2053)
    a += s * PIECES * inputs * COORDINATES
    b += s * PIECES * outputs * COORDINATES
    scalars = scalars_of(scalars, s, PIECES, MIXED, TEMPERATURE, LEARNED)
    turned = turned_of(constants, s, inputs, PIECES, COORDINATES)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if split == 0:
        for p in tl.static_range(PIECES):
            for k in range(COORDINATES):
                source = a + (p * inputs + columns) * COORDINATES + k
                value = tl.load(source, columns < inputs, 0.0).to(tl.float32)
                place = turned + (p * COORDINATES + k) * inputs + columns
                tl.store(place, value, columns < inputs)
    if MIXED:
        if dropped < total:
            _column_part(
                a, b, scalars, parts + (split * slices + s) * inputs, columns, inputs, outputs,
                split * height, tl.minimum((split + 1) * height, outputs), splits * slices * inputs,
                PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED, ROWS,
            )  # fmt: skip
    if done is not None:
        tl.debug_barrier()
        if tl.atomic_add(done + s, 1, sem="acq_rel") >= programs - 1:
            tl.store(done + s, 0)
            if (dropped > 0) & (dropped < total):
                buckets = workspace + slices * 2064 + s.to(tl.int64) * 2048 * 1024
                choose_window(
                    turned, b, scalars, parts, header, buckets, dropped,
                    inputs, outputs, splits, slices, s,
                    PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
                )  # fmt: skip


@triton.jit
def merge(
    b, scalars, budgets, constants, work, selection,
    inputs, outputs, splits,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the merged matrices, and the selection. Grid: (blocks of columns, of rows, slices)."""
    column, row, s = tl.program_id(0) * COLUMNS, tl.program_id(1) * ROWS, tl.program_id(2)
    slices, total = tl.num_programs(2), inputs * outputs
    dropped = rank_of(budgets, s, total)
    workspace = workspace_of(work, total, inputs, splits, slices)
    header = workspace + s * 2064
    buckets = workspace + slices * 2064 + s.to(tl.int64) * 2048 * CAPACITY
    merged, parts = work + s.to(tl.int64) * total, work + slices * total
    if dropped < total:
        b += s * PIECES * outputs * COORDINATES
        scalars = scalars_of(scalars, s, PIECES, MIXED, TEMPERATURE, LEARNED)
        turned = turned_of(constants, s, inputs, PIECES, COORDINATES)
        columns = column + tl.arange(0, COLUMNS)[None, :]
        rows = row + tl.arange(0, ROWS)[:, None]
        shift, normaliser = 0.0, 0.0
        if MIXED:
            shift, normaliser = combined_columns(parts, columns, inputs, splits, slices, s)
            if row == 0:
                keep_columns(turned, columns, shift, normaliser, inputs, PIECES, COORDINATES)
        _, value = evaluate(
            turned, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
            PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
        )  # fmt: skip
        inside = (rows < outputs) & (columns < inputs)
        flat = rows * inputs + columns
        tl.store(merged + flat, value, inside)
        if dropped > 0:
            count(header, buckets, bits_of(value), flat, inside, CAPACITY)
    tl.debug_barrier()
    done = tl.atomic_add(header + 2049, 1, sem="acq_rel")
    if done == tl.num_programs(0) * tl.num_programs(1) - 1:
        threshold, subtracted, cut = -1, 0, 0
        if dropped == total:
            threshold, subtracted, cut = 0x7F800000, 0x7F800000, -1
        elif dropped > 0:
            threshold, subtracted, cut = select(merged, header, buckets, dropped, total, CAPACITY)
        tl.store(selection + s, threshold)
        tl.store(selection + slices + s, subtracted)
        tl.store(selection + 2 * slices + s, cut)
        tl.store(selection + 3 * slices + s, total - dropped)


@triton.jit
def finish(
    merged, selection, base, out, scale, total, FORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = base + scale · S from the merged matrices. Grid: (blocks, slices)."""
    block, s, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    flat = block * BLOCK + tl.arange(0, BLOCK)
    index = s.to(tl.int64) * total + flat
    value = tl.zeros((BLOCK,), tl.float32)
    amount = tl.zeros((BLOCK,), tl.float32)
    if is_alive(selection, s, slices):
        value = tl.load(merged + index, flat < total, 0.0)
        amount, _ = factors_of(value, flat, selection, slices, s, FORM)
    tl.store(out + index, add_update(base, value, amount, scale, index, flat < total), flat < total)


@triton.jit
def apply(
    b, scalars, constants, work, selection, base, out, dense, weighted,
    scale, inputs, outputs, splits, height,
    PIECES: tl.constexpr, COORDINATES: tl.constexpr,
    MIXED: tl.constexpr, TEMPERATURE: tl.constexpr, LEARNED: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = base + scale · S, evaluated; and Σ_o ∂L/∂merged · exp over ``height`` rows of columns.

    out: or None. dense: ∂L/∂S, or None, then also weighted. weighted: (splits, slices, inputs).
    work: with parts of ``splits``, not combined yet, or None. Grid: (blocks of columns, splits,
    slices).
    """
    split, s, slices = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    total = inputs * outputs
    alive = is_alive(selection, s, slices)
    b += s * PIECES * outputs * COORDINATES
    scalars = scalars_of(scalars, s, PIECES, MIXED, TEMPERATURE, LEARNED)
    turned = turned_of(constants, s, inputs, PIECES, COORDINATES)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    shift, normaliser = 0.0, 0.0
    if MIXED:
        if work is None:
            shift, normaliser = known_columns(turned, columns, inputs, PIECES, COORDINATES)
        else:
            parts = work + slices * total
            shift, normaliser = combined_columns(parts, columns, inputs, splits, slices, s)
            if split == 0:
                keep_columns(turned, columns, shift, normaliser, inputs, PIECES, COORDINATES)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    stop = tl.minimum((split + 1) * height, outputs)
    for row in range(split * height, stop, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        inside = (rows < stop) & (columns < inputs)
        flat = rows * inputs + columns
        index = s.to(tl.int64) * total + flat
        merged = tl.zeros((ROWS, COLUMNS), tl.float32)
        amount = tl.zeros((ROWS, COLUMNS), tl.float32)
        if alive:
            exponential, merged = evaluate(
                turned, b, scalars, shift, normaliser, rows, columns, inputs, outputs,
                PIECES, COORDINATES, MIXED, TEMPERATURE, LEARNED,
            )  # fmt: skip
            amount, slope = factors_of(merged, flat, selection, slices, s, FORM)
            if dense is not None:
                grad = tl.load(dense + index, inside, 0.0).to(tl.float32) * slope * scale
                sums = tl.fma(grad, exponential, sums)
        if out is not None:
            tl.store(out + index, add_update(base, merged, amount, scale, index, inside), inside)
    if dense is not None:
        place = weighted + (split * slices + s) * inputs + columns
        tl.store(place, tl.sum(sums, 0, keep_dims=True), columns < inputs)
