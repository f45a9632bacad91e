"""S²FT: train a few Fourier coefficients of a weight update whose rows and columns are reordered.

    ΔŴ = - Σ_x ∇L_x(W) over a few training images,   π_r, π_c: greedy nearest-neighbour orders
    p(u, v) ∝ |DFT2(ΔŴ[π_r][:, π_c])|_uv ^ γ,        n points are drawn from p
    ΔW[π_r][:, π_c] = α Re(IDFT2(F)),                F zero but for n trained coefficients

Zhang et al., S²FT: Parameter-Efficient Fine-Tuning in Sparse Spectrum Domain. No code was found,
so what the paper leaves open follows FourierFT (Gao et al., ICML 2024): real coefficients, which
can express only the point-symmetric half of all updates, drawn from N(0, 1), and α = 300. γ = 0
draws uniformly; a model that was not calibrated keeps the identity order, and is FourierFT.
ViT-B/16, query and value: 24 n parameters, 72,000 (0.08 %) for n = 3,000.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snella.method import (
    Batch,
    LossFn,
    Method,
    Unsupported,
    batch_gradients,
    first_images,
    fold_parametrizations,
    fuse_qkv,
    slots,
    split_qkv,
)


class S2FT(Method):
    """Sparse fine-tuning in the spectrum of the reordered update."""

    paper: ClassVar[str] = "S²FT"
    bibkey: ClassVar[str] = "zhang_s2ft"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "sam", "sd3"})

    points: int = Field(default=3000, gt=0, description="n, spectral points per matrix")
    alpha: float = Field(default=300.0, gt=0)
    reference_width: int | None = Field(
        default=768,
        gt=0,
        description="points and alpha are meant for a square matrix of this width and scale with "
        "the number of entries of others; null: they hold for every matrix",
    )
    gamma: float = Field(default=1.5, ge=0)
    coefficients: Literal["real", "complex"] = "real"
    init: Literal["normal", "zeros"] = "normal"
    dedupe: bool = Field(default=False, description="draw no point and its mirror image both")
    images: int = Field(default=400, gt=0, description="training images of the estimate")
    batch_size: int = Field(default=50, gt=0, description="images at a time of the estimate")
    lr_ratio: float = Field(default=100.0, gt=0, description="coefficients' rate to the head's")
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ("q", "v")

    def adapt(self, model: nn.Module) -> None:
        split_qkv(model)
        for slot in slots(model, self.roles):
            layer = model.get_submodule(slot.path)
            parametrize.register_parametrization(layer, "weight", _Spectrum(self, layer.weight))

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        spectra = {n: m for n, m in model.named_modules() if isinstance(m, _Spectrum)}
        start = {name: spectrum.values.detach().clone() for name, spectrum in spectra.items()}
        weights = {name.removesuffix("0") + "original": name for name in spectra}

        def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
            return loss_fn(model, batch) * len(next(iter(batch.values())))

        change: dict[str, Tensor] = {}
        with torch.no_grad():
            for spectrum in spectra.values():
                spectrum.values.zero_()  # the gradient is that of the pre-trained weight
        used = first_images(batches, self.images, self.batch_size)
        for gradients in batch_gradients(model, weights, used, summed_loss):
            for weight, gradient in gradients.items():
                change[weight] = change.get(weight, 0) - gradient
        with torch.no_grad():
            for weight, name in weights.items():
                spectra[name].values.copy_(start[name])
                spectra[name].follow(change[weight].cpu().double(), self)

    def parameter_groups(
        self, model: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Coefficients, at ``lr_ratio`` times ``lr`` and without decay, and the rest."""
        values = [m.values for m in model.modules() if isinstance(m, _Spectrum)]
        coefficients = {id(value) for value in values}
        groups = super().parameter_groups(model, lr, weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in coefficients]
        fast = {"params": values, "lr": lr * self.lr_ratio, "weight_decay": 0.0}
        return [group for group in [fast, *groups] if group["params"]]

    def merge(self, model: nn.Module) -> None:
        fold_parametrizations(model, _Spectrum)
        fuse_qkv(model)


class _Spectrum(nn.Module):
    """The parametrization of one matrix: W + ΔW, ΔW from ``values`` at flat ``points``.

    Row i of ΔW is row ``rows[i]`` of the smooth matrix, i.e. ``rows`` is the inverse of π_r.
    """

    def __init__(self, settings: S2FT, weight: Tensor) -> None:
        super().__init__()
        reference = settings.reference_width
        share = weight.numel() / reference**2 if reference else 1.0
        count = max(1, round(settings.points * share))
        available = len(_distinct(*weight.shape)) if settings.dedupe else weight.numel()
        if count > available:
            raise Unsupported(
                f"S2FT: {count} points do not fit into a spectrum of {available}; choose fewer "
                "points, or leave reference_width at its default."
            )
        self.alpha = settings.alpha * share
        device = weight.device
        self.register_buffer("rows", torch.arange(weight.shape[0], device=device))
        self.register_buffer("columns", torch.arange(weight.shape[1], device=device))
        drawn = draw_points(torch.ones(weight.shape, device="cpu"), count, settings.dedupe)
        self.register_buffer("points", drawn.to(device))
        self.complex = settings.coefficients == "complex"
        values = torch.zeros(count * (1 + self.complex), device=device)
        self.values = nn.Parameter(values.normal_() if settings.init == "normal" else values)

    @torch.no_grad()
    def follow(self, change: Tensor, settings: S2FT) -> None:
        """Order rows and columns, and draw the points, by an estimated ``change`` (out, in)."""
        rows, columns = nearest_neighbour_order(change), nearest_neighbour_order(change.T)
        amplitude = torch.fft.fft2(change[rows][:, columns]).abs()
        points = draw_points(amplitude**settings.gamma, len(self.points), settings.dedupe)
        self.rows.copy_(rows.argsort())
        self.columns.copy_(columns.argsort())
        self.points.copy_(points)

    def forward(self, weight: Tensor) -> Tensor:
        values = torch.view_as_complex(self.values.view(-1, 2)) if self.complex else self.values
        smooth = spectral_delta(values, self.points, weight.shape, self.alpha)
        return (weight + smooth[self.rows][:, self.columns]).to(weight.dtype)


def spectral_delta(values: Tensor, points: Tensor, shape: torch.Size, alpha: float) -> Tensor:
    """α Re(IDFT2(F)) of ``shape``, F having ``values`` (n,) at flat ``points`` (n,)."""
    spectrum = values.new_zeros(shape.numel()).scatter(0, points, values).view(shape)
    return alpha * torch.fft.ifft2(spectrum).real


def nearest_neighbour_order(matrix: Tensor) -> Tensor:
    """Algorithm 1: from a random row on, always the unvisited row that is nearest (Euclidean)."""
    distance = torch.cdist(matrix, matrix)
    current = int(torch.randint(len(matrix), ()))
    order = [current]
    for _ in range(len(matrix) - 1):
        distance[:, current] = torch.inf
        current = int(distance[current].argmin())
        order.append(current)
    return torch.tensor(order)


def draw_points(weight: Tensor, count: int, dedupe: bool) -> Tensor:
    """Draw ``count`` distinct flat positions of ``weight`` (d, k) with odds in proportion to it.

    ``dedupe`` leaves out the mirror image (-u, -v) of each position, the same function of W.
    """
    odds = weight.flatten().double()
    odds = odds.clamp_min(1e-12 * float(odds.max()))  # so that there are enough to choose from
    if dedupe:
        kept = _distinct(*weight.shape)
        return kept[odds[kept].multinomial(count)]
    return odds.multinomial(count)


def _distinct(d: int, k: int) -> Tensor:
    """Flat positions of a d x k spectrum, of each pair of mirror images the first only."""
    position = torch.arange(d * k, device="cpu").view(d, k)
    mirror = position.flip(0, 1).roll((1, 1), (0, 1))  # of (u, v): (-u mod d, -v mod k)
    return position[position <= mirror]
