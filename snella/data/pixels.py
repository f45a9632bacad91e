"""The part of a protocol that says how pixels are treated; free of torch, for planning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from snella.validation import Strict


class PixelSettings(Strict):
    """How a stored image becomes the model's input; docs/data.md says which published code does
    what. ``normalisation: backbone`` is the one of its pre-training, put in when runs are planned.
    """

    pixels: Literal["as-is", "community-jpeg"] = "as-is"
    image_size: int = Field(224, gt=0, le=8192)
    resize: Literal["square", "shorter-side", "none"] = "square"
    resize_size: int | None = Field(None, gt=0, le=8192)
    interpolation: Literal["bilinear", "bicubic", "tf-bilinear"] = "bicubic"
    crop_interpolation: Literal["bicubic", "random"] = "bicubic"
    normalisation: Literal["imagenet", "inception", "clip", "none", "backbone"] = "imagenet"
    augmentation: Literal["none", "flip", "random-resized-crop", "timm"] = "none"
    auto_augment: str | None = Field(None, pattern=r"^(rand|augmix|original|v0|3a)[a-z0-9.-]*$")
    random_erasing: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _crop_fits(self) -> PixelSettings:
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size {self.resize_size} is smaller than image_size {self.image_size}"
            )
        if self.auto_augment is not None and self.augmentation != "timm":
            raise ValueError(
                "auto_augment needs augmentation: timm, whose colour jitter it replaces"
            )
        return self
