"""Finds, checks and loads a Hugging Face checkpoint. Knows no prompts and no batches."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

INSTALL = 'pip install "nanoeval[hf]"'
WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.bin.index.json",
)
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

logger = structlog.get_logger(component=__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded as asked; the message says what to change."""


@dataclass(frozen=True)
class Checkpoint:
    """Which weights, and how to hold them. Equal ones may share what was loaded."""

    model_id: str
    revision: str | None = None
    is_vlm: bool = False
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    attn_impl: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model on its device, with what turns text (and images) into its inputs."""

    model: Any
    tokenizer: Any
    processor: Any | None


def import_torch() -> tuple[Any, Any]:
    """The modules torch and transformers; an ImportError names the command that installs them."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"Hugging Face models need torch and transformers: {INSTALL}") from error
    return torch, transformers


def check_files(checkpoint: Checkpoint) -> None:
    """Refuse a local folder that cannot be a checkpoint. Reads no weights and imports nothing big.

    An id that is no folder here passes: the hub knows it or does not.
    """
    folder = Path(checkpoint.model_id).expanduser()
    if not folder.is_dir():
        if checkpoint.model_id.startswith((".", "/", "~")) or checkpoint.model_id.count("/") > 1:
            raise CheckpointError(f"model_id={checkpoint.model_id!r}: there is no such folder")
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is not a model's folder")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise CheckpointError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin); save the model there"
            " with save_pretrained, or name another model_id"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if "auto_map" in config and not checkpoint.trust_remote_code and not _is_stock(config):
        raise _needs_trust(checkpoint)


def _is_stock(config: dict[str, Any]) -> bool:
    _, transformers = import_torch()
    return config.get("model_type") in transformers.CONFIG_MAPPING


def _needs_trust(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.model_id} runs code of its own; read it, then set trust_remote_code: true, or"
        " choose a model that transformers knows"
    )


@functools.lru_cache(maxsize=8)
def load_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's configuration; from the hub it brings that one small file.

    Raises CheckpointError for code of its own that is not trusted, an unknown architecture, and a
    text model that is asked to see images.
    """
    check_files(checkpoint)
    _, transformers = import_torch()
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.model_id,
            revision=checkpoint.revision,
            trust_remote_code=checkpoint.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_trust(checkpoint) from error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot load {checkpoint.model_id}: {reason}") from error
    if checkpoint.is_vlm and not _sees_images(config):
        raise CheckpointError(
            f"{checkpoint.model_id} ({config.model_type}) is a text model and takes no images;"
            " choose a vision-language model, or set is_vlm: false for a task in text"
        )
    return config


def _sees_images(config: Any) -> bool:
    return _has_class("AutoModelForImageTextToText", config)


def _has_class(auto_class: str, config: Any) -> bool:
    _, transformers = import_torch()
    own = auto_class in (getattr(config, "auto_map", None) or {})
    return own or type(config) in getattr(transformers, auto_class)._model_mapping


def resolve_device(asked: str, warns: bool = False) -> str:
    """The device to use: `asked`, or the CPU where CUDA is asked for and not there.

    "auto" is CUDA where there is one, else the CPU. With `warns`, a fallback is a warning.
    """
    torch, _ = import_torch()
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise CheckpointError(
            f"device={asked!r} is no device; use auto, cpu, cuda, cuda:1, mps, ..."
        ) from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            if warns:
                logger.warning(f"device={asked!r} is not there; going on with the CPU", _print=True)
            return "cpu"
    return asked


def resolve_dtype(asked: str, config: Any) -> str:
    """The name of the number format: `asked`, or for "auto" that of the checkpoint's weights."""
    if asked != "auto":
        return asked
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(stored or "float32").removeprefix("torch.")


def resolve_attention(checkpoint: Checkpoint, device: str) -> str | None:
    """The attention implementation: flash attention on CUDA alone, elsewhere the default."""
    asked = checkpoint.attn_impl
    if asked and asked.startswith("flash_attention") and not device.startswith("cuda"):
        return None
    return asked


def own_version() -> str | None:
    """This package's version; None where it runs from a folder without being installed."""
    try:
        return importlib.metadata.version("nanoeval")
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a report says of the model: ids, the commit, number format, device, library versions.

    Reads the configuration, not the weights. `revision` is the hub's commit, None for a folder.
    """
    torch, transformers = import_torch()
    config = load_config(checkpoint)
    device = resolve_device(checkpoint.device)
    return {
        "model_id": checkpoint.model_id,
        "revision": getattr(config, "_commit_hash", None) or checkpoint.revision,
        "is_vlm": checkpoint.is_vlm,
        "architecture": (getattr(config, "architectures", None) or [config.model_type])[0],
        "dtype": resolve_dtype(checkpoint.dtype, config),
        "device": device,
        "attn_impl": resolve_attention(checkpoint, device) or "default",
        "trust_remote_code": checkpoint.trust_remote_code,
        "library_versions": {
            "nanoeval": own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def load(checkpoint: Checkpoint) -> Loaded:
    """Load weights and tokenizer (and processor, for a vision-language model) to the device."""
    torch, transformers = import_torch()
    config = load_config(checkpoint)
    device = resolve_device(checkpoint.device, warns=True)
    common = {
        "revision": checkpoint.revision,
        "trust_remote_code": checkpoint.trust_remote_code,
    }
    auto_class = "AutoModelForCausalLM"
    # A vision-language checkpoint also answers text alone.
    if checkpoint.is_vlm or (
        not _has_class(auto_class, config) and _has_class("AutoModelForImageTextToText", config)
    ):
        auto_class = "AutoModelForImageTextToText"
    attention = resolve_attention(checkpoint, device)
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            checkpoint.model_id,
            dtype=getattr(torch, resolve_dtype(checkpoint.dtype, config)),
            **({"attn_implementation": attention} if attention else {}),
            **common,
        )
        processor = None
        if checkpoint.is_vlm:
            processor = transformers.AutoProcessor.from_pretrained(checkpoint.model_id, **common)
            tokenizer = processor.tokenizer
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.model_id, **common)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"cannot load {checkpoint.model_id}: {reason}") from error
    model.to(device).eval()
    _decode_plainly(model, transformers)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return Loaded(model, tokenizer, processor)


def _decode_plainly(model: Any, transformers: Any) -> None:
    """Keep of the checkpoint's decoding settings only its special tokens.

    Penalties and sampling that a checkpoint ships would make "greedy" mean something else for
    each model.
    """
    stored = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stored.eos_token_id,
        bos_token_id=stored.bos_token_id,
        pad_token_id=stored.pad_token_id,
    )


def max_length(loaded: Loaded) -> int | None:
    """The longest sequence that the model was made for, in tokens; None where it does not say."""
    text = loaded.model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
