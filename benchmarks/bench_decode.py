"""Whole decoding: Hugging Face's generate and CTranslate2 on one model; the shipped models' strategies beside beam 5.

CTranslate2 counts as a peer where it can be imported; beside torch it can be put on PYTHONPATH.

pytest benchmarks/bench_decode.py. Encoding and decoding of text is not timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import Recorded
from shipped import shipped, sources
from torch import Tensor

from condgen_fast.data import embedded
from condgen_fast.data.batching import pad_sequences, windows
from condgen_fast.decode import BeamSearch, Greedy, LevenshteinRefinement, MaskPredict, adapt, decode
from condgen_fast.models.layers import SIZES, TransformerConfig
from condgen_fast.models.transformer import Transformer
from condgen_fast.recipes.evaluation import translate_lines

try:
    import transformers
except ImportError:
    transformers = None
try:
    import ctranslate2
except ImportError:
    ctranslate2 = None

V, LENGTH = 32000, 32  # vocabulary; tokens of each source, and of each output with its eos
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
def reference(device: str) -> Transformer:
    """Transformer-base of random weights in Marian's arrangement, so that all engines can have the same weights."""
    torch.manual_seed(0)
    config = TransformerConfig(
        V, **SIZES["base"], norm="post", pad_id=PAD, bos_id=PAD, eos_id=EOS, unk_id=1, mask_id=2, max_positions=128
    )
    return Transformer(config).eval().to(device)


@cache
def marian(device: str) -> Any:
    """The reference model's weights in a Marian model of transformers."""
    size = SIZES["base"]
    heads = {f"{side}_attention_heads": size["heads"] for side in ("encoder", "decoder")}
    layers = {f"{side}_layers": size[f"{side}_layers"] for side in ("encoder", "decoder")}
    config = transformers.MarianConfig(
        vocab_size=V, d_model=size["width"], encoder_ffn_dim=size["feed_forward"], decoder_ffn_dim=size["feed_forward"],
        **heads, **layers, max_position_embeddings=128, activation_function="relu", scale_embedding=True,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, forced_eos_token_id=None,
    )  # fmt: skip
    model, ours = transformers.MarianMTModel(config).eval(), reference("cpu")
    weights = {"model.shared.weight": ours.output_weight}
    for side in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(ours, side).layers):
            parts = {
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj": layer.attention.input,
                "self_attn.out_proj": layer.attention.output,
                "self_attn_layer_norm": layer.attention_residual.norm,
                "fc1": layer.feed_forward.inner,
                "fc2": layer.feed_forward.outer,
                "final_layer_norm": layer.feed_forward_residual.norm,
            }
            if side == "decoder":
                parts |= {
                    "encoder_attn.q_proj": layer.cross_attention.query,
                    "encoder_attn.k_proj encoder_attn.v_proj": layer.cross_attention.memory,
                    "encoder_attn.out_proj": layer.cross_attention.output,
                    "encoder_attn_layer_norm": layer.cross_attention_residual.norm,
                }
            for names, part in parts.items():
                for kind in ("weight", "bias"):
                    shares = getattr(part, kind).chunk(len(names.split()))
                    for name, share in zip(names.split(), shares, strict=True):
                        weights[f"model.{side}.layers.{i}.{name}.{kind}"] = share
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert all("embed_" in name or name in ("final_logits_bias", "lm_head.weight") for name in left.missing_keys)
    return model.to(device)


# In a process of its own: libgomp's threads stop waiting actively, ours as well, once a process has two pools of them.
CTRANSLATE2 = """
import json, sys, ctranslate2
folder, device, threads, rows, options = json.loads(input())
translator = ctranslate2.Translator(folder, device=device, compute_type="float32", intra_threads=threads)
for _ in sys.stdin:
    results = translator.translate_batch(rows, **options)
    print(json.dumps([result.hypotheses[0] for result in results]), flush=True)
"""


@contextmanager
def with_ctranslate2(
    model: Any, source: Tensor, beam_size: int, folder: Path
) -> Iterator[Callable[[], list[list[int]]]]:
    """The same weights in CTranslate2, float32."""
    from ctranslate2.converters.transformers import MarianMTLoader

    spec = MarianMTLoader().get_model_spec(model)
    spec.register_source_vocabulary(PIECES)
    spec.register_target_vocabulary(PIECES)
    spec.config.add_source_eos, spec.config.decoder_start_token = False, "</s>"
    spec.validate()
    spec.save(str(folder))
    rows = [[PIECES[token] for token in row] for row in source.tolist()]
    options = {"beam_size": beam_size, "min_decoding_length": LENGTH, "max_decoding_length": LENGTH}
    ids = {piece: i for i, piece in enumerate(PIECES)}
    with subprocess.Popen(
        [sys.executable, "-c", CTRANSLATE2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def send(line: str) -> None:
            process.stdin.write(line + "\n")
            process.stdin.flush()

        def translate() -> list[list[int]]:
            send("")
            return [[ids[piece] for piece in row] for row in json.loads(process.stdout.readline())]

        send(json.dumps([str(folder), source.device.type, torch.get_num_threads(), rows, options]))
        yield translate
        process.stdin.close()


@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("engine", ["Transformer", "adapted Marian"])
def test_transformer_base(compare, device, engine, beam_size, B, tmp_path):
    """LENGTH steps in every engine: ours ends with eos at the last, the others stop there without.

    Compared are their outputs, of LENGTH tokens, with the unfinished hypotheses of ours at that step.
    """
    if transformers is None:
        pytest.skip("needs transformers")
    theirs = marian(device)
    model = reference(device) if engine == "Transformer" else adapt(theirs)
    generator = torch.Generator().manual_seed(B)
    source = torch.randint(2, PAD, (B, LENGTH), generator=generator).to(device)
    mask = torch.ones_like(source)

    def ours(length: int = LENGTH, n_best: int = 1) -> Tensor:
        lengths = {"min_length": length, "max_length": length}
        if beam_size == 1:
            return decode(model, source, Greedy(**lengths)).tokens
        return decode(model, source, BeamSearch(beam_size=beam_size, n_best=n_best, **lengths)).tokens

    def generate() -> Tensor:
        return theirs.generate(
            source, attention_mask=mask, do_sample=False, num_beams=beam_size, min_new_tokens=LENGTH,
            max_new_tokens=LENGTH,
        )  # fmt: skip

    peers: dict[str, Callable[[], object] | None] = {"Hugging Face generate": generate, "CTranslate2": None}
    found = [row.tolist() for row in ours(LENGTH + 1, beam_size)]
    outputs = [generate()[:, 1:].tolist()]
    with ExitStack() as stack:
        if ctranslate2 is not None:
            translate = stack.enter_context(with_ctranslate2(theirs, source, beam_size, tmp_path))
            peers["CTranslate2"] = translate
            outputs.append(translate())
        for output in outputs:
            assert sum(row in rows for row, rows in zip(output, found, strict=True)) >= 0.9 * B
        kind = "beam" if beam_size > 1 else "greedy"
        name = f"{engine} 6+6x512 {kind} {beam_size} B{B} S{LENGTH} T{LENGTH} V{V} fp32"
        compare("decode", name, ours, peers=peers, pause=0.1)


# In a process of its own, whose resident memory is the decoder's: at its peak, over that before the model is made.
MEMORY = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import bench_decode
from condgen_fast.decode import BeamSearch, decode
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer

def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

B, K = int(sys.argv[2]), int(sys.argv[3])
beam = BeamSearch(beam_size=K, min_length=bench_decode.LENGTH, max_length=bench_decode.LENGTH)
source = torch.randint(2, bench_decode.PAD, (B, bench_decode.LENGTH))
small = TransformerConfig(64, width=64, feed_forward=64, encoder_layers=1, decoder_layers=1, heads=1)
decode(Transformer(small).eval(), source[:2] % 50 + 5, beam)  # what is loaded at the first call
before = status("VmRSS")
model = bench_decode.reference("cpu")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
for _ in range(3):
    decode(model, source, beam)
print(status("VmHWM") - before, 4 * sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("malloc", ["blocks from 1 MiB on mapped", "as it is set"])
def test_memory(note, malloc):
    """Peak memory of a decode beside weights, one cache of keys and values, and the logits of one step.

    As it is set, glibc's malloc keeps freed logits on its heap, between what is still in use.
    """
    B, K, layers, width = 32, 4, SIZES["base"]["decoder_layers"], SIZES["base"]["width"]
    arguments = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), str(B), str(K)]
    environment = dict(os.environ)
    if malloc != "as it is set":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    peak, weights = map(int, ran.stdout.split())
    cache = 4 * 2 * layers * width * B * LENGTH * (K + 1)  # of the beams' tokens, and of the source once a sentence
    needed = weights + cache + 4 * B * K * V
    note(
        f"decode memory  Transformer 6+6x512 beam {K} B{B} S{LENGTH} T{LENGTH} V{V} fp32, malloc {malloc}: "
        f"{peak / 2**20:.0f} MiB, {peak / needed:.2f}x weights + cache + logits ({needed / 2**20:.0f} MiB)"
    )


def translator(name: str, strategy: Any, B: int, device: str) -> Callable[..., list[list[int]]]:
    """Translates those sentences in one batch, or four of them one by one, with the model or one in its place."""
    model, sentences = shipped(name, device)[0], sources(name, device, 32)
    rows = [[row] for row in sentences[::8]] if B == 1 else [sentences]
    padded = [pad_sequences(batch, model.pad_id).to(device) for batch in rows]

    def translate(model: Any = model) -> list[list[int]]:
        return [best[0] for source in padded for best in decode(model, source, strategy).to_lists()]

    return translate


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


def test_translate(compare, device):
    """A file of 400 lines: sorted by length into batches of a token budget, or as it comes, 32 lines at a time."""
    model, vocabulary = shipped("transformer-en-de", device)
    lines = embedded.load("test")[0][:400]

    def ours() -> list[str]:
        return translate_lines(model, vocabulary, lines, "beam", beam_size=4, max_tokens=2048)

    def unsorted() -> list[str]:
        parts = windows(lines, 32)
        return [
            line
            for part in parts
            for line in translate_lines(model, vocabulary, part, "beam", beam_size=4, max_tokens=10**6)
        ]

    assert ours() == unsorted()
    tokens = sum(map(len, vocabulary.encode(lines)))
    compare("translate", f"400 lines, {tokens} tokens, beam 4", ours, peers={"32 lines at a time": unsorted})
