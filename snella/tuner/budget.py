"""Budgets that averaging does not mix: an averaged model keeps the integers of the live one.

Wrappers that average a model (``torch.optim.swa_utils.AveragedModel`` with buffers, timm's
``ModelEmaV2``) average whatever is in its state. A mean of the numbers of entries to keep, at
different times, is no number of entries to keep: the average would be denser than either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

# Without underscores, as functions, methods and operators are called.
_ARITHMETIC = {
    *("mul", "rmul", "add", "radd", "sub", "rsub", "div", "truediv", "lerp", "addcdiv"),
    *("multiply", "subtract", "divide", "true_divide"),
}

# Functions whose result is a budget again.
_COPIES = {
    *("detach", "clone", "to", "cpu", "cuda", "contiguous"),
    *("float", "double", "half", "bfloat16", "type", "type_as"),
}

# Functions that make one tensor of several, and the means of that.
_MEANS = {"mean", "sum"}


_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class Budget(Tensor):
    """Integers; arithmetic yields the operand that it is not written to."""

    _sources: list[Tensor]
    _plain: Tensor | None = None  # the tensor of the layer that this is a view of

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func == _SET_DATA and args[0]._plain is not None:  # FSDP moves buffers so
            args[0]._plain.data = args[1].as_subclass(Tensor)
        if name == "copy_" and hasattr(args[1], "_sources"):
            return _take(args[0], args[1]._sources)
        kwargs = kwargs or {}
        if name in _MEANS and len(getattr(args[0], "_sources", ())) > 1:
            return _combine(args[:1], in_place=False)
        if name.removeprefix("_foreach_").strip("_") not in _ARITHMETIC:
            return _apply(name, func, args, kwargs)
        if isinstance(out := kwargs.get("out"), Budget):
            return _take(out, list(_sources(args)))
        in_place = name.endswith("_") and not name.endswith("__")
        if name.startswith("_foreach_"):
            columns = [a if isinstance(a, list | tuple) else [a] * len(args[0]) for a in args]
            results = [_combine(row, in_place) for row in zip(*columns, strict=True)]
            return None if in_place else results
        return _combine(args, in_place)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self.detach().as_subclass(Tensor).clone().as_subclass(Budget)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold plain tensors."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _apply(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies of a budget are budgets; what is computed from it, as by an exported layer, not."""
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    copied = name in _COPIES or func == Tensor.data.__get__  # type: ignore[attr-defined]
    if copied and type(result) is Tensor:
        return result.as_subclass(Budget)
    if name == "stack":
        result = result.as_subclass(Budget)
        result._sources = list(_sources(args[0]))
    return result


def _combine(operands: tuple[Any, ...], in_place: bool) -> Tensor:
    sources = list(_sources(operands))
    if in_place:
        return _take(operands[0], sources)
    result: Budget = sources[-1].as_subclass(Tensor).clone().as_subclass(Budget)
    result._sources = sources
    return result


def _sources(operands: tuple[Any, ...]) -> Iterator[Tensor]:
    for operand in operands:
        if isinstance(operand, Budget):
            yield from getattr(operand, "_sources", [operand])


def _take(target: Tensor, sources: list[Tensor]) -> Tensor:
    """Write the source that is not the target itself."""
    plain = target.as_subclass(Tensor)
    others = [s for s in sources if s.data_ptr() != target.data_ptr()]
    if others:
        plain.copy_(others[-1].as_subclass(Tensor))
    return target


class _Entries(dict[str, Tensor]):
    """Plain tensors; those who iterate (averaging wrappers, ``state_dict``) see budgets.

    They see the same ones every time, as they would see plain tensors (``DataParallel`` looks
    buffers up by identity).
    """

    def items(self) -> Any:
        return [(name, self._view(name, value)) for name, value in super().items()]

    def values(self) -> Any:
        return [value for _, value in self.items()]

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value.as_subclass(Tensor) if type(value) is Budget else value)

    def __getstate__(self) -> None:
        """Views are made anew in a copy."""

    def _view(self, name: str, value: Tensor) -> Tensor:
        """A budget that shares its memory; not of tensors that stand in for it in an export."""
        if type(value) is not Tensor:
            return value
        views: dict[str, Budget] = self.__dict__.setdefault("views", {})  # copies begin without
        view = views.get(name)
        if view is None or view._plain is not value:
            view = views[name] = value.as_subclass(Budget)
            view._plain = value
        return view


class Budgets(BufferDict):
    """The numbers of entries to keep, (slices,), by adapter; saved with it."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
        object.__setattr__(self, "_buffers", _Entries())
