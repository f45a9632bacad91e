"""Rendered pictures of textured shapes with exact masks, for promptable pre-training.

Every picture is a textured ground with curved bands and some shapes over it, back to front. A shape
is star-shaped: its boundary lies at R(theta) = r (1 + sum_k a_k cos(k theta + phi_k)) around its
centre, or is that of a regular polygon, stretched and turned. Half of the shapes are raised: a dome
lit from one direction that the picture's shapes share, with a soft shadow on the other side; the
rest are flat. Textures are sums of a colour, smooth random fields of several scales and a warped
plane wave; some shapes differ from what is behind them by grain, tint or light alone. All of it is
drawn in one batch with torch, on any device, from one generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALES = {3: 0.25, 6: 0.25, 12: 0.2, 24: 0.15, 48: 0.12}
"""Cells across of the random fields of a texture, and their largest deviations."""
HARMONICS = 5
BANDS = 2


@dataclass(frozen=True)
class Pictures:
    """A batch of rendered pictures."""

    image: Tensor
    """(B, 3, S, S) float in [0, 1]."""
    visible: Tensor
    """(B, L, S, S) bool: the visible part of each shape, back to front."""
    relief: Tensor
    """(B, S, S) float in [0, 1]: height of the raised shape that is seen, 0 elsewhere."""

    def __len__(self) -> int:
        return len(self.image)

    def turned(self, rows: Tensor, rng: torch.Generator) -> Pictures:
        """The pictures of ``rows``, together mirrored, turned and with their colours exchanged."""
        quarter, mirror = torch.randint(4, (), generator=rng), torch.randint(2, (), generator=rng)
        colours = torch.randperm(3, generator=rng, device=rng.device)

        def turn(plane: Tensor) -> Tensor:
            chosen = plane[rows].rot90(int(quarter), (-2, -1))
            return chosen.flip(-1) if mirror else chosen

        return Pictures(
            turn(self.image)[:, colours].contiguous(), turn(self.visible), turn(self.relief)
        )


@dataclass(frozen=True)
class Shapes:
    """One shape per picture."""

    depth: Tensor
    """(B, S, S): 1 - rho / R, that is 1 at the centre, 0 on the boundary, negative outside."""
    dx: Tensor
    dy: Tensor
    """(B, S, S): offset from the centre, in radii."""


class Renderer:
    """Draws batches of pictures of ``size`` pixels with ``layers`` shapes each."""

    def __init__(self, size: int, layers: int, generator: torch.Generator) -> None:
        self.size, self.layers, self.rng = size, layers, generator
        self.device = generator.device
        axis = (torch.arange(size, device=self.device) + 0.5) / size
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")

    def __call__(self, count: int) -> Pictures:
        """Render ``count`` pictures."""
        image = self._bands(self.texture(count))
        light = self.uniform(count, 0, 2 * math.pi)[:, None, None]
        visible: list[Tensor] = []
        relief = torch.zeros(count, self.size, self.size, device=self.device)
        for _ in range(self.layers):
            shape = self.shape(count)
            skin = self.skin(count, image)
            raised = (self.uniform(count, 0, 1) < 0.5)[:, None, None]
            present = (self.uniform(count, 0, 1) < 0.7)[:, None, None]
            shade, shadow = self._light(count, shape, light)
            image = image * (1 - shadow * (raised & present))[:, None]
            skin = (skin * torch.where(raised, shade, 1.0)[:, None]).clamp(0, 1)
            soft = self.uniform(count, 0.1, 0.5)[:, None, None] * self.size
            cover = torch.sigmoid(shape.depth * soft) * present
            image = image + cover[:, None] * (skin - image)
            inside = (shape.depth > 0) & present
            relief = torch.where(inside, shape.depth.clamp(min=0).sqrt() * raised, relief)
            visible = [older & ~inside for older in visible]
            visible.append(inside)
        return Pictures(self._camera(image), torch.stack(visible, dim=1), relief)

    def many(self, count: int, batch: int) -> Pictures:
        """Render ``count`` pictures, ``batch`` at a time."""
        parts = [self(min(batch, count - begin)) for begin in range(0, count, batch)]
        return Pictures(
            torch.cat([part.image for part in parts]),
            torch.cat([part.visible for part in parts]),
            torch.cat([part.relief for part in parts]),
        )

    # ------------------------------------------------------------------------- shapes

    def shape(self, count: int) -> Shapes:
        """A shape somewhere in each picture."""
        centre = self.uniform(count, 0.1, 0.9, 2)
        radius = torch.exp(self.uniform(count, math.log(0.06), math.log(0.35)))[:, None, None]
        stretch = torch.exp(self.uniform(count, -0.5, 0.5))[:, None, None]
        angle = self.uniform(count, 0, 2 * math.pi)[:, None, None]
        dx = (self.x - centre[:, 0, None, None]) / radius
        dy = (self.y - centre[:, 1, None, None]) / radius
        u = (angle.cos() * dx + angle.sin() * dy) * stretch
        v = (angle.cos() * dy - angle.sin() * dx) / stretch
        theta, rho = torch.atan2(v, u), torch.hypot(u, v)
        polygon = (self.uniform(count, 0, 1) < 0.2)[:, None, None]
        reach = torch.where(polygon, self._polygon(count, theta), self._wave(count, theta))
        return Shapes(1 - rho / reach, dx, dy)

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

    def _light(self, count: int, shape: Shapes, light: Tensor) -> tuple[Tensor, Tensor]:
        """Shading of a dome's skin and its shadow on what is behind, both (B, S, S)."""
        side = (shape.dx * light.cos() + shape.dy * light.sin()).clamp(-1.5, 1.5)
        inside = shape.depth.clamp(0, 1)
        slope, crown, dark, reach = (
            self.uniform(count, low, high)[:, None, None]
            for low, high in ((0.1, 0.4), (0.0, 0.25), (0.0, 0.5), (0.1, 0.35))
        )
        shade = 1 + slope * side * (1 - inside) + crown * (inside.sqrt() - 0.5)
        near = torch.exp(-((shape.depth.clamp(max=0) / reach) ** 2))
        return shade, dark * near * (-side).clamp(0, 1)

    # ----------------------------------------------------------------------- textures

    def texture(self, count: int) -> Tensor:
        """Random textures (B, 3, S, S) around one random colour each."""
        colour = self.uniform(count, 0.1, 0.9)[:, None] + self.uniform(count, -0.3, 0.3, 3)
        field = torch.zeros(count, 3, 1, 1, device=self.device)
        for scale, deviation in SCALES.items():
            height = self.uniform(count, 0, 1) ** 3 * deviation
            noise = self._noise(count, scale)
            field = _enlarged(field, scale) + height[:, None, None, None] * noise
        field = _enlarged(field, self.size)
        return colour[:, :, None, None] + field + self._grating(count, field[:, 0])

    def skin(self, count: int, behind: Tensor) -> Tensor:
        """A shape's texture: one of its own, or what is behind it with other colour or grain."""
        own = self.texture(count)
        mix = self.uniform(count, 0, 1)[:, None, None, None]
        tint = self.uniform(count, -0.15, 0.15, 3)[:, :, None, None]
        matched = own + (behind - own).mean((2, 3), keepdim=True) + tint
        grain = behind.roll((self.size // 3, self.size // 4), (2, 3)) + tint
        skin = torch.where(mix < 0.55, matched, torch.where(mix < 0.75, behind + tint, grain))
        return torch.where(mix < 0.25, own, skin)

    def _noise(self, count: int, scale: int) -> Tensor:
        """White noise (B, 3, scale, scale), grey for half of the pictures."""
        noise = torch.randn(count, 3, scale, scale, generator=self.rng, device=self.device)
        grey = (self.uniform(count, 0, 1) < 0.5)[:, None, None, None]
        return torch.where(grey, noise[:, :1].expand_as(noise), noise)

    def _grating(self, count: int, field: Tensor) -> Tensor:
        """A plane wave of any colour, bent by ``field`` into fibres; absent in 60% of pictures."""
        wave = self.uniform(count, -60, 60, 2)
        phase = wave[:, 0, None, None] * self.x + wave[:, 1, None, None] * self.y
        phase = phase + self.uniform(count, 0, 30)[:, None, None] * field
        present = (self.uniform(count, 0, 1) < 0.4)[:, None]
        colour = self.uniform(count, -0.2, 0.2, 3) * present
        return colour[:, :, None, None] * torch.sin(phase)[:, None]

    def _bands(self, image: Tensor) -> Tensor:
        """``image`` with up to two curved dark or bright bands, which are no shapes."""
        count = len(image)
        for _ in range(BANDS):
            angle, bend, shift, width, height = (
                self.uniform(count, low, high)[:, None, None]
                for low, high in (
                    (0, 2 * math.pi),
                    (-0.8, 0.8),
                    (-0.4, 0.4),
                    (0.01, 0.06),
                    (-0.4, 0.25),
                )
            )
            u = angle.cos() * (self.x - 0.5) + angle.sin() * (self.y - 0.5)
            v = angle.cos() * (self.y - 0.5) - angle.sin() * (self.x - 0.5)
            present = (self.uniform(count, 0, 1) < 0.4)[:, None, None]
            band = torch.exp(-(((v - shift - bend * u**2) / width) ** 2)) * height * present
            image = image * (1 + band)[:, None]
        return image

    def _camera(self, image: Tensor) -> Tensor:
        """Bright reflections; contrast, brightness and noise of the camera; clipped to [0, 1]."""
        count = len(image)
        spots = _enlarged((self._noise(count, 24)[:, :1] - 2.6).clamp(0, 1), self.size)
        shiny = (self.uniform(count, 0, 1) < 0.5)[:, None, None, None]
        image = image + spots * shiny * (1 - image)
        gain = torch.exp(self.uniform(count, -0.4, 0.3))[:, None, None, None]
        image = (image - 0.5) * gain + 0.5 + self.uniform(count, -0.15, 0.15)[:, None, None, None]
        noise = torch.randn(image.shape, generator=self.rng, device=self.device)
        return (image + self.uniform(count, 0, 0.04)[:, None, None, None] * noise).clamp(0, 1)

    def uniform(self, count: int, low: float, high: float, *shape: int) -> Tensor:
        """Uniform random numbers (B, *shape) in [low, high)."""
        values = torch.rand(count, *shape, generator=self.rng, device=self.device)
        return values * (high - low) + low


def _enlarged(field: Tensor, size: int) -> Tensor:
    """A field (B, C, h, w) at ``size``, bilinear."""
    return functional.interpolate(field, size=(size, size), mode="bilinear", align_corners=False)
