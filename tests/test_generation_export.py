"""Adapters and folded transformers load back into diffusers' pipeline and give the same image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_support import official_pipeline

from snella.errors import UserError
from snella.methods.base import build_method, prepare_model, trainable
from snella.tasks.generation.export import save_adapter, save_lora, save_transformer

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[1]
BASELINES = ROOT / "baselines"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("peft", {"method": "lora", "rank": 4}),
    "fourierft": ("peft", {"method": "fourierft", "alpha": 50, "options": {"n_frequency": 40}}),
    "snella": ("snella", {"rank": 4}),
    "ssf": ("ssf", {}),
    "s2ft": ("s2ft", {"points": 20, "reference_width": 32}),
    "full": ("full", {}),
}
DRAW = """
pipe.set_progress_bar_config(disable=True)
made = pipe("a sks circle", height=64, width=64, num_inference_steps=2, max_sequence_length=8,
            generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save(saved + ".npy", made)
"""


def documented(how: str, folder: Path, saved: str) -> str:
    """The lines of docs/generation.md that load what was saved, with the paths of a test."""
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    name, sign = {
        "peft": ("dog-snella", "PeftModel.from_pretrained"),
        "lora": ("dog-lora", "load_lora_weights"),
        "plain": ("dog", "SD3Transformer2DModel.from_pretrained"),
    }[how]
    (code,) = [block for block in blocks if sign in block]
    assert len(code.strip().splitlines()) <= 5
    code = code.replace("stable-diffusion-3-medium-diffusers", folder.as_posix())
    return code.replace(f'"{name}"', repr(saved))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_pipeline(tmp_path_factory.mktemp("sd3"))


def trained(folder: Path, row: str) -> tuple[Any, Any, np.ndarray]:
    """An adapted model whose parameters have moved, its method, and the image that it makes."""
    file, hyperparameters = ROWS[row]
    method = build_method(BASELINES / f"{file}.py", hyperparameters)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    plain = image(pipe)
    torch.manual_seed(0)
    prepare_model(method, pipe.transformer)
    with torch.no_grad():
        for parameter in trainable(pipe.transformer).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    method.on_epoch_start(pipe.transformer, 0, 1)
    pipe.transformer.eval()
    moved = image(pipe)
    assert np.abs(moved - plain).max() > 0.01
    return pipe.transformer, method, moved


def image(pipe: Any) -> np.ndarray:
    made = pipe(
        "a sks circle", height=64, width=64, num_inference_steps=2, max_sequence_length=8,
        generator=torch.Generator().manual_seed(0), output_type="np",
    )  # fmt: skip
    return made.images


def test_another_process_makes_the_same_image(folder: Path, tmp_path: Path) -> None:
    """Adapters in both layouts and folded transformers, loaded by the documented lines."""
    cases: dict[str, np.ndarray] = {}
    for row in ("lora", "fourierft", "snella"):
        model, _, cases[f"peft={tmp_path / row}"] = trained(folder, row)
        save_adapter(model, tmp_path / row)
        if row == "lora":
            save_lora(model, tmp_path / "diffusers")
            cases[f"lora={tmp_path / 'diffusers'}"] = cases[f"peft={tmp_path / row}"]
    for row in ("snella", "s2ft"):
        model, method, expected = trained(folder, row)
        with pytest.raises(UserError, match="The update is not folded in"):
            save_transformer(model, tmp_path / "no")
        method.merge(model)
        save_transformer(model, tmp_path / f"{row}-merged")
        cases[f"plain={tmp_path / row}-merged"] = expected
    code = "import numpy, torch\n"
    for how, _, saved in (case.partition("=") for case in cases):
        code += f"saved = {saved!r}\n" + documented(how, folder, saved) + DRAW
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, expected in cases.items():
        found = np.load(case.partition("=")[2] + ".npy")
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=case)


def test_what_cannot_be_exported_says_why(folder: Path, tmp_path: Path) -> None:
    ssf, _, _ = trained(folder, "ssf")
    with pytest.raises(UserError, match="keeps no adapter that PEFT can read"):
        save_adapter(ssf, tmp_path)
    snella, _, _ = trained(folder, "snella")
    with pytest.raises(UserError, match="diffusers' loader reads LoRA only, not"):
        save_lora(snella, tmp_path)
