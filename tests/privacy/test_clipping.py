"""Clipped sums equal a loop of one-record autograd, for every kind of layer, dtype, model and way to cut a draw; layers
that cannot be clipped are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from dprlhf_ray.config import AdapterConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import adapters
from dprlhf_ray.models.policy import Policy, without_dropout
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.per_unit import Recorder

UNITS, G, T = 5, 2, 6  # units, rows per unit, tokens per row
Loss = Callable[[nn.Module, slice], Tensor]  # (model, rows) -> (rows,) losses
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative error of the clipped sum


def one_at_a_time(model: nn.Module, loss: Loss) -> list[Tensor]:
    """Gradient of each unit by ordinary autograd on its own rows: (d,) in the model's dtype, as float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for u in range(UNITS):
        grads = torch.autograd.grad(loss(model, slice(u * G, (u + 1) * G)).sum(), parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs]))
    return found


def clipped(gradients: Sequence[Tensor], bound: float) -> Tensor:
    return torch.stack([g * min(1.0, bound / float(g.norm())) for g in gradients]).sum(0)


def recorded(model: nn.Module, loss: Loss, bound: float, units_at_once: int = UNITS) -> Tensor:
    """The clipped sum as the learner makes it, in micro-batches."""
    recorder = Recorder(model)
    total = ClippedSum(recorder.sizes, bound)
    for start in range(0, UNITS, units_at_once):
        units = min(units_at_once, UNITS - start)
        with recorder.record(units, G):
            loss(model, slice(start * G, (start + units) * G)).sum().backward()
            total.add(recorder.take(), torch.ones(units, dtype=torch.bool))
    assert all(p.grad is None for p in model.parameters()), "a raw gradient was left where an optimizer could take it"
    return total.total.double()


def relative_error(
    model: nn.Module, loss: Loss, dtype: torch.dtype = torch.float32, units_at_once: int = UNITS
) -> float:
    """Of the recorded clipped sum, against the loop: in float64 for float32 models, in its own dtype for bfloat16."""
    exact = dtype == torch.float32
    reference = one_at_a_time(copy.deepcopy(model).double() if exact else model, loss)
    bound = float(torch.stack([g.norm() for g in reference]).median())  # some are clipped, some are not
    expected = clipped(reference, bound)
    return float((recorded(model, loss, bound, units_at_once) - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------ layers one by one


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Twice(nn.Module):
    """One layer called with two different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)) - x)


class Channels(nn.Module):
    """Layers that want channels before positions: (rows, T, 8) -> (rows, 8, T) and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 5),
    "linear without bias": lambda: nn.Linear(8, 5, bias=False),
    "value head": lambda: nn.Linear(8, 1),
    "Conv1D (GPT-2)": lambda: Conv1D(5, 8),
    "embedding": lambda: nn.Embedding(20, 8),
    "embedding with padding": lambda: nn.Embedding(20, 8, padding_idx=3),
    "tied head": Tied,
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8, eps=1e-6),
    "LlamaRMSNorm": lambda: LlamaRMSNorm(8),
    "GroupNorm": lambda: Channels(nn.GroupNorm(2, 8)),
    "Conv1d": lambda: Channels(nn.Conv1d(8, 5, 3, padding=1)),
    "called twice": Twice,
}


def layer_case(name: str, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = LAYERS[name]()
    with torch.no_grad():
        for p in model.parameters():  # away from ones and zeros, which hide faults of norms and biases
            p.add_(0.3 * torch.randn_like(p))
    model = model.to(dtype)
    ids, x = torch.randint(20, (UNITS * G, T)), torch.randn(UNITS * G, T, 8)
    x *= torch.logspace(-1, 1, UNITS).repeat_interleave(G)[:, None, None]  # gradients of unequal size
    takes_ids = any(isinstance(m, nn.Embedding) for m in model.modules())
    target = torch.randn(UNITS * G, T, 1)

    def loss(m: nn.Module, rows: slice) -> Tensor:
        own = next(m.parameters()).dtype
        y = m(ids[rows] if takes_ids else x[rows].to(own))
        return ((y - target[rows].to(own)).square() * target[rows].to(own)).sum((1, 2))

    return model, loss


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_s_clipped_sum_is_that_of_one_record_autograd(name: str, dtype: torch.dtype) -> None:
    """False: the layer's per-record rule is wrong, misses a call, or mixes the rows of two units."""
    error = relative_error(*layer_case(name, dtype), dtype)
    assert error < LIMITS[dtype], f"{name}: relative error {error:.1e}"


# ------------------------------------------------------------------------------------------------------ whole models


def gpt2(dropout: float = 0.0) -> nn.Module:
    rates = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **rates
        )
    )


def llama(dropout: float = 0.0) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, attention_dropout=dropout,
        )
    )  # fmt: skip


MODELS = {"GPT-2": (gpt2, ("c_attn", "c_proj")), "Llama": (llama, ("q_proj", "v_proj", "down_proj"))}


def policy_case(
    model: str, kind: Any = "full", dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> tuple[Policy, Loss]:
    """A policy with its value head and a loss over uneven completions."""
    torch.manual_seed(1)
    make, targets = MODELS[model]
    base = make(dropout).to(dtype)
    base.requires_grad_(False)
    attached = adapters.attach(base, AdapterConfig(kind=kind, rank=2, target_modules=targets), seed=0)
    policy = Policy(attached.to(dtype) if kind == "full" else attached, value_head=True).eval()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    rows = UNITS * G
    tokens, lengths = torch.randint(50, (rows, 9)), torch.randint(1, 4, (rows,))
    mask = (torch.arange(5) < torch.randint(1, 6, (rows, 1))).float()
    responses = tokens.gather(1, (lengths.unsqueeze(1) + torch.arange(5)).clamp(max=8))
    weights = torch.logspace(-2, 0, UNITS).repeat_interleave(G)

    def loss(m: nn.Module, at: slice) -> Tensor:
        scored = m(tokens[at], lengths[at], responses[at])
        each = -scored.log_probs + (scored.values - 1.0).square()
        return weights[at] * (each * mask[at]).sum(1) / mask[at].sum(1)

    return policy, loss


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("kind", ["lora", "ffa_lora", "lora_xs", "steering", "full"])
@pytest.mark.parametrize("model", list(MODELS))
def test_a_model_s_clipped_sum_is_that_of_one_record_autograd(model: str, kind: str, dtype: torch.dtype) -> None:
    """False: a part of a real model (PEFT's layers, learned positions, tied head) has a wrong per-record gradient."""
    error = relative_error(*policy_case(model, kind, dtype), dtype)
    assert error < LIMITS[dtype], f"{model} {kind}: relative error {error:.1e}"


@pytest.mark.parametrize("units_at_once", range(1, UNITS + 1))
def test_micro_batches_do_not_change_the_sum(units_at_once: int) -> None:
    """False: how a draw is cut changes what is released."""
    assert relative_error(*policy_case("GPT-2"), units_at_once=units_at_once) < LIMITS[torch.float32]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("model", list(MODELS))
def test_gradient_checkpointing_with_dropout_in_the_model_is_the_same_function(model: str, kind: str) -> None:
    """False: recomputed activations are recorded twice or not at all, or training mode lets dropout back in."""
    policy, loss = policy_case(model, kind, dropout=0.3)
    reference = one_at_a_time(copy.deepcopy(policy).double(), loss)  # eval mode: no dropout
    bound = float(torch.stack([g.norm() for g in reference]).median())
    policy.train()
    assert not torch.equal(loss(policy, slice(0, 2)), loss(policy, slice(0, 2))), "no dropout to switch off"
    without_dropout(policy)
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    inner = next(m for n, m in policy.named_modules() if n.endswith(("mlp.c_fc", "mlp.up_proj")))
    inner.register_forward_hook(lambda *_: calls.append(1))
    expected = clipped(reference, bound)
    assert (recorded(policy, loss, bound) - expected).norm() / expected.norm() < LIMITS[torch.float32]
    assert len(calls) == 2, "the activations were not recomputed: nothing was checkpointed"


@pytest.mark.parametrize("model", list(MODELS))
def test_with_dropout_on_the_gradient_that_is_clipped_is_the_one_that_was_normed(model: str) -> None:
    """False: norm and sum come from two passes with two dropout masks, and the clip bounds neither."""
    policy, loss = policy_case(model, dropout=0.3)
    policy.train()
    parameters, everybody = list(policy.parameters()), slice(0, UNITS * G)
    torch.manual_seed(5)
    losses = loss(policy, everybody).view(UNITS, G).sum(1)
    reference = []
    for u in range(UNITS):
        grads = torch.autograd.grad(losses[u], parameters, retain_graph=True)
        reference.append(torch.cat([g.flatten().double() for g in grads]))
    recorder = Recorder(policy)
    torch.manual_seed(5)
    with recorder.record(UNITS, G):
        loss(policy, everybody).sum().backward()
        grads = recorder.take()
    bound = 0.1 * min(float(g.norm()) for g in reference)
    total = ClippedSum(recorder.sizes, bound)
    assert total.add(grads, torch.ones(UNITS, dtype=torch.bool)).all()
    expected = clipped(reference, bound)
    assert (total.total - expected).norm() / expected.norm() < LIMITS[torch.float32]
    one = ClippedSum(recorder.sizes, bound)
    one.add([g[:1] for g in grads], torch.ones(1, dtype=torch.bool))
    assert abs(float(one.total.norm()) / bound - 1) < 1e-5


# ----------------------------------------------------------------------------------------------------- what is refused


class Router(nn.Module):
    """Tokens of all rows go to an expert by their score, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        return torch.zeros_like(x).masked_scatter(chosen.unsqueeze(-1), self.expert(x[chosen]))


class SharedPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(T, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(torch.arange(T).unsqueeze(0))


class Raw(nn.Module):
    """Uses a weight outside its layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.inner.weight


class Attention(nn.Module):
    """Only the output projection trains: torch reads its weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
        self.attention.out_proj.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Module):
    """Owns a weight and a layer that trains too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: Channels(nn.BatchNorm1d(8)),
    "InstanceNorm1d": lambda: Channels(nn.InstanceNorm1d(8, affine=True, track_running_stats=True)),
    "LSTM": lambda: nn.LSTM(8, 8, batch_first=True),
    "layer expert .Linear.*other rows": Router,
    "layer positions .Embedding.*other rows": SharedPositions,
    "Bilinear.*more than one tensor": lambda: nn.Bilinear(8, 8, 4),
    "inner.weight is used outside": Raw,
    "attention.out_proj.*is used outside": Attention,
    "Scaled.*both train": Scaled,
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_a_layer_without_a_sound_rule_is_refused_by_name(said: str) -> None:
    """False: a layer that mixes records, or whose rows cannot be told apart, trains without a bound."""
    torch.manual_seed(0)
    model = REFUSED[said]()
    x = torch.randn(UNITS, T, 8)
    with pytest.raises(ConfigError, match=said):
        recorder = Recorder(model)
        with recorder.record(UNITS):
            y = model(x, x) if isinstance(model, nn.Bilinear) else model(x)
            y.sum().backward()
    assert all(p.grad is None for p in model.parameters()), "a raw gradient was written before the refusal"
