"""What kd_loss, its teachers and linear_kd_loss refuse, and the words."""

from __future__ import annotations

import math

import pytest
import torch
from kd_loss_cases import IMPLS, linear_inputs

from condgen_fast.ops.kd_loss import LabelPrior, TopK, kd_loss, linear_kd_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_refusals(impl, device):
    s, labels = torch.zeros(2, 5, device=device), torch.tensor([0, 4], device=device)
    top = TopK(torch.tensor([[0, 1], [2, 3]], device=device), torch.full((2, 2), -1.0, device=device))

    def refuse(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            kd_loss(*arguments, **{"impl": impl, **options})

    refuse(TypeError, "student_logits must be a Tensor; got list", [1.0], s, labels)
    refuse(ValueError, "student_logits must be float32.*got int64", labels[None], s, labels)
    refuse(ValueError, "student_logits must have at least one column", s[:, :0], s, labels)
    refuse(TypeError, "teacher must be a Tensor, TopK, LabelPrior or None; got int", s, 3, labels)
    refuse(ValueError, r"teacher must have shape \[2, V\]; got \[1, 5\]", s, s[:1], labels)
    refuse(ValueError, "teacher must be given unless alpha is 0; got None with alpha 0.5", s, None, labels)
    refuse(ValueError, "labels must be given unless alpha is 1; got None with alpha 0.5", s, s)
    refuse(ValueError, r"labels must have shape \[2\]; got \[1\]", s, s, labels[:1])
    refuse(ValueError, "labels must be int64 or int32; got float32", s, s, labels.float())
    refuse(ValueError, r"weights must have shape \[2\]; got \[1\]", s, s, labels, weights=torch.ones(1, device=device))
    refuse(ValueError, r"alpha must be in \[0, 1\]; got 1.5", s, s, labels, alpha=1.5)
    refuse(TypeError, "alpha must be a number; got str", s, s, labels, alpha="half")
    refuse(ValueError, "temperature must be > 0; got 0", s, s, labels, temperature=0)
    refuse(ValueError, r"temperature must be in \[1e-18, 1e\+18\]; got inf", s, s, labels, temperature=math.inf)
    refuse(ValueError, r"temperature must be in .*; got 1e\+200", s, s, labels, temperature=1e200)
    refuse(ValueError, "teacher_temperature must be > 0; got -1", s, s, labels, teacher_temperature=-1)
    refuse(ValueError, r"label_smoothing must be in \[0, 1\]", s, s, labels, label_smoothing=2)
    refuse(ValueError, "z_loss must be >= 0", s, s, labels, z_loss=-1)
    refuse(ValueError, r"jsd_beta must be in \(0, 1\); got 1", s, s, labels, divergence="jsd", jsd_beta=1)
    refuse(ValueError, "divergence must be 'cross_entropy', .* or 'tvd'; got 'kl'", s, s, labels, divergence="kl")
    refuse(
        ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'batchmean'", s, s, labels, reduction="batchmean"
    )
    refuse(ValueError, "impl must be 'auto', 'reference' or 'triton'; got 'cuda'", s, s, labels, impl="cuda")
    refuse(TypeError, "ignore_index must be an int", s, s, labels, ignore_index=None)
    refuse(
        ValueError,
        r"teacher.ids must have shape \[2, k\]; got \[1, 2\]",
        s,
        TopK(top.ids[:1], top.log_probs[:1]),
        labels,
    )
    prior = LabelPrior(torch.arange(4, device=device)[:, None], torch.ones(1, device=device))
    refuse(ValueError, "teacher.ids must have 5 rows, one a label; got 4", s, prior, labels)
    if device == "cpu":
        for label in (5, -1):
            refuse(ValueError, rf"labels must be in \[0, 5\).*got {label}", s, s, torch.tensor([0, label]))
    if impl == "triton":
        refuse(ValueError, "impl must be auto or reference for float64; got triton", s.double(), s, labels)
    if device == "cpu":
        refuse(ValueError, r"teacher.ids must be in \[0, 5\); got 5", s, TopK(top.ids + 2, top.log_probs), labels)
        twice = torch.tensor([[0, 1], [3, 3]])
        refuse(
            ValueError, "teacher.ids must be distinct within a row; got 3 twice", s, TopK(twice, top.log_probs), labels
        )


def test_refusals_of_teachers():
    ids, one = torch.arange(4)[:, None], torch.ones(1)
    with pytest.raises(ValueError, match=r"ids must list at least one token a row; got shape \[4, 0\]"):
        TopK(ids[:, :0], torch.zeros(4, 0))
    with pytest.raises(ValueError, match=r"ids must list at least one token a label; got shape \[4, 0\]"):
        LabelPrior(ids[:, :0], one[:0])
    with pytest.raises(ValueError, match="tail must be"):
        TopK(ids, torch.zeros(4, 1), "mean")
    with pytest.raises(ValueError, match=r"log_probs must have shape \[4, 1\]; got \[1, 4\]"):
        TopK(ids, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"weights must have shape \[1\] or \[4, 1\]; got \[2\]"):
        LabelPrior(ids, torch.ones(2))
    with pytest.raises(ValueError, match="weights must not be negative"):
        LabelPrior(ids, -one)
    with pytest.raises(ValueError, match="weights must have a positive sum"):
        LabelPrior(ids, 0 * one)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 4\); got 4"):
        LabelPrior(ids + 1, one)
    with pytest.raises(ValueError, match="ids must be distinct within a row; got 0 twice"):
        LabelPrior(torch.zeros(4, 2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="floor must be >= 0"):
        LabelPrior(ids, one, -0.1)


def test_linear_refusals(device):
    inputs = linear_inputs(torch.float32, device)
    labels = torch.zeros(7, dtype=torch.int64, device=device)

    def refuse(error, words, **changes):
        with pytest.raises(error, match=words):
            linear_kd_loss(**{**inputs, "labels": labels, **changes})

    refuse(TypeError, "student_hidden must be a Tensor; got NoneType", student_hidden=None)
    refuse(
        ValueError, r"student_weight must have shape \[V, D\] with D=6; got \[30, 5\]", student_weight=torch.ones(30, 5)
    )
    refuse(ValueError, "student_hidden must have at least one column", student_hidden=torch.ones(7, 0, device=device))
    refuse(ValueError, "student_bias must have shape", student_bias=torch.ones(3, device=device))
    refuse(
        ValueError,
        r"teacher_hidden must have shape \[7, E\]; got \[3, 9\]",
        teacher_hidden=torch.ones(3, 9, device=device),
    )
    refuse(TypeError, "teacher_weight must be a Tensor; got NoneType", teacher_weight=None)
    refuse(ValueError, "teacher_hidden must be given unless alpha is 0", teacher_hidden=None)
    refuse(ValueError, "labels must be given", labels=None)
    refuse(ValueError, "chunk_rows must be >= 1; got 0", chunk_rows=0)
