"""Training through the command: resuming after a kill, two processes, warm starts, distillation, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from condgen_fast.cli import main
from condgen_fast.models.checkpoint import load_model, read_tensors
from condgen_fast.recipes.training import average_checkpoints, inverse_square_root


def final_weights(folder):
    return read_tensors(folder / "model.safetensors")


def assert_same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["transformer", "cmlm", "levenshtein", "masked_lm"])
def test_a_resumed_run_ends_with_the_same_weights(kind, train_arguments, tmp_path, monkeypatch):
    assert main(train_arguments(kind, tmp_path / "whole")) == 0
    folder = tmp_path / "whole"
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "vocab.model",
        "log.csv",
        "curve.png",
    }
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]

    from condgen_fast.recipes import training

    real_save = training.Run.save

    def save_and_die(self, measures):
        real_save(self, measures)
        if self.update == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "save", save_and_die)
    assert main(train_arguments(kind, tmp_path / "halves")) == 130
    monkeypatch.undo()
    assert main([*train_arguments(kind, tmp_path / "halves"), "--resume"]) == 0
    assert_same_weights(folder, tmp_path / "halves")


@pytest.fixture
def one_thread():
    """Sums are taken in another order with other numbers of threads, and Adam enlarges what is rounding of zero."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_sigkill_at_any_moment_leaves_a_run_that_resumes(train_arguments, tmp_path, one_thread):
    arguments = train_arguments("transformer", tmp_path / "killed", updates=12, save_every=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert main(train_arguments("transformer", tmp_path / "whole", updates=12, save_every=1)) == 0
    for attempt in range(3):
        resume = ["--resume"] if attempt else []
        process = subprocess.Popen(
            [sys.executable, "-m", "condgen_fast.cli", *arguments, *resume],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        checkpoints, before = tmp_path / "killed" / "checkpoints", attempt * 3
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(p.name[5:]) > before + 1 for p in checkpoints.glob("step-*")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main([*arguments, "--resume"]) == 0
    for a, b in zip(*(sorted((tmp_path / x / "checkpoints").glob("step-*")) for x in ("whole", "killed")), strict=True):
        assert_same_weights(a, b)


def test_sigterm_ends_with_a_status_and_resumes_to_the_same_weights(train_arguments, tmp_path, monkeypatch, capsys):
    from condgen_fast.recipes import training

    real_step = training.Run.step

    def step_and_terminate(self, batch):
        if self.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, batch)

    assert main(train_arguments("transformer", tmp_path / "whole")) == 0
    monkeypatch.setattr(training.Run, "step", step_and_terminate)
    assert main(train_arguments("transformer", tmp_path / "stopped")) == 130
    assert "stopped at update 3; --resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.undo()
    assert main([*train_arguments("transformer", tmp_path / "stopped"), "--resume"]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_what_a_killed_process_left_behind_changes_nothing(train_arguments, tmp_path):
    """Killed before old checkpoints were dropped, or while one was deleted or written."""
    arguments = train_arguments("transformer", tmp_path / "run")
    assert main(arguments) == 0
    before, checkpoints = final_weights(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000002")
    (checkpoints / ".step-00000001.old").mkdir()
    (checkpoints / ".step-00000008.incomplete-1").mkdir()
    assert main([*arguments, "--resume"]) == 0
    after = final_weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(checkpoints.glob(".*"))


def test_resuming_with_other_text_is_refused(train_arguments, corpus, tmp_path, capsys):
    source = tmp_path / "train.src"
    shutil.copy(corpus / "train.src", source)
    assert main(train_arguments("cmlm", tmp_path / "run", source=source)) == 0
    text = source.read_text()
    source.write_text(text.replace("open", "clip"))
    assert main([*train_arguments("cmlm", tmp_path / "run", source=source, updates=8), "--resume"]) == 1
    assert "the text or the vocabulary is not the one" in capsys.readouterr().err


def test_a_full_disk_while_saving_is_a_plain_error(train_arguments, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("condgen_fast.models.checkpoint.save_file", full)
    assert main(train_arguments("transformer", tmp_path / "run")) == 1
    assert "error:" in (message := capsys.readouterr().err) and "No space left on device" in message
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_two_processes_train_and_agree(train_arguments, tmp_path):
    arguments = train_arguments("transformer", tmp_path / "two", updates=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    result = subprocess.run(
        [*command, "-m", "condgen_fast.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    model, _ = load_model(tmp_path / "two")
    assert all(p.isfinite().all() for p in model.parameters())


VALIDATION = """
import json, sys
from condgen_fast.decode import MaskPredict
from condgen_fast.losses.cmlm import cmlm_loss
from condgen_fast.models.cmlm import CMLM, CMLMConfig
from condgen_fast.recipes import training
from condgen_fast.recipes.train_cmlm import TrainCMLM
import tyro, torch
options = tyro.cli(TrainCMLM, args=sys.argv[2:])
vocabulary, _, valid = training.prepare_data(options)
torch.manual_seed(1)
model = CMLM(CMLMConfig(**options.model_fields(), vocab_size=len(vocabulary)))
run = training.Run(options, model, vocabulary, cmlm_loss)
seen, real = [], training.translate_lines
def counted(model, vocabulary, lines, *rest):
    seen.extend(lines)
    return real(model, vocabulary, lines, *rest)
training.translate_lines = counted
measures = run.validate(valid, MaskPredict(iterations=2))
with open(f"{sys.argv[1]}.{run.rank}", "w") as file:
    json.dump([measures, len(seen)], file)
"""


def test_processes_share_the_validation(train_arguments, tmp_path):
    """Each has a part of the sentences, all know the same whole, and it is that of one process."""
    (tmp_path / "script.py").write_text(VALIDATION)
    options = {"max-tokens": 40, "vocabulary-size": 60}
    found = {}
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619"]
        command = launch if processes == 2 else [sys.executable]
        arguments = train_arguments("cmlm", tmp_path / f"run-{processes}", **options)[2:]
        result = subprocess.run(
            [*command, str(tmp_path / "script.py"), str(tmp_path / f"of-{processes}"), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found[processes] = [json.loads((tmp_path / f"of-{processes}.{r}").read_text()) for r in range(processes)]
    [(alone, count)] = found[1]
    assert count == 20 and set(alone) >= {"valid_loss", "valid_bleu"}
    assert found[2] == [[alone, 10], [alone, 10]]


def test_word_level_distillation_and_warm_starts_use_the_teacher(train_arguments, tmp_path):
    assert main(train_arguments("transformer", tmp_path / "teacher")) == 0
    vocabulary = {"vocabulary": tmp_path / "teacher" / "vocab.model"}
    assert main(train_arguments("transformer", tmp_path / "alone", **vocabulary)) == 0
    assert main(train_arguments("transformer", tmp_path / "kd", teacher=tmp_path / "teacher", **vocabulary)) == 0
    a, b = final_weights(tmp_path / "alone"), final_weights(tmp_path / "kd")
    assert any(not torch.equal(a[name], b[name]) for name in a)

    start = {"initialize-from": tmp_path / "teacher", "updates": 1, "save-every": 1, "learning-rate": 1e-9}
    assert main(train_arguments("levenshtein", tmp_path / "warm", **vocabulary, **start)) == 0
    teacher, warm = final_weights(tmp_path / "teacher"), final_weights(tmp_path / "warm")
    for name, tensor in teacher.items():
        torch.testing.assert_close(warm[name], tensor, atol=1e-6, rtol=0)


def test_bf16_on_the_cpu_keeps_few_compiled_products(train_arguments, tmp_path, monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "")  # what is set below is taken back after the test
        monkeypatch.delenv(name)
    assert main(train_arguments("transformer", tmp_path / "fp32", updates=1, save_every=1)) == 0
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv(names[1], "7")  # the user's own
    assert main(train_arguments("transformer", tmp_path / "bf16", updates=1, save_every=1, precision="bf16")) == 0
    assert [os.environ[name] for name in names] == ["128", "7"]


def test_averaging_is_the_mean(train_arguments, tmp_path):
    assert main(train_arguments("transformer", tmp_path / "run")) == 0
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    a, b = (read_tensors(folder / "model.safetensors") for folder in folders)
    for name, tensor in final_weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        average_checkpoints(load_model(tmp_path / "run")[0], [])


def test_schedule():
    rates = [inverse_square_root(update, 1e-3, 100) for update in (1, 50, 100, 400)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "missing.src"}, "missing.src"),
        ({"size": "huge"}, "size must be one of tiny, small, base, big; got 'huge'"),
        ({"updates": 0}, "updates must be >= 1; got 0"),
        ({"clip": -1}, "clip must be > 0; got -1"),
        ({"max-length": 5000}, "max_length must be below the model's 1024 positions; got 5000"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda; got 'tpu'"),
        ({"vocabulary-size": 100_000}, "100000"),
        ({"max-length": 2}, "must have a pair that fits max_length"),
    ],
)
def test_bad_options_are_refused(change, message, train_arguments, tmp_path, capsys):
    try:
        status = main(train_arguments("transformer", tmp_path / "run", **change))
    except SystemExit as stopped:  # refused while the command line is read
        status = stopped.code
    assert status in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())  # which is broken into lines


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("transformer", {"heads": 3}, "width must be a multiple of heads=3; got 16"),
        ("masked_lm", {"block-length": 0}, "block_length must be >= 1; got 0"),
        ("levenshtein", {"insertion-layers": 2}, "insertion_layers must be in [1, decoder_layers=1]; got 2"),
        ("levenshtein", {"beta": 1.5}, "beta must be in [0, 1]; got 1.5"),
        ("cmlm", {"valid-iterations": 0}, "valid_iterations must be >= 1; got 0"),
    ],
)
def test_what_no_model_can_be_is_refused_before_text_is_read(kind, change, message, train_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(train_arguments(kind, tmp_path / "run", source="missing.src", **change))
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_an_unknown_option_names_the_nearest(train_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*train_arguments("transformer", tmp_path / "run"), "--labelsmoothing", "0.1"])
    assert stopped.value.code == 2
    assert "--label-smoothing" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "transformer",
        "cmlm",
        "levenshtein",
        "masked_lm",
    ]


def test_a_folder_with_a_run_is_not_overwritten(train_arguments, tmp_path, capsys):
    assert main(train_arguments("transformer", tmp_path / "run")) == 0
    before = final_weights(tmp_path / "run")
    assert main(train_arguments("transformer", tmp_path / "run")) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main([*train_arguments("transformer", tmp_path / "run", warmup=5), "--resume"]) == 1
    assert "warmup was 4" in capsys.readouterr().err
    assert final_weights(tmp_path / "run").keys() == before.keys()
