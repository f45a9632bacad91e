"""Collapse: a model whose masks are empty, or full, for most images has learnt nothing."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY, FULL = 0.001, 0.95
"""Shares of foreground pixels at which a mask counts as empty, or as full."""


def collapsed(shares: Sequence[tuple[float, float]]) -> str | None:
    """What is wrong with masks of these shares of foreground (predicted, true), or None.

    A mask is too empty only where the truth has ten times its foreground: images without any, and
    very small objects, are predicted so rightly. It is too full where the truth is not as full.
    The answer names no numbers, so that the note of a table counts equal warnings of several runs.
    Users of fine-tuned SAM meet both: soft IoU has no gradient left once nothing is predicted, and
    a loss without background terms is content with everything.
    """
    for word, hits in (
        ("empty", sum(ours <= EMPTY and 10 * ours < true for ours, true in shares)),
        ("full", sum(ours >= FULL > true for ours, true in shares)),
    ):
        if 2 * hits > len(shares):
            return (
                f"the masks of most images are {word}, the model collapsed (try a lower learning "
                "rate or a longer warm-up)"
            )
    return None
