"""The model card of an exported model: README.md in Hugging Face form, with the privacy statement in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dprlhf_ray.config import AnyStage, RunConfig
from dprlhf_ray.models.embedded import LICENSE, hub_name
from dprlhf_ray.run_dir import write_atomically

_TEMPLATE = Path(__file__).parent / "card.md.j2"
_TAGS = ["differential-privacy", "rlhf", "dprlhf_ray"]
_KIND_TAGS: dict[str, list[str]] = {"rl": [], "sft": ["sft"], "reward_model": ["reward-model"]}
_METHODS = {"sft": "supervised fine-tuning", "reward_model": "the Bradley-Terry loss on pairs"}


def write_cards(folder: Path, config: RunConfig, stage: AnyStage, certificate: Mapping[str, Any] | None) -> list[Path]:
    """Write README.md into the exported models of a stage (`folder/adapter` and `folder/merged`, those that exist).

    Args:
        certificate: of the run; None while it has not ended, and the card says that nothing is certified yet.

    Returns:
        What was written.
    """
    written = []
    for kind in ("adapter", "merged"):
        if (folder / kind).is_dir():
            path = folder / kind / "README.md"
            write_atomically(path, model_card(kind, config, stage, certificate))
            written.append(path)
    return written


def model_card(kind: str, config: RunConfig, stage: AnyStage, certificate: Mapping[str, Any] | None) -> str:
    """The card of one exported folder (kind: adapter or merged), YAML front matter first."""
    from huggingface_hub import ModelCard, ModelCardData  # heavy enough to load only here

    name = config.model.name
    data = ModelCardData(
        base_model=hub_name(name) if _is_hub_name(name) else None,
        license=LICENSE if name == "embedded" else _license(name),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-classification" if stage.kind == "reward_model" else "text-generation",
        tags=[*_TAGS, *(["lora"] if kind == "adapter" else []), *_KIND_TAGS[stage.kind]],
    )
    c, made_of = certificate or {}, lineage(config, stage)
    private = [s for s in made_of if s.privacy.mode != "public"]
    data_sets = dict.fromkeys(config.dataset_of(s.data) for s in private)
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        kind=kind,
        embedded=name == "embedded",
        run=config.name,
        base=Path(name).name if _is_folder(name) else hub_name(name),
        stage=next((s for s in c.get("stages", []) if s["stage"] == stage.name), None),
        name=stage.name,
        reward_model=stage.kind == "reward_model",
        method=stage.algorithm.kind if stage.kind == "rl" else _METHODS[stage.kind],
        data_set=config.dataset_of(stage.data),
        public=stage.privacy.mode == "public",
        partition=stage.partition,
        start=config.start_of(stage),
        before=[s.name for s in made_of[:-1]],
        units=" or ".join(dict.fromkeys(f"one {s.privacy.unit}" for s in private)),
        costs={name: c["data_sets"][name] for name in data_sets} if c.get("certified") else {},
        public_parts={what: _shown(value) for what, value in c.get("public", {}).items()},
        certificate=certificate,
    )
    return str(card).rstrip() + "\n"


def lineage(config: RunConfig, stage: AnyStage) -> list[AnyStage]:
    """The stages that a stage's model is made of, in their order, itself last: what it starts from, reward models that
    scored it, and theirs."""
    used = {config.start_of(stage), *(s.stage for s in (stage.scorer.flat() if stage.kind == "rl" else ()))}
    direct = [s for s in config.stages if s.name in used]
    names = {s.name for other in direct for s in lineage(config, other)}
    return [*(s for s in config.stages if s.name in names), stage]


def _shown(declared: str | Sequence[str]) -> str:
    """What was declared public, without the folders of this machine."""
    values = [declared] if isinstance(declared, str) else declared
    named = [v.rpartition(" = ") for v in values]
    return ", ".join(name + equals + (Path(v).name if v[:1] in ("/", "~", ".") else v) for name, equals, v in named)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _is_hub_name(name: str) -> bool:
    return not _is_folder(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _license(name: str) -> str | None:
    """What the card of a local base model names; unknown otherwise."""
    readme = Path(name).expanduser() / "README.md"
    if not readme.is_file():
        return None
    from huggingface_hub import ModelCard

    found = ModelCard.load(readme, ignore_metadata_errors=True).data.get("license")
    return found if isinstance(found, str) else None
