"""Subword vocabulary: one SentencePiece model for both languages, with fixed ids for the special tokens."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from condgen_fast.data.files import write_atomically

SPECIAL_TOKENS = 5
LONGEST_LINE = 4192
"""Bytes of a line that SentencePiece's trainer takes; it skips longer ones."""


class Vocabulary:
    """A SentencePiece model (Kudo and Richardson 2018) whose ids 0 to 4 are padding, unknown, begin, end and mask.

    `Vocabulary(model)` takes the serialised model, as `vocabulary.model` gives it back. Special tokens are never read
    out of text: the characters "<mask>" in a sentence are encoded like any others.
    """

    pad_id = 0
    unk_id = 1
    bos_id = 2
    eos_id = 3
    mask_id = 4

    def __init__(self, model: bytes):
        try:
            if missing := {"pieces", "trainer_spec", "normalizer_spec"} - _parts(model):
                raise RuntimeError(f"its {sorted(missing)[0]} is missing")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, IndexError) as error:  # IndexError: bytes that are no protocol buffer, or cut off
            raise ValueError(f"model must be a serialised SentencePiece model: {error}") from None
        self.model = model
        """the model, serialised"""
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """hash of the model, in hexadecimal: two vocabularies are the same when this is"""
        p = self._processor
        found = (p.pad_id(), p.unk_id(), p.bos_id(), p.eos_id(), p.piece_to_id("<mask>"))
        if found != (0, 1, 2, 3, 4) or not p.is_control(4):
            raise ValueError(
                "model must have pad, unk, bos, eos and the control symbol <mask> as ids 0, 1, 2, 3, 4;"
                f" got {', '.join(map(str, found))}"
            )

    @classmethod
    def train(
        cls,
        lines: Iterable[str],
        size: int,
        *,
        model_type: str = "unigram",
        character_coverage: float = 1.0,
        threads: int = 2,
    ) -> Vocabulary:
        """Train a vocabulary of `size` pieces, the five special ones counted, on text.

        `model_type` is "unigram" (Kudo 2018) or "bpe" (Sennrich 2016). The same lines and options, `threads` among
        them, give the same bytes. Raises ValueError for a size that the text does not allow, and names the nearest
        one that it does.
        """
        if model_type not in ("unigram", "bpe"):
            raise ValueError(f"model_type must be one of unigram, bpe; got {model_type!r}")
        if not 0 < character_coverage <= 1:
            raise ValueError(f"character_coverage must be in (0, 1]; got {character_coverage}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1; got {threads}")
        if size <= SPECIAL_TOKENS:
            raise ValueError(f"size must be more than {SPECIAL_TOKENS}, the special tokens; got {size}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_without_long_lines(lines), model_writer=model, vocab_size=size,
                model_type=model_type, character_coverage=character_coverage, num_threads=threads,
                pad_id=cls.pad_id, unk_id=cls.unk_id, bos_id=cls.bos_id, eos_id=cls.eos_id,
                control_symbols=["<mask>"], minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(_explain(str(error), size)) from None
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file; a truncated or foreign one is a ValueError that names it."""
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the model to a file, whole or not at all."""
        write_atomically(path, [self.model])

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without bos and eos; a line without characters gives an empty list."""
        if isinstance(lines, str):
            raise TypeError("lines must be a list of str; got str")
        return self._processor.encode(list(lines))

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Text of each row of ids; special tokens leave nothing behind, but for the unknown one: " ⁇ "."""
        rows = [list(row) for row in rows]
        self._check_ids(rows)
        return self._processor.decode(rows) if rows else []

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces themselves, as for display: "▁" stands where a space was."""
        ids = list(ids)
        self._check_ids([ids])
        return self._processor.id_to_piece(ids) if ids else []

    def __len__(self) -> int:
        return self._processor.get_piece_size()

    def __reduce__(self) -> tuple[type[Vocabulary], tuple[bytes]]:
        return Vocabulary, (self.model,)

    def _check_ids(self, rows: list[list[int]]) -> None:
        size = len(self)
        for row in rows:
            for i in row:
                if not 0 <= i < size:
                    raise ValueError(f"ids must be in [0, {size}); got {i}")


def _parts(model: bytes) -> set[str]:
    """Names of the parts of a serialised model; IndexError where it is cut off.

    SentencePiece itself takes a file that was cut off between two pieces for a model with fewer of them.
    """
    names = {1: "pieces", 2: "trainer_spec", 3: "normalizer_spec"}
    parts, position = set(), 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = model[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(model):  # each part: its number and wire type, its length in bytes, itself
        parts.add(names.get(varint() >> 3, ""))
        length = varint()
        position += length
    if position > len(model):
        raise IndexError("it is cut off")
    return parts


def _without_long_lines(lines: Iterable[str]) -> Iterator[str]:
    """The text with every line that the trainer would skip cut into pieces that it takes."""
    for line in lines:
        if len(line.encode("utf-8")) <= LONGEST_LINE:
            yield line
        else:
            step = LONGEST_LINE // 4  # no character has more than 4 bytes
            yield from (line[start : start + step] for start in range(0, len(line), step))


def _explain(error: str, size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", error):
        return f"size must be at most {found[1]} for this text; got {size}"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", error):
        return f"size must be at least {found[1]} for the characters of this text; got {size}"
    if "sentences_.empty()" in error or "all_chars_count" in error:
        return "lines must hold text to train a vocabulary on; got none"
    return f"no vocabulary of {size} pieces can be trained on this text: {error}"
