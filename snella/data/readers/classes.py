"""Class folders, torchvision's ImageFolder: train/<class>/<image>, val/ and test/ likewise."""

from __future__ import annotations

import os
from pathlib import Path

from snella.data.options import Options
from snella.data.readers.listing import Line, Listing, few
from snella.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


def found(root: Path) -> bool:
    """Whether ``root`` has a folder of training images with class folders in it."""
    return any((root / n).is_dir() and any(_folders(root / n)) for n in NAMES["train"])


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())


def read(root: Path, options: Options) -> Listing:
    """List the class folders; classes are numbered in sorted order of their names."""
    folders = {role: next((root / n for n in names if (root / n).is_dir()), None)
               for role, names in NAMES.items()}  # fmt: skip
    if options.test:
        folders["test"] = root / options.test
        if folders["val"] == folders["test"]:
            folders["val"] = None
    for role in ("train", "test"):
        if (folder := folders[role]) is None or not folder.is_dir():
            held = sorted(p.name for p in root.iterdir() if p.is_dir())
            wanted = (options.test if role == "test" else None) or role
            raise UserError(
                f"{root} has no folder of {role} images, {wanted}/<class>/ (it has {few(held)}). "
                "Images to test on may lie elsewhere: `options: {test: val}`."
            )
    for role, folder in folders.items():
        if folder is not None and (inner := folder / folder.name).is_dir() and _folders(inner):
            raise UserError(
                f"{inner} holds the class folders of {role}; move them up into {folder}."
            )
    given = {role: folder for role, folder in folders.items() if folder is not None}
    classes = {role: {p.name for p in _folders(folder)} for role, folder in given.items()}
    names = sorted(classes["train"] | classes.get("val", set()))
    unknown_classes = sorted(classes["test"] - set(names))
    if unknown_classes:
        raise UserError(
            f"{given['test']} has classes that {given['train']} lacks: {few(unknown_classes)}."
        )
    lines = {}
    left_out = []
    for role, folder in given.items():
        left_out += [p for p in folder.rglob("*") if _is_other(p)]
        lines[role] = [
            Line(str(folder), image.relative_to(root).as_posix(), names.index(class_folder.name))
            for class_folder in sorted(_folders(folder))
            for image in _images(class_folder)
        ]
        if not lines[role]:
            raise UserError(f"{folder} has no images in its class folders.")
    kinds = few(sorted({p.suffix or p.name for p in left_out}))
    notes = [f"{len(left_out)} files are of no kind that is read ({kinds})"] if left_out else []
    return Listing("classes", root, lines, class_names=names, notes=notes)


def _is_other(path: Path) -> bool:
    """Whether a file is no image by its name, and none of those that systems leave behind."""
    hidden = path.name[0] == "." or path.name in ("Thumbs.db", "desktop.ini")
    return path.suffix.lower() not in SUFFIXES and not hidden and path.is_file()


def _folders(folder: Path) -> list[Path]:
    return [Path(e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    """Image files at any depth; hidden ones and hidden folders are what systems leave behind."""
    return sorted(
        p for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.is_dir()  # also a link that leads nowhere
        and not any(part[0] == "." for part in p.relative_to(folder).parts)
    )  # fmt: skip
