"""Text files: what is read, what is refused, and that a failed write leaves the old file."""

from __future__ import annotations

import io
import os
import resource
import stat
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen_fast.data.files import write_atomically
from condgen_fast.data.text import read_lines, read_parallel, write_lines


@contextmanager
def full_disk(limit: int):
    """Writing a file beyond `limit` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
        (b"x" * 10_000 + b"\n", ["x" * 10_000]),
    ],
)
def test_read_lines(tmp_path, data, lines):
    (tmp_path / "text").write_bytes(data)
    assert read_lines(tmp_path / "text") == lines


def test_standard_input_and_output(monkeypatch, capsysbinary):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ä\nb\n".encode()), encoding="ascii"))
    lines = read_lines("-")
    assert lines == ["ä", "b"]
    write_lines("-", lines)
    assert capsysbinary.readouterr().out == "ä\nb\n".encode()


def test_invalid_utf8_names_file_and_line(tmp_path):
    (tmp_path / "text").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(ValueError, match=r"text, line 3: text must be UTF-8; got byte 0xff"):
        read_lines(tmp_path / "text")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_lines(tmp_path / "nowhere")


def test_unequal_files_give_both_counts(tmp_path):
    write_lines(tmp_path / "a", ["x", ""])
    write_lines(tmp_path / "b", ["x", "", "y"])
    with pytest.raises(ValueError, match="same number of lines; got 2 and 3"):
        read_parallel(tmp_path / "a", tmp_path / "b")
    assert read_parallel(tmp_path / "a", tmp_path / "a") == (["x", ""], ["x", ""])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda x: "\n" not in x and x[-1:] != "\r")))
def test_what_is_written_reads_back(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("text") / "text"
    write_lines(path, lines)
    expected = [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else []
    assert read_lines(path) == expected


@pytest.mark.parametrize("line", ["a\nb", "a\r", "\n"])
def test_a_line_break_is_refused_before_anything_is_written(tmp_path, line):
    with pytest.raises(ValueError, match="line 2 must not hold a line break"):
        write_lines(tmp_path / "text", ["fine", line])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "text"
    write_lines(path, ["old"])
    with full_disk(4096), pytest.raises(OSError):
        write_lines(path, ["new" * 100] * 1000)
    assert read_lines(path) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_chunks_are_made_leaves_the_old_file(tmp_path):
    def chunks():
        yield b"new"
        raise RuntimeError("stop")

    path = tmp_path / "file"
    write_atomically(path, [b"old"])
    with pytest.raises(RuntimeError):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_writing_through_a_link_and_to_a_pipe(tmp_path):
    write_lines(tmp_path / "file", ["old"])
    (tmp_path / "link").symlink_to("file")
    write_lines(tmp_path / "link", ["new"])
    assert (tmp_path / "link").is_symlink() and read_lines(tmp_path / "file") == ["new"]
    write_lines("/dev/null", ["gone"])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
