"""Deep features reused over steps (DeepCache, Ma et al. 2023, arXiv 2312.00858).

In a UNet of skips the last layer of the last up block reads two things: the features that come up
from below, which change slowly over the steps, and the skip of the first convolution, which holds
the noise. So at most steps only that layer runs, with the features of the last step at which all of
it ran.

The authors' package `DeepCache` is no dependency; this is written anew. One tensor is kept, the
batch may lose its unconditional rows in between, and the UNet is given back as it was.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_locks: MutableMapping[nn.Module, AbstractContextManager] = WeakKeyDictionary()  # of each UNet
_reuse: ContextVar["_Reuse | None"] = ContextVar("reuse", default=None)  # of this thread's call


@contextmanager
def deep_features_reused(
    unet: UNet2DConditionModel, runs_whole: Callable[[int], bool]
) -> Iterator[None]:
    """Within it, the inner modules of this UNet (and of no other) run only at some of its calls,
    its outermost layer at every one; a call is a step of one generation. Afterwards the UNet is
    as it was. Calls of other threads, and of an `Elite` that a callback calls, are left alone;
    those of a stock pipeline in a callback count as steps. Of two threads that ask for this with
    one UNet, one waits for the other's whole generation, so a callback must not wait for such a
    thread.

    A call may have fewer rows than the one before: they are taken to be its last ones.

    Args:
        runs_whole: whether all runs at a call, counted from 0; at the first it must.
    """
    reuse = _Reuse(runs_whole)
    inner = inner_modules(unet)
    with _locks.setdefault(unet, RLock()), reuses(reuse):
        before = {module: vars(module).get("forward") for module in inner}
        hook = unet.register_forward_pre_hook(reuse.call_begins)
        try:
            for module in inner:
                vars(module)["forward"] = reuse.forward_of(module, is_read=module is inner[-1])
            yield
        finally:
            hook.remove()
            for module, forward in before.items():
                if forward is None:
                    vars(module).pop("forward", None)
                else:  # of an offloading hook, or of a generation around this one
                    vars(module)["forward"] = forward


@contextmanager
def reuses(reuse: "_Reuse | None") -> Iterator[None]:
    """Within it, calls of this thread are of a generation that reuses features so; None: not."""
    token = _reuse.set(reuse)
    try:
        yield
    finally:
        _reuse.reset(token)


def inner_modules(unet: UNet2DConditionModel) -> list[nn.Module]:
    """What need not run at each step, in their order; of the last one the outermost layer reads."""
    last = unet.up_blocks[-1]
    layers = zip(last.resnets, getattr(last, "attentions", [None] * len(last.resnets)), strict=True)
    parts = [part for layer in list(layers)[:-1] for part in layer if part is not None]
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks, *middle, *unet.up_blocks[:-1], *parts]


class _Reuse:
    """At which calls everything runs, and what stands in for the inner modules at the others."""

    def __init__(self, runs_whole: Callable[[int], bool]) -> None:
        self.runs_whole, self.calls = runs_whole, 0
        self.outputs: dict[nn.Module, Any] = {}  # of the last call at which they ran

    def call_begins(self, unet: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook before each call of the UNet; args begin with the latents, (B, C, h, w)."""
        if _reuse.get() is not self:
            return
        self.runs_all = self.runs_whole(self.calls)
        self.calls += 1
        self.rows, self.device = len(args[0]), args[0].device

    def forward_of(self, module: nn.Module, is_read: bool) -> Callable[..., Any]:
        """The module's forward; at most calls it answers with what it gave before, or where nobody
        reads that, with zeros of the same shape."""
        forward = module.forward

        def run_or_reuse(*args: Any, **kwargs: Any) -> Any:
            if _reuse.get() is not self:
                return forward(*args, **kwargs)
            if not self.runs_all:
                return tree_map_only(Tensor, self._again, self.outputs[module])
            output = forward(*args, **kwargs)
            self.outputs[module] = tree_map_only(Tensor, _kept if is_read else _shape, output)
            return output

        return run_or_reuse

    def _again(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.zeros(self.rows, *x.shape[1:], dtype=x.dtype, device=self.device)
        return _kept(x[-self.rows :])


def _kept(x: Tensor) -> Tensor:
    return x.clone()  # FreeU writes into what it reads


def _shape(x: Tensor) -> Tensor:
    """Shape and number type without memory."""
    return x.to("meta")
