"""The store of top-k teachers: what comes back, what is refused, what a kill leaves behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from condgen_fast.data.batching import ParallelDataset
from condgen_fast.data.teacher_store import HEADER_BYTES, MAGIC, TeacherStore, TeacherStoreWriter
from condgen_fast.data.top_k_records import LOWEST, TopKRecords

SOURCE, TARGET = ["a", "b c", "", "d"], ["A", "B C", "", "D E F"]
LENGTHS = [2, 3, 0, 4]
DESCRIPTION = {
    "k": 4, "vocab_size": 50, "vocabulary": "vocab", "teacher": "model", "temperature": 2.0, "source": SOURCE,
    "target": TARGET, "lengths": LENGTHS,
}  # fmt: skip


def top_k(rows: int, k: int, vocab_size: int, spread: float = 3.0):
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(rows)) * spread
    top = logits.log_softmax(-1).topk(k)
    return top.indices, top.values


def begin(path, rank=0, world_size=1, **changes) -> TeacherStoreWriter:
    return TeacherStoreWriter.open(path, rank=rank, world_size=world_size, **{**DESCRIPTION, **changes})


def fill(writer: TeacherStoreWriter, lines: list[int]) -> None:
    writer.append(lines, *top_k(sum(LENGTHS[i] for i in lines), 4, 50))


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        fill(writer, [3, 0])
        fill(writer, [1])
        writer.finish(path)
    return path


@pytest.mark.parametrize("vocab_size", [64, 100, 8000, 32000, 128256, 262144])
def test_a_record_of_64_tokens_has_at_most_200_bytes_and_comes_back_within_its_step(vocab_size):
    records = TopKRecords(64, vocab_size)
    assert records.size <= 200 and records.log_prob_bits >= 11
    rows = 300 if vocab_size < 10**5 else 20
    ids, log_probs = top_k(rows, 64, vocab_size)
    log_probs[0, 3:] = -torch.inf
    log_probs[1, 0] = 0.0
    log_probs[2, 5], log_probs[2, 6] = -LOWEST, -LOWEST - 1
    data = records.encode(ids, log_probs)
    assert data.shape == (rows, records.size) and data.dtype == np.uint8
    got_ids, got = records.decode(data)
    order = ids.argsort(-1)
    wanted = log_probs.gather(1, order)
    assert torch.equal(got_ids, ids.gather(1, order))
    kept = wanted >= -LOWEST
    assert bool((got[~kept] == -torch.inf).all()) and bool(got[kept].isfinite().all())
    allowed = records.step * (-wanted[kept]).sqrt() + records.step**2 / 4 + 2e-6
    assert bool(((got - wanted)[kept].abs() <= allowed).all())
    assert bool((got[1] == 0).any())


@pytest.mark.parametrize(
    ("k", "vocab_size"),
    [(1, 1), (1, 2), (2, 2), (3, 7), (5, 5), (9, 1000), (130, 131), *((k, 32000) for k in range(1, 12)), (5, 262144)],
)
def test_records_of_any_size(k, vocab_size):
    ids, log_probs = top_k(20, k, vocab_size)
    records = TopKRecords(k, vocab_size)
    got_ids, got = records.decode(records.encode(ids, log_probs))
    order = ids.argsort(-1)
    assert torch.equal(got_ids, ids.gather(1, order))
    torch.testing.assert_close(got, log_probs.gather(1, order), atol=0.02, rtol=0)
    empty_ids, empty = records.decode(records.encode(ids[:0], log_probs[:0]))
    assert empty_ids.shape == empty.shape == (0, k)


def test_records_refuse_what_they_cannot_hold():
    records = TopKRecords(2, 10)
    for ids in ([[3, 3]], [[-1, 2]], [[1, 10]]):
        with pytest.raises(ValueError, match=r"distinct in a row and in \[0, 10\)"):
            records.encode(torch.tensor(ids), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="NaN"):
        records.encode(torch.tensor([[1, 2]]), torch.tensor([[0.0, torch.nan]]))


def test_lines_come_back_in_any_order(written):
    store = TeacherStore(written)
    assert (store.k, store.vocab_size, store.temperature, store.teacher) == (4, 50, 2.0, "model")
    assert store.lengths.tolist() == LENGTHS
    store.check(vocabulary="vocab", source=SOURCE, target=TARGET)
    ids, log_probs = top_k(6, 4, 50)  # of lines 3 and 0, as `written` stored them
    order = ids.argsort(-1)
    ids, log_probs = ids.gather(1, order), log_probs.gather(1, order)
    got_ids, got = store.read([0, 2, 3])
    assert torch.equal(got_ids, torch.cat([ids[4:], ids[:4]]))
    torch.testing.assert_close(got, torch.cat([log_probs[4:], log_probs[:4]]), atol=1e-3, rtol=0)
    assert store.read(torch.tensor([1]))[0].shape == (3, 4) and store.read([])[0].shape == (0, 4)
    assert not written.with_name("store.parts").exists()


def test_other_text_or_vocabulary_is_refused(written):
    store = TeacherStore(written)
    same = {"vocabulary": "vocab", "source": SOURCE, "target": TARGET}
    for change, message in (
        ({"vocabulary": "other"}, "written with another vocabulary: vocab; got other"),
        ({"source": ["x", *SOURCE[1:]]}, "written with another source"),
        ({"target": [*TARGET[:3], "D E"]}, "written with another target"),
        ({"source": SOURCE[:3], "target": TARGET[:3]}, "for a text of 4 lines; got one of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            store.check(**{**same, **change})


def test_damage_is_refused(written):
    whole = written.read_bytes()

    def refuse(data: bytes, message: str, read: bool = False):
        written.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            store = TeacherStore(written)
            if read:
                store.read([3])

    def flipped(place: int) -> bytes:
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    refuse(b"", "is not a teacher store")
    refuse(b"{}" * 5000, "is not a teacher store")
    refuse(whole[:500], "its header does not match its checksum")
    refuse(flipped(len(MAGIC) + 20), "its header does not match its checksum")
    refuse(flipped(HEADER_BYTES + 9), "its index does not match its checksum")
    refuse(whole[:-1], f"must have {len(whole)} bytes; it has {len(whole) - 1}: it is not complete")
    refuse(whole + b"\0", "it is not complete")
    refuse(flipped(len(whole) - 1), "line 4 does not match its checksum", read=True)
    written.write_bytes(flipped(len(whole) - 1))
    assert TeacherStore(written).read([0, 1])[0].shape == (5, 4)  # the other lines are not damaged


def test_a_store_is_whole_or_not_there(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        assert writer.missing() == [0, 1, 3]
        fill(writer, [1])
        assert not path.exists()
        with pytest.raises(ValueError, match="not complete: 2 of 4 lines are missing, the first of them line 1"):
            writer.finish(path)
    assert not path.exists()
    for left_over in (tmp_path / "store.parts" / "records",):
        with pytest.raises(ValueError, match="is not a teacher store"):
            TeacherStore(left_over)
    with begin(path) as again:
        assert again.missing() == [0, 3]
        fill(again, [0, 3])
        again.finish(path)
    assert TeacherStore(path).read([0, 1, 2, 3])[0].shape == (9, 4)
    with pytest.raises(ValueError, match="exists; use another"):
        begin(path)


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_an_entry_cut_off_by_a_kill_is_done_again(tmp_path, cut):
    path = tmp_path / "store"
    with begin(path) as writer:
        fill(writer, [0])
        fill(writer, [1])
    journal = tmp_path / "store.parts" / "rank-0.done"
    os.truncate(journal, journal.stat().st_size - 1 - cut)
    again = begin(path)
    assert again.missing() == [1, 3]
    fill(again, [1])
    fill(again, [3])
    again.finish(path)
    assert TeacherStore(path).read([0, 1, 3])[0].shape == (9, 4)


def test_processes_share_the_lines(tmp_path):
    path = tmp_path / "store"
    with begin(path, 0, 2) as first, begin(path, 1, 2) as second:
        assert (first.missing(), second.missing()) == ([0], [1, 3])
        fill(second, [3])
        fill(first, [0])
    alone = begin(path)  # their number may change
    assert alone.missing() == [1]
    fill(alone, [1])
    alone.finish(path)
    assert TeacherStore(path).lengths.sum() == 9


def test_one_process_at_a_time_writes_a_share(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        for world_size in (1, 2):
            with pytest.raises(ValueError, match="store.parts is being written by another process"):
                begin(path, 0, world_size)
        fill(writer, [0])
    holder = (
        "import sys, time; from condgen_fast.data.files import lock\n"
        "held = lock(sys.argv[1], 'held'); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "store.parts" / "rank-0.lock")], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="is being written by another process"):
            begin(path)
        process.kill()  # which gives the lock back
    with begin(path) as writer:
        assert writer.missing() == [1, 3]


def test_what_does_not_belong_together_is_refused(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        fill(writer, [0])
    for change in ({"k": 5}, {"teacher": "other"}, {"temperature": 1.0}, {"vocabulary": "x"}, {"target": SOURCE}):
        with pytest.raises(ValueError, match=f"was begun with {next(iter(change))} "):
            begin(path, **change)
    with pytest.raises(ValueError, match="was begun with tokens 9; got 10"):
        begin(path, lengths=[3, 3, 0, 4])
    with pytest.raises(ValueError, match="was begun with starts"):
        begin(path, lengths=[3, 2, 0, 4])
    with pytest.raises(ValueError, match=r"k must be in \[1, 50\]; got 51"):
        begin(path, k=51)
    with pytest.raises(ValueError, match=r"must have shape \[3, 4\]; got \[2, 4\]"):
        begin(path).append([1], *top_k(2, 4, 50))
    (tmp_path / "store.parts" / "records").unlink()
    with pytest.raises(ValueError, match="lost its records"):
        begin(path)


def test_a_full_disk_shows_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        begin(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_pairs_know_their_lines():
    class Letters:
        pad_id, bos_id, eos_id = 0, 2, 3

        def encode(self, lines):
            return [[ord(letter) for letter in line] for line in lines]

    data = ParallelDataset.encode(["ab", "", "c", "long", "d"], ["x", "y", "z", "w", "v"], Letters(), max_length=4)
    assert data.lines.tolist() == [0, 2, 4] and len(data) == 3
