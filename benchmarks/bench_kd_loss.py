"""kd_loss and linear_kd_loss, forward and backward, against torch: pytest benchmarks/bench_kd_loss.py

TopK and LabelPrior are compared with our dense path, as torch has to turn them into dense teachers first. The floor is
one torch.add of the same size: two reads and a write, as the loss reads two sides and writes the gradient; that of
linear_kd_loss is its four matrix products and kd_loss of their logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, linear_kd_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(128, 8000), (1024, 32000), (256, 128256)]
LINEAR_SHAPES = [(128, 8000), (2048, 32000)]
WIDTH = 512  # of hidden states
ALPHA, TEMPERATURE = 0.5, 2.0


def by_shape(shapes: list[tuple[int, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("N", "V"), shapes, ids=[f"N{N}-V{V}" for N, V in shapes])


def eager_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    hard = F.cross_entropy(student, labels)
    log_p = F.log_softmax(student / TEMPERATURE, -1)
    log_q = F.log_softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft


def ours(student: Tensor, teacher: Tensor | TopK | LabelPrior, labels: Tensor) -> Tensor:
    return kd_loss(student, teacher, labels, alpha=ALPHA, temperature=TEMPERATURE)


def inputs(N: int, V: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = [torch.randn(N, V, generator=generator, device=device).mul_(3).to(DTYPES[dtype]) for _ in range(2)]
    labels = torch.randint(0, V, (N,), generator=generator, device=device)
    return logits[0].requires_grad_(), logits[1], labels


def forward_backward(loss: Callable[..., Tensor], *arguments: object) -> Callable[[], None]:
    """The call to time: the loss of `arguments` and fresh gradients for those that take one."""
    trained = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]

    def call() -> None:
        for parameter in trained:
            parameter.grad = None
        loss(*arguments).backward()

    return call


def compiled(*arguments: object) -> Callable[[], None] | None:
    torch.compiler.reset()  # dynamo gives up on a function after a few shapes
    call = forward_backward(torch.compile(eager_kd_loss, dynamic=False), *arguments)
    try:
        call()
    except TorchDynamoException:  # no compiler here
        return None
    return call


def liger(*arguments: Tensor) -> Callable[[], None] | None:
    """Its cross entropy, which writes the gradient over its input, and its KL divergence of log-probabilities."""
    if arguments[0].device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div
    except ImportError:
        return None

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher))
        soft = liger_kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        return (1 - ALPHA) * liger_cross_entropy(student.clone(), labels) + ALPHA * TEMPERATURE**2 * soft

    few = [value.detach()[:8].clone() for value in arguments]
    torch.testing.assert_close(loss(*few), eager_kd_loss(*few), rtol=2e-2, atol=1e-2)
    return forward_backward(loss, *arguments)


def one_add(student: Tensor, teacher: Tensor) -> tuple[str, Callable[[], Tensor]]:
    student = student.detach()
    return "torch.add", lambda: torch.add(student, teacher)


@pytest.mark.parametrize("dtype", DTYPES)
@by_shape(SHAPES)
def test_dense(compare, device, N, V, dtype):
    student, teacher, labels = inputs(N, V, dtype, device)
    wide = student.detach()[:8].double().requires_grad_()
    eager_kd_loss(wide, teacher[:8].double(), labels[:8]).backward()
    few = student.detach()[:8].clone().requires_grad_()
    ours(few, teacher[:8], labels[:8]).backward()
    step = {"fp32": 2**-22, "bf16": 2**-8}[dtype]
    assert bool(((few.grad.double() - wide.grad).abs() <= 1e-7 + step * wide.grad.abs()).all())
    arguments = (student, teacher, labels)
    compare(
        "kd_loss",
        f"dense N{N} V{V} {dtype}",
        forward_backward(ours, *arguments),
        peers={
            "eager torch": forward_backward(eager_kd_loss, *arguments),
            "torch.compile": compiled(*arguments),
            "liger-kernel": liger(*arguments),
        },
        floor=one_add(student, teacher),
    )


def beside_dense(
    compare,
    case: str,
    student: Tensor,
    sparse: TopK | LabelPrior,
    teacher: Tensor,
    labels: Tensor,
    peers: dict[str, Callable[[], object]] | None = None,
) -> None:
    """Time a teacher of a few tokens beside a dense one."""
    compare(
        "kd_loss",
        case,
        forward_backward(ours, student, sparse, labels),
        peers={"our dense path": forward_backward(ours, student, teacher, labels)} | (peers or {}),
        floor=one_add(student, teacher),
    )


@by_shape(SHAPES)
def test_top_k(compare, device, N, V):
    student, teacher, labels = inputs(N, V, "fp32", device)
    log_probs, ids = teacher.log_softmax(-1).topk(64, -1)
    top = TopK(ids, log_probs, "renormalise")
    masked = torch.full_like(teacher, -torch.inf).scatter_(1, ids, log_probs * TEMPERATURE)
    torch.testing.assert_close(
        kd_loss(student, top, labels, temperature=TEMPERATURE, teacher_temperature=1.0),
        ours(student, masked, labels),
    )
    beside_dense(compare, f"top-64 N{N} V{V} fp32", student, top, teacher, labels)


@by_shape(SHAPES)
def test_label_prior(compare, device, N, V):
    student, teacher, labels = inputs(N, V, "fp32", device)
    k = 200
    ids = (torch.arange(V, device=device)[:, None] + torch.arange(k, device=device) * 31) % V
    prior = LabelPrior(ids, torch.linspace(2, 1, k, device=device), 1e-4)
    few = labels[:8]
    table = torch.full((8, V), 1e-4, device=device).scatter_(1, ids[few], prior.weights.expand(8, k)).log()
    torch.testing.assert_close(ours(student[:8], prior, few), ours(student[:8], table, few))
    # As D2GPo does: prior[labels] from a V x V matrix, of which only as many rows are in memory here as it fits
    height = min(V, 2**28 // V)
    matrix, picked = torch.full((height, V), 1e-4, device=device), labels % height

    def by_matrix() -> None:
        student.grad = None
        log_q = F.log_softmax(matrix[picked].log() / TEMPERATURE, -1)
        log_p = F.log_softmax(student / TEMPERATURE, -1)
        soft = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        ((1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * TEMPERATURE**2 * soft).backward()

    peers = {"torch, prior[labels] of a matrix": by_matrix}
    beside_dense(compare, f"label prior k{k} N{N} V{V} fp32", student, prior, teacher, labels, peers)


def linear_inputs(N: int, V: int, device: str) -> tuple[Tensor, ...]:
    """Hidden states and weights of both sides, and labels."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, teacher_hidden = (torch.randn(N, WIDTH, generator=generator, device=device) for _ in range(2))
    weight, teacher_weight = (
        torch.randn(V, WIDTH, generator=generator, device=device).mul_(WIDTH**-0.5) for _ in range(2)
    )
    labels = torch.randint(0, V, (N,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels


def eager_linear(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor):
    return eager_kd_loss(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), labels)


def ours_linear(*arguments: Tensor) -> Tensor:
    return linear_kd_loss(*arguments, alpha=ALPHA, temperature=TEMPERATURE)


@by_shape(LINEAR_SHAPES)
def test_linear(compare, device, N, V):
    arguments = linear_inputs(N, V, device)
    hidden, weight, teacher_hidden, teacher_weight, labels = arguments
    gradient = torch.randn(N, V, device=device)
    logits, teacher_logits, _ = inputs(N, V, "fp32", device)
    row_kernels = forward_backward(ours, logits, teacher_logits, labels)

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), gradient @ weight, gradient.t() @ hidden
        row_kernels()

    few = (hidden[:64], weight, teacher_hidden[:64], teacher_weight, labels[:64])
    torch.testing.assert_close(ours_linear(*few), eager_linear(*few))
    compare(
        "linear_kd_loss",
        f"N{N} D{WIDTH} V{V} fp32",
        forward_backward(ours_linear, *arguments),
        peers={"eager torch": forward_backward(eager_linear, *arguments)},
        floor=("matrix products and our loss of their logits", products),
    )


# In a process of its own with the system's malloc: what resident memory has at its peak over that before the call.
MEMORY = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_kd_loss as bench

def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

loss, N, V = getattr(bench, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def arguments(N, V):
    return bench.linear_inputs(N, V, "cpu") if "linear" in sys.argv[2] else bench.inputs(N, V, "fp32", "cpu")
bench.forward_backward(loss, *arguments(64, 1000))()  # what is loaded at the first call
call = bench.forward_backward(loss, *arguments(N, V))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
call()
print(status("VmHWM") - before)
"""


def peak_memory(loss: str, N: int, V: int) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), loss, str(N), str(V)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("op", "N", "V"), [("kd_loss", 1024, 32000), ("linear_kd_loss", 2048, 32000)])
def test_memory(note, op, N, V):
    """Peak memory beyond the inputs, gradients included."""
    linear = op == "linear_kd_loss"
    own, eager = (
        peak_memory(name, N, V) for name in (("ours_linear", "eager_linear") if linear else ("ours", "eager_kd_loss"))
    )
    gradient = 4 * (V * WIDTH + N * WIDTH if linear else N * V)
    note(
        f"{op} memory  N{N}{f' D{WIDTH}' if linear else ''} V{V} fp32: {own / 2**20:.0f} MiB, gradient"
        f"{'s' * linear} {gradient / 2**20:.0f} MiB; {100 * own / eager:.1f} % of eager torch's {eager / 2**20:.0f} MiB"
    )
