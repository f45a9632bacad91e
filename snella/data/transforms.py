"""Pixels to batches: the image transforms of a protocol and the order of an epoch.

Transforms turn a stored image, uint8 (H, W, 3), into uint8 (3, S, S); normalisation
`(x / 255 - mean) / std` is done per batch on the device. Everything random in a transform comes
from torch's global generator. The settings and which published code uses which: docs/data.md.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from snella.data.auto_augment import AutoAugment
from snella.data.buffers import Buffers
from snella.data.epoch import epoch_order, lazy_images
from snella.data.images import ArrayImages, JoinedImages
from snella.data.pixels import PixelSettings
from snella.data.placement import travel
from snella.errors import UserError

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
RANDOM_CROPS = ("random-resized-crop", "timm")
MATERIALISE_BYTES = 1 << 29
BUFFERS = Buffers()
LARGE_NUMBERS = 1 << 15
"""Numbers of an image beyond which a step over one image costs more than its call."""


def eval_transform(settings: PixelSettings, *, jpeg: bool = False) -> Transform:
    """The deterministic transform for evaluation: resize, then a centre crop.

    Args:
        settings: `resize` "square" ignores the aspect ratio, "shorter-side" keeps it, both go to
            `resize_size` (absent: `image_size`); "none" takes images of `image_size` as they are.
            `pixels` "community-jpeg" encodes lossless images as JPEG first.
        jpeg: the stored pixels went through JPEG already (`Prepared.jpeg`) and must not again.

    """
    return _transform(settings, "none", jpeg)


def train_transform(settings: PixelSettings, *, jpeg: bool = False) -> Transform:
    """The transform for training, uint8 (H, W, 3) to uint8 (3, S, S).

    `auto_augment`, timm's name of a policy such as "rand-m9-mstd0.5-inc1", takes the place of
    colour jitter, as in timm. `augmentation` is one of
    - "none": as in evaluation (VTAB-1k in every published code);
    - "flip": resize as in evaluation, random crop, flip (VPT on FGVC);
    - "random-resized-crop": 8 to 100% of the area, flip (SSF, GPS, DyT, Sparse-Tuning);
    - "timm": that and colour jitter 0.4, timm's default (SPT, SNELL, SNELLA on FGVC).
    Random resized crops are bicubic, or with `crop_interpolation` "random" bilinear or bicubic for
    each image (timm's default: SSF, GPS), whatever `interpolation` says for evaluation.
    """
    return _transform(settings, settings.augmentation, jpeg)


def _transform(settings: PixelSettings, augmentation: str, jpeg: bool) -> Transform:
    resize_size = settings.resize_size or settings.image_size
    reencode = settings.pixels == "community-jpeg" and not jpeg
    policy = settings.auto_augment if augmentation == "timm" else None
    crops = augmentation in RANDOM_CROPS
    return Transform(
        settings.image_size,
        settings.resize,
        resize_size,
        settings.crop_interpolation if crops else settings.interpolation,
        augmentation,
        reencode,
        policy,
        NORMALISATIONS[settings.normalisation][0] if policy else (),
    )


@dataclass(frozen=True)
class Transform:
    """A callable from one stored image, uint8 (H, W, 3), to uint8 (3, S, S); pickles."""

    image_size: int
    resize: str
    resize_size: int
    interpolation: str
    augmentation: str
    reencode: bool
    auto_augment: str | None = None
    fill: tuple[float, ...] = ()
    """The mean colour, 0 to 1, which `auto_augment` puts where it moves pixels away."""

    @property
    def deterministic(self) -> bool:
        """Whether the same image always gives the same result."""
        return self.augmentation == "none"

    @property
    def identity(self) -> bool:
        """Whether pixels stay as they are."""
        return self.deterministic and self.resize == "none" and not self.reencode

    def __call__(self, image: np.ndarray) -> Tensor:
        from PIL import Image

        self.require_size(image.shape)
        if self.reencode:
            image = community_jpeg(image)
        if self.resize == "none" and self.deterministic:
            return torch.tensor(image).permute(2, 0, 1).contiguous()
        pixels: Tensor = self._pipeline(Image.fromarray(image))
        return pixels.contiguous()

    def require_size(self, shape: tuple[int, ...]) -> None:
        """Refuse images of another size where nothing would resize them."""
        size = self.image_size
        kept = self.resize == "none" and self.augmentation in ("none", "flip")
        if kept and shape[-3:-1] != (size, size):
            raise UserError(
                f"Protocol: resize 'none' needs images of {size}x{size} pixels, "
                f"these have {shape[-3]}x{shape[-2]}."
            )

    @cached_property
    def _pipeline(self) -> Any:
        from torchvision.transforms import v2

        size = self.image_size
        steps: list[Any] = []
        if self.augmentation in RANDOM_CROPS:
            names = ("bilinear", "bicubic") if self.interpolation == "random" else ("bicubic",)
            modes = [v2.InterpolationMode(name) for name in names]
            crops = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=m) for m in modes]
            steps.append(v2.RandomChoice(crops) if len(crops) > 1 else crops[0])
        elif self.resize != "none":
            to = [self.resize_size] * (2 if self.resize == "square" else 1)
            if self.interpolation == "tf-bilinear":
                steps.append(TensorFlowResize(to))
            else:
                steps.append(v2.Resize(to, v2.InterpolationMode(self.interpolation)))
            steps.append(v2.CenterCrop(size) if self.deterministic else v2.RandomCrop(size))
        if not self.deterministic:
            steps.append(v2.RandomHorizontalFlip())
        if self.auto_augment is not None:
            steps.append(AutoAugment(self.auto_augment, size, self.fill))
        elif self.augmentation == "timm":
            steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4))
        return v2.Compose([*steps, v2.PILToTensor()])


@dataclass(frozen=True)
class TensorFlowResize:
    """TensorFlow's ``tf.image.resize``: bilinear, pixel centres at one half, no antialiasing.

    ``size`` is height and width, or the shorter side alone. Results are rounded to whole grey
    levels, which TensorFlow's loaders did not do.
    """

    size: list[int]

    def __call__(self, picture: Any) -> Any:
        from PIL import Image

        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        size = self.size
        if len(size) == 1:
            short = min(height, width)
            size = [int(size[0] * side / short) for side in (height, width)]
        resized = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        return Image.fromarray(resized.round().to(torch.uint8).permute(1, 2, 0).numpy())


def community_jpeg(image: np.ndarray) -> np.ndarray:
    """Write and read an image as the extracted VTAB-1k copies were: JPEG quality 75, 4:2:0.

    These are Pillow's defaults, spelled out. Source: NOAH, get_vtab1k.py.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    return np.array(Image.open(buffer))


def normalise(batch: Tensor, settings: PixelSettings) -> Tensor:
    """Normalise a batch uint8 (B, 3, H, W) to float32 `(x / 255 - mean) / std`, on its device."""
    mean, std = _constants(settings.normalisation, batch.device)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std)


def take(images: Tensor, index: Tensor, settings: PixelSettings) -> Tensor:
    """The images of ``index``, normalised, where training happens: :func:`normalise` of them.

    On the CPU large images go into memory that is used again. One core takes each image from its
    place to its result while it is in the cache, by numpy, which divides as it casts; several
    cores share the steps over a whole batch. The numbers are the same to the last bit.
    """
    if images.is_cuda or torch.cuda.is_available():
        return normalise(travel(images[travel(index, images.device)]), settings)
    if images[0].numel() < LARGE_NUMBERS:
        return normalise(images[index], settings)
    constants = _constants(settings.normalisation, images.device)
    out = BUFFERS.empty((len(index), *images.shape[1:]))
    if torch.get_num_threads() > 1:
        return out.copy_(images[index]).div_(255).sub_(constants[0]).div_(constants[1])
    mean, std = (part.numpy() for part in constants)
    pixels = images.numpy()
    for row, number in zip(out.numpy(), index.tolist(), strict=True):
        np.divide(pixels[number], 255, out=row, dtype=np.float32)
        np.divide(np.subtract(row, mean, out=row), std, out=row)
    return out


@cache
def _constants(normalisation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = NORMALISATIONS[normalisation]
    with torch.inference_mode(False):
        return (
            torch.tensor(mean, device=device).view(3, 1, 1),
            torch.tensor(std, device=device).view(3, 1, 1),
        )


class Split(Dataset[tuple[Tensor, int]]):
    """A split transformed at access: item `i` is the image uint8 (3, S, S) and its index."""

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), index


def load_split(images: Sequence[np.ndarray] | np.ndarray, transform: Transform) -> Tensor:
    """All images of a split, transformed once, uint8 (N, 3, S, S).

    Where the transform changes nothing, a stored array is memory-mapped and not copied; what is
    written to the result never reaches the file.

    Raises:
        ValueError: the transform is random, so once is not enough.
    """
    if not transform.deterministic:
        raise ValueError(f"augmentation {transform.augmentation!r} is random: use Split")
    if transform.identity:
        if isinstance(images, JoinedImages):
            return torch.cat([load_split(part, transform) for part in images.parts])
        if isinstance(images, ArrayImages | np.ndarray):
            array = images.array() if isinstance(images, ArrayImages) else images
            transform.require_size(array.shape)
            return torch.from_numpy(array).permute(0, 3, 1, 2)
    size = transform.image_size
    out = torch.empty((len(images), 3, size, size), dtype=torch.uint8)
    for index in range(len(images)):
        out[index] = transform(images[index])
    return out


def open_split(
    images: Sequence[np.ndarray] | np.ndarray,
    transform: Transform,
    *,
    max_bytes: int = MATERIALISE_BYTES,
) -> Tensor | Split:
    """A split in the form that suits it best: in memory where possible, else lazily.

    Random transforms and splits of more than `max_bytes` of pixels are transformed at access.
    """
    large = 3 * transform.image_size**2 * len(images) > max_bytes and not transform.identity
    if large or not transform.deterministic:
        return Split(images, transform)
    return load_split(images, transform)


def batches(
    split: Tensor | Split,
    labels: np.ndarray | Tensor | None,
    batch_size: int,
    shuffle_seed: int | None = None,
    *,
    workers: int | None = None,
    settings: PixelSettings | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One epoch: every image exactly once, the last batch as long as is left.

    Args:
        split: images uint8 (N, 3, S, S), or a lazy split.
        labels: (N,), None where they are sealed.
        batch_size: images per batch.
        shuffle_seed: gives the order and, for a lazy split, each image's augmentation. Absent:
            in order, and augmented under a seed drawn from torch's global generator.
        workers: processes for a lazy split. Absent: one per core, at most 8, none for a short
            epoch. The batches are the same whatever their number.
        settings: normalise the images so, where training happens.

    Returns:
        Batches {"image": uint8 or, normalised, float32 (B, 3, S, S), "index": int64 (B,)} and,
        where labels are given, {"label": int64 (B,)}.

    Raises:
        ValueError: there are more or fewer labels than images.
    """
    if labels is not None and len(labels) != len(split):
        raise ValueError(f"{len(split)} images but {len(labels)} labels")
    targets = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    order = epoch_order(len(split), shuffle_seed).split(batch_size)
    if isinstance(split, Split):
        images = lazy_images(split, order, shuffle_seed, workers)
        if settings is not None:
            images = (normalise(travel(image), settings) for image in images)
    elif settings is not None:
        images = (take(split, index, settings) for index in order)
    else:
        images = (split[travel(index, split.device)].contiguous() for index in order)
    return (
        {"image": image, "index": index} | ({} if targets is None else {"label": targets[index]})
        for image, index in zip(images, order, strict=True)
    )
