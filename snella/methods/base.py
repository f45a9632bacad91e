"""The one interface that SNELLA and every baseline implement, and the discovery of method files.

A method file holds one subclass of :class:`Method`. Its typed fields are its hyper-parameters;
its class attributes say where it comes from and what it supports. The trainer knows only the
hooks below and names no method. Hooks get the model and keep no reference to it, so that a
method object can be copied, printed and compared like the plain settings it is.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from torch import Tensor, nn

from snella.errors import CannotMerge, Unsupported, UserError, one_line, unknown
from snella.models.entries import restore_entries
from snella.models.families import family, head, unused_parameters
from snella.models.parameters import count_parameters, freeze, no_decay, trainable
from snella.validation import hyperparameter_error, not_one_class

Batch = dict[str, Tensor]
"""What a task's loader yields, e.g. image (B, 3, H, W) float and label (B,) int64."""
LossFn = Callable[[nn.Module, Batch], Tensor]
"""The task's loss: a scalar, the mean over the batch."""


class Method(BaseModel):
    """A parameter-efficient fine-tuning method: settings plus hooks.

    Every hook but :meth:`adapt` is optional. When :meth:`adapt` is called all parameters are
    frozen; afterwards the trainer unfreezes the task head (``model.get_classifier()`` in timm),
    which every method trains.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)

    paper: ClassVar[str] = ""
    bibkey: ClassVar[str] = ""
    licence: ClassVar[str] = "MIT"
    supports: ClassVar[frozenset[str]] = frozenset({"vit", "swin", "convnext"})
    head_only: ClassVar[bool] = False
    """Whether nothing but the task head trains, by intention."""
    replaces_head: ClassVar[bool] = False
    """Whether :meth:`adapt` puts another head in the place of the task's, by intention."""
    calibration_order: ClassVar[Literal["file", "shuffled"]] = "file"
    """Order of the training images that :meth:`calibrate` sees."""
    calibration_views: ClassVar[int] = 0
    """Augmented views per image in the key ``views`` (B, n, 3, H, W) of calibration batches."""

    _steps_per_epoch: int | None = PrivateAttr(None)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; who trains sets it before the first one."""
        return self._steps_per_epoch

    @steps_per_epoch.setter
    def steps_per_epoch(self, steps: int) -> None:
        self._steps_per_epoch = steps

    def adapt(self, model: nn.Module) -> None:
        """Change the frozen ``model`` in place and set ``requires_grad`` on what trains."""
        raise NotImplementedError

    def calibrate(self, model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> None:
        """Look at gradients on training batches before training; runs after :meth:`adapt`."""

    def parameter_groups(
        self, model: nn.Module, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters.

        By default vectors, biases and class tokens are not decayed, as in all released codes.
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (plain if no_decay(name, parameter) else decayed).append(parameter)
        groups = [
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"params": plain, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def auxiliary_loss(self, model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor | None:
        """A scalar added to the task's loss after its forward pass on ``batch``, or None."""
        return None

    def on_epoch_start(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Called before epoch ``epoch`` of 0 .. ``epochs`` - 1.

        Called again, after the states are loaded, where a training was stopped inside the epoch.
        """

    def on_step_end(self, model: nn.Module) -> None:
        """Called after each optimizer step while the step's gradients are still alive."""

    def merge(self, model: nn.Module) -> None:
        """Fold the update into plain weights, so that inference costs what the backbone costs.

        Raises :class:`~snella.errors.CannotMerge` with the reason where the method cannot.
        """
        raise CannotMerge(f"{type(self).__name__} does not fold into the backbone's weights")

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All tensors that change the output: by default what trains, and persistent buffers.

        Must be symmetric with :meth:`load_state`. A method that changes frozen weights or
        chooses modules from data overrides both.
        """
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        return {name: t.detach() for name, t in model.state_dict().items() if name not in frozen}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Load what :meth:`state` returned into a freshly adapted ``model``, not calibrated again.

        Entries chosen by :func:`~snella.method.train_entries` are chosen as they were. Raises
        ``ValueError`` if a tensor has no place in the model.
        """
        restore_entries(model, state)
        result = model.load_state_dict(state, strict=False)
        if result.unexpected_keys:
            raise ValueError(
                f"the adapter has tensors unknown here: {result.unexpected_keys[:3]}; "
                "what calibrate builds, load_state must build as well"
            )

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Further tensors that an interrupted training needs to go on, e.g. moving averages.

        They are checkpointed but are no part of the adapter.
        """
        return {}

    def load_training_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Load what :meth:`training_state` returned; runs after :meth:`load_state`."""

    def count(self, model: nn.Module) -> dict[str, int]:
        """Numbers of parameters, as :func:`count_parameters` counts them.

        To be overridden where tensors hold entries that the paper does not count as trained.
        """
        return count_parameters(model)

    def check_supported(self, model: nn.Module) -> None:
        """Raise :class:`~snella.errors.Unsupported` for a family the method does not claim."""
        kind = family(model)
        if kind not in self.supports:
            raise Unsupported(
                f"{type(self).__name__} does not support {kind} backbones "
                f"(it claims {', '.join(sorted(self.supports))})."
            )


def load_method(path: Path) -> type[Method]:
    """Import a method file and return its one :class:`Method` subclass.

    Raises :class:`~snella.errors.UserError` if it does not import or holds no or two methods.
    """
    module = _import(path)
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise not_one_class(path, [cls.__name__ for cls in own])
    if own[0].adapt is Method.adapt:
        raise UserError(f"{path}: {own[0].__name__} has no adapt(self, model); write one.")
    _check_hooks(path, own[0])
    return own[0]


def _check_hooks(path: Path, cls: type[Method]) -> None:
    """Refuse a method whose name is almost a hook's, and a hook with other arguments.

    The trainer would never call the one, and fail in the middle of a run with the other.
    """
    hooks = {name: f for name, f in vars(Method).items() if name[0] != "_" and callable(f)}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("_") or hasattr(BaseModel, name):
            continue
        line = f"{path}, line {function.__code__.co_firstlineno}: {cls.__name__}.{name}"
        if name not in hooks:
            likeness = 0.5 if name.startswith("on_") else 0.8
            close = difflib.get_close_matches(name, hooks, n=1, cutoff=likeness)
            if close or name.startswith("on_"):
                raise UserError(
                    f"{line} is no hook and would never be called. "
                    f"Did you mean {close[0] if close else 'on_step_end'!r}? "
                    "(The name of a helper starts with an underscore.)"
                )
            continue
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise UserError(f"{line} yields or is async, so it would never run; write a plain one.")
        wanted = list(inspect.signature(hooks[name]).parameters)
        try:
            inspect.signature(function).bind(*wanted)
        except TypeError as error:
            raise UserError(
                f"{line} is called as {name}({', '.join(wanted[1:])}); correct its arguments."
            ) from error


def _import(path: Path) -> ModuleType:
    """Run a method file; it is registered, so that its annotations and its source are found."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"snella_method_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"Method file {path} does not import: {one_line(error, path)}; correct the file."
        ) from error
    return module


def method_file(method: Method) -> Path:
    """The file that the class of ``method`` was loaded from."""
    return Path(inspect.getfile(type(method)))


def build_method(path: Path, hyperparameters: dict[str, Any]) -> Method:
    """Load the method of ``path`` with ``hyperparameters``; name file and field if one is wrong."""
    cls = load_method(path)
    for name in hyperparameters:
        if name not in cls.model_fields:
            raise unknown(f"hyper-parameter of {path}", name, cls.model_fields)
    try:
        return cls(**hyperparameters)
    except ValidationError as error:
        raise hyperparameter_error(path, error) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def prepare_model(method: Method, model: nn.Module) -> None:
    """Freeze ``model``, let ``method`` adapt it, and unfreeze the task head.

    Raises :class:`~snella.errors.UserError`, naming the method's file, if ``adapt`` fails or
    marks nothing; a method that calibrates may still mark something then.
    """
    method.check_supported(model)
    freeze(model)
    heads, kinds = _heads(model), {p.dtype for p in model.parameters()}
    gradients = torch.is_grad_enabled()
    try:
        method.adapt(model)
    except Unsupported:
        raise
    except UserError as error:
        raise UserError(f"{method_file(method)}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError, NameError, SystemExit) as error:
        file = method_file(method)
        raise UserError(
            f"{file}: {type(method).__name__}.adapt does not fit {type(model).__name__}: "
            f"{one_line(error, file)}{_closest_module(model, error)}"
        ) from error
    _check_left(method, model, kinds, gradients)
    marked = bool(trainable(model)) or method.head_only
    for parameter in unused_parameters(model):
        parameter.requires_grad_(False)
    found = _heads(model)
    if found != heads and not (method.replaces_head and found):
        raise UserError(
            f"{method_file(method)}: {type(method).__name__}.adapt replaces or removes the head, "
            "which belongs to the task and trains without being marked; leave it as it is, or "
            "say replaces_head = True."
        )
    for part in found:
        part.requires_grad_(True)
    if not _calibrates(method) and not (marked and trainable(model)):
        raise _nothing_marked(method, "adapt")
    _in_single_precision(model)


def _check_left(method: Method, model: nn.Module, kinds: set[torch.dtype], gradients: bool) -> None:
    """Refuse what would make code elsewhere stumble, where the method's file is not named."""
    problem = ""
    if gradients and not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        problem = "leaves gradients switched off; write `with torch.no_grad():`"
    elif torch.float64 in {p.dtype for p in model.parameters()} - kinds:
        problem = "makes parameters float64, which the images are not; keep float32"
    if problem:
        raise wrong_result(method, "adapt", problem)


def _heads(model: nn.Module) -> list[nn.Module]:
    """The task head, in the parts that it is made of; modules are equal if they are the same."""
    found = head(model)
    if found is None:
        return []
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def check_marked(method: Method, model: nn.Module) -> None:
    """Raise :class:`~snella.errors.UserError` if a method that calibrates marked nothing."""
    if _calibrates(method) and not method.head_only and not count_parameters(model)["trainable"]:
        raise _nothing_marked(method, "calibrate")
    _in_single_precision(model)


def counted(method: Method, model: nn.Module) -> dict[str, int]:
    """What ``count`` says; raises :class:`~snella.errors.UserError` if these are no numbers."""
    counts = method.count(model)
    known = count_parameters(model)
    if not isinstance(counts, dict) or not all(type(counts.get(name)) is int for name in known):
        raise wrong_result(method, "count", f"must return whole numbers named {', '.join(known)}")
    return counts


def kept_tensors(method: Method, model: nn.Module, hook: str) -> dict[str, Tensor]:
    """What ``state`` or ``training_state`` returns; raises ``UserError`` if no file can hold it."""
    found = getattr(method, hook)(model)
    if not isinstance(found, dict) or not all(map(_can_be_kept, found, found.values())):
        raise wrong_result(method, hook, "it must return tensors by name, dense ones with values")
    return found


def _can_be_kept(name: object, value: object) -> bool:
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        return False
    return value.layout is torch.strided and not value.is_meta


def _calibrates(method: Method) -> bool:
    return type(method).calibrate is not Method.calibrate


def _in_single_precision(model: nn.Module) -> None:
    """What trains is float32 even where the frozen weights are half: steps would be rounded off."""
    for parameter in trainable(model).values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def wrong_result(method: Method, hook: str, problem: str) -> UserError:
    """The error for what a hook returned, which fails in code that is not the method's own."""
    function = getattr(type(method), hook)
    line = function.__code__.co_firstlineno
    return UserError(f"{inspect.getfile(function)}, line {line}: {hook}: {problem}; correct it.")


def _nothing_marked(method: Method, hook: str) -> UserError:
    return UserError(
        f"{method_file(method)}: {type(method).__name__}.{hook} marks nothing trainable; set "
        "requires_grad on what trains (a method of the head alone says head_only = True)."
    )


def _closest_module(model: nn.Module, error: BaseException) -> str:
    """A hint where ``error`` is about a module that lies elsewhere, or has a similar name."""
    missing = re.search(r"has no attribute [`'\"](\w+)", str(error))
    if not missing:
        return "."
    paths = {path.rpartition(".")[2]: path for path, _ in reversed(list(model.named_modules()))}
    close = difflib.get_close_matches(missing[1], paths, n=1)
    return f". Did you mean {paths[close[0]]!r}?" if close else "."
