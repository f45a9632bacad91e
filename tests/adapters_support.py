"""Tiny backbones, golden vectors and small steps shared by the tests of the adapter baselines."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from snella.method import Method
from snella.methods.base import build_method, prepare_model
from snella.models.tiny import BASE_SIZE, tiny_backbone

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "baselines"
# As the golden vectors have them.
_SIZES: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 48, "num_heads": 3},
    "swin": {"img_size": 64, "embed_dim": 16, "depths": (2, 2)},
    "convnext": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5},
}


def method(file: str, **hyperparameters: Any) -> Method:
    """The method of ``baselines/<file>.py``."""
    return build_method(ROOT / "baselines" / f"{file}.py", hyperparameters)


def tiny(family: str, **overrides: Any) -> nn.Module:
    """The tiny backbone of the family, with vectors (biases, norms) that are not their initial."""
    model = tiny_backbone(family, **_SIZES[family] | overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(family: str, file: str, **hyperparameters: Any) -> tuple[Method, nn.Module]:
    """A tiny backbone adapted by the method, in eval mode."""
    model, chosen = tiny(family), method(file, **hyperparameters)
    torch.manual_seed(1)
    prepare_model(chosen, model)
    return chosen, model.eval()


def real_on_meta(family: str, file: str, **hyperparameters: Any) -> nn.Module:
    """The base-size backbone, adapted, without storage: for counting."""
    with torch.device("meta"):
        model = timm.create_model(BASE_SIZE[family][1], num_classes=10)
        prepare_model(method(file, **hyperparameters), model)
    return model


def images(family: str, count: int = 6) -> Tensor:
    """Seeded random images for the tiny backbone."""
    size = 32 if family == "vit" else 64
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def labels(count: int = 6) -> Tensor:
    """Labels that repeat 0 .. 4."""
    return torch.arange(count) % 5


def perturb(model: nn.Module) -> None:
    """Move all trainable tensors off their initial values, zeros included."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def golden(name: str) -> dict[str, Tensor]:
    """All arrays of a golden file; floating-point ones in double precision."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data if data[key].dtype.kind != "U"}
    return {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}


def golden_model(
    family: str, data: dict[str, Tensor], rename: dict[str, str] | None = None, **overrides: Any
) -> nn.Module:
    """The tiny backbone of a golden file in double precision, with its ``w/`` weights."""
    weights = {k[2:]: v for k, v in data.items() if k.startswith("w/")}
    for old, new in (rename or {}).items():
        weights = {k.replace(old, new): v for k, v in weights.items()}
    model = tiny(family, **overrides).double()
    model.load_state_dict(weights)
    return model.eval()


def assert_gradients(
    expected: dict[str, Tensor], parameters: dict[str, nn.Parameter], relative: float = 1e-6
) -> None:
    """Compare the gradients of ``parameters`` with the expected arrays of the same names."""
    assert expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        found = parameters[name].grad
        assert found is not None, name
        error = (found.reshape(gradient.shape) - gradient).abs().max() / gradient.abs().max()
        assert error < relative, (name, float(error))
