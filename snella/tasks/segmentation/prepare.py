"""From raw pictures to a prepared data set: columns image, mask (sealed for test), size and name.

Kinds: `quick` (rendered), `kvasir` and `image-mask` (a folder of images and masks; the first knows
Kvasir-SEG's own lists). Images keep their original bytes, masks are stored as PNG of one bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snella.errors import UserError, unknown
from snella.files import user_path
from snella.tasks.segmentation.duplicates import near_groups, share_out
from snella.tasks.segmentation.folder import Pair, read_list, read_pairs
from snella.tasks.segmentation.masks import encode_mask
from snella.tasks.segmentation.options import Options, lists_of, parse_options

KINDS = ("quick", "kvasir", "image-mask")
Split = dict[str, list[tuple[str, Pair]]]
"""Per split the images: (number of the test set they belong to, pair)."""


def prepare(name: str, spec: Any, folder: Path) -> None:
    """Read data set ``name`` as ``spec`` says and write it to ``folder``.

    Raises :class:`~snella.errors.UserError` for the first thing wrong with the raw data.
    """
    from snella.data.prepared import write_prepared

    check(name, spec)
    columns, info = _quick(name) if spec.kind == "quick" else _folder(name, spec)
    write_prepared(folder, columns, sealed=("mask",), info={"name": name, **info})


def check(name: str, spec: Any) -> None:
    """Raise :class:`~snella.errors.UserError` for an entry that no folder could make right."""
    if spec.kind not in KINDS:
        raise unknown(f"kind of data set {name!r}:", spec.kind, KINDS)
    parse_options(name, spec.options)


def sources(spec: Any) -> list[Path]:
    """The files and folders whose change makes the prepared data stale."""
    if spec.kind == "quick" or spec.path is None:
        return []
    root, options = Path(spec.path), Options(**spec.options)
    lists = lists_of(spec.kind, root, options) or ()
    released = [root / options.released_test] if options.released_test else []
    further = [*released, *map(user_path, options.test_sets.values())]
    return [root / "images", root / "masks", *lists, *further]


def _path(name: str, spec: Any) -> str:
    if spec.path is None:
        raise UserError(f"Data set {name!r} of kind {spec.kind} needs `path:`, a folder.")
    return str(spec.path)


# ---------------------------------------------------------------------------------- quick


def _quick(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from snella.quick.segmentation import QUICK, SOURCES, TISSUES, make

    columns = {}
    for split, drawn in make(name).items():
        count = len(drawn["image"])
        columns[split] = {
            "image": drawn["image"],
            "mask": [encode_mask(mask) for mask in drawn["mask"]],
            "size": np.array([mask.shape for mask in drawn["mask"]], dtype=np.int32),
            "name": [f"{split}{i:03d}".encode() for i in range(count)],
            "test_set": drawn["tissue"],
        }
    info = {
        "source": "; ".join(SOURCES),
        "licence": "CC0 and CC BY-SA 4.0 (the photographs), the drawing is ours",
        "description": QUICK[name].description,
        "demo": True,
        "jpeg": False,
        "test_sets": [tissue.name for tissue in TISSUES],
        "pool_test_sets": True,
    }
    return columns, info


# --------------------------------------------------------------------------------- folder


def _folder(name: str, spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    root, options = Path(_path(name, spec)), parse_options(name, spec.options)
    pairs = read_pairs(root, options.allow_empty)
    if options.split == "released":
        splits = _released(name, root, pairs, options)
    else:
        splits = _disjoint(name, pairs, lists_of(spec.kind, root, options), options)
    for title, path in options.test_sets.items():
        further = read_pairs(user_path(path), options.allow_empty)
        splits["test"] += [(title, pair) for pair in further.values()]
    info = {
        "source": f"folder {root}",
        "licence": "see the data set's owner",
        "split": options.split,
        "test_sets": list(dict.fromkeys(title for title, _ in splits["test"])),
        "pool_test_sets": False,
        **_overlap(splits, options),
    }
    return {split: _columns(found, info["test_sets"]) for split, found in splits.items()}, info


def _disjoint(
    name: str, pairs: Mapping[str, Pair], lists: tuple[Path, Path] | None, options: Options
) -> Split:
    """Test images from the lists or by seed, validation by seed; near-duplicates stay together."""
    names = list(pairs)
    if lists:
        train, test = (read_list(file, names) for file in lists)
        both = sorted(set(train) & set(test))
        if both:
            raise UserError(
                f"{lists[1]}: {both[0]} is also in {lists[0]} ({len(both)} names are in both); "
                "remove them from one."
            )
        groups = _groups(pairs, train, options)
        wanted = round(options.val_fraction * len(train))
        val, rest = share_out(groups, [wanted, len(train) - wanted], options.seed)
        parts = {"train": [train[i] for i in rest], "val": [train[i] for i in val], "test": test}
    else:
        sizes = [round(f * len(names)) for f in (options.test_fraction, options.val_fraction)]
        groups = _groups(pairs, names, options)
        shares = share_out(groups, [*sizes, len(names) - sum(sizes)], options.seed)
        parts = {
            split: [names[i] for i in share]
            for split, share in zip(("test", "val", "train"), shares, strict=True)
        }
    return _named(name, parts, pairs)


def _released(name: str, root: Path, pairs: Mapping[str, Pair], options: Options) -> Split:
    """All images train; a validation part is named, so that training on `trainval` is on all."""
    names = list(pairs)
    wanted = round(options.val_fraction * len(names))
    val, train = share_out(
        np.arange(len(names)), [wanted, len(names) - wanted], options.seed
    )  # every image trains, so near-duplicates need not stay together
    assert options.released_test is not None
    place = root / options.released_test
    if place.is_dir():
        tested = read_pairs(place, options.allow_empty)
    else:
        tested = {stem: pairs[stem] for stem in read_list(place, names)}
    parts = {"train": [names[i] for i in train], "val": [names[i] for i in val]}
    return {**_named(name, parts, pairs), "test": [(name, pair) for pair in tested.values()]}


def _named(name: str, parts: Mapping[str, Sequence[str]], pairs: Mapping[str, Pair]) -> Split:
    for split, members in parts.items():
        if not members:
            raise UserError(
                f"Data set {name!r}: {len(pairs)} images leave none for {split}; add some, or "
                "change `val_fraction`, `test_fraction` or, where most are near-duplicates of each "
                "other, `near_duplicate_bits` under its `options:`."
            )
    return {split: [(name, pairs[m]) for m in members] for split, members in parts.items()}


def _groups(pairs: Mapping[str, Pair], names: Sequence[str], options: Options) -> Any:
    return near_groups([pairs[n].hash for n in names], options.near_duplicate_bits)


def _overlap(splits: Split, options: Options) -> dict[str, Any]:
    """How many test images are equal or near to an image that trains, and what a table says."""
    training = [pair for split in ("train", "val") for _, pair in splits[split]]
    tested = [pair for _, pair in splits["test"]]
    known = {pair.pixels for pair in training}
    equal = sum(pair.pixels in known for pair in tested)
    hashes = np.array([pair.hash for pair in training], dtype=np.uint64)
    near = sum(_near(hashes, pair.hash, options.near_duplicate_bits) for pair in tested)
    info: dict[str, Any] = {"test_equal_to_training": equal, "test_near_to_training": near}
    released = " (split as released)" if options.split == "released" else ""
    info["warnings"] = [
        f"{count} of {len(tested)} test images are {what}training images{released}"
        for count, what in ((equal, ""), (near - equal, "near-duplicates of "))
        if count > 0
    ]
    return info


def _near(hashes: Any, value: int, bits: int) -> bool:
    differing = (hashes ^ np.uint64(value)).view(np.uint8).reshape(-1, 8)
    return bool((np.unpackbits(differing, axis=1).sum(axis=1) <= bits).any())


def _columns(found: list[tuple[str, Pair]], test_sets: list[str]) -> dict[str, Any]:
    from snella.data.images import EncodedFiles

    number = {title: i for i, title in enumerate(test_sets)}
    return {
        "image": EncodedFiles([pair.path for _, pair in found]),
        "mask": [pair.mask for _, pair in found],
        "size": np.array([pair.size for _, pair in found], dtype=np.int32),
        "name": [pair.name.encode() for _, pair in found],
        "test_set": np.array([number.get(title, 0) for title, _ in found], dtype=np.int64),
    }
