"""Subword vocabulary: fixed ids, determinism, round trips, and what is refused."""

from __future__ import annotations

import pickle

import pytest

from condgen_fast.data.embedded import load
from condgen_fast.data.vocabulary import Vocabulary

SMALL = ["hello world a b c", "xyz"] * 10


@pytest.fixture(scope="module")
def text() -> list[str]:
    english, german = load("valid")
    return english + german


@pytest.fixture(scope="module")
def vocabulary(text) -> Vocabulary:
    return Vocabulary.train(text, 500)


def test_special_ids(vocabulary):
    assert len(vocabulary) == 500
    ids = [vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert vocabulary.pieces(ids) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_same_text_gives_same_bytes(text, model_type):
    first, second = (Vocabulary.train(iter(text), 300, model_type=model_type) for _ in range(2))
    assert first.model == second.model and first.fingerprint == second.fingerprint
    assert first.fingerprint != Vocabulary.train(text, 301, model_type=model_type).fingerprint


def test_round_trip(vocabulary, text):
    rows = vocabulary.encode(text)
    assert all(i > 4 for row in rows for i in row)
    assert vocabulary.decode(rows) == [" ".join(line.replace("…", "...").split()) for line in text]
    assert "".join(vocabulary.pieces(rows[0])).replace("▁", " ").strip() == text[0]


def test_special_tokens_are_not_read_from_text(vocabulary):
    (row,) = vocabulary.encode(["a <mask> b </s> <pad> <s>"])
    assert not {0, 2, 3, 4} & set(row)


@pytest.mark.parametrize("line", ["", "   ", "\t", "\ufeff"])
def test_a_line_without_characters_is_empty(vocabulary, line):
    assert vocabulary.encode([line]) == [[]]


def test_unknown_characters_and_a_long_line(vocabulary):
    (row,) = vocabulary.encode(["漢字"])
    assert vocabulary.pieces(row) == ["▁", "<unk>"]
    (row,) = vocabulary.encode(["word " * 10_000])
    assert len(row) >= 10_000


def test_empty_lists(vocabulary):
    assert vocabulary.encode([]) == [] and vocabulary.decode([]) == [] and vocabulary.decode([[]]) == [""]
    assert vocabulary.pieces([]) == []


def test_specials_leave_nothing_in_decoded_text(vocabulary):
    (row,) = vocabulary.encode(["Open the file."])
    assert vocabulary.decode([[2, *row, 4, 3, 0, 0]]) == ["Open the file."]


@pytest.mark.parametrize("bad", [-1, 500, 2**40])
def test_an_id_out_of_range_is_refused(vocabulary, bad):
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 500\); got {bad}"):
        vocabulary.decode([[5], [6, bad]])
    with pytest.raises(ValueError, match="ids must be in"):
        vocabulary.pieces([bad])


def test_one_string_is_not_a_list(vocabulary):
    with pytest.raises(TypeError, match="list of str"):
        vocabulary.encode("Open the file.")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_size_too_large_names_the_largest(model_type):
    with pytest.raises(ValueError, match=r"size must be at most (\d+) for this text; got 8000") as error:
        Vocabulary.train(SMALL, 8000, model_type=model_type)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert len(Vocabulary.train(SMALL, largest, model_type=model_type)) == largest


def test_a_size_too_small_names_the_smallest():
    with pytest.raises(ValueError, match="size must be at least 13 for the characters of this text; got 6"):
        Vocabulary.train(["hello world"] * 5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5}, "size must be more than 5"),
        ({"size": 20, "model_type": "word"}, "model_type must be one of unigram, bpe; got 'word'"),
        ({"size": 20, "character_coverage": 0}, r"character_coverage must be in \(0, 1\]; got 0"),
        ({"size": 20, "threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.train(SMALL, **options)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_no_text(lines):
    with pytest.raises(ValueError, match="lines must hold text"):
        Vocabulary.train(lines, 50)


def test_a_line_too_long_for_the_trainer_is_used_all_the_same():
    assert len(Vocabulary.train(["hello world a b c " * 1000], 16)) == 16


def test_save_load_and_pickle(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "vocab.model")
    for copy in (Vocabulary.load(tmp_path / "vocab.model"), pickle.loads(pickle.dumps(vocabulary))):
        assert copy.fingerprint == vocabulary.fingerprint and copy.encode(["a b"]) == vocabulary.encode(["a b"])


def test_every_truncation_is_noticed():
    model = Vocabulary.train(SMALL, 20).model
    # Among the pieces, where a cut between two leaves a valid protocol buffer, and then at every hundredth byte.
    for end in [*range(400), *range(400, len(model), 997), len(model) - 1]:
        with pytest.raises(ValueError, match="model must be a serialised SentencePiece model"):
            Vocabulary(model[:end])


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "vocab.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="vocab.model: model must be a serialised SentencePiece model"):
        Vocabulary.load(tmp_path / "vocab.model")


def test_a_model_with_other_ids_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SMALL), model_writer=model, vocab_size=18, minloglevel=2
    )
    with pytest.raises(ValueError, match="ids 0, 1, 2, 3, 4; got -1, 0, 1, 2"):
        Vocabulary(model.getvalue())
