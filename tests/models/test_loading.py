"""Models and tokenizers come as data: no code of theirs is run, and no pickle is read."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.embedded import resolve_model
from dprlhf_ray.stages.classifier_files import check_classifier

SOURCES = Path(__file__).parents[2] / "dprlhf_ray"


def _loads() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    """(place, what is loaded, its keywords) of every call of `from_pretrained`."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                keywords = {k.arg: k.value for k in node.keywords if k.arg}
                yield f"{path.relative_to(SOURCES)}:{node.lineno}", ast.unparse(node.func), keywords


def _is(value: ast.expr | None, expected: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is expected


def test_everything_that_is_loaded_is_loaded_without_code_and_pickles() -> None:
    """False: transformers asks on the terminal whether to run a repository's code, or falls back to a pickle."""
    found = list(_loads())
    assert len(found) > 8
    for place, what, keywords in found:
        if "gguf_file" in keywords or "GenerationConfig" in what:  # the embedded model's own file; plain JSON
            continue
        assert _is(keywords.get("trust_remote_code"), False), f"{place}: {what} without trust_remote_code=False"
        if "Tokenizer" not in what and "AutoConfig" not in what:
            assert _is(keywords.get("use_safetensors"), True), f"{place}: {what} without use_safetensors=True"


def test_a_folder_that_has_pickled_weights_only_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for kind, load, key in (
        ("LlamaForCausalLM", lambda: resolve_model(str(tmp_path)), "model.name"),
        ("BertForSequenceClassification", lambda: check_classifier(str(tmp_path), "LABEL_0"), "scorer.model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind]}))
        with pytest.raises(ConfigError, match=rf"^{key}: .* has no \.safetensors weights") as e:
            load()
        assert e.value.exit_code == 2
