"""Pre-train the quick suite's small SAM: promptable segmentation of rendered shapes.

A 96-pixel SAM of segment-anything's own classes (patch 12, width 96, 6 blocks, decoder width 64)
learns to answer a point or a box with the mask of the shape under it (`segmentation_shapes`), as
SAM did: binary cross-entropy plus soft IoU on the single-mask output and on the best of the three
ambiguity-aware outputs, and the squared error of the predicted IoU. It is also asked without a
prompt, for all shapes, because that is how the benchmark uses SAM and this one is too small to get
there by itself. A linear map of the encoder's output, thrown away afterwards, predicts coverage,
boundary and relief in cells, which teaches a small encoder sooner than masks alone do. It never
sees a tissue. Each epoch depends only on (config, epoch), and a checkpoint follows each.

    python -m snella.quick.pretrain_sam --out workflow/resources/sam_quick.safetensors
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snella.methods.base import Batch
from snella.methods.step import train_step
from snella.models.sam import build_sam, mask_loss, pixel_statistics, positions
from snella.quick.epochs import run_epochs, write
from snella.quick.segmentation_shapes import Pictures, Renderer
from snella.records import provenance

ARCHITECTURE: dict[str, Any] = {
    "image_size": 96,
    "patch_size": 12,
    "encoder_dim": 96,
    "encoder_depth": 6,
    "encoder_heads": 3,
    "window_size": 4,
    "global_blocks": [1, 3, 5],
    "decoder_dim": 64,
    "decoder_mlp_dim": 128,
    "decoder_heads": 4,
}
CELLS = 4
"""Cells of the dense map along a side of a patch: the resolution of the decoder's masks."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that moves the weights (besides the device's arithmetic)."""

    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))
    epochs: int = 68
    steps: int = 50
    batch_size: int = 32
    repeats: int = 6
    """How often an epoch shows each of its pictures, each time turned and asked otherwise."""
    layers: int = 4
    prompts: int = 1
    unprompted: float = 2.0
    """Weight of the loss without a prompt; each of the two with one weighs 1."""
    dense: float = 2.0
    """Weight of the loss of the dense map."""
    least_pixels: int = 30
    lr: float = 1.5e-3
    warmup_epochs: float = 2.0
    cooldown_epochs: int = 23
    """Epochs at the end over which the learning rate falls to zero in a straight line."""
    weight_decay: float = 0.05
    seed: int = 0


# --------------------------------------------------------------------------------- prompts


def choose_shapes(visible: Tensor, prompts: int, least: int, rng: torch.Generator) -> Tensor:
    """For each picture ``prompts`` visible shapes at random, as masks (B * prompts, S, S).

    ``visible`` is (B, L, S, S). Shapes of fewer than ``least`` pixels are taken only where there
    is no other.
    """
    area = visible.flatten(2).sum(-1)
    noise = torch.rand(area.shape, generator=rng, device=area.device)
    score = noise + (area >= least).float() + (area > 0).float()
    chosen = score.argsort(dim=1, descending=True)[:, :1].repeat(1, prompts)
    second = score.argsort(dim=1, descending=True)[:, :prompts]
    usable = area.gather(1, second) >= least
    index = torch.where(usable, second, chosen)
    size = visible.shape[-1]
    return visible.gather(1, index[..., None, None].expand(-1, -1, size, size)).flatten(0, 1)


def points_in(masks: Tensor, rng: torch.Generator) -> Tensor:
    """A random pixel (x, y) of each mask (N, S, S) -> (N, 1, 2) float."""
    size = masks.shape[-1]
    noise = torch.rand(len(masks), size * size, generator=rng, device=masks.device)
    index = (noise * masks.flatten(1)).argmax(dim=1)
    return torch.stack([index % size, index // size], dim=-1)[:, None].float()


def boxes_around(masks: Tensor, rng: torch.Generator) -> Tensor:
    """The box (x0, y0, x1, y1) of each mask with each side moved by up to 10% -> (N, 4)."""
    size = masks.shape[-1]
    axis = torch.arange(size, device=masks.device)
    sides = []
    for dim in (1, 2):  # columns are seen by any over rows, rows by any over columns
        seen = masks.any(dim=dim)
        low = torch.where(seen, axis, size).amin(1)
        high = torch.where(seen, axis, -1).amax(1)
        sides.append((low.float(), high.float()))
    (x0, x1), (y0, y1) = sides
    box = torch.stack([x0, y0, x1, y1], dim=1)
    span = torch.stack([x1 - x0, y1 - y0], dim=1).repeat(1, 2)
    jitter = torch.rand(box.shape, generator=rng, device=box.device) * 0.2 - 0.1
    return (box + jitter * span).clamp(0, size - 1)


def decode(model: Any, embeddings: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """All four masks of each prompt, and their predicted IoU.

    segment-anything's decoder takes many prompts for one image; here each prompt (N, T, C) has an
    embedding (N, C, h, w) of its own, with the decoder's own layers.
    """
    decoder, prompt = model.mask_decoder, model.prompt_encoder
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], dim=1)
    dense = prompt.no_mask_embed.weight.reshape(1, -1, 1, 1)
    found, source = decoder.transformer(embeddings + dense, positions(model), tokens)
    masks = decoder.num_mask_tokens
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(embeddings.shape))
    weights = torch.stack(
        [mlp(found[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    low = torch.einsum("nmc,nchw->nmhw", weights, upscaled)
    assert low.shape[1] == masks
    return low, decoder.iou_prediction_head(found[:, 0])


# -------------------------------------------------------------------------------- training


def prompted_loss(
    model: Any, embeddings: Tensor, masks: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss and IoU (B * P,) of prompts: embeddings (B, C, h, w), masks (B * P, S, S).

    The first half of the prompts are points, the second boxes.
    """
    embeddings = embeddings.repeat_interleave(len(masks) // len(embeddings), dim=0)
    half = len(masks) // 2
    coordinates = points_in(masks[:half], rng)
    labels = torch.ones(coordinates.shape[:2], dtype=torch.int64, device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):  # coordinates need their digits
        by_point, _ = model.prompt_encoder((coordinates, labels), None, None)
        by_box, _ = model.prompt_encoder(None, boxes_around(masks[half:], rng), None)
    # both have two tokens: a point is padded with "not a point", a box has two corners
    low, quality = decode(model, embeddings, torch.cat([by_point, by_box]))
    losses, iou = _compare(low, masks)
    loss = losses[:, 0].mean() + losses[:, 1:].amin(1).mean()
    return loss + functional.mse_loss(quality.float(), iou), iou[:, 0]


def unprompted_loss(model: Any, embeddings: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and IoU (B,) without a prompt: embeddings (B, C, h, w), masks (B, S, S)."""
    nothing = embeddings.new_zeros(len(embeddings), 0, embeddings.shape[1])
    low, _ = decode(model, embeddings, nothing)
    losses, iou = _compare(low[:, :1], masks)
    return losses.mean(), iou[:, 0]


def dense_loss(map_: nn.Module, embeddings: Tensor, pictures: Pictures) -> Tensor:
    """Loss of coverage, boundary and relief, ``CELLS`` squared per embedding (B, C, h, w)."""
    found = functional.pixel_shuffle(map_(embeddings).float(), CELLS)
    cells = found.shape[-1]
    covered, boundary = pictures.visible.any(1), boundaries(pictures.visible)
    wanted = torch.stack([covered.float(), boundary.float(), pictures.relief], dim=1)
    wanted = functional.interpolate(wanted, size=(cells, cells), mode="area")
    mask = functional.binary_cross_entropy_with_logits(found[:, :2], wanted[:, :2])
    return mask + functional.mse_loss(found[:, 2], wanted[:, 2])


def boundaries(visible: Tensor) -> Tensor:
    """Pixels (B, S, S) whose neighbour below or to the right shows another shape (B, L, S, S)."""
    index = torch.arange(1, visible.shape[1] + 1, device=visible.device)
    label = (visible * index[:, None, None]).sum(1)
    found = torch.zeros_like(label, dtype=torch.bool)
    found[:, :-1] |= label[:, :-1] != label[:, 1:]
    found[:, :, :-1] |= label[:, :, :-1] != label[:, :, 1:]
    return found


def _compare(low: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and IoU (N, M) of mask logits (N, M, h, w) against one mask (N, S, S) each.

    Compared at the logits' resolution: a ninth of the pixels' arithmetic.
    """
    size = (low.shape[-2], low.shape[-1])
    share = functional.interpolate(masks[:, None].float(), size=size, mode="area")
    logits, target = low.float(), share.expand(-1, low.shape[1], -1, -1)
    with torch.no_grad():
        hit, wanted = logits > 0, target > 0.5
        both = (hit & wanted).flatten(2).sum(-1).float()
        iou = both / (hit | wanted).flatten(2).sum(-1).clamp(min=1)
    return mask_loss(logits, target, reduce=False), iou


def learning_rate(config: PretrainConfig, progress: float) -> float:
    """Linear warm-up, constant, and linear cool-down; progress is in epochs."""
    rise = progress / config.warmup_epochs
    fall = (config.epochs - progress) / config.cooldown_epochs
    return config.lr * max(0.0, min(1.0, rise, fall))


def train_epoch(
    model: nn.Module,
    map_: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    epoch: int,
) -> dict[str, float]:
    """One epoch of freshly rendered pictures; mean loss and IoU with and without a prompt."""
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(config.seed * 100_003 + epoch)
    render = Renderer(config.architecture["image_size"], config.layers, rng)
    drawn = render.many(-(-config.steps * config.batch_size // config.repeats), config.batch_size)
    rows = torch.cat([torch.randperm(len(drawn), generator=rng) for _ in range(config.repeats)])
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value, *ious = losses(model, map_, Pictures(**batch), config, rng)
        seen.append(torch.stack([value.detach(), *ious]))
        return value

    for step, chosen in enumerate(rows.split(config.batch_size)[: config.steps]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + (step + 1) / config.steps)
        batch = vars(drawn.turned(chosen, rng))
        train_step(model, optimizer, [batch], loss, clip_grad=1.0)
    means = torch.stack(seen).mean(0).tolist()
    return dict(zip(("loss", "iou", "iou_unprompted"), means, strict=True))


def losses(
    model: Any, map_: nn.Module, pictures: Pictures, config: PretrainConfig, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one batch, IoU of the single mask with a prompt, and without one."""
    mean, std = pixel_statistics(pictures.image.device)
    masks = choose_shapes(pictures.visible, config.prompts, config.least_pixels, rng)
    kind = pictures.image.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        embeddings = model.image_encoder((pictures.image - mean) / std)
        prompted, iou = prompted_loss(model, embeddings, masks, rng)
        unprompted, iou_unprompted = unprompted_loss(model, embeddings, pictures.visible.any(1))
        dense = dense_loss(map_, embeddings, pictures)
    loss = prompted + config.unprompted * unprompted + config.dense * dense
    return loss, iou.mean(), iou_unprompted.mean()


@torch.no_grad()
def checks(model: Any, config: PretrainConfig, batches: int = 8) -> dict[str, float]:
    """Mean IoU on pictures that no epoch has seen: given a point, a box, and nothing."""
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(config.seed * 100_003 + 99_991)
    render = Renderer(config.architecture["image_size"], config.layers, rng)
    mean, std = pixel_statistics(device)
    found: dict[str, list[Tensor]] = {"point": [], "box": [], "unprompted": []}
    for _ in range(batches):
        pictures = render(config.batch_size)
        embeddings = model.image_encoder((pictures.image - mean) / std)
        masks = choose_shapes(pictures.visible, 1, config.least_pixels, rng)
        _, iou = prompted_loss(model, embeddings, masks, rng)
        half = len(iou) // 2
        found["point"].append(iou[:half])
        found["box"].append(iou[half:])
        found["unprompted"].append(unprompted_loss(model, embeddings, pictures.visible.any(1))[1])
    return {f"iou_{name}": round(float(torch.cat(v).mean()), 4) for name, v in found.items()}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors, embeddings and position tables do not."""
    spared = ("pos_embed", "rel_pos", "token", "embed")

    def decays(name: str, value: Tensor) -> bool:
        return value.ndim >= 2 and ("patch_embed" in name or not any(s in name for s in spared))

    named = list(model.named_parameters())
    plain = [p for name, p in named if decays(name, p)]
    rest = [p for name, p in named if not decays(name, p)]
    return [{"params": plain, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def parts(
    config: PretrainConfig, device: str = "cpu"
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The SAM with random weights, the map of the dense loss, and the optimizer of both."""
    torch.manual_seed(config.seed)
    model = build_sam("sam_vit", config.architecture).to(device).train()
    map_ = nn.Conv2d(config.architecture["decoder_dim"], 3 * CELLS**2, 1).to(device)
    groups = parameter_groups(nn.ModuleList([model, map_]), config.weight_decay)
    return model, map_, torch.optim.AdamW(groups, lr=config.lr, fused=True)


def pretrain(
    config: PretrainConfig, out: Path, device: str = "cpu", stop_after: int | None = None
) -> dict[str, Any]:
    """Train, write the weights to ``out`` and their record beside it (.json); return the record.

    Resumes from ``out`` + ".checkpoint" when that was made by the same config. ``stop_after`` ends
    the call after that many of its epochs, and returns an empty dict.
    """
    model, map_, optimizer = parts(config, device)
    both = nn.ModuleList([model, map_])
    done = run_epochs(
        config, out, both, optimizer,
        lambda epoch: train_epoch(model, map_, optimizer, config, epoch), stop_after,
    )  # fmt: skip
    if done is None:
        return {}
    kind = "cpu" if device == "cpu" else "gpu"
    about = {
        "model_class": "segment_anything.modeling.Sam",
        "architecture": config.architecture,
        "data": "shapes rendered by formula only: no photograph, no image of a quick task",
        "pictures": config.epochs * config.steps * config.batch_size,
        "config": asdict(config),
        "checks": checks(model.eval(), config),
        "machine": {
            "device": provenance()["hardware"][kind],
            "threads": torch.get_num_threads(),
        },
    }
    return write(out, model.state_dict(), about, *done, {})


OPTIONS = ("epochs", "cooldown_epochs", "steps", "batch_size", "seed")


def main(argv: list[str] | None = None) -> None:
    """Command line: the defaults are the recipe of the shipped file."""
    recipe = PretrainConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in OPTIONS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(recipe, name))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = replace(recipe, **{name: getattr(args, name) for name in OPTIONS})
    pretrain(config, args.out, args.device)


if __name__ == "__main__":
    main()
