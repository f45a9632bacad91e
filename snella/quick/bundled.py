"""Small images cut from photographs and scans that ship inside scikit-learn and scikit-image.

A scan belongs to one split. Every photograph is divided into square blocks; each block belongs to
one split, and a patch lies wholly inside its block, so that no pixel is in two splits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snella.errors import UserError
from snella.quick import render

SIZE = render.SIZE
Images = NDArray[np.uint8]

SCIKIT_IMAGE, SCIKIT_LEARN = "skimage/data", "sklearn/datasets/images"
PHOTOGRAPHS: dict[str, str] = {
    "astronaut": f"{SCIKIT_IMAGE}/astronaut.png",
    "brick": f"{SCIKIT_IMAGE}/brick.png",
    "camera": f"{SCIKIT_IMAGE}/camera.png",
    "cat": f"{SCIKIT_IMAGE}/chelsea.png",
    "china": f"{SCIKIT_LEARN}/china.jpg",
    "coffee": f"{SCIKIT_IMAGE}/coffee.png",
    "coins": f"{SCIKIT_IMAGE}/coins.png",
    "flower": f"{SCIKIT_LEARN}/flower.jpg",
    "grass": f"{SCIKIT_IMAGE}/grass.png",
    "gravel": f"{SCIKIT_IMAGE}/gravel.png",
    "motorcycle": f"{SCIKIT_IMAGE}/motorcycle_left.png",
    "rocket": f"{SCIKIT_IMAGE}/rocket.jpg",
}
DIGITS = "sklearn/datasets/data/digits.csv.gz"
RETINA = f"{SCIKIT_IMAGE}/retina.jpg"


def bundled(path: str) -> Path:
    """Where `package/file` lies on this machine; UserError when the package lacks the file."""
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The quick suite needs {package}: pip install 'snella[bench]'.")
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.is_file():
        raise UserError(f"{found} is missing: reinstall the package ({package}).")
    return found


# -------------------------------------------------------------------------------------- digits


def digit_scans() -> tuple[Images, NDArray[np.int64]]:
    """scikit-learn's 1797 handwritten digits: scans (1797, 8, 8) as uint8, and labels.

    Read from the file that `sklearn.datasets.load_digits` reads, without its seconds of import.
    """
    table = np.loadtxt(bundled(DIGITS), delimiter=",", dtype=np.int64)
    return (table[:, :64].reshape(-1, 8, 8) * 255 // 16).astype(np.uint8), table[:, 64]


def _number(rng: np.random.Generator, three: Images) -> Images:
    """Ink (32, 32) of three scans in a row, the middle one in view, 16 to 24 pixels high."""
    side = int(rng.integers(16, 25))
    top, left = ((SIZE - side) // 2 + rng.integers(-3, 4, 2) + SIZE).tolist()
    ink = np.zeros((3 * SIZE, 3 * SIZE), dtype=np.uint8)
    for scan, place in zip(three, (-1, 0, 1), strict=True):
        x = left + place * (3 * side // 4)
        large = Image.fromarray(scan).resize((side, side), Image.Resampling.BILINEAR)
        here = np.s_[top : top + side, x : x + side]
        ink[here] = np.maximum(ink[here], np.asarray(large))
    return ink[SIZE : 2 * SIZE, SIZE : 2 * SIZE]


def digit_images(rng: np.random.Generator, scans: Images) -> Images:
    """House-number-like images of scans (N, 8, 8): each between two others of the same N.

    Upright on a white sheet the scans are too easy: a support-vector machine gets 99.6 %.
    """
    n = len(scans)
    others = rng.integers(0, n, (n, 2))
    rows = [scans[[left, i, right]] for i, (left, right) in enumerate(others)]
    ink = np.stack([_number(rng, three) for three in rows]) / 255.0
    ground = render.backdrop(rng, n, 0.1, 0.5)
    colour = render.any_colour(rng, n)[:, None, None, :]
    image = ground + ink[..., None] * (colour - ground)
    return render.finish(rng, image)


# ---------------------------------------------------------------------------- disjoint regions

BLOCKS = (
    ("train", "test", "train"),
    ("train", "val", "test"),
    ("test", "train", "train"),
)


def block_split(row: int, column: int) -> str:
    """The split that owns a block: a fixed 3 × 3 pattern of 5 train, 1 validation, 3 test."""
    return BLOCKS[row % 3][column % 3]


def blocks_of(shape: tuple[int, ...], side: int, split: str) -> list[tuple[int, int]]:
    """Top-left corners (y, x) of the whole blocks of one split in an image of this shape."""
    rows, columns = shape[0] // side, shape[1] // side
    return [
        (r * side, c * side)
        for r in range(rows)
        for c in range(columns)
        if block_split(r, c) == split
    ]


def _scaled(photo: Image.Image, window: tuple[int, int, int, int]) -> Image.Image:
    """A window scaled to 32 × 32; cut first, as `resize(box=...)` reads pixels around the box."""
    return photo.crop(window).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


# -------------------------------------------------------------------------------------- photos

PHOTO_BLOCK = 64
FLAT = 14.0


def _photo_patch(rng: np.random.Generator, photo: Image.Image, corner: tuple[int, int]) -> Images:
    """One square of 36 to 64 pixels inside a block, scaled to 32, mirrored half of the time."""
    side = int(rng.integers(36, 65))
    y, x = (int(start + rng.integers(0, PHOTO_BLOCK - side + 1)) for start in corner)
    window = (x, y, x + side, y + side)
    pixels = np.asarray(_scaled(photo, window))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def photo_patches(rng: np.random.Generator, split: str, labels: NDArray[np.int64]) -> Images:
    """For each label a textured patch (deviation above 14 levels) of the photograph it numbers."""
    photos = [Image.open(bundled(path)).convert("RGB") for path in PHOTOGRAPHS.values()]
    homes = [blocks_of((p.height, p.width), PHOTO_BLOCK, split) for p in photos]
    out = []
    for label in labels:
        patch = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        while patch.std(axis=(0, 1)).mean() < FLAT:
            corner = homes[label][int(rng.integers(len(homes[label])))]
            patch = _photo_patch(rng, photos[label], corner)
        out.append(_lit(rng, patch))
    return np.stack(out)


def _lit(rng: np.random.Generator, patch: Images) -> Images:
    """The patch under another light: each channel times a factor between 0.85 and 1.15."""
    return np.rint(np.clip(patch * rng.uniform(0.85, 1.15, 3), 0, 255)).astype(np.uint8)


# -------------------------------------------------------------------------------------- retina

RETINA_BLOCK = 72
WINDOW = 48
VESSEL = ("no vessel", "vessel at 0°", "vessel at 45°", "vessel at 90°", "vessel at 135°")


def _ridges(green: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.complex128]]:
    """Strength of dark ridges, and strength · exp(2 i φ) with φ the direction along the ridge.

    The larger eigenvalue of the Gaussian Hessian is the curvature across a vessel (Frangi et al.,
    1998); the direction along it is at a right angle to that eigenvector.
    """
    from scipy.ndimage import gaussian_filter

    sigma = 3.0
    yy, xx, xy = (gaussian_filter(green, sigma, order=o) for o in ((2, 0), (0, 2), (1, 1)))
    half_gap = np.hypot((xx - yy) / 2, xy)
    strength = np.maximum((xx + yy) / 2 + half_gap, 0) * sigma**2
    across = np.arctan2(2 * xy, xx - yy) / 2
    along = -(across + np.pi / 2)
    return strength, strength * np.exp(2j * along)


def _grade(strength: NDArray[np.float64], turning: NDArray[np.complex128]) -> int:
    """Label of a window: 0 no vessel, 1 to 4 one clear direction, −1 ambiguous (left out)."""
    if strength.max() < 2.2:
        return 0
    middle = slice(WINDOW // 4, -WINDOW // 4)
    core, pull = strength[middle, middle], turning[middle, middle]
    if core.max() < 4.5 or abs(pull.sum()) < 0.6 * core.sum():
        return -1
    eighths = np.angle(pull.sum()) / (np.pi / 2)
    if abs(eighths - np.rint(eighths)) > 0.35:
        return -1
    return 1 + int(np.rint(eighths)) % 4


def _windows(split: str, eye: Images) -> dict[int, list[tuple[int, int]]]:
    """Top-left corners of all labelled 48 × 48 windows of a split, on a grid of 3 pixels."""
    strength, turning = _ridges(eye[..., 1].astype(np.float64))
    found: dict[int, list[tuple[int, int]]] = {label: [] for label in range(len(VESSEL))}
    for top, left in blocks_of(eye.shape, RETINA_BLOCK, split):
        for y in range(top, top + RETINA_BLOCK - WINDOW + 1, 3):
            for x in range(left, left + RETINA_BLOCK - WINDOW + 1, 3):
                window = np.s_[y : y + WINDOW, x : x + WINDOW]
                if eye[window][..., 0].min() < 100:
                    continue
                label = _grade(strength[window], turning[window])
                if label >= 0:
                    found[label].append((y, x))
    return found


def retina_patches(rng: np.random.Generator, split: str, labels: NDArray[np.int64]) -> Images:
    """Windows of the fundus photograph with the wanted vessel direction, turned and mirrored."""
    photo = Image.open(bundled(RETINA)).convert("RGB")
    found = _windows(split, np.asarray(photo))
    out = []
    for label in labels:
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        source = int(label) if label == 0 else 1 + _before(int(label) - 1, turns, mirror)
        y, x = found[source][int(rng.integers(len(found[source])))]
        window = (x, y, x + WINDOW, y + WINDOW)
        turned = np.rot90(np.asarray(_scaled(photo, window)), turns)
        out.append(_lit(rng, turned[:, ::-1] if mirror else turned))
    return np.stack(out)


def _before(direction: int, turns: int, mirror: bool) -> int:
    """The direction (in 45°) that becomes `direction` after `turns` quarter turns and a mirror."""
    unmirrored = -direction % 4 if mirror else direction
    return (unmirrored - 2 * turns) % 4
