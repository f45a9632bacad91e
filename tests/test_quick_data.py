"""The quick suite's data: the same bytes each time, disjoint splits, balanced, truly varied."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image

from snella.errors import UserError
from snella.quick import bundled, render, species
from snella.quick.tasks import MORE, QUICK, SPLITS, Split, make

NAMES = sorted(QUICK)


@cache
def task(name: str) -> dict[str, Split]:
    return make(name)


def digest(splits: dict[str, Split]) -> str:
    """One digest of all arrays of a task, in the order of the splits' names."""
    sha = hashlib.sha256()
    for name in sorted(splits):
        images, labels = splits[name]
        sha.update(name.encode() + images.tobytes() + labels.tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_counts_shapes_types_and_label_range(name: str) -> None:
    splits = task(name)
    assert list(splits) == list(SPLITS)
    for split, (images, labels) in splits.items():
        more = MORE if split == "test" and not QUICK[name].real_pixels else 0
        assert images.shape == (SPLITS[split] + more, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (SPLITS[split] + more,)
        assert labels.dtype == np.int64
        assert labels.min() >= 0
        assert labels.max() < QUICK[name].num_classes


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_balanced(name: str) -> None:
    for images, labels in task(name).values():
        counts = np.bincount(labels, minlength=QUICK[name].num_classes)
        even = len(images) / QUICK[name].num_classes
        slack = 0.45 * even if name == "digits" else 1  # digits: a random draw of the scans
        assert np.abs(counts - even).max() <= slack


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_in_two_splits(name: str) -> None:
    seen = [{image.tobytes() for image in images} for images, _ in task(name).values()]
    assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.parametrize("name", NAMES)
def test_labels_come_in_no_order(name: str) -> None:
    labels = task(name)["train"][1]
    assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 0.12


def test_tasks_are_the_same_in_another_process() -> None:
    names = ["count", "leaves", "photos", "retina"]
    code = (
        "import tests.test_quick_data as t\n"
        "import sys\n"
        f"sys.stdout.write(' '.join(t.digest(t.make(n)) for n in {names}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(task(name)) for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_says_where_its_pixels_come_from(name: str) -> None:
    info = QUICK[name]
    assert info.name == name
    assert info.source and info.licence and info.description
    assert len(set(info.class_names)) == info.num_classes
    assert info.real_pixels == ("rendered" not in info.source)


def test_the_groups_of_the_design_are_there() -> None:
    groups = [info.group for info in QUICK.values()]
    assert {g: groups.count(g) for g in groups} == {
        "natural": 2,
        "specialised": 1,
        "structured": 2,
        "fgvc": 2,
    }


def test_unknown_task_names_the_closest() -> None:
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        make("digit")


def test_missing_photograph_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"no_such\.png is missing: reinstall"):
        bundled.bundled("skimage/data/no_such.png")
    with pytest.raises(UserError, match="needs no_such_package"):
        bundled.bundled("no_such_package/x.png")


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    scans, labels = bundled.digit_scans()
    assert np.array_equal(labels, theirs.target)
    assert np.array_equal(scans, (theirs.images * 255 // 16).astype(np.uint8))


def test_no_scan_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even as the neighbour of another digit: a split's painter sees only its own scans."""
    monkeypatch.setattr(bundled, "digit_images", lambda _, scans: scans)
    seen = [{scan.tobytes() for scan in scans} for scans, _ in make("digits").values()]
    assert sum(map(len, seen)) == len(set().union(*seen)) == sum(SPLITS.values())


def test_a_digit_stands_between_its_two_neighbours() -> None:
    left, middle, right = np.zeros((3, 8, 8), dtype=np.uint8)
    middle[2:6, 2:6] = 255
    ink = bundled._number(np.random.default_rng(0), np.stack([left, middle, right]))
    rows, columns = np.nonzero(ink > 128)
    assert abs(rows.mean() - 15.5) < 4 and abs(columns.mean() - 15.5) < 4
    middle[:] = 0
    left[:] = right[:] = 255
    ink = bundled._number(np.random.default_rng(0), np.stack([left, middle, right]))
    assert ink[16, 0] > 0 and ink[16, -1] > 0 and ink[16, 15] == 0


# ---------------------------------------------------------------------------- photographs


@pytest.mark.parametrize("side", [bundled.PHOTO_BLOCK, bundled.RETINA_BLOCK])
def test_blocks_of_the_splits_never_share_a_pixel(side: int) -> None:
    owner = np.zeros((430, 640), dtype=int)
    for split in SPLITS:
        for y, x in bundled.blocks_of(owner.shape, side, split):
            owner[y : y + side, x : x + side] += 1
    assert owner.max() == 1


def test_photo_patches_stay_inside_their_block() -> None:
    owner = np.zeros((448, 448, 3), dtype=np.uint8)
    for tone, split in enumerate(SPLITS, start=1):
        for y, x in bundled.blocks_of(owner.shape, bundled.PHOTO_BLOCK, split):
            owner[y : y + bundled.PHOTO_BLOCK, x : x + bundled.PHOTO_BLOCK] = 80 * tone
    photo, rng = Image.fromarray(owner), np.random.default_rng(0)
    for tone, split in enumerate(SPLITS, start=1):
        for corner in bundled.blocks_of(owner.shape, bundled.PHOTO_BLOCK, split):
            assert (bundled._photo_patch(rng, photo, corner) == 80 * tone).all()


def test_retina_windows_stay_inside_their_block() -> None:
    eye = np.asarray(Image.open(bundled.bundled(bundled.RETINA)).convert("RGB"))
    side, window = bundled.RETINA_BLOCK, bundled.WINDOW
    for split in SPLITS:
        for corners in bundled._windows(split, eye).values():
            assert corners, "every class occurs in every split"
            for y, x in corners:
                assert bundled.block_split(y // side, x // side) == split
                assert y // side == (y + window - 1) // side
                assert x // side == (x + window - 1) // side


def test_scaling_a_window_reads_nothing_around_it() -> None:
    canvas = np.zeros((96, 96, 3), dtype=np.uint8)
    canvas[20:68, 30:78] = 200
    assert (np.asarray(bundled._scaled(Image.fromarray(canvas), (30, 20, 78, 68))) == 200).all()


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("direction", range(4))
def test_vessel_direction_survives_turning_and_mirroring(
    direction: int, turns: int, mirror: bool
) -> None:
    """A drawn dark line, turned like a patch, is graded as the label that the patch carries."""
    axis = np.arange(bundled.WINDOW) - (bundled.WINDOW - 1) / 2
    angle = np.pi / 4 * bundled._before(direction, turns, mirror)
    across = np.sin(angle) * axis[None, :] + np.cos(angle) * axis[:, None]
    drawn = 150 - 60 * np.exp(-(across**2) / 18)
    turned = np.rot90(drawn, turns)
    turned = turned[:, ::-1] if mirror else turned
    assert bundled._grade(*bundled._ridges(turned)) == direction + 1


def test_a_plain_patch_has_no_vessel() -> None:
    assert bundled._grade(*bundled._ridges(np.full((48, 48), 120.0))) == 0


# ------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize(
    "painter",
    [render.paint_count, render.paint_orientation, species.paint_beetles, species.paint_leaves],
)
def test_images_of_one_class_differ_in_colour_and_place(painter: render.Painter) -> None:
    images = painter(np.random.default_rng(3), np.full(60, 2, dtype=np.int64)).astype(float)
    assert images.mean(axis=(1, 2)).std(axis=0).min() > 10  # mean colour per image
    grey = images.mean(axis=-1) - images.mean(axis=(1, 2, 3))[:, None, None]
    weight = np.abs(grey) ** 2
    centre = (weight * np.arange(32)).sum(axis=2).sum(axis=1) / weight.sum(axis=(1, 2))
    assert centre.std() > 0.5


def test_count_paints_as_many_objects_as_it_says() -> None:
    from scipy.ndimage import label

    rng = np.random.default_rng(0)
    where, radius = render._scatter(rng, np.arange(1, 9))
    for i, count in enumerate(range(1, 9)):
        x, y = render.pixels()
        discs = [
            np.hypot(x[0] - where[i, j, 0], y[0] - where[i, j, 1]) < radius[i, j]
            for j in range(where.shape[1])
        ]
        assert label(np.any(discs, axis=0))[1] == count


def test_shapes_have_the_size_they_are_given() -> None:
    u, v = render.posed(np.zeros((1, 2)), np.zeros(1))
    for distance, area in (
        (np.hypot(u, v) - 6, np.pi * 36),
        (render.box(u, v, 5.0, 3.0), 60.0),
        (render.ellipse(u, v, 9.0, 5.0), np.pi * 45),
        (render.triangle(u, v, 8.0), 3 * np.sqrt(3) * 16),
    ):
        assert np.clip(0.5 - distance, 0, 1).sum() == pytest.approx(area, rel=0.06)


def test_orientation_turns_the_sprite_counter_clockwise() -> None:
    quarter = render.ORIENTATIONS // 4
    u, v = render.posed(np.zeros((2, 2)), np.array([0, quarter]) * 2 * np.pi / render.ORIENTATIONS)
    assert np.allclose(np.rot90(u[0]), u[1]) and np.allclose(np.rot90(v[0]), v[1])


def test_hsv_matches_the_standard_library() -> None:
    import colorsys

    h, s, v = np.random.default_rng(0).random((3, 50))
    expected = [colorsys.hsv_to_rgb(*three) for three in zip(h, s, v, strict=True)]
    assert np.allclose(render.hsv(h, s, v), expected)
