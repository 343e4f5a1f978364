"""Model folders: they read back, are replaced whole or not at all, and refuse what does not belong together."""

from __future__ import annotations

import json

import pytest
import torch

from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.models import checkpoint
from condgen_fast.models.checkpoint import fingerprint, load_model, load_weights, save_model, weights
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.levenshtein import LevenshteinConfig, LevenshteinTransformer
from condgen_fast.models.transformer import Transformer

SHAPE = {"width": 8, "feed_forward": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "max_positions": 32}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(["open the file and close the window", "save the new table in a row"] * 5, 28)


def model_of(vocabulary, model_class=Transformer, config_class=TransformerConfig, **more):
    return model_class(config_class(vocab_size=len(vocabulary), **SHAPE | more)).eval()


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(Transformer, TransformerConfig), (CMLM, CMLMConfig), (LevenshteinTransformer, LevenshteinConfig)],
)
def test_a_model_reads_back(model_class, config_class, vocabulary, tmp_path):
    model = model_of(vocabulary, model_class, config_class)
    save_model(tmp_path / "model", model, vocabulary)
    again, same = load_model(tmp_path / "model")
    assert type(again) is model_class and again.config == model.config and not again.training
    assert same.fingerprint == vocabulary.fingerprint and fingerprint(again) == fingerprint(model)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors", "vocab.model"]


def test_half_precision_halves_the_file(vocabulary, tmp_path):
    model = model_of(vocabulary, width=64)
    for name, dtype in (("full", None), ("half", torch.float16)):
        save_model(tmp_path / name, model, vocabulary, dtype=dtype)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    again, _ = load_model(tmp_path / "half")
    assert all(t.dtype == torch.float32 for t in weights(again).values())
    torch.testing.assert_close(weights(again)["encoder.norm.weight"], weights(model)["encoder.norm.weight"])


def test_tied_embeddings_are_stored_once(vocabulary, tmp_path):
    names = weights(model_of(vocabulary)).keys()
    assert sum("tokens.weight" in name or "output_weight" in name for name in names) == 1
    assert "output_weight" in weights(model_of(vocabulary, tie_embeddings=False))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.model"])
def test_a_missing_file_is_named(name, vocabulary, tmp_path):
    save_model(tmp_path / "model", model_of(vocabulary), vocabulary)
    (tmp_path / "model" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.model"])
def test_a_truncated_file_is_named(name, vocabulary, tmp_path):
    save_model(tmp_path / "model", model_of(vocabulary), vocabulary)
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path / "model")


def test_no_such_model_lists_the_shipped_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="model must be a model folder or one of .*; got nowhere"):
        load_model("nowhere")


def test_weights_of_another_model_are_refused(vocabulary, tmp_path):
    save_model(tmp_path / "a", model_of(vocabulary), vocabulary)
    with pytest.raises(ValueError, match="another model: .* must have shape"):
        load_weights(model_of(vocabulary, feed_forward=24), tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="another model: it lacks length_head"):
        load_weights(model_of(vocabulary, CMLM, CMLMConfig), tmp_path / "a" / "model.safetensors")


def test_another_vocabulary_is_refused(vocabulary, tmp_path):
    save_model(tmp_path / "a", model_of(vocabulary), vocabulary)
    other = Vocabulary.train(
        ["something else entirely, with quite other words", "jumping over a lazy dog"] * 5, len(vocabulary)
    )
    other.save(tmp_path / "a" / "vocab.model")
    with pytest.raises(ValueError, match="not the vocabulary the model was trained with"):
        load_model(tmp_path / "a")


def test_an_unknown_field_of_the_config_is_refused(vocabulary, tmp_path):
    save_model(tmp_path / "a", model_of(vocabulary), vocabulary)
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wdith": 8}))
    with pytest.raises(ValueError, match="unknown field 'wdith'"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("failing", ["save_file", "_sync"])
def test_a_full_disk_leaves_the_previous_model(failing, vocabulary, tmp_path, monkeypatch):
    first = model_of(vocabulary)
    save_model(tmp_path / "model", first, vocabulary)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "model", model_of(vocabulary), vocabulary)
    monkeypatch.undo()
    assert fingerprint(load_model(tmp_path / "model")[0]) == fingerprint(first)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
