"""What is done with the noised gradient. All of it is post-processing: public constants and released values only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dprlhf_ray.config import OptimizerConfig


class NoiseCorrectedAdamW(torch.optim.Optimizer):
    """AdamW whose second moment is that of the gradient without the noise (DP-AdamBC: Tang, Shpilevskiy and Lecuyer
    2024, arXiv 2312.14334, algorithm 1).

    The noised gradient's second moment is larger than the gradient's by the noise's known variance s^2; under usual
    settings s^2 is nearly all of it, and Adam is SGD with momentum. So divide by sqrt(max(v_hat - s^2, floor)). The
    paper tunes the floor; here it is v_hat's own standard error if all were noise, s^2 sqrt(2 sum_i w_i^2) over
    v_hat's weights w_i: a smaller estimate cannot be told from zero. With s = 0 this is AdamW.

    Elementwise, with torch's names for its state, so that it may be sharded and checkpointed like AdamW.

    Args:
        noise_std: s, standard deviation of the noise in each coordinate of the gradient (sigma C / L).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        noise_std: float,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, noise_std=noise_std))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), variance = self.state[p], group["betas"], group["noise_std"] ** 2
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        t = float(state["step"])
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        floor = variance * _standard_error(beta2, t)
        root = (second / (1 - beta2**t) - variance).clamp_min_(floor).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**t))


def _standard_error(beta: float, t: float) -> float:
    """Of the bias-corrected running mean of t squared N(0, 1): sqrt(2 sum_i w_i^2), w_i its weights."""
    return math.sqrt(2 * (1 - beta) * (1 + beta**t) / ((1 + beta) * (1 - beta**t)))


def build_optimizer(parameters: list[nn.Parameter], o: OptimizerConfig, noise_std: float) -> torch.optim.Optimizer:
    """The configured optimizer; `noise_std` is that of each coordinate of the gradient it will be given."""
    if o.kind == "sgd":
        return torch.optim.SGD(parameters, lr=o.lr, weight_decay=o.weight_decay)
    if o.noise_corrected:
        return NoiseCorrectedAdamW(parameters, o.lr, o.betas, o.eps, o.weight_decay, noise_std)
    return torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)


def set_lr(optimizer: Any, o: OptimizerConfig, version: int, steps: int) -> None:
    """Learning rate as a function of the step number only."""
    scale = min(1.0, (version + 1) / o.warmup_steps) if o.warmup_steps else 1.0
    done = min(1.0, version / max(1, steps))
    if o.schedule == "linear":
        scale *= 1.0 - done
    elif o.schedule == "cosine":
        scale *= 0.5 * (1.0 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = o.lr * scale
