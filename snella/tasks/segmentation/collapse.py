"""Collapse: a model whose masks are empty, or full, for most images has learnt nothing."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY, FULL = 0.001, 0.95
"""Shares of foreground pixels at which a mask counts as empty, or as full."""


def collapsed(shares: Sequence[float]) -> str | None:
    """What is wrong with masks of these shares of foreground, or None.

    It names no numbers, so that the note of a table counts equal warnings of several runs.
    Users of fine-tuned SAM meet both: soft IoU has no gradient left once nothing is predicted, and
    a loss without background terms is content with everything.
    """
    for word, hits in (
        ("empty", sum(share <= EMPTY for share in shares)),
        ("full", sum(share >= FULL for share in shares)),
    ):
        if 2 * hits > len(shares):
            return (
                f"the masks of most images are {word}, the model collapsed (try a lower learning "
                "rate or a longer warm-up)"
            )
    return None
