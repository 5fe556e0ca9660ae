"""What the files of a sequence classifier say of it, before any weight is read. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.embedded import check_weights, looks_local


def check_classifier(name: str, label: str | None) -> None:
    """Refuse a local folder that holds no sequence classifier with this label (None: with one number). A hub name is
    looked at when it is loaded.

    Raises:
        ConfigError: in one line.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and not looks_local(name):
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str((config.get("architectures") or ["none"])[0])
        labels = list(config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).values())  # two are not written
    except OSError:
        raise ConfigError(f"scorer.model: no readable {folder / 'config.json'}: give a folder or a hub name") from None
    except (ValueError, AttributeError):
        raise ConfigError(f"scorer.model: {folder / 'config.json'} is not valid JSON of a model config") from None
    if not kind.endswith("ForSequenceClassification"):
        raise ConfigError(f"scorer.model: {name}: {kind}: should be a ...ForSequenceClassification")
    check_weights(folder, "scorer.model")
    check_labels(name, labels, label)


def check_labels(name: str, labels: list[str], label: str | None) -> None:
    """One label is a reward model's; a classifier has the one that is asked for.

    Raises:
        ConfigError: in one line.
    """
    if label is None and len(labels) != 1:
        raise ConfigError(
            f"scorer.model: {name} has {len(labels)} labels, a reward model has one: use kind classifier and a label"
        )
    if label is not None and label not in labels:
        raise ConfigError(f"scorer.label: {label!r} is not a label of {name}: {', '.join(map(str, labels))}")
