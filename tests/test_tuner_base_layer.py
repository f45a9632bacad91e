"""The adapted layer's own behaviour stays: its forward, its hooks, its place in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from snella import SnellaConfig
from snella.tuner import SnellaLinear


class Standardised(nn.Linear):
    """A forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return F.linear(x, weight, self.bias) * 2


def adapted(kind: type[nn.Linear], **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    block = nn.ModuleDict({"fc1": kind(12, 20), "fc2": nn.Linear(20, 12)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    config = SnellaConfig(rank=4, allocation=False, target_modules=["fc1"], **settings)
    return get_peft_model(model, config)


def layer_of(model: PeftModel) -> SnellaLinear:
    return model.base_model.model["blocks"][0]["fc1"]


X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))


def test_own_forward_is_called() -> None:
    layer = layer_of(adapted(Standardised)).train()
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    weight = weight / weight.norm(dim=1, keepdim=True)
    expected = F.linear(X, weight, layer.base_layer.bias) * 2
    torch.testing.assert_close(layer(X), expected)
    leaves = [layer.snella_A["default"], layer.snella_B["default"]]
    actual = torch.autograd.grad(layer(X).square().sum(), leaves)
    for mine, reference in zip(
        actual, torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, reference)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(X), expected)
        layer.merge()
        torch.testing.assert_close(layer(X), expected)


def test_hooks_fire() -> None:
    layer = layer_of(adapted(nn.Linear))
    expected = layer.train()(X).detach()
    seen: list[Tensor] = []
    gradients: list[Tensor] = []
    base = layer.base_layer
    base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    base.register_full_backward_hook(lambda module, ins, outs: gradients.append(outs[0]))
    y = layer(X)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected)
    assert seen[0] is y or seen[0].equal(y)
    assert gradients[0].equal(torch.ones_like(y))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(X), expected)
    assert len(seen) == 2


@pytest.mark.parametrize("training", [False, True])
def test_offloaded_by_accelerate(training: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = adapted(nn.Linear)
    layer = layer_of(model)
    expected = layer.train()(X).detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert layer.base_layer.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(layer.train(training)(X), expected)
    assert layer.base_layer.weight.is_meta and layer.snella_A["default"].is_meta


@pytest.mark.parametrize("settings", [{}, {"variant": "released"}, {"kernel": "piecewise-linear"}])
def test_compiles_without_graph_breaks(settings: dict[str, Any]) -> None:
    model = adapted(nn.Linear, **settings).train()
    layer = layer_of(model)
    leaves = [layer.snella_A["default"], layer.snella_B["default"]]
    results = []
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    for function in (layer, torch.compile(layer, fullgraph=True, backend=counted)):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend=counted)
    for step in range(3):
        compiled(X).sum().backward()
        optimizer.step()
        layer.set_budget("default", [10 + step])
    assert counted.frame_count <= 2, "neither new parameters nor new budgets compile again"


def test_the_first_forward_may_be_a_compiled_one() -> None:
    layer = layer_of(adapted(nn.Linear)).train()
    layer.set_scale("default", 0.5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(compiled, layer(X))


def test_exports() -> None:
    layer = layer_of(adapted(nn.Linear)).eval()
    program = torch.export.export(layer, (X,))
    torch.testing.assert_close(program.module()(X), layer(X))
    layer.set_budget("default", [17])
    program = torch.export.export(layer, (X,))
    torch.testing.assert_close(program.module()(X), layer(X))


def test_operators_are_registered_as_torch_asks() -> None:
    layer = layer_of(adapted(nn.Linear)).train()
    update = layer._update("default")
    tensors = [t.detach().clone() for t in layer._tensors("default")]
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    weight = layer.base_layer.weight.detach()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = X.clone().requires_grad_()
    arguments = x, weight, None, *tensors, update.spec
    torch.library.opcheck(torch.ops.snella.linear.default, arguments, test_utils=tests)
    arguments = weight, *tensors, update.spec
    torch.library.opcheck(torch.ops.snella.weight.default, arguments, test_utils=tests)
