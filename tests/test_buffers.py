"""Memory of batches is used again, and never while anything still looks at it."""

from __future__ import annotations

import gc

import pytest
import torch

from snella.data import transforms
from snella.data.buffers import KEPT, Buffers
from snella.data.pixels import PixelSettings


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[1:],
        lambda tensor: tensor.detach().view(-1),
        lambda tensor: tensor.numpy()[:1],
        lambda tensor: (torch.ones(4, 3).requires_grad_() * tensor).sum(),  # saved for backward
        lambda tensor: iter(tensor.split(2)),
    ],
)
def test_memory_returns_with_its_last_user(hold):
    buffers = Buffers()
    tensor = buffers.empty((4, 3))
    place = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    gc.collect()
    other = buffers.empty((4, 3))
    assert other.data_ptr() != place
    del held, other
    gc.collect()
    assert place in {t.data_ptr() for t in [buffers.empty((4, 3)) for _ in range(KEPT)]}


def test_another_size_gets_memory_of_its_own():
    buffers = Buffers()
    for _ in range(KEPT + 2):
        buffers.empty((4, 3))
    assert buffers.empty((5, 3)).shape == (5, 3)
    assert len(buffers._free) <= KEPT


def test_batches_that_are_kept_stay_as_they_are():
    images = torch.randint(0, 256, (12, 3, 128, 128), dtype=torch.uint8)
    assert images[0].numel() >= transforms.LARGE_NUMBERS
    settings = PixelSettings(image_size=128, resize="none")
    found = transforms.batches(images, None, 4, 3, settings=settings)
    kept = [batch["image"] for batch in found]
    expected = transforms.batches(images, None, 4, 3, settings=None)
    for image, batch in zip(kept, expected, strict=True):
        assert torch.equal(image, transforms.normalise(batch["image"], settings))
