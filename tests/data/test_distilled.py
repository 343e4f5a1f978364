"""The store of a distilled corpus: resuming, sharing between processes, refusing what does not belong together."""

from __future__ import annotations

import json
import resource

import pytest

from condgen_fast.data.distilled import DistilledCorpus
from condgen_fast.data.text import read_lines

SOURCES = [f"sentence {i}" for i in range(10)]
DESCRIPTION = {"teacher": "abc", "strategy": "beam", "beam_size": 5}


def store(path, rank=0, world_size=1, **changes) -> DistilledCorpus:
    arguments = {"sources": SOURCES, "description": DESCRIPTION} | changes
    return DistilledCorpus.open(path / "parts", rank=rank, world_size=world_size, **arguments)


def fill(corpus: DistilledCorpus, indices: list[int]) -> None:
    corpus.append(indices, [f"Satz {i}" for i in indices])


def test_fill_in_any_order_and_finish(tmp_path):
    corpus = store(tmp_path)
    assert corpus.missing() == list(range(10))
    fill(corpus, [7, 3, 9])
    fill(corpus, [])
    assert corpus.missing() == [0, 1, 2, 4, 5, 6, 8]
    with pytest.raises(ValueError, match="not complete: 7 of 10 lines are missing, the first of them line 1"):
        corpus.finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fill(corpus, [8, 6, 5, 4, 2, 1, 0])
    corpus.finish(tmp_path / "out")
    assert read_lines(tmp_path / "out") == [f"Satz {i}" for i in range(10)]


def test_resume_sees_what_was_done(tmp_path):
    fill(store(tmp_path), [0, 5])
    assert store(tmp_path).missing() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_processes_share_the_lines_and_their_number_may_change(tmp_path):
    first, second = store(tmp_path, 0, 2), store(tmp_path, 1, 2)
    assert (first.missing(), second.missing()) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    fill(first, [0, 2])
    fill(second, [9, 1, 3])
    shares = [store(tmp_path, rank, 3).missing() for rank in range(3)]
    assert sorted(i for share in shares for i in share) == [4, 5, 6, 7, 8]
    alone = store(tmp_path)
    fill(alone, alone.missing())
    alone.finish(tmp_path / "out")
    assert read_lines(tmp_path / "out") == [f"Satz {i}" for i in range(10)]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_record_cut_off_by_a_kill_is_done_again(tmp_path, cut):
    fill(store(tmp_path), [0, 1])
    shard = tmp_path / "parts" / "rank-0.jsonl"
    whole = shard.read_bytes()
    fill(store(tmp_path), [2, 3])
    shard.write_bytes(shard.read_bytes()[: len(whole) + cut])
    corpus = store(tmp_path)
    assert corpus.missing() == [2, 3, 4, 5, 6, 7, 8, 9]
    fill(corpus, corpus.missing())
    assert store(tmp_path).missing() == []
    store(tmp_path).finish(tmp_path / "out")
    assert read_lines(tmp_path / "out") == [f"Satz {i}" for i in range(10)]


def test_full_disk_loses_only_the_record_that_did_not_fit(tmp_path):
    corpus = store(tmp_path)
    fill(corpus, [0, 1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            corpus.append([2, 3], ["x" * 2000, "y"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert corpus.missing() == store(tmp_path).missing() == [2, 3, 4, 5, 6, 7, 8, 9]
    fill(corpus, corpus.missing())
    store(tmp_path).finish(tmp_path / "out")
    assert read_lines(tmp_path / "out") == [f"Satz {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": SOURCES[:-1]}, "of a source text of 10 lines; got one of 9"),
        ({"sources": [*SOURCES[:-1], "other"]}, "of another source text of as many lines"),
        ({"sources": [*SOURCES[:-2], SOURCES[-1], SOURCES[-2]]}, "of another source text of as many lines"),
        ({"description": DESCRIPTION | {"teacher": "xyz"}}, "begun with teacher 'abc'; got 'xyz'"),
        ({"description": DESCRIPTION | {"beam_size": 4}}, "begun with beam_size 5; got 4"),
        ({"description": {"teacher": "abc", "strategy": "beam"}}, "begun with beam_size 5; got None"),
    ],
)
def test_another_corpus_teacher_or_option_is_refused(tmp_path, changes, message):
    fill(store(tmp_path), [0])
    with pytest.raises(ValueError, match=message):
        store(tmp_path, **changes)
    assert store(tmp_path).missing() == list(range(1, 10))


def test_a_damaged_header_is_named(tmp_path):
    store(tmp_path)
    for damage in (b"{", b"[]", json.dumps({"lines": 10}).encode()):
        (tmp_path / "parts" / "store.json").write_bytes(damage)
        with pytest.raises(ValueError, match="store.json is not"):
            store(tmp_path)


@pytest.mark.parametrize(
    ("indices", "texts", "message"),
    [
        ([0, 1], ["a"], "same length; got 2 and 1"),
        ([10], ["a"], r"indices must be in \[0, 10\); got 10"),
        ([-1], ["a"], r"indices must be in \[0, 10\); got -1"),
        ([0], ["a\nb"], "must not hold a line break"),
    ],
)
def test_bad_records(tmp_path, indices, texts, message):
    corpus = store(tmp_path)
    with pytest.raises(ValueError, match=message):
        corpus.append(indices, texts)
    assert corpus.missing() == list(range(10))


def test_empty_text_and_empty_source(tmp_path):
    corpus = store(tmp_path)
    corpus.append(range(10), [""] * 10)
    corpus.finish(tmp_path / "out")
    assert read_lines(tmp_path / "out") == [""] * 10
    nothing = DistilledCorpus.open(tmp_path / "nothing", sources=[], description={})
    assert nothing.missing() == []
    nothing.finish(tmp_path / "none")
    assert read_lines(tmp_path / "none") == []


def test_bad_rank(tmp_path):
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\); got 2"):
        store(tmp_path, 2, 2)
