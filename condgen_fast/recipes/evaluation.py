"""Decoding of whole texts, as translation, distillation, validation and evaluation use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from tqdm import tqdm

from condgen_fast._check import check_number
from condgen_fast.data.batching import pad_sequences
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.decode import Hypotheses, decode
from condgen_fast.models.checkpoint import kind
from condgen_fast.models.layers import EncoderDecoder

OWN_STRATEGY = {
    "transformer": "beam",
    "cmlm": "mask_predict",
    "levenshtein": "levenshtein",
    "masked_lm": "block_diffusion",
}


@dataclass(kw_only=True)
class DecodingOptions:
    """How to decode: a strategy and its options; an option that the strategy does not have is an error."""

    strategy: str | None = None
    """a short name, as decode() lists them; by default the strategy that the model was trained for"""
    beam_size: int | None = None
    """beam: hypotheses kept at every step"""
    length_penalty: float | None = None
    """beam: exponent of the length that scores are divided by"""
    temperature: float | None = None
    """sample, block_diffusion: softmax temperature"""
    top_k: int | None = None
    """sample: draw among this many most probable tokens"""
    top_p: float | None = None
    """sample: draw among the most probable tokens that hold this share of the probability"""
    seed: int | None = None
    """sample, block_diffusion: seed of the draws"""
    iterations: int | None = None
    """mask_predict: decoder passes"""
    length_beam: int | None = None
    """mask_predict: candidate lengths a sentence"""
    max_iterations: int | None = None
    """levenshtein, refine, insert: rounds at most"""
    eos_penalty: float | None = None
    """levenshtein, insert: subtracted from the score of inserting nothing"""
    policy: str | None = None
    """block_diffusion: quota, threshold, margin or entropy"""
    threshold: float | None = None
    """block_diffusion: how sure a token must be to be written (quota has none)"""
    steps: int | None = None
    """block_diffusion: passes a block, of policy quota"""
    block_length: int | None = None
    """block_diffusion: positions of a block"""
    max_length: int | None = None
    """tokens of a translation at most, the closing eos counted"""

    def strategy_for(self, model: EncoderDecoder) -> tuple[str, dict[str, object]]:
        """The strategy's name and its given options, as `decode` takes them."""
        given = {field.name: getattr(self, field.name) for field in fields(DecodingOptions)}
        name = given.pop("strategy") or OWN_STRATEGY[kind(model)]
        return name, {key: value for key, value in given.items() if value is not None}


def batches_by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `max_tokens` padded tokens, longest first: the memory needed shows at once."""
    check_number(max_tokens, "max_tokens", minimum=1, integer=True)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, max_tokens // max(lengths[order[0]], 1))
        yield order[:rows]
        order = order[rows:]


def translate_batch(
    model: EncoderDecoder, sources: list[list[int]], strategy: object, **options: object
) -> tuple[list[list[int]], Hypotheses]:
    """Best hypothesis (ids) of each source (ids without eos), and everything `decode` returned."""
    device = next(model.parameters()).device
    source = pad_sequences([[*ids, model.eos_id] for ids in sources], model.pad_id).to(device)
    hypotheses = decode(model, source, strategy, **options)
    lengths = hypotheses.lengths[:, 0].tolist()
    rows = zip(hypotheses.tokens[:, 0].tolist(), lengths, strict=True)
    return [tokens[:length] for tokens, length in rows], hypotheses


def translate_lines(
    model: EncoderDecoder,
    vocabulary: Vocabulary,
    lines: list[str],
    strategy: object,
    *,
    max_tokens: int = 4096,
    truncate: bool = False,
    progress: bool = False,
    first: int = 1,
    **options: object,
) -> list[str]:
    """Translate text, one sentence a line; an empty line stays empty.

    A line with more tokens than the model has positions is a ValueError that names it, before anything is decoded;
    with `truncate` its end is left out. `first` is the number of the first line.
    """
    encoded = vocabulary.encode(lines)
    longest = model.max_positions - 1
    for number, ids in enumerate(encoded, first):
        if len(ids) > longest:
            if not truncate:
                raise ValueError(
                    f"line {number} must have at most {longest} tokens; got {len(ids)} (--truncate leaves its end out)"
                )
            del ids[longest:]
    filled = [i for i, ids in enumerate(encoded) if ids]
    outputs = [""] * len(lines)
    with tqdm(total=len(filled), unit="sentence", disable=not progress) as bar:
        for batch in batches_by_length([len(encoded[i]) for i in filled], max_tokens):
            indices = [filled[i] for i in batch]
            tokens, _ = translate_batch(model, [encoded[i] for i in indices], strategy, **options)
            for i, text in zip(indices, vocabulary.decode(tokens), strict=True):
                outputs[i] = text
            bar.update(len(batch))
    return outputs
