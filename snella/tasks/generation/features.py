"""The networks of the metrics: CLIP through open_clip, DINO and DINOv2 through timm, LPIPS.

Each is read from a local file; features are unit vectors, one per image or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from snella.errors import UserError, one_line, unknown
from snella.models.backbones import build_backbone
from snella.models.checkpoint import is_torchscript
from snella.tasks.generation.settings import LOCAL, locate

Images = Sequence[np.ndarray]


def device() -> torch.device:
    """Where metrics are computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clip:
    """CLIP features of images and texts, float32 (N, D) on the CPU.

    ``model`` is an architecture of open_clip with weights ``file``, or ``local-dir:`` and a folder
    in open_clip's layout. Images are prepared as open_clip prepares them for that model. OpenAI's
    own files are TorchScript archives, and fit the architectures called ``-quickgelu`` alone.
    """

    def __init__(self, model: str, file: str | None, batch: int = 64) -> None:
        import open_clip

        if model.startswith(LOCAL):
            model, file = LOCAL + locate(model.removeprefix(LOCAL)), None
        elif model not in open_clip.list_models():
            raise unknown("CLIP architecture of open_clip", model, open_clip.list_models())
        else:
            file = _existing(file, "clip_file", f"CLIP {model}")
            check_clip(model, file)
        archive = file is not None and is_torchscript(Path(file))
        try:
            made = open_clip.create_model_and_transforms(
                model, pretrained=None if archive else file, device=device()
            )
            if archive:
                made[0].load_state_dict(_openai_tensors(str(file)))
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:
            raise UserError(
                f"CLIP {model} cannot be loaded from {file or 'its folder'}: {one_line(error)}; "
                "correct `clip_model:` and `clip_file:`."
            ) from error
        self.model, self.transform, self.batch = made[0].eval(), made[2], batch

    @torch.inference_mode()
    def images(self, images: Images) -> Tensor:
        """Features (N, D) of images, each uint8 (H, W, 3)."""
        return _features(images, self.transform, self.model.encode_image, self.batch)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D) of texts."""
        found = self.model.encode_text(self.tokenizer(list(texts)).to(device()))
        return F.normalize(found.float(), dim=-1).cpu()


def check_clip(model: str, file: str) -> None:
    """Refuse OpenAI's file for an architecture with another activation, which nothing would show.

    Raises :class:`~snella.errors.UserError`; needs no weights in memory.
    """
    import open_clip

    known = open_clip.get_model_config(model) or {}
    if is_torchscript(Path(file)) and not known.get("quick_gelu"):
        raise UserError(
            f"`clip_file: {file}` is OpenAI's, which was trained with QuickGELU; "
            f"set `clip_model: {model}-quickgelu`."
        )


def _openai_tensors(file: str) -> dict[str, Tensor]:
    """The tensors of OpenAI's archive in single precision, under names that are open_clip's too."""
    sizes = ("input_resolution", "context_length", "vocab_size")
    state = torch.jit.load(file, map_location="cpu").state_dict()
    return {name: tensor.float() for name, tensor in state.items() if name not in sizes}


class TimmFeatures:
    """Features of a timm model without its head, with timm's own preparation of images.

    ``setting`` is the prefix of the settings that name the model, for errors.
    """

    def __init__(self, arch: str, kwargs: dict[str, Any], file: str | None, setting: str) -> None:
        import timm
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        if not timm.is_model(arch):
            raise unknown(f"timm architecture in `{setting}_model:`", arch, timm.list_models())
        file = _existing(file, f"{setting}_file", arch)
        entry = {"arch": arch, "kwargs": {"dynamic_img_size": True, **kwargs}, "file": file}
        self.model: Any = build_backbone(entry, 0).eval().to(device())
        self.transform = create_transform(
            **resolve_model_data_config(self.model), is_training=False
        )

    @torch.inference_mode()
    def images(self, images: Images) -> Tensor:
        """Features (N, D) of images, each uint8 (H, W, 3)."""
        return _features(images, self.transform, self.model, 64)

    @torch.inference_mode()
    def maps(self, images: Images) -> list[Tensor]:
        """Feature maps (N, C, h, w) after each block."""
        pixels = torch.stack([self.transform(Image.fromarray(image)) for image in images])
        found = self.model.forward_intermediates(pixels.to(device()), intermediates_only=True)
        return [layer.float().cpu() for layer in found]


def _features(
    images: Images, transform: Any, encode: Callable[[Tensor], Tensor], batch: int
) -> Tensor:
    found = []
    for start in range(0, len(images), batch):
        part = [transform(Image.fromarray(image)) for image in images[start : start + batch]]
        features = encode(torch.stack(part).to(device())).float()
        found.append(F.normalize(features, dim=-1).cpu())
    return torch.cat(found)


def _existing(file: str | None, setting: str, what: str) -> str:
    if file is None:
        raise UserError(
            f"The weights of {what} are not configured; set `{setting}:` in the protocol to a "
            "local file (docs/generation.md)."
        )
    path = locate(file)
    if not Path(path).is_file():
        raise UserError(f"`{setting}: {file}` does not exist; correct it (docs/generation.md).")
    return path


# --------------------------------------------------------------------------------------- LPIPS


class Perceptual:
    """The LPIPS distance of pairs of images (Zhang et al., CVPR 2018).

    With ``net`` alex, vgg or squeeze it is the library ``lpips`` with its calibrated weights on
    torchvision's network in ``file``. With ``net`` dino the same distance without calibration is
    taken on the blocks of a timm model, for images that are too small for the others.
    """

    def __init__(self, net: str, file: str | None, size: int, dino: TimmFeatures) -> None:
        self.size, self.dino = size, dino
        self.library: Any = None if net == "dino" else lpips_network(net, file).to(device())

    @torch.inference_mode()
    def pairs(self, images: Images, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Distances (P,) of ``pairs`` of indices into ``images``."""
        if not pairs:
            return np.zeros(0)
        if self.library is None:
            maps = self.dino.maps(images)
            first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
            layers = [(layer[first], layer[second]) for layer in maps]
            return map_distance(layers).numpy()
        pixels = [self._pixels(image) for image in images]
        found = [
            float(self.library(pixels[i].to(device()), pixels[j].to(device()))) for i, j in pairs
        ]
        return np.array(found)

    def _pixels(self, image: np.ndarray) -> Tensor:
        scaled = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def map_distance(layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """LPIPS's distance with equal weights: mean_l mean_hw ‖x̂ - ŷ‖² of channel-normalised maps."""
    total = torch.zeros(len(layers[0][0]))
    for x, y in layers:
        x, y = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (x, y))
        total = total + (x - y).square().sum(1).mean((1, 2))
    return total / len(layers)


def lpips_network(net: str, file: str | None) -> nn.Module:
    """The library's network with torchvision's weights of ``net`` in ``file``.

    Raises :class:`~snella.errors.UserError` where library or weights are missing or do not fit.
    """
    path = _existing(file, "lpips_file", f"LPIPS's {net}")
    try:
        import lpips
    except ImportError as error:
        raise UserError("LPIPS needs lpips: pip install 'snella[generation]'.") from error
    made: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = made.net.state_dict()  # type: ignore[union-attr]
        # the library cuts torchvision's `features` into slices and keeps the layers' numbers
        found = {name: state["features." + name.partition(".")[2]] for name in own}
        made.net.load_state_dict(found)  # type: ignore[union-attr]
    except Exception as error:
        raise UserError(
            f"`lpips_file: {file}` does not hold torchvision's weights of {net} "
            f"({one_line(error)})."
        ) from error
    return made
