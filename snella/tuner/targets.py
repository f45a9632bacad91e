"""Which layers SNELLA adapts when ``target_modules`` is not given; what it leaves out, it says."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from snella.errors import UserError
from snella.models.names import is_adapted, is_other
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.shapes import is_attention

_BLOCK = re.compile(r"(.*?\.)?\d+(?=\.)")
_TYPES = (nn.Linear, Conv1D, SnellaLayer)
_UNKNOWN = (
    "SNELLA's default leaves {} linear layer(s) of the adapted blocks out, whose names it does not "
    "know: {}. Name all layers to adapt in target_modules."
)
_STACKS = (
    "SNELLA adapts layers, and leaves {} parameter(s) of the adapted blocks out that stack several "
    "matrices: {}. They stay frozen."
)
# In the paths of a model that was compiled before it was adapted.
COMPILED = "_orig_mod."


def default_targets(model: nn.Module, config: SnellaConfig) -> set[str]:
    """Paths of the layers to adapt; ``layers_to_transform`` and exclusions of ``config`` apply.

    Warns about linear layers in an adapted block whose names it does not know, and about parameters
    that are no layers but stacks of matrices (experts). Raises ``UserError`` if it recognises none.
    """
    modules = dict(_outside_adapters(model))
    attentions = {n for n, m in modules.items() if _is_attention(m) and _BLOCK.match(f"{n}.")}
    inside = {f"{name}.out_proj" for name in attentions}
    linear = {name for name, module in modules.items() if _is_matrix(module)} - inside
    matched = {name for name in linear if is_adapted(name)} | attentions
    if not matched:
        raise UserError(
            f"No linear layers to adapt were recognised in {type(model).__name__}; "
            "name them with SnellaConfig(target_modules=[...])."
        )
    blocks = {match.group() for name in matched if (match := _BLOCK.match(name))}
    unknown = {name for name in linear - matched if not is_other(name)}
    _warn_of_the_rest(unknown, blocks, _UNKNOWN)
    _warn_of_the_rest(_stacks(modules), blocks, _STACKS)
    chosen = {name for name in matched if matches_layers(config, name)}
    if not chosen:
        raise UserError(
            f"None of the {len(matched)} layers recognised in {type(model).__name__} is left by "
            f"layers_to_transform={config.layers_to_transform}, exclude_modules and "
            "modules_to_save."
        )
    return chosen


def matches_layers(config: SnellaConfig, key: str) -> bool:
    """Whether the exclusions and layer indices of ``config`` admit the layer at path ``key``."""
    probe = copy.copy(config)
    probe.target_modules = {key.rpartition(".")[2]}
    return bool(check_layer_index(probe, key))


def check_layer_index(config: SnellaConfig, key: str) -> bool | re.Match[str] | None:
    """PEFT's rule, which without layers_pattern does not see an index at the root (timm's blocks).

    PEFT looks for ``parent.blocks.3.``; here ``blocks.3.`` counts too. What ``torch.compile`` puts
    into paths does not count.
    """
    key = key.replace(COMPILED, "")
    found: bool | re.Match[str] | None = check_target_module_exists(config, key)
    indices, listed = config.layers_to_transform, not isinstance(config.target_modules, str)
    if found or indices is None or config.layers_pattern or not listed:
        return found
    if re.match(r"[^.]*\.\d+\.", key) is None:
        return found
    return bool(check_target_module_exists(config, f"model.{key}"))


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside an adapter layer, such as the layer that it wraps."""
    inside: list[str] = []
    for path, module in model.named_modules():
        name = path.replace(COMPILED, "")
        if not name.startswith(tuple(inside)):
            yield name, module
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")


def _is_attention(module: nn.Module) -> bool:
    """Whether query, key and value of this module are one parameter that can be adapted."""
    return is_attention(module.get_base_layer() if isinstance(module, SnellaLayer) else module)


def _is_matrix(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SnellaLayer):
        module = module.get_base_layer()  # of another method; refused later, not left out here
    if isinstance(module, nn.Conv2d):  # ConvNeXt with conv_mlp, which writes its MLP so
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, _TYPES) and not _is_attention(module)


def _stacks(modules: dict[str, nn.Module]) -> set[str]:
    """Paths of parameters that hold several matrices, as the experts of a mixture do."""
    return {
        f"{path}.{name}"
        for path, module in modules.items()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1
    }


def _warn_of_the_rest(left: set[str], blocks: set[str], message: str) -> None:
    """One warning for what the default leaves out of adapted blocks."""
    missed = sorted(n for n in left if (match := _BLOCK.match(n)) and match.group() in blocks)
    if missed:
        names = ", ".join(missed[:3]) + (", …" if len(missed) > 3 else "")
        warnings.warn(message.format(len(missed), names), stacklevel=3)
