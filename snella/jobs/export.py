"""Opening a finished run again, with the model as it was trained."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from snella.errors import UserError
from snella.methods.base import Method
from snella.runs.run import Run
from snella.runs.train import ADAPTER, load_run


def open_run(folder: Path) -> tuple[Method, nn.Module]:
    """The method and the adapted model of the run in ``folder``, in evaluation mode.

    Raises :class:`~snella.errors.UserError` if the run has not been trained.
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file() or not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no trained run ({ADAPTER}, config.json).")
    loaded = load_run(Run.from_json((folder / "config.json").read_text()))
    loaded.method.load_state(loaded.model, load_file(folder / ADAPTER))
    return loaded.method, loaded.model.eval()
