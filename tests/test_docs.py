"""The documents say what the code does: every key and default, every test, command and file that they name exists."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from dprlhf_ray import cli, config_file
from dprlhf_ray.config import STAGES, DataConfig, RLStage, RunConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "cluster/README.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def _section(annotation: typing.Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in typing.get_args(annotation) if (s := _section(a)) is not None), None)


def _keys(
    model: type[BaseModel], prefix: str = "", known: set[type[BaseModel]] | None = None
) -> Iterator[tuple[str, str]]:
    """(dotted key, default as the page writes it) of every setting. A section that comes again is described once."""
    known = {model} if known is None else known
    for name, field in model.model_fields.items():
        nested = _section(field.annotation)
        if nested is None or nested in known:
            value = None if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, "required" if field.is_required() else f"`{json.dumps(value)}`"
        else:
            known.add(nested)
            inner = f"{prefix}{name}." + {"data": "NAME.", "stages": "N."}.get(name, "") * (not prefix)
            yield from _keys(nested, inner, known)


def _rows() -> dict[str, str]:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", page, flags=re.MULTILINE))


@pytest.mark.parametrize(("key", "default"), list(_keys(RunConfig)))
def test_every_setting_is_documented_with_its_default(key: str, default: str) -> None:
    rows = _rows()
    assert rows.get(key) == default, f"docs/configuration.md, {key}: {rows.get(key)!r} should be {default!r}"


def test_no_setting_is_documented_that_does_not_exist() -> None:
    known = {key for key, _ in _keys(RunConfig)}
    sections = {key for key, default in _rows().items() if default in ("see below", "required")}
    assert set(_rows()) - sections <= known
    for key in sections - known:
        assert any(k.startswith(f"{key}.") for k in known), key


def test_stages_of_other_kinds_have_no_key_that_those_of_kind_rl_lack() -> None:
    """What the page says of `stages.N` is what kind rl takes; only kind and name have other defaults elsewhere."""
    for kind, stage in STAGES.items():
        for name, field in stage.model_fields.items():
            assert name in RLStage.model_fields, (kind, name)
            same = field.is_required() == RLStage.model_fields[name].is_required()
            assert name in ("kind", "name") or (same and field.default == RLStage.model_fields[name].default)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_accepted_and_in_the_readme(config: Path) -> None:
    config_file.load(config)
    assert f"`configs/{config.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_tests_files_and_links_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`((?:tests|configs|docs|requirements|dprlhf_ray|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_names_exist(page: str) -> None:
    groups = {c.name: c for c in cli.app.registered_groups}
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback} | set(groups)
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"(?:^|`)dprlhf ([a-z]+)", text, flags=re.MULTILINE):
        assert command in known, command
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, target


def _blocks(page: str) -> list[typing.Any]:
    """The YAML that a page shows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [yaml.safe_load(b) for b in re.findall(r"^ *```yaml\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)]


def test_data_sets_and_configs_of_the_pipeline_s_page_are_accepted() -> None:
    blocks = _blocks("docs/pipeline.md")
    whole = [b for b in blocks if "stages" in b]
    assert len(whole) == 2 and len(blocks) > 5
    for block in blocks:
        if block in whole:
            config_file.parse(block)
        else:
            assert [DataConfig.model_validate(data) for data in block.values()]


def test_configs_of_the_readme_are_accepted() -> None:
    """The first is a whole config, the second is added to it."""
    blocks = _blocks("README.md")
    assert len(blocks) == 2
    config_file.parse(blocks[0])
    assert config_file.parse(blocks[0] | blocks[1]).learner.use_gpu
