"""The authors' models with our rows' hyper-parameters: how each is built, and what trains in it.

Every entry of :data:`PUBLISHED` gives the row, the clone, the function that builds the authors'
model (ViT-B/16 at 224 px, on which all of them are written), and where our row must be set
otherwise to compute the same. What their scripts do around a step (masks, a second pass) is
done here with their own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from authors_code import Settings, imported
from measuring import Setup, Training, trained_by_adamw, with_random_head
from torch import Tensor, nn

VIT_B = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "qkv_bias": True}


REPOSITORIES: dict[str, str] = {
    "SSF": "dongzelian/SSF@e94e0e704a4ece1986a537c97a95158b46838f71",
    "vpt": "KMnP/vpt@4410440ec1b489f24f66b9fad3d9b10ff3443567",
    "AdaptFormer": "ShoufaChen/AdaptFormer@6967d676c1a5e5a11be2e2768a6e5c604bb043ed",
    "adapter_plus": "visinf/adapter_plus@191c4ab26fc97ea09ae390383ff79327822853ff",
    "SPT": "ziplab/SPT@e385f67ef0cba524b44072d52ec0650a7022f4e2",
    "SNELL": "ssfgunner/SNELL@e9d51857fd36f8753096b05a907bd5223ff07d44",
    "GPS": "FightingFighting/GPS@72e0c31564f46b6b6a166b54a28f2a8f48cec031",
    "PETL-ViT": "JieShibo/PETL-ViT@026e4f12cfbe1e46bfb4d3ed5ba09f2d9f83e91e",
    "Sparse-Tuning": "liuting20/Sparse-Tuning@550cc004a6deca377121469b29484935cd31cfbf",
    "Dynamic-Tuning": "NUS-HPC-AI-Lab/Dynamic-Tuning@d1744f0b9366f79ad9b78f586e479af34e81807a",
}
"""GitHub repository and commit of each clone, by the name of its folder."""


class Published(NamedTuple):
    """One comparison: a row of config/methods.yaml and the authors' code of it."""

    row: str
    repository: str
    build: Callable[[Path, Setup, Training], Training]
    settings: Mapping[str, Any] = MappingProxyType({})
    note: str = ""


def ready(model: Any, setup: Setup, trained: tuple[str, ...], **hooks: Any) -> Training:
    """Train the parameters whose names contain one of ``trained``, with the plain loss."""
    model, batch = with_random_head(model).to(setup.device).train(), setup.data()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))

    def loss() -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    return trained_by_adamw(model, loss, **hooks)


def ssf(root: Path, setup: Setup, ours: Training) -> Training:
    with imported(root, "models.vision_transformer") as code:
        model = code.VisionTransformer(**VIT_B, num_classes=setup.classes, tuning_mode="ssf")
    return ready(model, setup, ("ssf_", "head."))


def vpt(deep: bool, root: Path, setup: Setup, ours: Training) -> Training:
    prompt = {"LOCATION": "prepend", "INITIATION": "random", "NUM_DEEP_LAYERS": None}
    prompt |= {"DEEP_SHARED": False, "PROJECT": -1, "NUM_TOKENS": 50, "DROPOUT": 0.0}
    config = Settings(prompt, VIT_POOL_TYPE="original", DEEP=deep)
    with imported(root, "src.models.vit_prompt.vit") as code:
        model = code.PromptedVisionTransformer(config, "sup_vitb16_224", 224, setup.classes)
    return ready(model, setup, ("prompt", "head."))


def vpt_adapter(root: Path, setup: Setup, ours: Training) -> Training:
    config = Settings(STYLE="Pfeiffer", REDUCATION_FACTOR=768 // 8)
    with imported(root, "src.models.vit_adapter.vit") as code:
        classes, name = setup.classes, "sup_vitb16_224"
        model = code.ADPT_VisionTransformer(name, 224, classes, adapter_cfg=config)
    training = ready(model, setup, ("adapter_", "head."))
    model.eval()  # as their trainer does with a frozen encoder, which has dropout
    return training


def adaptformer(bottleneck: int, root: Path, setup: Setup, ours: Training) -> Training:
    tuning = {"ffn_adapt": True, "ffn_option": "parallel", "ffn_num": bottleneck, "d_model": 768}
    tuning |= {"ffn_adapter_layernorm_option": "none", "ffn_adapter_init_option": "lora"}
    config = Settings(tuning, ffn_adapter_scalar="0.1", vpt_on=False)
    with imported(root, "models.vit_image") as code:
        model = code.vit_base_patch16(num_classes=setup.classes, tuning_config=config)
    return ready(model, setup, ("adaptmlp", "head."))


def adapter_plus(root: Path, setup: Setup, ours: Training) -> Training:
    """Their blocks in timm's model, whose constructor no longer fits theirs."""
    config = Settings(config="post", scaling="channel", act_layer=True, norm_layer=False)
    config |= {"bias": True, "init": "houlsby", "dim": 8, "attn_adapter": False}
    config |= {"dropout": 0, "drop_path": 0.1}
    model = setup.backbone()
    with imported(root, "adapter_plus.vit_adapter") as code:
        norm = partial(nn.LayerNorm, eps=1e-6)
        settings = {"qkv_bias": True, "norm_layer": norm, "adapter_config": config}
        blocks = [code.AdapterBlock(768, 12, **settings) for _ in model.blocks]
    model.blocks = nn.Sequential(*blocks)
    return ready(model, setup, (".adapter.", "head."))


def convpass(root: Path, setup: Setup, ours: Training) -> Training:
    with imported(root / "convpass" / "vtab", "convpass") as code:
        pass
    model = setup.backbone()
    code.set_Convpass(model, "convpass", dim=8, s=1.0)
    for block in model.blocks:
        block.drop_path = block.drop_path1
    return ready(model, setup, ("adapter", "head."))


def fact(form: str, rank: int, root: Path, setup: Setup, ours: Training) -> Training:
    model: Any = setup.backbone()
    with imported(root / "FacT", f"fact_{form}") as code:
        code.vit = model
        code.set_FacT(model, dim=rank, s=10.0)
    for block in model.blocks:
        block.attn.forward = without_mask(block.attn.forward)
        block.mlp.drop = block.mlp.drop1
    return ready(model, setup, ("FacT", "head."))


def without_mask(forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention that is not given what today's timm passes to it."""
    return lambda x, attn_mask=None, is_causal=False: forward(x)


def sparse_tuning(root: Path, setup: Setup, ours: Training) -> Training:
    config = Settings(ffn_adapt=True, ffn_option="parallel")
    keep = [0.7 if block in (3, 6, 9) else 1 for block in range(12)]
    with imported(root, "models.vit_image") as code:
        settings = {"keep_rate": keep, "fuse_token": True, "tuning_config": config}
        model = code.VisionTransformer(**VIT_B, num_classes=setup.classes, **settings)
    return ready(model, setup, ("adaptmlp", "head."))


def dyt(root: Path, setup: Setup, ours: Training) -> Training:
    tuning = {"ffn_num": 8, "d_model": 768, "ffn_adapter_scalar": 1.0}
    tuning |= {"ffn_adapter_layernorm_option": "none", "ffn_adapter_init_option": "lora"}
    configs = {"tuning_config": Settings(tuning), "select_config": Settings(open=False)}
    with imported(root, "models.vision_transformer_IN21K") as code:
        model = code.VisionTransformer(**VIT_B, num_classes=setup.classes, **configs)
    with imported(root, "models.losses") as code:
        criterion = code.AdaLoss(
            F.cross_entropy, token_target_ratio=0.5, token_minimal=0.0, token_minimal_weight=0.0
        )
    training = ready(model, setup, ("adaptmlp", "token_select", "head."))
    batch = setup.data()

    def loss() -> Tensor:  # of engine_finetune.py: a second pass with all tokens teaches
        outputs, selected = model(batch["image"])
        teacher, _ = model(batch["image"], complete_model=True)
        target = teacher.detach().log_softmax(-1)
        kl = F.kl_div(outputs.log_softmax(-1), target, reduction="batchmean", log_target=True)
        own, _ = criterion({"prediction": outputs, **selected}, batch["label"])
        return own + criterion.base_criterion(teacher, batch["label"]) + kl

    training.loss = loss
    return training


def gps(root: Path, setup: Setup, ours: Training) -> Training:
    """All weights train under a mask that is 1 where a gradient is set to zero, as in theirs."""
    with imported(root, "models.vision_transformer") as code:
        model = code.VisionTransformer(**VIT_B, num_classes=setup.classes)
    with imported(root, "utils.cuda") as code:
        scaler = code.NativeScaler
    masks = {name: mask_of(name, p, ours.model).to(setup.device) for name, p in named(model)}
    hook = partial(scaler.maks_gradient, None, masks, model)
    return ready(model, setup, ("",), after_backward=hook)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def mask_of(name: str, parameter: Tensor, ours: nn.Module) -> Tensor:
    """1 where ``parameter`` stays as it is in our model, else 0."""
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    if name in trained:
        return torch.zeros_like(parameter)
    mask = torch.ones_like(parameter)
    path, _, tensor = name.rpartition(".")
    indices = ours.state_dict().get(f"{path}.parametrizations.{tensor}.0.indices")
    if indices is not None:
        mask.view(-1)[indices.cpu()] = 0
    return mask


def spt(module: str, root: Path, setup: Setup, ours: Training) -> Training:
    """The allocation that our row found, in the form of theirs."""
    roles = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    state = {name.replace(".qkv.", "."): t for name, t in ours.model.state_dict().items()}
    structured = [
        [f"blocks.{i}.{role}.branch.down.weight" in state for role in roles] for i in range(12)
    ]
    entries: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for name, indices in state.items():
        original, found, _ = name.partition(".0.indices")
        if found:
            name = original.replace("parametrizations.", "")
            shapes[name] = state[f"{original}.original"].shape
            entries[name] = torch.stack(torch.unravel_index(indices.cpu(), shapes[name]), dim=1)
    trained = [n.replace(".qkv.", ".") for n, p in named(ours.model) if p.requires_grad]
    vectors = [n for n in trained if ".branch." not in n and "parametrizations" not in n]
    with imported(root, "model.vision_transformer_timm") as code:
        model = code.VisionTransformerSPT(
            **VIT_B,
            num_classes=setup.classes,
            structured_list=structured,
            low_rank_dim=8,
            block="BlockSPTParallel" if module == "lora" else "BlockSPTSeq",
            structured_type=module,
            structured_bias=module == "adapter",
            unstructured_indexes=entries,
            unstructured_shapes=shapes,
            fully_fine_tuned_keys=vectors,
            no_structured_drop_out=False,
            no_structured_drop_path=False,
        )
    for layer in model.modules():
        for name in ("sparse_weight_indexes", "sparse_bias_indexes"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).to(setup.device))
    return ready(model, setup, ("structured_", ".sparse_", *vectors))


def snell(module: str, sparsity: float, root: Path, setup: Setup, ours: Training) -> Training:
    """Their modules recompute the kernel in the backward pass.

    Their class token trains, too: without it SNELL's checkpoints would pass no gradient on.
    """
    with imported(root, "model.vision_transformer_timm") as code:
        model = code.VisionTransformerSNELL(
            **VIT_B,
            num_classes=setup.classes,
            low_rank_dim=8,
            block="BlockSNELLParallel",
            tuning_model=module,
            init_thres=sparsity,
            no_drop_out=False,
            no_drop_path=False,
        )
    names = ("In_Qs", "Out_Qs", "learnable.alpha", "learnable.gamma", "learnable.beta")
    training = ready(model, setup, (*names, "cls_token", "head."))
    if module == "snella":
        with imported(root, "sparse_allocator") as code:
            allocator = code.Allocator(training.model, 0.7, 1, 1, 1, 0.85, 0.85, 100)
        training.after_step = lambda: allocator.update_ipt(training.model)
    return training


SNELL_NOTE = "theirs trains the class token (768), ours the coefficients of the kernel"
PUBLISHED: dict[str, Published] = {
    "klora-8": Published("klora-8", "SNELL", partial(snell, "klora", 0.0), note=SNELL_NOTE),
    "snell-8": Published("snell-8", "SNELL", partial(snell, "snell", 0.7), note=SNELL_NOTE),
    "snella-8": Published(
        "snella-8",
        "SNELL",
        partial(snell, "snella", 0.5),
        {"options": {"initial_sparsity": 0.5}},
        SNELL_NOTE,
    ),
    "ssf": Published("ssf", "SSF", ssf),
    "vpt-shallow": Published("vpt-shallow", "vpt", partial(vpt, False)),
    "vpt-deep": Published("vpt-deep", "vpt", partial(vpt, True)),
    "adapter-8": Published("adapter-8", "vpt", vpt_adapter, {"activation": "gelu"}),
    "adaptformer-8": Published("adaptformer-8", "AdaptFormer", partial(adaptformer, 8)),
    "adaptformer-64": Published("adaptformer-64", "AdaptFormer", partial(adaptformer, 64)),
    "adapter-plus-8": Published("adapter-plus-8", "adapter_plus", adapter_plus),
    "spt-lora": Published("spt-lora", "SPT", partial(spt, "lora"), {"variant": "released"}),
    "spt-adapter": Published(
        "spt-adapter", "SPT", partial(spt, "adapter"), {"variant": "released"}
    ),
    "gps": Published(
        "gps", "GPS", gps, note="theirs trains all weights and sets the other gradients to zero"
    ),
    "fact-tt": Published("fact-tt", "PETL-ViT", partial(fact, "tt", 16)),
    "fact-tk": Published("fact-tk", "PETL-ViT", partial(fact, "tk", 32)),
    "convpass": Published("convpass", "PETL-ViT", convpass),
    "sparse-tuning-0.7, public code": Published(
        "sparse-tuning-0.7", "Sparse-Tuning", sparse_tuning, {"variant": "public_code"}
    ),
    "sparse-tuning-0.7": Published(
        "sparse-tuning-0.7",
        "Sparse-Tuning",
        sparse_tuning,
        note="ours has the paper's Dense Adapters (bottleneck 8), theirs nested ones (64)",
    ),
    "dyt-0.5, released": Published("dyt-0.5", "Dynamic-Tuning", dyt, {"variant": "released"}),
    "dyt-0.5": Published(
        "dyt-0.5", "Dynamic-Tuning", dyt, note="ours makes one pass as in the paper, theirs two"
    ),
}

NOT_COMPARED = {
    "full, linear, partial-1, bias, mlp3": "train parts of the plain backbone; no code around it",
    "lora-16, lora-plus, rslora, pissa, corda": "the step of lora-8",
    "adapter-32, other ranks and keep rates": "the layers of the row that is compared, wider",
    "hydralora": "published for language models only",
    "adapter-8-noah": "the same layers as adapter-8, with dropout",
}
