"""Other people's loops: live model = saved and reloaded = merged; resumed = uninterrupted."""

from __future__ import annotations

import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_tuner import budgets, layers, trainable
from test_tuner_models import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snella import SnellaCallback, SnellaConfig, TrainingState, on_epoch_start, on_step_end
from snella.errors import UserError

Forward = Callable[[nn.Module], Tensor]
OPTIMIZERS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SPARSITY = 0.6
CPU = torch.device("cpu")


def made(name: str, rank: int = 4) -> tuple[PeftModel, Callable[[], nn.Module], Forward]:
    """An adapted model, the same backbone anew, and a forward pass."""
    make, _ = MODELS[name]
    torch.manual_seed(0)
    backbone, forward = make()
    state = {key: value.clone() for key, value in backbone.state_dict().items()}

    def again() -> nn.Module:
        fresh, _ = make()
        fresh.load_state_dict(state)
        return fresh

    torch.manual_seed(1)
    model = get_peft_model(backbone, SnellaConfig(rank=rank, target_sparsity=SPARSITY))
    return model, again, forward


def check(model: PeftModel, again: Callable[[], nn.Module], forward: Forward, path: Path) -> None:
    """Saved, reloaded and merged it is the live model, as sparse as asked."""
    assert sum(budgets(model)) == int(
        (1 - SPARSITY) * sum(layer.slice_size * layer.slices for layer in layers(model))
    )
    for layer in layers(model):
        kept = (layer.get_delta_weight("default").view(layer.slices, -1) != 0).sum(1)
        assert kept.tolist() == layer.snella_budget["default"].tolist(), layer.key
    with torch.no_grad():
        live = forward(model.eval())
        model.save_pretrained(str(path / "adapter"))
        reloaded = PeftModel.from_pretrained(again(), str(path / "adapter"))
        assert forward(reloaded.eval()).equal(live)
        merged = model.merge_and_unload()
        torch.testing.assert_close(forward(merged), live, rtol=1e-4, atol=1e-5)


def run(model: nn.Module, loss: Callable[[], Tensor], epochs: int = 3, **optimizer: Any) -> None:
    update = torch.optim.AdamW(trainable(model), lr=1e-3, **optimizer)
    for epoch in range(epochs):
        on_epoch_start(model, epoch, epochs)
        for _ in range(2):
            for _ in range(2):  # micro-batches
                loss().backward()
            update.step()
            on_step_end(model)
            update.zero_grad()


# Fused ones, which leave the least trace, on all; the others on two.
KINDS = (
    *("ViT", "open_clip", "Swin", "ConvNeXt", "CLIP", "BERT", "Llama", "segment-anything"),
    *("transformers ViT", "DINOv2 with SwiGLU", "SD3"),
)
PAIRS = [(n, "fused") for n in KINDS] + [(n, o) for n in KINDS[:2] for o in ("plain", "foreach")]


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_optimizers_and_models(name: str, optimizer: str, tmp_path: Path) -> None:
    model, again, forward = made(name)
    model.train()
    run(model, lambda: forward(model).square().mean(), **OPTIMIZERS[optimizer])
    check(model, again, forward, tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model, again, forward = made("ViT")
    plain, _, _ = made("ViT")
    plain.train()
    run(plain, lambda: forward(plain).square().mean())
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reentrant: no input requires gradients
        blocks = model.get_base_model().blocks
        for block in blocks:
            block.forward = lambda x, run=block.forward, **_: checkpoint(
                run, x, use_reentrant=reentrant
            )
        if reentrant:
            model.get_base_model().patch_embed.register_forward_hook(
                lambda module, args, output: output.requires_grad_()
            )
        run(model, lambda: forward(model).square().mean())
    assert budgets(model) == budgets(plain)
    for block in blocks:
        del block.forward
    check(model, again, forward, tmp_path)


def test_reentrant_checkpointing_without_gradients_is_explained() -> None:
    model, _, forward = made("ViT")
    for block in model.get_base_model().blocks:
        block.forward = lambda x, run=block.forward, **_: checkpoint(run, x, use_reentrant=True)
    model.train()
    model.get_base_model().head.requires_grad_(True)
    on_epoch_start(model, 0, 2)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        forward(model).sum().backward()
    with pytest.raises(UserError, match="enable_input_require_grads"):
        on_step_end(model)


def classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8, num_labels=3)
    torch.manual_seed(0)
    return ViTForImageClassification(config)


def trainer(folder: Path, steps: int, callbacks: list[Any], **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = classifier()
    settings = {"rank": 4, "target_sparsity": SPARSITY} | settings
    model = get_peft_model(model, SnellaConfig(modules_to_save=["classifier"], **settings))
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3}
        for i in range(12)
    ]
    arguments = TrainingArguments(
        str(folder), num_train_epochs=4, per_device_train_batch_size=2, save_steps=steps,
        save_strategy="steps", report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_trainer_with_its_own_optimizer(tmp_path: Path) -> None:
    used = trainer(tmp_path, 100, [SnellaCallback()])
    used.train()
    assert used.optimizer.param_groups[0]["fused"]
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    check(used.model, classifier, lambda m: m(images).logits, tmp_path)


@pytest.mark.parametrize("at", [12, 14], ids=["between epochs", "in mid-epoch"])
def test_the_trainer_resumes_exactly(at: int, tmp_path: Path) -> None:
    through = trainer(tmp_path, at, [SnellaCallback()])
    through.train()
    expected = state_of(through)
    kept = sum(budgets(through.model))
    total = sum(layer.slice_size for layer in layers(through.model))
    assert kept == int((1 - SPARSITY) * total)
    resumed = trainer(tmp_path, 100, [SnellaCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    for name, value in state_of(resumed).items():
        assert value.equal(expected[name]), name
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / f"checkpoint-{at}", elsewhere)
    lost = trainer(tmp_path / "other", 100, [SnellaCallback()])
    with pytest.raises(UserError, match=r"resumes at step .*resume_from_checkpoint"):
        lost.train(resume_from_checkpoint=str(elsewhere))
    found = trainer(tmp_path / "other", 100, [SnellaCallback(resume_from_checkpoint=elsewhere)])
    found.train(resume_from_checkpoint=str(elsewhere))
    assert state_of(found).keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in state_of(found).items())


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length; they end before training does, and start anew."""

    def __iter__(self) -> Any:
        return iter(trainer(Path(), 1, []).train_dataset[:8])


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_trainer_on_data_without_a_length(interval: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    settings = {"rank": 4, "modules_to_save": ["classifier"], "target_sparsity": SPARSITY}
    model = get_peft_model(classifier(), SnellaConfig(**settings, interval=interval))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    used = Trainer(model, arguments, train_dataset=Stream(), callbacks=[SnellaCallback()])
    if interval == "epoch":
        with pytest.raises(UserError, match='interval="step"'):
            used.train()
        return
    used.train()
    total = sum(layer.slice_size for layer in layers(model))
    assert sum(budgets(model)) == int((1 - SPARSITY) * total)


def test_the_trainer_ends_within_an_epoch(tmp_path: Path) -> None:
    """Every step counts towards the schedule, whatever epochs they fall into."""
    used = trainer(tmp_path, 100, [SnellaCallback()], interval="step", schedule="linear")
    used.args.max_steps = 8  # of 6 in an epoch
    used.train()
    total = sum(layer.slice_size for layer in layers(used.model))
    assert sum(budgets(used.model)) == int((1 - SPARSITY) * total)


def test_the_callback_twice_counts_once(tmp_path: Path) -> None:
    once, twice = (trainer(tmp_path, 100, [SnellaCallback()] * n) for n in (1, 2))
    once.train()
    twice.train()
    assert budgets(twice.model) == budgets(once.model)


def test_accelerate_accumulates_and_resumes(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def train(resume: bool) -> PeftModel:
        model, _, forward = made("ViT")
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        update = torch.optim.AdamW(trainable(model), lr=1e-3)
        model, update = accelerator.prepare(model, update)
        accelerator.register_for_checkpointing(TrainingState(model))
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for epoch in range(2 if resume else 0, 4):
            on_epoch_start(model, epoch, 4)
            for _ in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(forward(model.train()).square().mean())
                    update.step()
                    if accelerator.sync_gradients:
                        on_step_end(model)
                    update.zero_grad()
            if epoch == 1 and not resume:
                accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(model)

    through, resumed = train(False), train(True)
    assert budgets(resumed) == budgets(through)
    for name, value in resumed.state_dict().items():
        assert value.equal(through.state_dict()[name]), name


def scaled_loss(model: nn.Module, forward: Forward) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return forward(model.train()).float().square().mean()


def test_a_gradient_scaler_skips_steps(tmp_path: Path) -> None:
    """torch's own scaler, as for fp16: its first scale overflows, and it leaves the step out."""
    model, again, forward = made("ViT")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    update = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    skipped = []
    for epoch in range(3):
        on_epoch_start(model, epoch, 3)
        for _ in range(3):
            before = trainable(model)[0].detach().clone()
            scaler.scale(scaled_loss(model, forward)).backward()
            scaler.step(update)
            scaler.update()
            on_step_end(model)
            update.zero_grad()
            skipped.append(trainable(model)[0].equal(before))
    assert skipped[0] and not any(skipped[-4:])
    assert all(p.isfinite().all() for p in trainable(model))
    check(model, again, forward, tmp_path)


def test_accelerate_with_a_scaler_skips_steps(tmp_path: Path) -> None:
    """The optimizer that accelerate wraps for fp16, which asks for a GPU only to make a scaler."""
    from accelerate import Accelerator

    model, again, forward = made("ViT")
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    update = torch.optim.AdamW(trainable(model), lr=1e-3)
    model, update = accelerator.prepare(model, update)
    skipped = []
    for epoch in range(3):
        on_epoch_start(model, epoch, 3)
        for _ in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(scaled_loss(model, forward))
                update.step()
                if accelerator.sync_gradients:
                    on_step_end(model)
                    skipped.append(accelerator.optimizer_step_was_skipped)
                update.zero_grad()
    assert skipped[0] and not any(skipped[-4:])
    check(accelerator.unwrap_model(model), again, forward, tmp_path)


def eight_bits(library: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW whose averages have eight bits, of tensors with 4,096 entries or more."""
    module = pytest.importorskip(library)
    make: Callable[..., torch.optim.Optimizer] = module.AdamW8bit
    return make


@pytest.mark.parametrize("library", ["bitsandbytes.optim", "torchao.optim"])
def test_optimizers_of_eight_bits(library: str, tmp_path: Path) -> None:
    make = eight_bits(library)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        model, again, forward = made("ViT", rank=256)
        update = make(trainable(model), lr=1e-3)
        for epoch in range(3):
            on_epoch_start(model.train(), epoch, 3)
            for _ in range(2):
                forward(model).square().mean().backward()
                update.step()
                on_step_end(model)
                update.zero_grad()
        values = [v for state in update.state.values() for v in state.values()]
        assert any(getattr(v, "dtype", None) == torch.uint8 or hasattr(v, "codes") for v in values)
        check(model, again, forward, tmp_path)


def _in_parallel(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, _, _ = made("ViT")
    parallel = DistributedDataParallel(model.train())
    update = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(rank)
    for epoch in range(3):
        # Both ways of calling the hooks: with the wrapper, and as methods of the module.
        on_epoch_start(parallel, epoch, 3)
        for _ in range(2):
            update.zero_grad()
            parallel(torch.randn(2, 3, 16, 16, generator=generator)).square().mean().backward()
            update.step()
            parallel.module.on_step_end()
    entries = sum(layer.slice_size * layer.slices for layer in layers(model))
    assert sum(budgets(model)) == int((1 - SPARSITY) * entries)
    torch.save((budgets(model), model.state_dict()), Path(folder) / f"{rank}.pt")
    _fully_sharded(rank, Path(folder))
    dist.destroy_process_group()


def _fully_sharded(rank: int, folder: Path) -> None:
    """Parameters in parts (FSDP2): hooks, saving and refusals; and FSDP's flat pieces."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    mesh = init_device_mesh("cpu", (2,))
    model, again, forward = made("ViT")
    for block in (*model.get_base_model().blocks, model):
        fully_shard(block, mesh=mesh)
    update = torch.optim.AdamW(trainable(model), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    for epoch in range(3):
        on_epoch_start(model, epoch, 3)
        for _ in range(2):
            update.zero_grad()
            model(torch.randn(2, 3, 16, 16, generator=generator)).square().mean().backward()
            update.step()
            on_step_end(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        live = forward(model.eval())
    with pytest.raises(UserError, match="fully_shard has left a part"):
        model.merge_adapter()
    if rank == 0:
        model.save_pretrained(str(folder / "adapter"), state_dict=state)
        whole = PeftModel.from_pretrained(again(), str(folder / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(forward(whole.eval()), live)
        assert budgets(whole) == budgets(model) and len(set(budgets(whole))) > 1
    model, _, _ = made("ViT")
    policy = ModuleWrapPolicy({type(model.get_base_model().blocks[0])})
    flat = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=CPU, auto_wrap_policy=policy
    )
    with pytest.raises(UserError, match="set allocation=False"):
        on_epoch_start(flat, 0, 3)
    state = get_model_state_dict(flat, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(str(folder / "flat"), state_dict=state)
        whole = PeftModel.from_pretrained(again(), str(folder / "flat"))
        with torch.no_grad():
            assert forward(whole.eval()).equal(forward(made("ViT")[0].eval()))


def test_data_parallel_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_parallel, (port, str(tmp_path)), nprocs=2)
    (one, first), (two, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == two and len(set(one)) > 1
    assert all(value.equal(second[name]) for name, value in first.items())
