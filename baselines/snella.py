"""SNELLA, and as settings of the same code SNELL and KLoRA: kernelised sparse fine-tuning.

ΔW = sparsify(κ(A, B)): a kernel merges two low-rank factors to a matrix of high rank (Eq. 5, 6),
of which the entries of largest magnitude stay (Eq. 13); how many per matrix is decided by a
competition of all matrices for a shrinking budget (Eq. 7-12, Algorithm 1). arXiv 2510.24037.

SNELL: no competition, piecewise-linear kernel. KLoRA: dense as well. ViT-B/16, rank 8: 1,327,104
entries of A and B, and for each of 72 matrices four scalars of Mix-K or two of the other kernel.
`variant="released"` follows the authors' code where it differs from the paper (hard squared
threshold, fixed coefficients, learned temperature, dropout; docs/snella.md lists all): three
scalars or none, and the class token of a ViT trains.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from snella.errors import UserError, unknown
from snella.method import ROLES, Method, replace, slots
from snella.tuner import (
    SnellaConfig,
    SnellaLayer,
    SnellaModel,
    load_training_state,
    on_epoch_start,
    on_step_end,
    training_state,
)

_ADAPTER = "default"
_KERNEL = {"snella": "mix-k", "snell": "piecewise-linear", "klora": "piecewise-linear"}
_SPARSIFY = {"klora": "none"}
_OURS = {"rank", "variant", "target_sparsity", "allocation", "target_modules", "modules_to_save"}


class Snella(Method):
    """Adapt query, key, value, projection and both MLP layers of every block."""

    paper: ClassVar[str] = "SNELLA (2025), SNELL (NeurIPS 2024)"
    bibkey: ClassVar[str] = "shen2025snella"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext", "sam", "sd3"})

    method: Literal["snella", "snell", "klora"] = "snella"
    rank: PositiveInt = 8
    variant: Literal["paper", "released"] = "paper"
    target_sparsity: float = Field(0.7, ge=0, le=1)
    roles: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ROLES
    options: dict[str, Any] = Field({}, description="Further fields of SnellaConfig.")

    def adapt(self, model: nn.Module) -> None:
        SnellaModel(model, self.config(model), _ADAPTER)
        for module in model.modules():
            if isinstance(module, SnellaLayer):
                module.train(model.training)
        if self.variant == "released" and isinstance(
            token := getattr(model, "cls_token", None), Tensor
        ):
            token.requires_grad_(True)

    def config(self, model: nn.Module) -> SnellaConfig:
        """The tuner's configuration for ``model``.

        Raises :class:`~snella.errors.UserError` for an option the tuner does not have.
        """
        known = set(SnellaConfig.__dataclass_fields__) - _OURS
        for name in self.options:
            if name not in known:
                raise unknown("option of SnellaConfig", name, known)
        if len(set(self.roles) & {"q", "k", "v"}) not in (0, 3):
            raise UserError("SNELLA adapts a fused qkv layer whole: name all of q, k, v or none.")
        values = {
            "kernel": _KERNEL[self.method],
            "sparsify": _SPARSIFY.get(self.method),
            "allocation": self.method == "snella" and self.options.get("sparsify") != "none",
            # by whole names: SD3's `ff.net.0.proj` is no attention output
            "no_dropout": ["attn.proj", "attn.to_out.0"],
            **self.options,
        }
        return SnellaConfig(
            rank=self.rank,
            variant=self.variant,
            target_sparsity=self.target_sparsity,
            target_modules=list(dict.fromkeys(slot.path for slot in slots(model, self.roles))),
            **values,
        )

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        on_epoch_start(model, epoch, epochs, self.steps_per_epoch)

    def on_step_end(self, model: nn.Module) -> None:
        on_step_end(model)

    def merge(self, model: nn.Module) -> None:
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SnellaLayer)]
        for path, layer in layers:
            layer.merge()
            replace(model, path, layer.get_base_layer())
        del model.peft_config

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        return training_state(model)

    def load_training_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        load_training_state(model, state)
