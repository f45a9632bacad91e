"""Near-duplicate images by perceptual hash, so that they can be kept in one split.

The hash is pHash: the signs of the 8 x 8 lowest frequencies of the cosine transform of the grey
image at 32 x 32 pixels, against their median. Neighbouring frames of one endoscopy differ in few
of its 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, LOW = 32, 8


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """The 64-bit hash of an image, RGB uint8 (H, W, 3)."""
    from scipy.fft import dctn

    grey = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, dtype=np.float64), norm="ortho")[:LOW, :LOW].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_groups(hashes: Sequence[int], distance: int) -> NDArray[np.int64]:
    """A group number per image (N,): images within ``distance`` bits are linked, groups are chains.

    Numbers are those of the group's first image, so they do not depend on anything else.
    """
    values = np.asarray(hashes, dtype=np.uint64)
    parent = np.arange(len(values))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for i in range(len(values)):
        differing = (values[i + 1 :] ^ values[i]).view(np.uint8).reshape(-1, 8)
        near = np.flatnonzero(np.unpackbits(differing, axis=1).sum(axis=1) <= distance) + i + 1
        for j in near:
            a, b = root(i), root(int(j))
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(values))], dtype=np.int64)


def share_out(
    groups: NDArray[np.int64], counts: Sequence[int], seed: int
) -> list[NDArray[np.int64]]:
    """Divide all images among parts of about ``counts`` images, whole groups at a time.

    Groups go in random order to the first part that still has room for them; what fits nowhere
    goes to the last. Returns the sorted indices of each part.
    """
    rng = np.random.default_rng(seed)
    room = list(counts)
    parts: list[list[int]] = [[] for _ in counts]
    for group in rng.permutation(np.unique(groups)):
        members = np.flatnonzero(groups == group)
        fits = [i for i, left in enumerate(room) if left >= len(members)]
        part = fits[0] if fits else len(counts) - 1
        parts[part].extend(members.tolist())
        room[part] -= len(members)
    return [np.array(sorted(part), dtype=np.int64) for part in parts]
