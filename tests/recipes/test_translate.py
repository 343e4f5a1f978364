"""The translate, distill and evaluate commands on text as it comes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from condgen_fast.cli import main


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A briefly trained toy Transformer's folder."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    arguments = {
        "source": corpus / "train.src", "target": corpus / "train.trg", "valid-source": corpus / "valid.src",
        "valid-target": corpus / "valid.trg", "output": folder, "vocabulary-size": 60, "max-tokens": 200, "updates": 3,
        "save-every": 3, "width": 16, "feed-forward": 32, "encoder-layers": 1, "decoder-layers": 1, "heads": 2,
        "device": "cpu",
    }  # fmt: skip
    assert main(["train", "transformer", *(str(x) for k, v in arguments.items() for x in (f"--{k}", v))]) == 0
    return folder


def translate(teacher, tmp_path, data: bytes, *options: str) -> bytes:
    (tmp_path / "in").write_bytes(data)
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["translate", "--model", str(teacher), *files, "--max-length", "5", "--device", "cpu", *options]) == 0
    return (tmp_path / "out").read_bytes()


def test_lines_stay_aligned(teacher, tmp_path):
    text = "open the file\n\nsave\n \n日本語\nclose the window\n".encode()
    lines = translate(teacher, tmp_path, text).decode().split("\n")
    assert len(lines) == 7 and lines[1] == lines[3] == lines[6] == ""


def test_the_result_does_not_depend_on_the_batch(teacher, tmp_path):
    text = b"open the file\nsave\nclose the window and the new file\nmenu\n"
    assert translate(teacher, tmp_path, text) == translate(teacher, tmp_path, text, "--max-tokens", "1")


def test_windows_keep_the_order_and_the_numbers_of_lines(teacher, tmp_path, capsys):
    text = b"open the file\n\nsave\nclose the window and the new file\nmenu\n"
    assert translate(teacher, tmp_path, text) == translate(teacher, tmp_path, text, "--window", "2")
    (tmp_path / "in").write_bytes(b"open\n" * 3 + b"\xff\n")
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "new"), "--device", "cpu"]
    assert main(["translate", "--model", str(teacher), *arguments, "--window", "2"]) != 0
    assert "line 4: text must be UTF-8; got byte 0xff" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_reader_that_left_is_no_error():
    """As in `condgen-fast doctor | head -1`: no traceback, and the status of a process that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "condgen_fast.cli", "doctor"], stdout=writer, stderr=subprocess.PIPE, timeout=300
        )
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


def test_empty_input_gives_empty_output(teacher, tmp_path):
    assert translate(teacher, tmp_path, b"") == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "no-such-folder/out"], "the folder of"),
        (["--max-tokens", "0"], "max_tokens must be >= 1; got 0"),
        (["--device", "cuda"], "device must be auto or cpu where torch sees no GPU; got 'cuda'"),
    ],
)
def test_what_cannot_work_is_refused(options, message, teacher, tmp_path, capsys):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    (tmp_path / "in").write_text("open\n")
    assert main(["translate", "--model", str(teacher), "--input", str(tmp_path / "in"), *options]) == 1
    assert message in capsys.readouterr().err


def test_output_is_utf8_whatever_the_terminal(teacher):
    run = subprocess.run(
        [sys.executable, "-m", "condgen_fast.cli", "translate", "--model", "transformer-en-de", "--strategy", "greedy"],
        input=b"Open the file.\n", env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert run.stdout.decode("utf-8") == "Öffnen Sie die Datei.\n"


def test_invalid_utf8_is_refused_by_line(teacher, tmp_path, capsys):
    (tmp_path / "in").write_bytes(b"open\n\xff\xfe\n")
    assert main(["translate", "--model", str(teacher), "--input", str(tmp_path / "in")]) == 1
    assert "line 2" in capsys.readouterr().err


def test_a_line_of_ten_thousand_tokens(teacher, tmp_path, capsys):
    (tmp_path / "in").write_text("open\n" + "file " * 10_000 + "\n")
    assert main(["translate", "--model", str(teacher), "--input", str(tmp_path / "in"), "--device", "cpu"]) == 1
    assert "line 2 must have at most 1023 tokens; got" in capsys.readouterr().err
    assert translate(teacher, tmp_path, b"open\n" + b"file " * 10_000 + b"\n", "--truncate").count(b"\n") == 2


def test_an_option_of_another_strategy_is_refused(teacher, tmp_path, capsys):
    (tmp_path / "in").write_text("open\n")
    command = ["translate", "--model", str(teacher), "--input", str(tmp_path / "in"), "--iterations", "4"]
    assert main(command) == 1
    assert "iterations is not an option of strategy 'beam'" in capsys.readouterr().err


def test_standard_input_and_output(teacher):
    result = subprocess.run(
        [sys.executable, "-m", "condgen_fast.cli", "translate", "--model", str(teacher), "--max-length", "4"],
        input="open the file\n", capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "strategy", [["greedy"], ["beam", "--beam-size", "3"], ["sample", "--top-k", "5", "--seed", "1"]]
)
def test_distillation_resumes_and_shards(strategy, teacher, corpus, tmp_path, monkeypatch):
    def arguments(output):
        return [
            "distill", "--model", str(teacher), "--source", str(corpus / "valid.src"), "--output", str(output),
            "--strategy", *strategy, "--max-length", "6", "--max-tokens", "40", "--device", "cpu",
        ]  # fmt: skip

    assert main(arguments(tmp_path / "whole")) == 0
    whole = (tmp_path / "whole").read_text()
    assert whole.count("\n") == 20

    from condgen_fast.data.distilled import DistilledCorpus

    append, calls = DistilledCorpus.append, []

    def append_and_stop(self, *rest):
        append(self, *rest)
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(DistilledCorpus, "append", append_and_stop)
    assert main(arguments(tmp_path / "halves")) == 130
    assert not (tmp_path / "halves").exists()
    monkeypatch.undo()
    assert main(arguments(tmp_path / "halves")) == 0
    halves = (tmp_path / "halves").read_text()
    assert halves.count("\n") == 20
    if strategy[0] != "sample":  # draws depend on the batch, and batches on what was missing
        assert halves == whole


def test_distillation_on_two_processes(teacher, corpus, tmp_path):
    command = [
        "distill", "--model", str(teacher), "--source", str(corpus / "valid.src"), "--strategy", "greedy",
        "--max-length", "6", "--device", "cpu", "--output",
    ]  # fmt: skip
    assert main([*command, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m"]
    result = subprocess.run(
        [*launch, "condgen_fast.cli", *command, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_distillation_refuses_to_mix_options(teacher, corpus, tmp_path, capsys):
    command = ["distill", "--model", str(teacher), "--source", str(corpus / "valid.src"), "--max-length", "4"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out"), "--strategy"]
    assert main([*command, "greedy"]) == 0
    assert main([*command, "beam"]) == 1
    assert "strategy" in capsys.readouterr().err


def test_evaluate_prints_edit_rates(tmp_path, capsys):
    (tmp_path / "out").write_text("a b c d\na x\n\nd d e\n")
    (tmp_path / "reference").write_text("a b c d\na b\nc\nd e\n")
    assert main(["evaluate", "--hypotheses", str(tmp_path / "out"), "--reference", str(tmp_path / "reference")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["BLEU", "chrF", "TER", "edits", "repeated"]
    assert printed[3:] == ["edits  33.33   sentences: median 50.00, 25.0 % need none", "repeated tokens 11.11 %"]
    for name in ("out", "reference"):
        (tmp_path / name).write_text("")
    assert main(["evaluate", "--hypotheses", str(tmp_path / "out"), "--reference", str(tmp_path / "reference")]) == 0
    assert "edits   0.00   sentences: median 0.00, 0.0 % need none" in capsys.readouterr().out


def test_evaluate_scores_a_file_against_itself(corpus, capsys):
    reference = str(corpus / "valid.trg")
    assert main(["evaluate", "--hypotheses", reference, "--reference", reference]) == 0
    printed = capsys.readouterr().out
    assert "BLEU  100.00" in printed and "edits   0.00   sentences: median 0.00, 100.0 % need none\n" in printed
    assert main(["evaluate", "--reference", reference]) == 1
