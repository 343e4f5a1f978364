"""Whole decoding: Hugging Face's generate and CTranslate2 on one model; the shipped models' strategies beside beam 5.

pytest benchmarks/bench_decode.py. Encoding and decoding of text is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condgen_fast.data import embedded
from condgen_fast.data.batching import pad_sequences
from condgen_fast.decode import BeamSearch, Greedy, LevenshteinRefinement, MaskPredict, adapt, decode
from condgen_fast.models.checkpoint import load_model

try:
    import transformers
except ImportError:
    transformers = None
try:
    import ctranslate2
except ImportError:
    ctranslate2 = None

V, LENGTH = 8000, 32  # vocabulary; tokens of each source and each output
EOS, PAD = 0, V - 1
PIECES = ["</s>", "<unk>", *map(str, range(2, PAD))]  # CTranslate2 takes text; padding is none of it
STRATEGIES = {
    "greedy": ("transformer-en-de", Greedy()),
    "Mask-Predict T=1": ("cmlm-en-de", MaskPredict(iterations=1)),
    "Mask-Predict T=4": ("cmlm-en-de", MaskPredict(iterations=4)),
    "Mask-Predict T=10": ("cmlm-en-de", MaskPredict(iterations=10)),
    "LevT": ("levenshtein-en-de", LevenshteinRefinement()),
}


@cache
def marian(device: str) -> Any:
    """A Marian model of random weights that writes LENGTH tokens and then eos, in whatever way it is decoded."""
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=V,
        d_model=256,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        max_position_embeddings=128,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        forced_eos_token_id=None,
        scale_embedding=True,
        init_std=0.08,
    )
    model = transformers.MarianMTModel(config).eval().to(device)

    def fix_length(module: object, args: object, kwargs: object, output: Any) -> Any:
        output.logits[..., PAD] = -torch.inf
        output.logits[..., EOS] = -torch.inf if output.past_key_values.get_seq_length() <= LENGTH else 1e4
        return output

    model.register_forward_hook(fix_length, with_kwargs=True)
    return model


def with_ctranslate2(model: Any, source: Tensor, beam_size: int, folder: Path) -> Callable[[], list[list[str]]]:
    """The same weights in CTranslate2, float32."""
    from ctranslate2.converters.transformers import MarianMTLoader

    spec = MarianMTLoader().get_model_spec(model)
    spec.register_source_vocabulary(PIECES)
    spec.register_target_vocabulary(PIECES)
    spec.config.add_source_eos, spec.config.decoder_start_token = False, "</s>"
    spec.validate()
    spec.save(str(folder))
    translator = ctranslate2.Translator(
        str(folder), device=source.device.type, compute_type="float32", intra_threads=torch.get_num_threads()
    )
    rows = [[PIECES[token] for token in row] for row in source.tolist()]

    def translate() -> list[list[str]]:
        results = translator.translate_batch(
            rows, beam_size=beam_size, min_decoding_length=LENGTH, max_decoding_length=LENGTH
        )
        return [result.hypotheses[0] for result in results]

    return translate


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_hugging_face(compare, device, strategy, B, tmp_path):
    if transformers is None:
        pytest.skip("needs transformers")
    model, beam_size = marian(device), {"greedy": 1, "beam": 5}[strategy]
    generator = torch.Generator().manual_seed(B)
    source = torch.randint(2, PAD, (B, LENGTH), generator=generator).to(device)
    options: dict[str, Any] = {"max_length": LENGTH + 1}
    if strategy == "beam":
        options |= {"beam_size": beam_size, "stopping": "heuristic"}
    adapted, mask = adapt(model), torch.ones_like(source)

    def ours() -> Tensor:
        return decode(adapted, source, strategy, **options).tokens[:, 0]

    def generate() -> Tensor:
        return model.generate(
            source, attention_mask=mask, do_sample=False, num_beams=beam_size, max_new_tokens=LENGTH + 1
        )

    tokens = ours()
    assert tokens.shape == (B, LENGTH)
    assert torch.equal(generate()[:, 1 : LENGTH + 1], tokens)
    peers: dict[str, Callable[[], object] | None] = {"Hugging Face generate": generate, "CTranslate2": None}
    if ctranslate2 is not None:
        peers["CTranslate2"] = translate = with_ctranslate2(model, source, beam_size, tmp_path)
        assert translate() == [[PIECES[token] for token in row] for row in tokens.tolist()]
    compare("decode a Marian model", f"3+3x256 {strategy} {beam_size} B{B} T{LENGTH} V{V} fp32", ours, peers=peers)


@cache
def shipped(name: str, device: str) -> tuple[Any, list[list[int]]]:
    """A shipped model and 32 sentences of the embedded test set, evenly from the shortest to the longest."""
    try:
        model, vocabulary = load_model(name, device=device)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    lines = sorted(embedded.load("test")[0], key=len)
    encoded = vocabulary.encode([lines[len(lines) * (2 * i + 1) // 64] for i in range(32)])
    return model, [[*ids, model.eos_id] for ids in encoded]


def translator(name: str, strategy: Any, B: int, device: str) -> Callable[..., list[list[int]]]:
    """Translates those sentences in one batch, or four of them one by one, with the model or one in its place."""
    model, sentences = shipped(name, device)
    rows = [[row] for row in sentences[::8]] if B == 1 else [sentences]
    sources = [pad_sequences(batch, model.pad_id).to(device) for batch in rows]

    def translate(model: Any = model) -> list[list[int]]:
        return [best[0] for source in sources for best in decode(model, source, strategy).to_lists()]

    return translate


class Recorded:
    """A model that notes each call of its methods, with the arguments as they were."""

    def __init__(self, model: Any):
        self._model, self._calls = model, []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            self._calls.append((value, [a.clone() if isinstance(a, Tensor) else a for a in arguments]))
            return value(*arguments)

        return call

    @torch.no_grad()
    def replay(self) -> None:
        for method, arguments in self._calls:
            method(*arguments)


@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize("name", STRATEGIES)
def test_shipped(compare, device, name, B):
    """The floor of a refining strategy is the calls that it makes of its model."""
    folder, strategy = STRATEGIES[name]
    ours = translator(folder, strategy, B, device)
    found = ours()
    assert found[:: 8 if B > 1 else 1] == translator(folder, strategy, 1, device)()
    floor = None
    if name != "greedy":
        recorded = Recorded(shipped(folder, device)[0])
        assert ours(recorded) == found
        floor = ("the model alone", recorded.replay)
    compare(
        "decode with the shipped models",
        f"{name} {'4 x B1' if B == 1 else f'B{B}'}",
        ours,
        peers={"beam 5": translator("transformer-en-de", BeamSearch(beam_size=5), B, device)},
        floor=floor,
    )
