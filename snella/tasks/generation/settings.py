"""What a protocol says about subject-driven generation besides optimisation and selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from snella.tasks.base import TaskSettings

IMAGES, BASE, DRIFT = "images", "base", "drift"
"""Folders of a prediction: the subject's images, the unadapted model's, and unrelated prompts'."""

LOCAL = "local-dir:"
"""Before a folder in open_clip's layout, in the place of an architecture's name."""
CHECKOUT = Path(__file__).resolve().parents[3]


class GenerationSettings(TaskSettings):
    """Training images and objective, sampling, and every choice of the metrics.

    In a template ``{token}`` is the rare token that comes to mean the subject, ``{class_word}`` the
    subject's class. A metric's model is read from a local file; nothing is downloaded.
    """

    scoring: ClassVar[frozenset[str]] = frozenset(
        {
            "clip_model", "clip_file", "clip_batch", "dino_model", "dino_kwargs", "dino_file",
            "dinov2_model", "dinov2_kwargs", "dinov2_file", "lpips_net", "lpips_file", "lpips_size",
        }
    )  # fmt: skip

    # training images and prompts
    image_size: int = Field(512, gt=0)
    rare_token: str = "sks"
    instance_prompt: str = "a photo of {token} {class_word}"
    epoch_batches: int | None = Field(None, gt=0, description="batches per epoch; null: one pass")
    max_sequence_length: int = Field(77, ge=1, le=512, description="tokens of the third encoder")
    weights: Literal["fp32", "bf16"] = Field("fp32", description="type of the frozen weights")

    # objective (diffusers' SD3 DreamBooth script)
    weighting: Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    mode_scale: float = 1.29
    precondition: bool = True

    # prior preservation
    prior_weight: float = Field(0.0, ge=0, description="0: no prior preservation")
    prior_images: int = Field(100, gt=0)
    class_prompt: str = "a photo of {class_word}"

    # sampling
    samples_per_prompt: int = Field(4, gt=0)
    prompts: int | None = Field(None, gt=0, description="use the first prompts only; null: all")
    inference_steps: int = Field(28, gt=0)
    guidance: float = Field(7.0, ge=0)
    negative_prompt: str = ""
    generation_batch: int = Field(4, gt=0, description="images at a time; part of the result")
    drift_prompts: tuple[str, ...] = (
        "a photo of a chair in a living room",
        "a photo of a car on a street",
        "a painting of a mountain lake",
        "a photo of a plate of food",
    )
    drift_samples: int = Field(4, gt=0)
    unadapted: bool = Field(True, description="score the unadapted model's images as well")

    # metrics
    clip_model: str = Field("ViT-B-32", description="open_clip architecture, or local-dir:FOLDER")
    clip_file: str | None = None
    clip_batch: int = Field(64, gt=0)
    dino_model: str = Field("vit_small_patch16_224.dino", description="timm architecture")
    dino_kwargs: dict[str, Any] = {}
    dino_file: str | None = None
    dinov2_model: str = Field("vit_base_patch14_dinov2.lvd142m", description="timm architecture")
    dinov2_kwargs: dict[str, Any] = {}
    dinov2_file: str | None = None
    lpips_net: Literal["alex", "vgg", "squeeze", "dino"] = Field(
        "alex", description="network of the lpips library; dino: the same distance on DINO's blocks"
    )
    lpips_file: str | None = Field(None, description="torchvision's weights of that network")
    lpips_size: int = Field(256, gt=0)

    def scoring_files(self) -> dict[str, str | None]:
        """The weights of the metrics' networks."""
        files = {"dino_file": self.dino_file, "dinov2_file": self.dinov2_file}
        if self.clip_model.startswith(LOCAL):
            files["clip_model"] = self.clip_model.removeprefix(LOCAL)
        else:
            files["clip_file"] = self.clip_file
        if self.lpips_net != "dino":
            files["lpips_file"] = self.lpips_file
        return {name: file and locate(file) for name, file in files.items()}

    @field_validator("instance_prompt")
    @classmethod
    def _names_the_subject(cls, value: str) -> str:
        if "{token}" not in value:
            raise ValueError("must contain {token}, which comes to mean the subject")
        return fill(value, "token", "class") and value

    @field_validator("class_prompt")
    @classmethod
    def _names_the_class(cls, value: str) -> str:
        if "{class_word}" not in value or "{token}" in value:
            raise ValueError("must contain {class_word} and not {token}")
        return fill(value, "token", "class") and value


def locate(path: str) -> str:
    """``path``, or what the checkout ships under that name."""
    shipped = CHECKOUT / path
    return path if Path(path).exists() or not shipped.exists() else shipped.as_posix()


def fill(template: str, token: str, class_word: str) -> str:
    """A template with the rare token and the class word put in.

    Raises ``ValueError`` for another placeholder, and for a brace alone.
    """
    try:
        return template.format(token=token, class_word=class_word)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        text = "may contain {token} and {class_word} and no other braces"
        raise ValueError(f"{template!r} {text} ({error})") from error
