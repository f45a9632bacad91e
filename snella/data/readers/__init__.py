"""Raw image data sets in all their layouts, checked and ready to be prepared.

`read_images` finds out the layout of a folder (the community's VTAB-1k lists, VPT's json lists,
class folders, the original releases, TFDS-prepared records), looks at every image once, and
returns columns per split with the warnings that go into the manifest and the tables' notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snella.data.images import EncodedFiles
from snella.data.options import Options, check_layout, options_of
from snella.data.readers import classes, original, tfds, vpt, vtab
from snella.data.readers.findings import check_labels, check_listing, warnings_of
from snella.data.readers.listing import ROLES, Images, Listing, few, picked
from snella.data.readers.pixels import SMALL, Seen, decoded, look_at_all
from snella.errors import UserError, one_line, record_traceback
from snella.files import user_path

__all__ = ["Listing", "Options", "check_lists", "list_images", "read_images", "read_listing"]


LAYOUTS = {"vtab": vtab, "vpt": vpt, "tfds": tfds, "original": original, "classes": classes}
TEXTS = ("vtab", "vpt")
"""Layouts whose lists are texts, quick to read."""
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".gz", ".rar", ".7z", ".tar.bz2")

Splits = dict[str, dict[str, Any]]


def read_images(
    root: str | Path,
    name: str,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Splits, dict[str, Any]]:
    """Read and check a data set of labelled images in any layout.

    Args:
        root: the data set's folder.
        name: its name in messages and in the manifest.
        num_classes: labels must be below it; if absent it is the number of class names or else
            one more than the highest label.
        options: the entry's ``options:``, see :class:`~snella.data.readers.listing.Options`.

    Returns:
        Columns ``image`` and ``label`` (int64 (N,)) of train, test and, where there is one, val;
        and the manifest's info, whose ``warnings`` name everything that is odd but usable.

    Raises:
        UserError: the first thing that is wrong, with file and line.
    """
    chosen = options_of(name, dict(options or {}))
    listing = list_images(root, name, chosen)
    classes_found = check_labels(listing, num_classes, chosen, name)
    check_listing(listing)
    with _readable(f"Data set {name!r}: the images of {listing.root} cannot be read"):
        seen = look_at_all(listing)
    return read_listing(listing, seen, name, classes_found, chosen)


def list_images(root: str | Path, name: str, options: Options) -> Listing:
    """The labelled lines of a data set's folder, before any image is opened."""
    root = user_path(root)
    if not root.is_dir():
        state = f"{root} is a file, not a folder" if root.exists() else f"there is no folder {root}"
        raise UserError(f"Data set {name!r}: {state}; correct `path:` (docs/data.md).")
    layout = options.layout if options.layout != "auto" else _layout(root, name)
    if layout == "original" and (options.official or "").startswith("vtab1k/"):
        layout = "tfds"  # VTAB's part of it, by the order that TFDS gives it
    with _readable(f"Data set {name!r}: {root} cannot be read as a copy in {layout} layout"):
        listing: Listing = LAYOUTS[layout].read(root, options)
    check_layout(name, options, listing.layout, "val" in listing.lines)
    if options.first_label:
        listing.lines = {role: [_lowered(line, options.first_label) for line in lines]
                         for role, lines in listing.lines.items()}  # fmt: skip
        if listing.union:
            listing.union = [_lowered(line, options.first_label) for line in listing.union]
    if options.val_share is not None:
        _set_aside(listing, options.val_share, options.split_seed)
    return listing


def _set_aside(listing: Listing, share: float, seed: int) -> None:
    """Make a share of the training images the validation images, in place."""
    lines, test = listing.lines["train"], listing.lines["test"]
    train, val = vpt.set_aside(lines, share, seed)
    listing.lines = {"train": train, "val": val, "test": test}
    if listing.images is not None:
        held, row = listing.images["train"], {line: i for i, line in enumerate(lines)}
        for role in ("train", "val"):
            listing.images[role] = picked(held, [row[line] for line in listing.lines[role]])
    listing.notes.append(
        f"{len(val)} training images were set aside as val (seed {seed}); which ones VPT took for "
        "fine-grained sets, only its json files say"
    )


def check_lists(
    root: str | Path, name: str, num_classes: int | None, options: Mapping[str, Any]
) -> None:
    """Raise :class:`~snella.errors.UserError` for a folder in no known layout, or faulty lists.

    No image is opened, and only lists that are texts are read: planning can ask.
    """
    root, chosen = user_path(root), options_of(name, dict(options))
    found = chosen.layout == "auto" and root.is_dir()
    layout = _layout(root, name) if found else chosen.layout
    if layout in (*TEXTS, "auto"):  # without a folder, the list says that there is none
        listing = list_images(root, name, chosen)
        check_labels(listing, num_classes, chosen, name)
        check_listing(listing)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever a damaged file makes a reader stumble over is the file's fault: one line, and a log.

    Binary releases (.mat, pickles, records) can be wrong in more ways than readers look for.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        record_traceback(error)
        raise UserError(
            f"{what} ({one_line(error)}): the copy is damaged or of another release; fetch it anew."
        ) from error


def _lowered(line: Any, by: int) -> Any:
    return type(line)(line.where, line.path, line.label - by)


def _layout(root: Path, name: str) -> str:
    for layout, reader in LAYOUTS.items():
        if reader.found(root):
            return layout
    nested = [
        folder for pattern in ("*", "*/*") for folder in sorted(root.glob(pattern))
        if folder.is_dir() and any(reader.found(folder) for reader in LAYOUTS.values())
    ]  # fmt: skip
    if nested:
        raise UserError(
            f"Data set {name!r}: {root} holds no data set itself, but {nested[0]} does; "
            f"set `path: {nested[0]}`."
        )
    held = [p.name for p in sorted(root.iterdir()) if p.is_dir() and classes.holds_images(p)]
    if flat := next((root / n for n in classes.NAMES["train"] if n in held), None):
        raise UserError(
            f"Data set {name!r}: {flat} holds images but no class folders; sort them into one "
            "folder per class, or write lists (docs/data.md)."
        )
    if held:
        raise UserError(
            f"Data set {name!r}: {root} holds images ({few(held)}), but neither lists nor a "
            "split; put class folders below train/ and test/, or write lists (docs/data.md)."
        )
    archives = sorted(p.name for p in root.iterdir() if p.name.endswith(ARCHIVES))
    if archives:
        raise UserError(
            f"Data set {name!r}: {root} holds an archive ({archives[0]}); unpack it there first."
        )
    needed = ", ".join(f"{split}.txt" for split in vtab.LISTS)
    raise UserError(
        f"Data set {name!r}: {root} is in no known layout: VTAB-1k lists ({needed}), VPT's "
        "train.json and test.json, class folders (train/<class>/), an original release, "
        "TFDS-prepared files, or with `layout: tfds` VTAB's archives (docs/data.md)."
    )


def read_listing(
    listing: Listing, seen: dict[str, Seen], name: str, num_classes: int, options: Options
) -> tuple[Splits, dict[str, Any]]:
    """The columns and the manifest's info of a listing whose images were looked at."""
    small = _one_small_size(listing, seen)
    splits: Splits = {}
    for role in ROLES:
        if role not in listing.lines:
            continue
        lines = listing.lines[role]
        labels = np.asarray([line.label for line in lines], dtype=np.int64)
        splits[role] = {"image": _images(listing, role, small), "label": labels}
    encodings = {seen[line.path].encoding for lines in listing.lines.values() for line in lines}
    info: dict[str, Any] = {
        "name": name,
        "source": f"{listing.layout} layout in {listing.root}",
        "licence": "see the folder's owner",
        "layout": listing.layout,
        "num_classes": num_classes,
        "class_names": listing.class_names,
        "jpeg": "JPEG" in encodings,
        "only_trainval": listing.only_trainval,
        "warnings": warnings_of(listing, seen, num_classes, options),
    }
    return splits, info


def _images(listing: Listing, role: str, small: tuple[int, int] | None) -> Images:
    if listing.images is not None:
        return listing.images[role]
    paths = [listing.files_root / line.path for line in listing.lines[role]]
    return decoded(paths, small) if small else EncodedFiles(paths)


def _one_small_size(listing: Listing, seen: dict[str, Seen]) -> tuple[int, int] | None:
    shapes = {seen[line.path].shape for lines in listing.lines.values() for line in lines}
    shape = shapes.pop()
    return shape if not shapes and shape[0] * shape[1] <= SMALL else None
