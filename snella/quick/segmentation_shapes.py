"""Rendered pictures of textured shapes with exact masks, for promptable pre-training.

Every picture is a textured ground with some shapes over it, back to front. A shape is star-shaped:
its boundary lies at R(theta) = r (1 + sum_k a_k cos(k theta + phi_k)) around its centre, or is that
of a regular polygon, stretched and turned. Textures are sums of a colour, smooth random fields
of several scales and a plane wave; some shapes differ from what is behind them by texture or by
shading alone. All of it is drawn in one batch with torch, on any device, from one generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALES = (3, 6, 12, 24, 48)
HARMONICS = 5


@dataclass(frozen=True)
class Pictures:
    """A batch of rendered pictures."""

    image: Tensor
    """(B, 3, S, S) float in [0, 1]."""
    visible: Tensor
    """(B, L, S, S) bool: the visible part of each shape, back to front."""


class Renderer:
    """Draws batches of pictures of ``size`` pixels with ``layers`` shapes each."""

    def __init__(self, size: int, layers: int, generator: torch.Generator) -> None:
        self.size, self.layers, self.rng = size, layers, generator
        self.device = generator.device
        axis = (torch.arange(size, device=self.device) + 0.5) / size
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")

    def __call__(self, count: int) -> Pictures:
        """Render ``count`` pictures."""
        image = self.texture(count)
        visible: list[Tensor] = []
        for _ in range(self.layers):
            depth, shape = self.shape(count)
            skin = self.skin(count, image)
            light = self._shading(count, depth)
            soft = self.uniform(count, 0.5, 2.5)[:, None, None] * self.size
            cover = torch.sigmoid(depth * soft)[:, None]
            present = (self.uniform(count, 0, 1) < 0.8)[:, None, None]
            cover = cover * present[:, None]
            image = image + cover * ((skin * light).clamp(0, 1) - image)
            shape = shape & present
            visible = [older & ~shape for older in visible]
            visible.append(shape)
        return Pictures(self._camera(image), torch.stack(visible, dim=1))

    # ------------------------------------------------------------------------- shapes

    def shape(self, count: int) -> tuple[Tensor, Tensor]:
        """Depth 1 - rho / R inside the boundary (B, S, S), negative outside, and its mask."""
        centre = self.uniform(count, 0.1, 0.9, 2)
        radius = torch.exp(self.uniform(count, math.log(0.06), math.log(0.4)))
        stretch = torch.exp(self.uniform(count, -0.5, 0.5))
        angle = self.uniform(count, 0, 2 * math.pi)
        dx = self.x - centre[:, 0, None, None]
        dy = self.y - centre[:, 1, None, None]
        cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
        u = (cos * dx + sin * dy) * stretch[:, None, None]
        v = (cos * dy - sin * dx) / stretch[:, None, None]
        theta, rho = torch.atan2(v, u), torch.hypot(u, v)
        polygon = (self.uniform(count, 0, 1) < 0.3)[:, None, None]
        reach = torch.where(polygon, self._polygon(count, theta), self._wave(count, theta))
        depth = 1 - rho / (radius[:, None, None] * reach)
        return depth, depth > 0

    def _wave(self, count: int, theta: Tensor) -> Tensor:
        """R / r of a smooth star-shaped boundary, within [0.4, 1.6]."""
        reach = torch.ones_like(theta)
        rough = self.uniform(count, 0.0, 0.35)
        for k in range(2, 2 + HARMONICS):
            height = rough * self.uniform(count, 0, 1) * 2 / k
            phase = self.uniform(count, 0, 2 * math.pi)
            reach = reach + height[:, None, None] * torch.cos(k * theta + phase[:, None, None])
        return reach.clamp(0.4, 1.6)

    def _polygon(self, count: int, theta: Tensor) -> Tensor:
        """R / r of a regular polygon of 3 to 6 corners."""
        corners = torch.floor(self.uniform(count, 3, 7))[:, None, None]
        sector = 2 * math.pi / corners
        return torch.cos(sector / 2) / torch.cos(torch.remainder(theta, sector) - sector / 2)

    # ----------------------------------------------------------------------- textures

    def texture(self, count: int) -> Tensor:
        """Random textures (B, 3, S, S) around one random colour each."""
        colour = self.uniform(count, 0.1, 0.9)[:, None] + self.uniform(count, -0.3, 0.3, 3)
        field = torch.zeros(count, 3, self.size, self.size, device=self.device)
        for scale in SCALES:
            height = self.uniform(count, 0, 1) ** 3 * 0.25
            field = field + height[:, None, None, None] * self._smooth(count, scale)
        return colour[:, :, None, None] + field + self._grating(count)

    def skin(self, count: int, behind: Tensor) -> Tensor:
        """A shape's texture: one of its own, or what is behind it with other colour or grain."""
        own = self.texture(count)
        mix = self.uniform(count, 0, 1)[:, None, None, None]
        tint = self.uniform(count, -0.2, 0.2, 3)[:, :, None, None]
        grain = behind.roll((self.size // 3, self.size // 4), (2, 3)) + tint
        return torch.where(mix < 0.5, own, torch.where(mix < 0.75, behind + tint, grain))

    def _smooth(self, count: int, scale: int) -> Tensor:
        """Smooth noise of about ``scale`` cells across, grey for half of the pictures."""
        noise = torch.randn(count, 3, scale, scale, generator=self.rng, device=self.device)
        grey = (self.uniform(count, 0, 1) < 0.5)[:, None, None, None]
        noise = torch.where(grey, noise[:, :1].expand_as(noise), noise)
        return functional.interpolate(
            noise, size=(self.size, self.size), mode="bilinear", align_corners=False
        )

    def _grating(self, count: int) -> Tensor:
        """A plane wave in one direction, of any colour; absent in 60% of the pictures."""
        wave = self.uniform(count, -40, 40, 2)
        phase = wave[:, 0, None, None] * self.x + wave[:, 1, None, None] * self.y
        present = (self.uniform(count, 0, 1) < 0.4)[:, None]
        colour = self.uniform(count, -0.2, 0.2, 3) * present
        return colour[:, :, None, None] * torch.sin(phase)[:, None]

    def _shading(self, count: int, depth: Tensor) -> Tensor:
        """Light (B, 1, S, S) over a dome: brighter to one side, darker at the edge, or flat."""
        strength = self.uniform(count, -0.5, 0.5)
        edge = self.uniform(count, 0.0, 0.5) * (self.uniform(count, 0, 1) < 0.5)
        side = self.uniform(count, -1, 1, 2) * (self.uniform(count, 0, 1) < 0.5)[:, None]
        inside = depth.clamp(0, 1)
        slope = side[:, 0, None, None] * (self.x - 0.5) + side[:, 1, None, None] * (self.y - 0.5)
        light = 1 + strength[:, None, None] * inside * 0.5 + slope
        return (light - edge[:, None, None] * (1 - inside) ** 3)[:, None]

    def _camera(self, image: Tensor) -> Tensor:
        """Contrast, brightness and noise of the camera; clipped to [0, 1]."""
        count = len(image)
        gain = torch.exp(self.uniform(count, -0.4, 0.3))[:, None, None, None]
        image = (image - 0.5) * gain + 0.5 + self.uniform(count, -0.15, 0.15)[:, None, None, None]
        noise = torch.randn(image.shape, generator=self.rng, device=self.device)
        return (image + self.uniform(count, 0, 0.06)[:, None, None, None] * noise).clamp(0, 1)

    def uniform(self, count: int, low: float, high: float, *shape: int) -> Tensor:
        """Uniform random numbers (B, *shape) in [low, high)."""
        values = torch.rand(count, *shape, generator=self.rng, device=self.device)
        return values * (high - low) + low
