"""What a layer's forward pass keeps for the backward one, and what is computed again there (activation checkpointing).

selective: what products, attention and exchanges have made is kept. Of what is `cheap` to make of that (norms,
activation functions, copies in other orders), a recipe is.
full: the layer's input is kept, and the whole layer computed again (Chen et al., 2016), but for what was chosen `once`:
an expert that a rounding error replaces would be another model's, and what was counted must not be counted twice.

Either computes what a pass that keeps all does; full to the last bit, while selective adds up the parts of some
gradients in another order.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]
T = TypeVar("T")


def recomputing(how: Recompute, layer: Callable[..., T], x: Tensor, *rest: Any) -> T:
    """`layer(x, *rest)`, whose backward pass is to find what `how` keeps."""
    if how == "none" or not torch.is_grad_enabled():
        return layer(x, *rest)
    if how == "selective":
        with _Kept().active():
            return layer(x, *rest)
    _note(x)
    contexts = partial(_choosing, [])
    # No layer draws from a generator: what is random here, a key decides.
    found: T = checkpoint(layer, x, *rest, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return found


def cheap(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`function(*inputs)`, a new tensor, which may be computed again: all that it depends on is among its inputs."""
    if torch.compiler.is_compiling():
        return function(*inputs)  # the compiler has its own mind of what to keep
    kept = _kept.get()
    return function(*inputs) if kept is None else kept.compute(function, inputs)


def once(choose: Callable[[], T]) -> T:
    """What `choose` returns, without a gradient: where a layer is computed again, what it returned the first time."""
    if torch.compiler.is_compiling():
        return choose()  # nothing that chooses is in a layer that is compiled and computed again
    choices = _choices.get()
    return choose() if choices is None else choices(choose)


@contextmanager
def noting() -> Iterator[list[Tensor]]:
    """All that forward passes keep within, weights too."""
    noted: list[Tensor] = []
    token = _noted.set(noted)
    try:
        with saved_tensors_hooks(_note, lambda x: x):
            yield noted
    finally:
        _noted.reset(token)


_kept: ContextVar["_Kept | None"] = ContextVar("kept", default=None)
_choices: ContextVar[Callable[[Callable[[], Any]], Any] | None] = ContextVar("choices", default=None)
_noted: ContextVar[list[Tensor] | None] = ContextVar("noted", default=None)


def _note(x: Tensor) -> Tensor:
    if (noted := _noted.get()) is not None:
        noted.append(x)
    return x


class _Recipe:
    """How a cheap tensor is made again: once, for all that are to read it, and for its own gradient."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any], needs: list[bool]) -> None:
        """inputs: as `_Kept.pack` left them. needs: which of them shall have a gradient."""
        self._function, self._inputs, self._needs = function, inputs, needs
        self._made: tuple[list[Any], Tensor] | None = None
        self.readers = 1

    def make(self) -> tuple[list[Any], Tensor]:
        """Inputs and result, in a graph of their own; nothing is held once the last reader has it."""
        if self._made is None:
            inputs = [None if x is None else _unpack(x).detach() for x in self._inputs]
            for x, needs in zip(inputs, self._needs, strict=True):
                if x is not None:
                    x.requires_grad_(needs)
            with torch.enable_grad():
                self._made = inputs, self._function(*inputs)
        made, self.readers = self._made, self.readers - 1
        if self.readers == 0:
            self._made, self._inputs = None, []
        return made


class _Kept:
    """What one layer keeps: tensors, and recipes for those that are cheap, and for views of these."""

    def __init__(self) -> None:
        # The tensors are held until the layer is through: no other one gets the address of their storage meanwhile.
        self._recipes: dict[int, tuple[Tensor, _Recipe]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _kept.set(self)
        try:
            with saved_tensors_hooks(self.pack, _unpack):
                yield
        finally:
            _kept.reset(token)
            self._recipes.clear()

    def compute(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> Tensor:
        needs = [x is not None and x.requires_grad for x in inputs]
        if not any(needs):
            return function(*inputs)
        recipe = _Recipe(function, [None if x is None else self.pack(x.detach()) for x in inputs], needs)
        made: Tensor = _Remade.apply(recipe, function, *inputs)
        self._recipes[_address(made)] = made, recipe
        return made

    def pack(self, x: Tensor) -> Any:
        if (found := self._recipes.get(_address(x))) is None:
            return _note(x)
        _, recipe = found
        recipe.readers += 1
        return recipe, x.shape, x.stride(), x.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, *view = packed
    _, made = recipe.make()
    return made.detach().as_strided(*view)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.recipe = recipe
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, made = ctx.recipe.make()
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(made, leaves, grad))
        return None, None, *(next(found) if x is not None and x.requires_grad else None for x in inputs)


def _choosing(made: list[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Within the first, `once` fills the list; within the second, it reads it."""

    def choose(make: Callable[[], Any]) -> Any:
        made.append(make())
        if isinstance(made[-1], Tensor):
            _note(made[-1])
        return made[-1]

    @contextmanager
    def replayed() -> Iterator[None]:
        again = iter(made)
        with _set_choices(lambda _: next(again)):
            yield

    return _set_choices(choose), replayed()


@contextmanager
def _set_choices(choose: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    token = _choices.set(choose)
    try:
        yield
    finally:
        _choices.reset(token)
