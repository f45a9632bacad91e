"""Adapters to and from the Hugging Face hub: the library's own code, with a folder for the hub."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import peft.config
import peft.peft_model
import peft.utils.save_and_load
import pytest
import transformers.utils.hub
from huggingface_hub import repocard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from test_tuner import adapted, backbone, budgets, logits, train

REPO = "someone/snella-adapter"


class Hub:
    """The few calls of the hub that PEFT and transformers make, on files under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            file = self.root / repo_id / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, file)

    def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
        return (self.root / repo_id / filename).is_file()

    def download(self, repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = self.root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {repo_id} has no {filename}")
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "hub")

    @functools.wraps(huggingface_hub.hf_hub_download)  # PEFT reads its signature
    def download(*args: Any, **kwargs: Any) -> str:
        return hub.download(*args, **kwargs)

    for module in (peft.config, peft.peft_model, peft.utils.save_and_load, repocard):
        monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", hub.file_exists)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    return hub


def test_pushed_and_loaded_by_its_hub_id(hub: Hub) -> None:
    model = adapted()
    train(model)
    expected = logits(model)
    model.push_to_hub(REPO)
    files = {path.name for path in (hub.root / REPO).iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert type(PeftConfig.from_pretrained(REPO)).__name__ == "SnellaConfig"
    for settings in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(backbone(), REPO, **settings)
        assert logits(loaded).equal(expected) and budgets(loaded) == budgets(model)
    loaded.load_adapter(REPO, "again", is_trainable=True)
    loaded.set_adapter("again")
    assert logits(loaded).equal(expected)
    assert any(p.requires_grad for n, p in loaded.named_parameters() if "snella_A.again" in n)


def test_in_a_subfolder_of_a_repository(hub: Hub) -> None:
    model = adapted()
    model.save_pretrained(str(hub.root / REPO / "adapters" / "first"))
    loaded = PeftModel.from_pretrained(backbone(), REPO, subfolder="adapters/first")
    assert logits(loaded).equal(logits(model))
