"""From a subject's photographs and DreamBooth's prompt file to a prepared data set.

A data set is one subject. Its photographs train; the same photographs are the sealed reference of
the test split, as in DreamBooth's evaluation. Prompt templates and class word are in the manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snella.errors import UserError, unknown
from snella.tasks.base import DatasetSpec
from snella.tasks.generation.prompts import NAME, check_template, read_prompts

KINDS = ("dreambooth", "quick")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp")
UNREAD = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif")
"""Photographs as well, which would be missed without a word."""
OPTIONS = ("subject", "class_word", "prompts")


def prepare(name: str, spec: DatasetSpec, folder: Path) -> dict[str, Any]:
    """Read or render the subject, check it, and write its prepared folder.

    Raises :class:`~snella.errors.UserError` if it is not configured, incomplete or damaged.
    """
    from snella.data.prepared import write_prepared

    check(name, spec)
    images, info = _quick(name) if spec.kind == "quick" else _photographs(name, spec)
    columns = {"image": images}
    described = {"num_classes": 1, "repeats_training_images": True, **info}
    splits = {"train": columns, "test": columns}
    return write_prepared(folder, splits, sealed=("image",), info=described)


def check(name: str, spec: DatasetSpec) -> None:
    """Raise :class:`~snella.errors.UserError` for an entry that no folder could make right."""
    if spec.kind not in KINDS:
        raise unknown(f"kind of data set {name!r}:", spec.kind, KINDS)
    known = OPTIONS if spec.kind == "dreambooth" else ()
    for option in spec.options:
        if option not in known:
            raise unknown(f"option of data set {name!r}:", option, known)
    own = spec.options.get("prompts")
    if own is not None and (not isinstance(own, list) or not own):
        raise UserError(f"`datasets.{name}.options.prompts` must be a list of templates.")
    templates = list(own or ())
    for number, template in enumerate(templates):
        check_template(str(template), f"datasets.{name}.options.prompts")
        if template in templates[:number]:
            raise UserError(
                f"`datasets.{name}.options.prompts` has {template!r} twice; remove one."
            )
    for option in ("subject", "class_word"):
        value = spec.options.get(option, "text")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"`datasets.{name}.options.{option}` must be text; put it in quotes.")


def sources(spec: DatasetSpec) -> list[Path]:
    """The subject's photographs and the prompt file; all subjects' where the entry names none."""
    if spec.kind != "dreambooth" or spec.path is None:
        return []
    root = _root(Path(spec.path))
    subjects = [root / str(spec.options.get("subject", ""))]
    if "subject" not in spec.options and root.is_dir():
        subjects = sorted(path for path in root.iterdir() if path.is_dir())
    files = [file for folder in subjects for file in image_files(folder)]
    return [p for p in (root / NAME, *files) if p.is_file()]


def image_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """A subject's photographs, in the order of their names."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in suffixes and not p.name.startswith("."))


def _photographs(name: str, spec: DatasetSpec) -> tuple[list[bytes], dict[str, Any]]:
    if spec.path is None:
        raise UserError(
            f"Data set {name!r} has no folder; set `datasets.{name}.path` in the configuration to "
            "DreamBooth's dataset folder (docs/generation.md)."
        )
    options = dict(spec.options)
    root = _root(Path(spec.path))
    subject = str(options.get("subject", name))
    class_word, templates = _prompts(name, root, subject, options)
    files = image_files(root / subject)
    if unread := image_files(root / subject, UNREAD):
        raise UserError(
            f"{unread[0]} is of a format that is not read; save it as JPEG or PNG, or remove it."
        )
    if not files:
        kind = "no images" if (root / subject).is_dir() else "no such folder"
        raise UserError(
            f"Subject {subject!r}: {kind} in {root / subject}; put its photographs there "
            f"({', '.join(SUFFIXES)}) or correct `datasets.{name}`."
        )
    images = [_checked(path) for path in files]
    warnings = [
        f"{len(items) - len(set(items))} of {len(items)} {what} repeat another"
        for what, items in (("photographs", images), ("prompts", templates))
        if len(set(items)) < len(items)
    ]
    if len(images) == 1:
        raise UserError(
            f"Subject {subject!r} has one photograph in {root / subject}; add another, for the "
            "metrics compare photographs with each other, too."
        )
    info = {
        "subject": subject,
        "class_word": class_word,
        "prompts": templates,
        "source": "DreamBooth (Ruiz et al., CVPR 2023), github.com/google/dreambooth",
        "licence": "see references_and_licenses.txt of the data set",
        **({"warnings": warnings} if warnings else {}),
    }
    return images, info


def _prompts(name: str, root: Path, subject: str, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Class word and templates, from the options or else from the prompt file."""
    own, word = options.get("prompts"), options.get("class_word")
    if own is not None and word is not None:
        return word, [str(template) for template in own]
    path = root / NAME
    if not path.is_file():
        raise UserError(
            f"{path} is missing; it gives the class word of each subject and the prompts. Copy it "
            f"there, or set `class_word` and `prompts` in `datasets.{name}.options`."
        )
    found = read_prompts(path)
    word = word or found.class_word(subject)
    return word, [str(template) for template in own or found.templates(word)]


def _root(path: Path) -> Path:
    """DreamBooth's ``dataset`` folder; its parent is accepted too."""
    inner = path / "dataset"
    return inner if not (path / NAME).is_file() and inner.is_dir() else path


def _checked(path: Path) -> bytes:
    """A photograph's bytes, after decoding it once; one that lies on its side is set upright.

    A telephone notes how it was held, and diffusers' script obeys.
    """
    import io

    from PIL import Image, ImageOps

    from snella.data.images import decode
    from snella.data.readers.pixels import (
        image_bytes,
        orientation,
        refuse_deep,
        refuse_text,
        why_undecodable,
    )

    try:
        data = image_bytes(path)
        refuse_text(data, str(path))
        refuse_deep(data)
        decode(data)
        if orientation(data) == 1:
            return data
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        raise UserError(
            f"{path} is not a readable image ({why_undecodable(error)}); replace it."
        ) from error
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", exif=b"")
    return buffer.getvalue()


def _quick(name: str) -> tuple[Any, dict[str, Any]]:
    from snella.quick import generation

    return generation.make(name)
