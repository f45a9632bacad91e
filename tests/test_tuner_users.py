"""What users of PEFT do to a model: it works with SNELLA, or is refused in one line."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from test_tuner import IMAGES, adapted, backbone, layers, logits
from test_tuner_models import LLAMA
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from snella import SnellaConfig
from snella.errors import UserError
from snella.tuner import SnellaLayer

IDS = torch.arange(8).view(2, 4) + 3
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def config(**settings: Any) -> SnellaConfig:
    return SnellaConfig(**{"rank": 4, "allocation": False, "target_sparsity": 0.5} | settings)


@torch.no_grad()
def shifted(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def language_model() -> nn.Module:
    """With one weight for the embedding and the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **LLAMA, tie_word_embeddings=True))


class Shared(nn.Module):
    """Two modules with one weight, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third = nn.Linear(8, 8)
        self.again = self.third

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.third(self.second(self.first(x).relu()).relu()).relu())
        return y


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@torch.no_grad()
def test_tied_embeddings_merge_into_weights_of_their_own(target: str, tmp_path: Path) -> None:
    plain = language_model()(IDS).logits
    model = shifted(get_peft_model(language_model(), config(target_modules=[target, "q_proj"])))
    expected = model(IDS).logits
    model.merge_adapter()
    assert model(IDS).logits.equal(expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, plain)
    model.unmerge_adapter()
    assert model(IDS).logits.equal(expected)
    inside = model.get_base_model()
    heads = [inside.lm_head, inside.model.embed_tokens]
    weights = {getattr(module, "base_layer", module).weight for module in heads}
    assert len(weights) == 1, "tied again"
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert merged(IDS).logits.equal(expected)
    merged.save_pretrained(str(tmp_path))
    again = type(merged).from_pretrained(str(tmp_path))
    assert again(IDS).logits.equal(expected)


@pytest.mark.parametrize("targets", [["first"], ["first", "second"], ["third"], ["again"]])
@torch.no_grad()
def test_shared_weights_and_modules(targets: list[str], tmp_path: Path) -> None:
    if targets == ["again"]:  # a module is found under its first name
        with pytest.raises(ValueError, match="not found"):
            get_peft_model(Shared(), config(target_modules=targets))
        return
    model = shifted(get_peft_model(Shared(), config(target_modules=targets)))
    expected = model(X)
    assert not expected.allclose(Shared()(X), atol=1e-4)
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing keys
        loaded = PeftModel.from_pretrained(Shared(), str(tmp_path)).eval()
    assert loaded(X).equal(expected)
    assert copy.deepcopy(loaded).unload()(X).equal(Shared()(X))
    torch.testing.assert_close(loaded.merge_and_unload()(X), expected)
    assert not any(isinstance(module, SnellaLayer) for module in loaded.modules())


@pytest.mark.parametrize(
    "computed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_are_computed_are_refused(computed: Any) -> None:
    model = nn.ModuleDict({"q": computed(nn.Linear(8, 8))})
    with pytest.raises(UserError, match="its weight is computed anew in every forward"):
        get_peft_model(model, config(target_modules=["q"]))


@torch.no_grad()
def test_compiled_before_it_was_adapted(tmp_path: Path) -> None:
    """The file fits the model that is not compiled, and the other way round."""
    compiled = [torch.compile(backbone(), backend="eager") for _ in range(2)]
    with pytest.raises(UserError, match="adapt the model first, then compile"):
        get_peft_model(compiled[0], config(modules_to_save=["head"]))
    model = shifted(get_peft_model(compiled[0], config(layers_to_transform=[1])))
    assert len(layers(model)) == 4
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    for base in (backbone(), compiled[1]):
        assert logits(PeftModel.from_pretrained(base, str(tmp_path))).equal(expected)


def test_evaluation_mode_is_kept() -> None:
    settings = config(dropout=0.5, no_dropout=[])
    model = get_peft_model(backbone().eval(), settings)
    assert not any(layer.training for layer in layers(model))
    assert all(layer.training for layer in layers(get_peft_model(backbone(), settings)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recording", [True, False])
def test_transforms_of_torch_are_refused_or_right(training: bool, recording: bool) -> None:
    model = adapted(allocation=False).train(training)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    with torch.set_grad_enabled(recording):
        with pytest.raises(UserError, match=r"cannot be transformed by torch\.func"):
            torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, IMAGES)
        with pytest.raises(UserError, match=r"cannot be transformed by torch\.func"):
            torch.func.jvp(lambda p: loss(p, IMAGES[0]), (trained,), (trained,))
        if not recording and not training:  # by one plain matrix
            mapped = torch.func.vmap(lambda image: model(image[None])[0])(IMAGES)
            torch.testing.assert_close(mapped, model(IMAGES))


def test_tracing_is_refused_and_export_is_right() -> None:
    model = shifted(adapted(allocation=False))
    with torch.no_grad(), pytest.raises(UserError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(model, IMAGES)
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), model(IMAGES))
    assert type(exported(IMAGES)) is Tensor  # with which one can count


def test_a_scale_is_not_saved_without_a_word(tmp_path: Path) -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(str(tmp_path))
    for layer in layers(model):
        layer.set_scale("default", 0.3)
    with pytest.warns(UserWarning, match="'default' is scaled by 0.3, which is not saved"):
        model.save_pretrained(str(tmp_path))


def test_offloaded_embeddings_are_refused() -> None:
    from accelerate import cpu_offload

    model = get_peft_model(language_model(), config(target_modules=["embed_tokens"])).eval()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UserError, match="offloaded its weight, which with SNELLA"):
        model(IDS)


def test_layers_of_other_adapters_and_without_a_shape_are_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1"]), backbone())
    with pytest.raises(UserError, match="it carries an adapter of another method"):
        inject_adapter_in_model(config(target_modules=["fc1"]), model, "second")
    lazy = nn.ModuleDict({"q": nn.LazyLinear(8)})
    with pytest.raises(UserError, match="its shape is not known before"):
        get_peft_model(lazy, config(target_modules=["q"]))


def test_files_of_another_backbone_are_noticed(tmp_path: Path) -> None:
    adapted(modules_to_save=None).save_pretrained(str(tmp_path))
    model = backbone()
    del model.blocks[1]
    with pytest.warns(UserWarning, match="layers that this model does not adapt"):
        PeftModel.from_pretrained(model, str(tmp_path))
