"""Options of train transformer that follow a distribution: each trains, and its loss is what it says."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from condgen_fast.cli import main
from condgen_fast.data.teacher_store import TeacherStore
from condgen_fast.data.text import read_lines
from condgen_fast.losses.d2gpo import d2gpo_prior
from condgen_fast.models.checkpoint import load_model, save_model
from condgen_fast.models.transformer import Transformer
from condgen_fast.ops import TopK, kd_loss
from condgen_fast.recipes import distill, train_transformer, training


@pytest.fixture(scope="module")
def teacher(train_arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation") / "teacher"
    assert main(train_arguments("transformer", folder, updates=4, save_every=4)) == 0
    return folder


@pytest.fixture
def store_arguments(teacher, corpus):
    def arguments(output, **more):
        options = {
            "model": teacher, "source": corpus / "train.src", "target": corpus / "train.trg", "output": output,
            "store-top-k": 8, "device": "cpu", "max-tokens": 300,
        } | {name.replace("_", "-"): value for name, value in more.items()}  # fmt: skip
        return ["distill", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]

    return arguments


@pytest.fixture
def first_loss(train_arguments, teacher, tmp_path, monkeypatch):
    """first_loss(option=…) -> the loss of the first update, and what it was computed from: the student's logits, the
    teacher's and labels of its real positions."""
    frozen, _ = load_model(teacher)
    runs = 0

    def run(**options):
        nonlocal runs
        runs += 1
        seen = {}

        def stop(self, batch):
            self.model.train()
            torch.manual_seed(7)
            seen["loss"] = self._inner.loss(self.model, batch)["loss"]
            read, predict = batch.target[:, :-1], batch.target[:, 1:]
            real = predict != self.model.pad_id
            torch.manual_seed(7)  # the same dropout
            seen["student"] = self.model.project(self.model(batch.source, batch.source_lengths, read)[real])
            with torch.no_grad():
                seen["teacher"] = frozen.project(frozen(batch.source, batch.source_lengths, read)[real])
            seen["labels"] = predict[real]
            raise KeyboardInterrupt

        monkeypatch.setattr(training.Run, "step", stop)
        options = {"vocabulary": teacher / "vocab.model", "label_smoothing": 0.1} | options
        assert main(train_arguments("transformer", tmp_path / f"run-{runs}", **options)) == 130
        monkeypatch.undo()
        return seen

    return run


def word_kd(seen, *, alpha, temperature=1.0):
    """Kim and Rush 2016, written out."""
    hard = F.cross_entropy(seen["student"], seen["labels"], label_smoothing=0.1)
    log_p, log_q = ((seen[name] / temperature).log_softmax(-1) for name in ("student", "teacher"))
    return (1 - alpha) * hard + alpha * temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def test_word_level_kd_and_its_mixture_with_the_labels(first_loss, teacher):
    for options in ({"alpha": 1}, {"alpha": 0.3, "temperature": 2.0}, {}):
        seen = first_loss(teacher=teacher, **options)
        torch.testing.assert_close(seen["loss"], word_kd(seen, **{"alpha": 0.5, **options}), rtol=1e-5, atol=1e-6)
    seen = first_loss()
    torch.testing.assert_close(seen["loss"], word_kd(seen, alpha=0), rtol=1e-5, atol=1e-6)
    seen = first_loss(teacher=teacher, divergence="tvd", alpha=1)
    wanted = kd_loss(seen["student"], seen["teacher"], alpha=1.0, divergence="tvd", impl="reference")
    torch.testing.assert_close(seen["loss"], wanted, rtol=1e-5, atol=1e-6)


def test_top_k_of_a_teacher(first_loss, teacher):
    for tail in ("uniform", "drop", "renormalise"):
        seen = first_loss(teacher=teacher, top_k=3, tail=tail)
        log_probs, ids = seen["teacher"].log_softmax(-1).topk(3)
        wanted = kd_loss(
            seen["student"], TopK(ids, log_probs, tail), seen["labels"], label_smoothing=0.1, impl="reference"
        )
        torch.testing.assert_close(seen["loss"], wanted, rtol=1e-5, atol=1e-6)
    full = first_loss(teacher=teacher, top_k=60)
    torch.testing.assert_close(full["loss"], word_kd(full, alpha=0.5), rtol=1e-5, atol=1e-6)


def test_a_store_is_the_teacher_to_its_rounding(first_loss, store_arguments, tmp_path):
    for temperature, store_temperature in ((1.0, 1.0), (2.0, 2.0), (2.0, 1.0)):
        path = tmp_path / f"store-{temperature}-{store_temperature}"
        assert main(store_arguments(path, store_temperature=store_temperature)) == 0
        assert TeacherStore(path).temperature == store_temperature
        for tail in ("uniform", "renormalise"):
            seen = first_loss(teacher_store=path, tail=tail, temperature=temperature, alpha=0.7)
            log_probs, ids = (seen["teacher"] / store_temperature).log_softmax(-1).topk(8)
            online = kd_loss(
                seen["student"], TopK(ids, log_probs, tail), seen["labels"], alpha=0.7, label_smoothing=0.1,
                temperature=temperature, teacher_temperature=temperature / store_temperature,
            )  # fmt: skip
            torch.testing.assert_close(seen["loss"], online, rtol=2e-4, atol=1e-4)


def test_a_store_of_text_with_lines_that_are_left_out(first_loss, store_arguments, corpus, tmp_path):
    """Empty lines, lines that are too long and equal lines: every token meets its own distribution all the same."""
    text = {}
    for side in ("src", "trg"):
        lines = read_lines(corpus / f"train.{side}")[:40]
        lines[5:5] = ["", " ".join(lines), lines[7], lines[7]]
        text[side] = tmp_path / f"text.{side}"
        text[side].write_text("".join(line + "\n" for line in ["", *lines]), encoding="utf-8")
    path, both = tmp_path / "store", {"source": text["src"], "target": text["trg"]}
    assert main(store_arguments(path, **both)) == 0
    seen = first_loss(teacher_store=path, max_length=40, max_tokens=100_000, alpha=1, **both)
    log_probs, ids = seen["teacher"].log_softmax(-1).topk(8)
    online = kd_loss(seen["student"], TopK(ids, log_probs, "uniform"), alpha=1.0)
    torch.testing.assert_close(seen["loss"], online, rtol=2e-4, atol=1e-4)


def test_d2gpo_from_trained_and_from_given_embeddings(first_loss, teacher, tmp_path):
    model, vocabulary = load_model(teacher)
    trained = model.decoder.embedding.tokens.weight.detach()
    vectors = tmp_path / "vectors.txt"
    pieces = vocabulary.pieces(range(len(vocabulary)))
    given = torch.randn(len(vocabulary), 5, generator=torch.Generator().manual_seed(3))
    vectors.write_text(
        "".join(f"{p} {' '.join(map(repr, v))}\n" for p, v in zip(pieces, given.tolist(), strict=True)),
        encoding="utf-8",
    )
    unlisted = (0, 1, 2, 4)
    base = {"d2gpo_temperature": 0.3, "d2gpo_width": 5}
    losses = []
    for embeddings, source, change in (
        (trained, teacher, {}),
        (given, vectors, {}),
        (given, vectors, {"d2gpo_shape": "linear"}),
        (given, vectors, {"d2gpo_sigma": 3.0}),
        (given, vectors, {"d2gpo_width": 2}),
        (given, vectors, {"d2gpo_temperature": 0.5}),
        (given, vectors, {"d2gpo_alpha": 0.4}),
    ):
        options = base | change
        seen = first_loss(d2gpo_embeddings=source, **options)
        fields = {name.removeprefix("d2gpo_"): value for name, value in options.items()}
        alpha = fields.pop("alpha", 0.1)
        prior = d2gpo_prior(embeddings, unlisted=unlisted, **fields)
        soft = kd_loss(seen["student"], prior, seen["labels"], alpha=1.0, impl="reference")
        hard = F.cross_entropy(seen["student"], seen["labels"], label_smoothing=0.1)
        wanted = (1 - alpha) * hard + alpha * fields["temperature"] ** 2 * soft
        torch.testing.assert_close(seen["loss"], wanted, rtol=1e-5, atol=1e-6)
        losses.append(seen["loss"].item())
    assert len({round(loss, 5) for loss in losses}) == len(losses)  # each option changes it


def test_every_option_trains(train_arguments, store_arguments, teacher, tmp_path):
    store = tmp_path / "store"
    assert main(store_arguments(store)) == 0
    for name, options in {
        "kd": {"teacher": teacher, "alpha": 1},
        "top-k": {"teacher": teacher, "top_k": 4},
        "from-store": {"teacher_store": store},
        "d2gpo": {"d2gpo_embeddings": teacher},
    }.items():
        options = {"vocabulary": teacher / "vocab.model", "updates": 3, "save_every": 3} | options
        assert main(train_arguments("transformer", tmp_path / name, **options)) == 0, name
        model, _ = load_model(tmp_path / name)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_does_not_go_on_with_another_teacher_of_the_same_name(
    train_arguments, store_arguments, teacher, tmp_path, capsys
):
    """Its folder, its store or the file of embeddings was replaced in place."""
    folder, store, vectors = tmp_path / "teacher", tmp_path / "store", tmp_path / "vectors.txt"
    model, vocabulary = load_model(teacher)
    save_model(folder, model, vocabulary)
    assert main(store_arguments(store)) == 0
    pieces = vocabulary.pieces(range(len(vocabulary)))
    vectors.write_text("".join(f"{piece} {i} 1\n" for i, piece in enumerate(pieces)), encoding="utf-8")
    runs = {
        name: train_arguments("transformer", tmp_path / name, updates=2, vocabulary=teacher / "vocab.model", **options)
        for name, options in {
            "kd": {"teacher": folder}, "from-store": {"teacher_store": store}, "d2gpo": {"d2gpo_embeddings": vectors},
        }.items()
    }  # fmt: skip
    for arguments in runs.values():
        assert main(arguments) == 0
        assert main([*arguments, "--resume"]) == 0
    with torch.no_grad():
        model.decoder.embedding.tokens.weight[5] += 1
    save_model(folder, model, vocabulary)
    store.unlink()
    assert main(store_arguments(store, model=folder)) == 0
    vectors.write_text(vectors.read_text(encoding="utf-8").replace(" 7 1\n", " 7 2\n"), encoding="utf-8")
    for arguments in runs.values():
        capsys.readouterr()
        assert main([*arguments, "--resume"]) == 1
        assert "resume: the teacher, its store or the embeddings are not what" in capsys.readouterr().err


def test_a_killed_store_goes_on_and_is_the_same(store_arguments, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(store_arguments(whole, max_tokens=20)) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    journal = tmp_path / "killed.parts" / "rank-0.done"
    command = [sys.executable, "-m", "condgen_fast.cli", *store_arguments(killed, max_tokens=20)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.stat().st_size > 300:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists() and journal.exists()
    assert main(store_arguments(killed, max_tokens=20)) == 0
    a, b = TeacherStore(whole), TeacherStore(killed)
    lines = range(len(a.lengths))
    assert torch.equal(a.read(lines)[0], b.read(lines)[0])
    torch.testing.assert_close(a.read(lines)[1], b.read(lines)[1], atol=1e-3, rtol=0)


def test_two_processes_write_one_store(store_arguments, corpus, tmp_path, monkeypatch):
    for rank in (1, 0):  # one after the other, as far as each can tell at once
        monkeypatch.setattr(distill, "start_process_group", lambda *_, rank=rank: (rank, 2))
        monkeypatch.setattr(distill.dist, "barrier", lambda: None)
        assert not (tmp_path / "two").exists()
        assert main(store_arguments(tmp_path / "two")) == 0
    store = TeacherStore(tmp_path / "two")
    assert len(store.lengths) == len(read_lines(corpus / "train.src")) and bool((store.lengths > 0).all())


def test_refusals(train_arguments, store_arguments, teacher, corpus, tmp_path, capsys):
    store, vocabulary = tmp_path / "store", {"vocabulary": teacher / "vocab.model"}
    assert main(store_arguments(store)) == 0
    other = tmp_path / "other.trg"
    other.write_text((corpus / "train.trg").read_text().replace("OPEN", "TEXT"), encoding="utf-8")
    output = tmp_path / "run"

    def refused(message, *arguments):
        capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as stopped:  # refused while the command line is read
            status = stopped.code
        error = " ".join(capsys.readouterr().err.split())  # which is broken into lines
        assert status in (1, 2) and message in error, (message, error)

    def train(**options):
        return train_arguments("transformer", output, **options)

    refused("was written with another vocabulary", *train(teacher_store=store, vocabulary_size=50))
    refused("was written with another target", *train(teacher_store=store, target=other, **vocabulary))
    refused("at most one of teacher, teacher_store", *train(teacher_store=store, teacher=teacher, **vocabulary))
    refused("top_k must be left out without --teacher", *train(top_k=3))
    refused("top_k must be in [1, 60]; got 61", *train(teacher=teacher, top_k=61, **vocabulary))
    refused("alpha must be in [0, 1]; got 1.5", *train(teacher=teacher, alpha=1.5, **vocabulary))
    refused("temperature must be > 0; got 0", *train(teacher=teacher, temperature=0, **vocabulary))
    refused("d2gpo_sigma must be > 0; got -1", *train(d2gpo_embeddings=teacher, d2gpo_sigma=-1, **vocabulary))
    refused("d2gpo_width must be >= 1; got 0", *train(d2gpo_embeddings=teacher, d2gpo_width=0, **vocabulary))
    assert not output.exists()
    for name, value in {"alpha": 0.9, "temperature": 2.0, "divergence": "jsd"}.items():
        refused(f"{name} must be left out without --teacher or --teacher-store", *train(**{name: value}))
    refused("tail must be left out without --top-k or --teacher-store", *train(teacher=teacher, tail="drop"))
    refused("d2gpo_alpha must be left out without --d2gpo-embeddings", *train(d2gpo_alpha=0.5))
    refused("tail must be", *train(teacher=teacher, tail="mean", **vocabulary))
    refused("divergence must be", *train(teacher=teacher, divergence="kl", **vocabulary))
    refused("has another vocabulary", *train(d2gpo_embeddings=teacher, vocabulary_size=50))
    refused("is not a teacher store", *train(teacher_store=other, **vocabulary))
    refused("store exists; use another", *store_arguments(store))
    refused("temperature must be left out with --store-top-k", *store_arguments(tmp_path / "t", temperature=2.0))
    without = [x for x in store_arguments(tmp_path / "t", store_temperature=2.0) if x not in ("--store-top-k", "8")]
    target = without.index("--target")
    refused("store_temperature must be left out without --store-top-k", *without[:target], *without[target + 2 :])
    refused("k must be in [1, 60]; got 61", *store_arguments(tmp_path / "more", store_top_k=61))
    refused("was begun with", *(store_arguments(half_written(store_arguments, tmp_path), store_top_k=3)))
    data = bytearray(store.read_bytes())
    for place in range(len(data) // 2, len(data), 20):
        data[place] ^= 1
    store.write_bytes(data)
    refused("does not match its checksum; write it again", *train(teacher_store=store, **vocabulary))


def half_written(store_arguments, tmp_path):
    """The path of a store that another run has begun."""
    path = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("condgen_fast.data.teacher_store.TeacherStoreWriter.append", interrupt)
        assert main(store_arguments(path)) == 130
    return path


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_pair_the_teacher_cannot_read_is_named(
    train_arguments, store_arguments, teacher, tmp_path, capsys, monkeypatch
):
    real = train_transformer.TeacherStore.__init__

    def without_line_3(self, path):
        real(self, path)
        self.lengths = self.lengths.copy()
        self.lengths[2] = 0

    store = tmp_path / "store"
    assert main(store_arguments(store)) == 0
    monkeypatch.setattr(train_transformer.TeacherStore, "__init__", without_line_3)
    vocabulary = {"vocabulary": teacher / "vocab.model"}
    assert main(train_arguments("transformer", tmp_path / "run", teacher_store=store, **vocabulary)) == 1
    assert "has 0 tokens of line 3" in capsys.readouterr().err


def test_a_teacher_that_reads_less_than_the_training_text_is_refused(train_arguments, teacher, tmp_path, capsys):
    short, vocabulary = tmp_path / "short", {"vocabulary": teacher / "vocab.model"}
    model, pieces = load_model(teacher)
    config = dataclasses.replace(model.config, max_positions=100)
    save_model(short, Transformer(config), pieces)
    assert main(train_arguments("transformer", tmp_path / "run", teacher=short, **vocabulary)) == 1
    assert "max_length must be below the teacher's 100 positions; got 200" in capsys.readouterr().err
