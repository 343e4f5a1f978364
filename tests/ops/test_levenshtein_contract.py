"""What the levenshtein ops refuse, and how they behave in torch: threads, opcheck, compile, graphs, memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from levenshtein_cases import BOS, EOS, IDS, IMPLS, MASK, PAD, assert_equal, batch, random_pairs, sentence

from condgen_fast.ops.levenshtein import apply_edits, edit_alignment, edit_distance, edit_oracle


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_inside_a_row_is_refused(impl):
    good, bad = batch([[BOS, 10, EOS], [BOS, EOS]]), batch([[BOS, 10, EOS], [BOS, PAD, EOS]])
    message = " must be right-padded; got pad_id 0 before a token in row 1, position 1"
    calls = {
        "tokens": (lambda: edit_oracle(bad, good, pad_id=PAD, impl=impl), lambda: apply_edits(bad, **IDS, impl=impl)),
        "target": (lambda: edit_oracle(good, bad, pad_id=PAD, impl=impl),),
        "a": (lambda: edit_distance(bad, good, pad_id=PAD, impl=impl),),
        "b": (lambda: edit_distance(good, bad, pad_id=PAD, impl=impl),),
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"^{name}{message}$"):
                call()


def test_messages():
    x = batch([sentence([10])])
    refused = [
        (ValueError, r"tokens must have shape \[B, S\]; got \[3\]", lambda: edit_oracle(x[0], x, pad_id=0)),
        (TypeError, "target must be a Tensor; got list", lambda: edit_oracle(x, [[1]], pad_id=0)),
        (ValueError, "tokens must be int64 or int32; got float32", lambda: edit_oracle(x.float(), x, pad_id=0)),
        (ValueError, "target must be int64; got int32", lambda: edit_oracle(x, x.int(), pad_id=0)),
        (ValueError, r"b must have shape .*; got \[2, 3\]", lambda: edit_distance(x, x.repeat(2, 1), pad_id=0)),
        (ValueError, "slots must be 'kept' or 'source'; got 'all'", lambda: edit_oracle(x, x, pad_id=0, slots="all")),
        (ValueError, "cost must be 'levenshtein' or 'indel'; got 'x'", lambda: edit_distance(x, x, pad_id=0, cost="x")),
        (ValueError, "impl must be 'auto' or 'reference'; got 'x'", lambda: edit_oracle(x, x, pad_id=0, impl="x")),
        (TypeError, "all_pairs must be a bool; got int", lambda: edit_distance(x, x, pad_id=0, all_pairs=1)),
        (ValueError, "gap_id must differ from pad_id; got 0 .*", lambda: edit_alignment(x, x, pad_id=0, gap_id=0)),
        (ValueError, "gap_id must be in .*", lambda: edit_alignment(x.int(), x.int(), pad_id=0, gap_id=2**31)),
        (
            ValueError,
            r"carried\[1\] must have shape \[B, S, ...\] with B=1, S=3 on cpu; got \[1, 2\] on cpu",
            lambda: apply_edits(x, carried=(x, x[:, :2]), **IDS),
        ),
        (TypeError, "carried must be a sequence of Tensors; got Tensor", lambda: apply_edits(x, carried=x, **IDS)),
        (TypeError, "carried must be a sequence of Tensors; got NoneType", lambda: apply_edits(x, carried=None, **IDS)),
        (TypeError, "pad_id must be an int; got float", lambda: edit_distance(x, x, pad_id=0.0)),
        (ValueError, "delete must be bool; got int64", lambda: apply_edits(x, delete=x, **IDS)),
        (ValueError, r"delete must have .*; got \[1, 2\]", lambda: apply_edits(x, delete=x[:, :2].bool(), **IDS)),
        (ValueError, r"insert must have shape .*; got \[1, 3\]", lambda: apply_edits(x, insert=x, **IDS)),
        (ValueError, r"fill must have shape .*; got \[1, 2\]", lambda: apply_edits(x, fill=x[:, :2], **IDS)),
        (ValueError, "scores must be .*; got int64", lambda: apply_edits(x, scores=x, **IDS)),
        (ValueError, "bounds must be int64; got int32", lambda: apply_edits(x, bounds=x[:, 0].int(), **IDS)),
        (ValueError, r"bounds must have shape \[B\].*; got \[2\]", lambda: apply_edits(x, bounds=x[0, :2], **IDS)),
        (
            ValueError,
            r"mask_id must be in \[-2147483648, 2147483647\]; got 1099511627776",
            lambda: apply_edits(x.int(), **{**IDS, "mask_id": 2**40}),
        ),
        (ValueError, "pad_id must be in .*; got 1180591620717411303424", lambda: edit_distance(x, x, pad_id=2**70)),
        (
            ValueError,
            "insert must ask for fewer than 2147483648 tokens a row; got 4294967299",
            lambda: apply_edits(x, insert=torch.full((1, 2), 2**62), **IDS),
        ),
        (ValueError, "max_length must be >= 2; got 1", lambda: apply_edits(x, max_length=1, **IDS)),
        (ValueError, "mask_id must differ from pad_id; got 0 .*", lambda: apply_edits(x, **{**IDS, "mask_id": 0})),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=f"^{message}$"):
            call()


def test_threads_do_not_change_the_result():
    rows, targets = random_pairs(600, random.Random(22))
    tokens, target = batch(rows), batch(targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = edit_oracle(tokens, target, pad_id=PAD)
        torch.set_num_threads(2)
        assert_equal(edit_oracle(tokens, target, pad_id=PAD), wanted, rows, targets)
    finally:
        torch.set_num_threads(threads)


def test_opcheck(device):
    tokens, target = (
        batch([sentence([10, 11]), sentence([12])], device=device),
        batch([sentence([11])] * 2, device=device),
    )
    ops = torch.ops.condgen_fast
    labels = edit_oracle(tokens, target, pad_id=PAD)
    torch.library.opcheck(ops.edit_oracle.default, (tokens, target, PAD, False))
    torch.library.opcheck(ops.edit_alignment.default, (tokens, target, PAD, MASK))
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.random_noise.default, (tokens, seed, 1, PAD, BOS, EOS, MASK, 0))
    for all_pairs in (False, True):
        torch.library.opcheck(ops.edit_distance.default, (tokens, target, PAD, True, all_pairs))
    for scores in (None, tokens.float()):
        arguments = (tokens, labels.delete, labels.insert, None, scores, PAD, BOS, EOS, MASK, 6, labels.distance)
        torch.library.opcheck(ops.apply_edits.default, arguments)


def test_compiles_without_graph_breaks(device):
    def step(tokens, target, scores):
        labels = edit_oracle(tokens, target, pad_id=PAD)
        canvas = apply_edits(
            tokens, delete=labels.delete, insert=labels.insert, scores=scores, max_length=target.shape[1], **IDS
        )
        filled = apply_edits(canvas.tokens, fill=target, **IDS)
        aligned = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
        return (*labels, *canvas[:4], filled.tokens, edit_distance(tokens, target, pad_id=PAD), *aligned)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (20, 33):
        rows, targets = random_pairs(count, random.Random(count))
        tokens, target = batch(rows, device=device), batch(targets, device=device)
        results = compiled(tokens, target, tokens.float())
        for value, wanted in zip(results, step(tokens, target, tokens.float()), strict=True):
            assert torch.equal(value, wanted)
        assert torch.equal(results[8], target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_captures_all_of_it():
    """Nothing waits for the host: what a capture records runs again on other contents."""
    rows, targets = random_pairs(16, random.Random(5))
    tokens, target = batch(rows, device="cuda"), batch(targets, device="cuda")

    def step():
        labels = edit_oracle(tokens, target, pad_id=PAD)
        canvas = apply_edits(tokens, delete=labels.delete, insert=labels.insert, max_length=target.shape[1], **IDS)
        alignment = edit_alignment(tokens, target, pad_id=PAD, gap_id=MASK)
        distance = edit_distance(tokens, target, pad_id=PAD, all_pairs=True)
        return *labels, canvas.tokens, *alignment, distance

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    tokens.copy_(tokens.roll(1, 0))
    graph.replay()
    for value, wanted in zip(recorded, step(), strict=True):
        assert torch.equal(value, wanted)


def test_memory_of_a_long_sentence():
    """32768 x 32768 tokens of few symbols, whose table is dense: at most a bit a cell."""
    code = """
        import resource
        import torch
        from condgen_fast.ops import edit_oracle
        torch.manual_seed(0)
        x, y = (torch.nn.functional.pad(torch.randint(10, ALPHABET, (1, 32766)), (1, 1), value=5) for _ in range(2))
        edit_oracle(x[:, :600], x[:, :600], pad_id=0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        labels = edit_oracle(x, y, pad_id=0)
        assert (labels.delete.sum() + labels.masked.sum()) == labels.distance
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    """
    for alphabet, bytes_a_cell in ((14, 1 / 8), (32000, 1 / 40)):
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code).replace("ALPHABET", str(alphabet))],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(ran.stdout) <= 32768**2 * bytes_a_cell + 2**22  # and the sentences and labels themselves
