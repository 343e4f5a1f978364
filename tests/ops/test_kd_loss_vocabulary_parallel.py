"""vocabulary_parallel_kd_loss: slices of the vocabulary on several processes against kd_loss on the whole."""

from __future__ import annotations

import math
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, vocabulary_parallel_kd_loss
from condgen_fast.ops.kd_loss.checks import DIVERGENCES

V = 37
TEACHERS = ["none", "dense", "drop", "uniform", "renormalise", "prior"]
OPTIONS = [
    {},
    {"alpha": 1.0, "temperature": 0.5, "teacher_temperature": 1.5},
    {"alpha": 0.7, "temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"},
    {"alpha": 0.3, "scale_by_temperature_squared": False, "temperature": 3.0, "jsd_beta": 0.2, "reduction": "none"},
]


def inputs(kind: str, rows: int = 5):
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    student = torch.randn(rows, V, generator=generator) * 3
    student[0, :20] = -math.inf  # a process may have nothing but -inf
    labels = torch.tensor([25, 0, V - 1, -100, 12])[:rows]
    weights = torch.rand(rows, generator=generator)
    ids = torch.rand(V, V, generator=generator).topk(4).indices
    if kind == "none":
        return student, None, labels, weights
    if kind == "prior":
        return student, LabelPrior(ids, torch.rand(4, generator=generator) + 0.1, 0.01), labels, weights
    logits = torch.randn(rows, V, generator=generator) * 3
    logits[0, :20] = -math.inf
    if kind == "dense":
        return student, logits, labels, weights
    ids = torch.tensor([[20, 36, 30, 25]] * rows)
    return student, TopK(ids, logits.log_softmax(-1).gather(1, ids), kind), labels, weights


def sliced(teacher, columns: slice):
    return teacher[:, columns] if isinstance(teacher, torch.Tensor) else teacher


def loss_and_gradient(call, student, *arguments, **options):
    student = student.detach().clone().requires_grad_()
    loss = call(student, *arguments, **options)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return loss.detach(), student.grad


def same(got, wanted, slack: float = 3e-6) -> bool:
    finite = wanted.isfinite()
    if not torch.equal(got[~finite].double(), wanted[~finite].double()) and not wanted[~finite].isnan().all():
        return False
    error = (got - wanted)[finite].abs()
    return error.numel() == 0 or error.max().item() <= slack * max(1.0, wanted[finite].abs().max().item())


def cases():
    for kind in TEACHERS:
        for divergence in DIVERGENCES if kind != "none" else DIVERGENCES[:1]:
            if divergence == "reverse_kl" and kind in ("drop", "renormalise"):
                continue  # infinite
            for number, options in enumerate(OPTIONS):
                if kind == "none":
                    options = options | {"alpha": 0.0}
                yield kind, divergence, number, options | {"divergence": divergence}


def check_all(columns: slice) -> list[str]:
    """What differs between this slice of the loss and the whole."""
    wrong = []
    for kind, divergence, number, options in cases():
        student, teacher, labels, weights = inputs(kind)
        options = options | ({"weights": weights} if number % 2 else {})
        wanted = loss_and_gradient(kd_loss, student, teacher, labels, impl="reference", **options)
        got = loss_and_gradient(
            vocabulary_parallel_kd_loss, student[:, columns], sliced(teacher, columns), labels,
            vocabulary_start=columns.start, vocabulary_size=V, **options,
        )  # fmt: skip
        if not (same(got[0], wanted[0]) and same(got[1], wanted[1][:, columns])):
            wrong.append(f"{kind} {divergence} {options}")
    return wrong


def on_a_rank(rank: int, port: int, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sizes = []
    real = dist.all_reduce

    def all_reduce(value, *arguments):
        sizes.append(value.numel())
        return real(value, *arguments)

    wrong = check_all([slice(0, 15), slice(15, V)][rank])
    dist.all_reduce = all_reduce
    student, teacher, labels, _ = inputs("dense")
    columns = [slice(0, 15), slice(15, V)][rank]
    for divergence, reductions in (("forward_kl", 2), ("jsd", 3)):
        sizes.clear()
        loss_and_gradient(
            vocabulary_parallel_kd_loss, student[:, columns], teacher[:, columns], labels,
            vocabulary_start=columns.start, vocabulary_size=V, divergence=divergence,
        )  # fmt: skip
        if len(sizes) != reductions or max(sizes) > 9 * len(student):
            wrong.append(f"{divergence} reduces {sizes}")
    try:
        vocabulary_parallel_kd_loss(student[:, :15], teacher[:, :15], labels, vocabulary_start=0, vocabulary_size=V)
        wrong.append("slices with a gap were not refused")
    except ValueError as error:
        if "they have 30 columns" not in str(error):
            wrong.append(str(error))
    results.put((rank, wrong))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=on_a_rank, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert dict(results.get(timeout=5) for _ in processes) == {0: [], 1: []}


def test_one_process_is_kd_loss(monkeypatch):
    module = sys.modules["condgen_fast.ops.kd_loss.vocabulary_parallel"]
    monkeypatch.setattr(module, "CHUNK_LOGITS", 2 * V)  # chunks of two rows
    assert check_all(slice(0, V)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    student, teacher, labels, _ = inputs("dense")
    whole = dict(vocabulary_start=0, vocabulary_size=V)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, gradient = loss_and_gradient(vocabulary_parallel_kd_loss, student, teacher, labels, **whole)
    wanted, wanted_gradient = loss_and_gradient(kd_loss, student.double(), teacher.double(), labels, impl="reference")
    assert gradient.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert same(loss, wanted, max(1e-12, min(rounding, 3e-6))) and same(gradient, wanted_gradient, rounding)


def test_gradcheck():
    student, teacher, labels, weights = inputs("dense")
    student, teacher = student[1:, :9].double().requires_grad_(), teacher[1:, :9].double()
    for divergence in DIVERGENCES:
        assert torch.autograd.gradcheck(
            lambda s, d=divergence: vocabulary_parallel_kd_loss(
                s, teacher, labels[1:] % 9, vocabulary_start=0, vocabulary_size=9, divergence=d, temperature=1.3,
                label_smoothing=0.1, z_loss=0.1, jsd_beta=0.3, weights=weights[1:], reduction="none",
            ),
            student,
        )  # fmt: skip


def test_dead_and_ignored_rows():
    whole = dict(vocabulary_start=0, vocabulary_size=V)
    student, teacher, labels, _ = inputs("dense")
    student[1], student[3], teacher[3] = -math.inf, math.nan, math.nan
    for divergence in ("forward_kl", "jsd"):
        options = dict(divergence=divergence, reduction="none", label_smoothing=0.1, z_loss=0.1)
        loss, gradient = loss_and_gradient(vocabulary_parallel_kd_loss, student, teacher, labels, **whole, **options)
        assert loss[1] == math.inf and loss[3] == 0
        assert bool((gradient[[1, 3]] == 0).all()) and bool(gradient.isfinite().all())
    nobody = vocabulary_parallel_kd_loss(student[:0], teacher[:0], labels[:0], **whole)
    assert nobody == 0


def test_refusals():
    student, teacher, labels, _ = inputs("dense")

    def refuse(words, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=words):
            vocabulary_parallel_kd_loss(*arguments, **{"vocabulary_start": 0, "vocabulary_size": V, **options})

    refuse(r"vocabulary_start must be in \[0, 0\]; got 3", student, teacher, labels, vocabulary_start=3)
    refuse("vocabulary_size must be >= 1", student, teacher, labels, vocabulary_size=0)
    refuse("they have 37 columns", student, teacher, labels, vocabulary_size=40)
    refuse("student_logits must have at least one column", student[:, :0], teacher[:, :0], labels)
    refuse(r"teacher must have shape \[5, 37\]; got \[5, 36\]", student, teacher[:, 1:], labels)
    refuse(r"labels must be in \[0, 37\)", student, teacher, labels + 30)
    refuse("teacher must be given unless alpha is 0", student, None, labels)
    refuse("labels must be given", student, teacher)
    refuse("reduction must be", student, teacher, labels, reduction="batch")
    refuse("teacher.ids must be in", student, TopK(labels[:, None] * 0 + V, torch.zeros(5, 1)), labels)
    refuse("student_logits must be a Tensor", None, teacher, labels, error=TypeError)


def test_probabilities_whose_half_is_zero():
    student, teacher = torch.linspace(0, -110, 3000)[None], torch.full((1, 3000), -200.0)
    teacher[0, 0] = 0
    options = {"divergence": "jsd", "alpha": 1.0}
    got = loss_and_gradient(
        vocabulary_parallel_kd_loss, student, teacher, vocabulary_start=0, vocabulary_size=3000, **options
    )
    wanted = loss_and_gradient(kd_loss, student.double(), teacher.double(), impl="reference", **options)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
