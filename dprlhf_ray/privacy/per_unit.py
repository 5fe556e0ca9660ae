"""Per-unit gradients in one backward pass, with no raw gradient left behind.

Every module that owns a trainable parameter gets a forward that runs through `_Recorded`. Its weights enter the graph
detached, so autograd can never write a `.grad` for them: the only thing that a backward pass yields is one gradient per
unit, handed to the `Recorder`. What the optimizer sees is written later, clipped and noised (fail closed, by
construction; a weight that is used outside its module's forward is refused when its gradient comes).

Formal guarantee: row block u of a recorded gradient is a function of unit u's own rows of the batch, because no
supported module mixes rows and each is called with exactly the rows of the batch. Layers that mix them (BatchNorm), or
whose rows are others (tokens routed to an expert, positions shared by all rows), are refused by name.

Linear layers use the outer-product rule (Goodfellow 2015, arXiv 1510.01799), summed over a unit's rows and tokens;
embeddings a scatter; any other module with one tensor input goes through `torch.func` (vmap of its vector-Jacobian
product). Not Opacus's samplers: they sum in the layer's dtype (here in float32), give the padding row of an embedding a
gradient, and know neither Hugging Face's norms nor its Conv1D, so that a second way would be needed anyhow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dprlhf_ray.errors import ConfigError

_COUPLING = (nn.modules.batchnorm._NormBase,)  # batch and instance norm: both may keep running statistics


class Recorder:
    """Collects per-unit gradients of `parameters` during backward passes inside `record`.

    Args:
        model: its modules that own trainable parameters are instrumented in place.

    Raises:
        ConfigError: a trainable layer couples records of a batch, or has no rule here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.names: list[str] = [n for n, p in model.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("model.adapter: nothing is trainable")
        # .ds_numel: under ZeRO-3 a parameter is partitioned and numel() is that of its shard
        self.sizes: list[int] = [int(getattr(p, "ds_numel", p.numel())) for p in self.parameters]
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        self._anchor = torch.zeros((), requires_grad=True)
        self._units = self._rows = 0
        self._grads: list[Tensor | None] = []
        self._shadows: dict[int, nn.Module] = {}  # for layers without a rule of their own
        covered: set[int] = set()
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                if isinstance(module, _COUPLING):
                    raise ConfigError(f"model.adapter: layer {name} ({type(module).__name__}) mixes records of a batch")
                if any(p.requires_grad for child in module.children() for p in child.parameters()):
                    raise ConfigError(
                        f"model.adapter: layer {name} ({type(module).__name__}) and a part of it both train"
                    )
                covered.update(id(p) for p in own)
                self._instrument(name, module)
        missing = [n for n, p in zip(self.names, self.parameters, strict=True) if id(p) not in covered]
        if missing:
            raise ConfigError(f"model.adapter: no per-record gradient for {missing[0]}")
        for name, p in zip(self.names, self.parameters, strict=True):
            p.register_hook(partial(self._refuse_raw, name))

    @property
    def dimension(self) -> int:
        """d: number of trainable coordinates."""
        return sum(self.sizes)

    @contextmanager
    def record(self, units: int, rows_per_unit: int = 1) -> Iterator[None]:
        """Inside, backward passes collect gradients of `units` units; the batch has units * rows_per_unit rows,
        unit-major.

        Raises (in forward or backward):
            ConfigError: a trainable layer gets other rows or several tensors, or its weight is used elsewhere.
        """
        self._units, self._rows, self._grads = units, units * rows_per_unit, [None] * len(self.parameters)
        try:
            yield
        finally:
            self._units = 0

    def take(self) -> list[Tensor]:
        """The recorded gradients, one (units, *shape) float32 tensor per parameter that took part; then forget them.

        Parameters that took no part are left out of the list of the same length as an empty tensor (units, 0).
        """
        grads, self._grads = self._grads, []
        device = self._anchor.device
        return [g if g is not None else torch.zeros(0, 0, device=device) for g in grads]

    # ------------------------------------------------------------------------------------------------ internals

    def _refuse_raw(self, name: str, grad: Tensor) -> None:
        """Runs before autograd would write a raw gradient; outside `record` it is the noised one that comes."""
        if self._units:
            raise ConfigError(f"model.adapter: {name} is used outside its layer's forward: no per-record gradient")

    def _instrument(self, name: str, module: nn.Module) -> None:
        layer = f"model.adapter: layer {name} ({type(module).__name__})"
        if isinstance(module, nn.RNNBase):
            raise ConfigError(f"{layer} is not supported: recurrent layers return more than one tensor")
        plain = module.forward
        self._shadows[id(module)] = _without_hooks(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._units or not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise ConfigError(f"{layer} takes more than one tensor; not supported")
            if args[0].shape[:1] != (self._rows,):
                raise ConfigError(f"{layer} is called with other rows than the batch's: whose they are cannot be told")
            anchor = self._anchor = self._anchor.to(args[0].device).detach().requires_grad_()
            return _Recorded.apply(anchor, args[0], module, plain, self)

        module.forward = forward

    def _add(self, parameter: Tensor, grad: Tensor) -> None:
        i = self._index[id(parameter)]
        grad = grad.float()
        held = self._grads[i]
        self._grads[i] = grad if held is None else held + grad


class _Recorded(torch.autograd.Function):
    """y = module(x); backward records the weight gradients per unit and returns the input gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, module: nn.Module, plain: Any, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.recorder = module, recorder
        with torch.no_grad():
            return plain(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        g, module, recorder = grad_outputs[0], ctx.module, ctx.recorder
        grad_x: Tensor | None = None
        if type(module) is nn.Linear:
            grad_x = _linear(module, x, g, recorder, ctx.needs_input_grad[1])
        elif type(module) is nn.Embedding:
            _embedding(module, x, g, recorder)
        else:
            grad_x = _generic(module, x, g, recorder, ctx.needs_input_grad[1])
        return None, grad_x, None, None, None


def _linear(module: nn.Linear, x: Tensor, g: Tensor, recorder: Recorder, needs_x: bool) -> Tensor | None:
    units = recorder._units
    gu, xu = g.reshape(units, -1, g.shape[-1]), x.reshape(units, -1, x.shape[-1])
    if module.weight.requires_grad:
        recorder._add(module.weight, torch.bmm(gu.transpose(1, 2).float(), xu.float()))
    if module.bias is not None and module.bias.requires_grad:
        recorder._add(module.bias, gu.float().sum(1))
    return (g @ module.weight.detach().to(g.dtype)) if needs_x else None


def _embedding(module: nn.Embedding, ids: Tensor, g: Tensor, recorder: Recorder) -> None:
    units = recorder._units
    flat = ids.reshape(units, -1)
    grad = torch.zeros(units, module.num_embeddings, module.embedding_dim, device=g.device)
    source = g.reshape(units, flat.shape[1], -1).float()
    if module.padding_idx is not None:
        source = source.masked_fill((flat == module.padding_idx).unsqueeze(-1), 0.0)
    grad.scatter_add_(1, flat.unsqueeze(-1).expand_as(source), source)
    recorder._add(module.weight, grad)


def _generic(module: nn.Module, x: Tensor, g: Tensor, recorder: Recorder, needs_x: bool) -> Tensor | None:
    """Any module with one tensor input that treats rows alike (RMSNorm, LayerNorm, Conv1D, ...)."""
    units = recorder._units
    named = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    xu, gu = x.reshape(units, -1, *x.shape[1:]), g.reshape(units, -1, *g.shape[1:])
    shadow = recorder._shadows[id(module)]
    weights = {n: p.detach() for n, p in named.items()}

    def of_unit(xi: Tensor, gi: Tensor) -> dict[str, Tensor]:
        return torch.func.vjp(lambda w: torch.func.functional_call(shadow, w, (xi,)), weights)[1](gi)[0]

    for name, grad in torch.func.vmap(of_unit)(xu, gu).items():
        recorder._add(named[name], grad)
    if not needs_x:
        return None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(torch.func.functional_call(shadow, weights, (leaf,)), leaf, g)[0]


def _without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy that shares the parameters but runs the class's own forward and no hook (ZeRO-3 installs some)."""
    shadow = copy.copy(module)
    shadow.__dict__ = {
        k: (type(v)() if k.endswith("_hooks") else v) for k, v in module.__dict__.items() if k != "forward"
    }
    shadow.__dict__["_parameters"] = dict(module._parameters)
    return shadow
