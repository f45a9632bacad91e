"""The rectified-flow objective of Stable Diffusion 3, as diffusers' DreamBooth script trains it.

    z_σ = (1 - σ) x + σ ε,   v = ε - x,   L = w(σ) ‖v̂(z_σ, σ) - v‖²,   σ = σ[⌊u N⌋], u ~ π

x is a latent, ε ~ N(0, 1) noise, and σ[·] the scheduler's table of N = 1000 noise levels (shifted
for high resolutions). π is logit-normal: u = sigmoid(m + s n), n ~ N(0, 1); the weight w is then 1
(Esser et al., Scaling Rectified Flow Transformers, ICML 2024, Eq. 19).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"]


def draw_positions(
    n: int,
    weighting: Weighting,
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Draw ``n`` positions u in [0, 1) of the noise schedule, 0 being pure noise."""
    if weighting == "logit_normal":
        normal = torch.randn(n, generator=generator, device=generator.device)
        return torch.sigmoid(mean + std * normal)
    u = torch.rand(n, generator=generator, device=generator.device)
    if weighting == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def noise_levels(positions: Tensor, table: Tensor) -> Tensor:
    """σ (n,) at positions u (n,): entries of the scheduler's ``table`` (N,), from 1 downwards."""
    index = (positions * len(table)).long().clamp(0, len(table) - 1)
    return table.to(positions.device)[index]


def loss_weight(sigma: Tensor, weighting: Weighting) -> Tensor:
    """w(σ) of each example, (n,)."""
    if weighting == "sigma_sqrt":
        return sigma**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """σ (n,) shaped to multiply ``like`` (n, ...)."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


def interpolate(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_σ = (1 - σ) x + σ ε of latents and noise (n, C, H, W) and σ (n,)."""
    s = expand(sigma, latent)
    return (1 - s) * latent + s * noise


def flow_loss(
    velocity: Tensor,
    latent: Tensor,
    noise: Tensor,
    sigma: Tensor,
    weighting: Weighting = "logit_normal",
    precondition: bool = True,
) -> Tensor:
    """The loss of each example, (n,), in float32.

    ``velocity`` is the model's output v̂. With ``precondition`` it is first turned into an estimate
    of the latent, x̂ = z_σ - σ v̂, and compared with x, which multiplies the squared error by σ²;
    this is the default of diffusers' script.
    """
    velocity = velocity.float()
    if precondition:
        estimate = interpolate(latent, noise, sigma) - expand(sigma, latent) * velocity
        error = estimate - latent
    else:
        error = velocity - (noise - latent)
    squared = error.square().flatten(1).mean(1)
    return loss_weight(sigma, weighting) * squared
