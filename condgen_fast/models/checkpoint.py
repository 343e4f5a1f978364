"""A trained model as a folder: config.json, model.safetensors, vocab.model; written atomically, nothing unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.models.cmlm import CMLM
from condgen_fast.models.layers import EncoderDecoder
from condgen_fast.models.levenshtein import LevenshteinTransformer
from condgen_fast.models.masked_lm import MaskedLM
from condgen_fast.models.transformer import Transformer

MODELS: dict[str, type[EncoderDecoder | MaskedLM]] = {
    "transformer": Transformer,
    "cmlm": CMLM,
    "levenshtein": LevenshteinTransformer,
    "masked_lm": MaskedLM,
}

SHIPPED = Path(__file__).parent / "weights"
"""Folder of the models that come with the package."""


def kind(model: EncoderDecoder) -> str:
    """The name a model's class has in config.json."""
    return next(name for name, cls in MODELS.items() if type(model) is cls)


def weights(model: EncoderDecoder) -> dict[str, Tensor]:
    """The model's tensors by name on the CPU, each stored once (embeddings are one matrix, whatever uses them)."""
    seen, kept = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().cpu().contiguous()
    return kept


def fingerprint(model: EncoderDecoder) -> str:
    """A hash of the model's weights and config: which teacher wrote a distilled corpus."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(weights(model).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def save_model(
    folder: str | Path,
    model: EncoderDecoder,
    vocabulary: Vocabulary,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Tensor] | None = None,
    state: Mapping[str, object] | None = None,
) -> None:
    """Write a model folder whole or not at all.

    `dtype` converts floating weights (float16 halves the file). `extra` tensors and the JSON-able `state` are what
    training needs beside the weights: training.safetensors and training.json. A folder that exists is replaced only
    once the new one is complete on disk; on any error (a full disk) it is left as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.incomplete-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        config = {"model": kind(model), "vocabulary": vocabulary.fingerprint} | dataclasses.asdict(model.config)
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        vocabulary.save(fresh / "vocab.model")
        tensors = weights(model)
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        _write_tensors(tensors, fresh / "model.safetensors")
        if extra is not None:
            _write_tensors(extra, fresh / "training.safetensors")
        for file in fresh.glob("*.safetensors"):  # safetensors lets nobody but the owner read what it writes
            shutil.copymode(fresh / "config.json", file)
        if state is not None:
            (fresh / "training.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for file in fresh.iterdir():
            _sync(file)
        if folder.exists():
            for file in fresh.iterdir():  # weights last: they are what a half-replaced folder would be wrong about
                if file.name != "model.safetensors":
                    os.replace(file, folder / file.name)
            os.replace(fresh / "model.safetensors", folder / "model.safetensors")
        else:
            os.rename(fresh, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk; no OSError by itself
        raise OSError(f"{path.parent.parent} could not take {path.name}: {error}") from error


def load_model(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[EncoderDecoder, Vocabulary]:
    """Read a model folder, or a shipped model by its name -> the model in eval mode and its vocabulary.

    Raises FileNotFoundError for a missing file and ValueError for a truncated one, for weights of another model and
    for a vocabulary that is not the one the model was trained with.
    """
    shipped = sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
    folder = SHIPPED / folder if str(folder) in shipped and not Path(folder).exists() else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model must be a model folder or one of {', '.join(shipped)}; got {folder}")
    for name in ("config.json", "model.safetensors", "vocab.model"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {folder} must contain {name}; it does not")
    config = _read_config(folder / "config.json")
    name = config.pop("model", None)
    model_class = MODELS.get(name) if isinstance(name, str) else None
    if model_class is None:
        raise ValueError(f"{folder / 'config.json'}: model must be one of {', '.join(MODELS)}")
    fingerprint = config.pop("vocabulary", None)
    vocabulary = Vocabulary.load(folder / "vocab.model")
    if fingerprint != vocabulary.fingerprint or config.get("vocab_size") != len(vocabulary):
        raise ValueError(
            f"{folder / 'vocab.model'} is not the vocabulary the model was trained with: expected"
            f" {config.get('vocab_size')} pieces, fingerprint {str(fingerprint)[:12]}; got {len(vocabulary)} pieces,"
            f" fingerprint {vocabulary.fingerprint[:12]}"
        )
    fields = {field.name for field in dataclasses.fields(model_class.config_class)}
    if set(config) - fields:
        raise ValueError(f"{folder / 'config.json'}: unknown field {sorted(set(config) - fields)[0]!r}")
    model = model_class(model_class.config_class(**config))
    load_weights(model, folder / "model.safetensors")
    return model.to(device).eval(), vocabulary


def load_weights(model: EncoderDecoder, path: str | Path) -> None:
    """Copy a safetensors file into a model of the same shape; ValueError names the first tensor that does not fit."""
    tensors = read_tensors(path)
    expected = weights(model)
    for name in expected.keys() | tensors.keys():
        if name not in tensors or name not in expected:
            where = "lacks" if name not in tensors else "has, and this model has not,"
            raise ValueError(f"{path} is of another model: it {where} {name}")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{path} is of another model: {name} must have shape {list(expected[name].shape)};"
                f" got {list(tensors[name].shape)}"
            )
    with torch.no_grad():
        own = dict(model.state_dict())
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """A safetensors file as tensors on the CPU; a truncated or foreign file is a ValueError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
