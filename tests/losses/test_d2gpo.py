"""D2GPo: the table of ranks, the weights of ranks, the loss against dense formulas of paper and published code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from condgen_fast.losses.d2gpo import (
    d2gpo_loss,
    d2gpo_prior,
    label_smoothing_prior,
    rank_table,
    rank_weights,
    read_embeddings,
)
from condgen_fast.ops import kd_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense_prior(embeddings, f, temperature, truncate=False):
    """The published construction: V x V similarities, f of the rank, softmax (over the non-zero part with truncate)."""
    similarity = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    rank = similarity.argsort(-1, descending=True).argsort(-1)
    values = f[rank]
    if truncate:
        values = values.masked_fill(values == 0, -torch.inf)
    return (values / temperature).softmax(-1)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_the_table_ranks_by_similarity_in_blocks(block_rows):
    embeddings = torch.randn(40, 8, dtype=torch.float64)
    table = rank_table(embeddings, 40, block_rows=block_rows)
    similarity = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    assert torch.equal(table, similarity.argsort(-1, descending=True))
    assert torch.equal(rank_table(embeddings, 5, block_rows=block_rows), table[:, :5])
    permutation = torch.randperm(40)  # commutes with renaming the tokens
    renamed = rank_table(embeddings[permutation], 40, block_rows=block_rows)
    assert torch.equal(permutation[renamed], table[permutation])


def test_the_token_itself_is_first_and_unlisted_tokens_last():
    embeddings = torch.randn(20, 4)
    embeddings[3] = embeddings[7]  # equally similar
    embeddings[5] = 0
    table = rank_table(embeddings, 20, unlisted=(0, 2))
    assert torch.equal(table[:, 0], torch.arange(20))
    others = [i for i in range(20) if i not in (0, 2)]
    assert set(table[others, -2:].flatten().tolist()) == {0, 2}
    assert table[0, 1:].tolist()[-1] == 2 and all(len(set(row)) == 20 for row in table.tolist())


def test_the_table_takes_little_memory(monkeypatch):
    """No V x V: the largest product has block_rows rows."""
    largest = 0
    real = torch.Tensor.__matmul__

    def matmul(a, b):
        nonlocal largest
        largest = max(largest, a.shape[0] * b.shape[1])
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    assert rank_table(torch.randn(3000, 4), 3, block_rows=100).shape == (3000, 3)
    assert largest == 100 * 3000


def test_golden_weights():
    """V = 10, Gaussian of sigma 1, softmax at T = 2; and the first ranks at V = 32000, times V."""
    weights, floor = rank_weights(10)
    q = weights / weights.sum()
    assert q.tolist() == pytest.approx([0.117618, 0.108739, 0.098985, 0.096562, 0.096355] + [0.096348] * 5, abs=1e-6)
    weights, floor = rank_weights(200)
    q = weights / (weights.sum() + (32000 - 200) * floor) * 32000
    assert q[:5].tolist() == pytest.approx([1.2207, 1.1286, 1.0274, 1.0022, 1.0001], abs=1e-4)
    assert q[0] / q[-1] == pytest.approx(math.exp(0.39894 / 2), abs=1e-4)
    linear, _ = rank_weights(4, shape="linear", temperature=1.0)
    assert linear.log().diff().tolist() == pytest.approx([-0.25] * 3)
    cosine, _ = rank_weights(2, shape="cosine", temperature=1.0)
    assert (cosine[1] / cosine[0]).log() == pytest.approx(math.cos(math.pi / 4) - 1)
    assert all(w.isfinite().all() and w.max() == 1 for w, _ in [rank_weights(9, temperature=1e-4)])


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("shape", ["gaussian", "linear", "cosine"])
def test_the_loss_is_that_of_the_published_code(shape, truncate):
    embeddings, width, temperature, sigma = torch.randn(30, 6), 7, 0.5, 2.0
    rank = torch.arange(30.0)
    f = {
        "gaussian": torch.exp(-((rank / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi)),
        "linear": 1 - rank / width,
        "cosine": torch.cos(math.pi / 2 * rank / width),
    }[shape]
    q = dense_prior(embeddings, torch.where(rank < width, f, 0.0), temperature, truncate)
    logits, labels = torch.randn(5, 30, requires_grad=True), torch.tensor([0, 4, 29, -100, 4])
    options = dict(width=width, shape=shape, sigma=sigma, temperature=temperature, truncate=truncate)
    got = d2gpo_loss(logits, d2gpo_prior(embeddings, **options), labels, alpha=0.3, temperature=temperature)
    kept = labels >= 0
    log_p = logits.log_softmax(-1)[kept]
    divergence = F.kl_div(log_p, q[labels[kept]], reduction="batchmean")
    wanted = 0.7 * F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.3 * temperature**2 * divergence
    torch.testing.assert_close(got, wanted)
    a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, wanted))
    torch.testing.assert_close(a, b)


def test_without_weight_it_is_the_smoothed_likelihood():
    logits, labels = torch.randn(5, 30), torch.randint(0, 30, (5,))
    prior = d2gpo_prior(torch.randn(30, 6))
    assert prior.ids.shape == (30, 30)  # no more ranks than tokens
    got = d2gpo_loss(logits, prior, labels, alpha=0.0, label_smoothing=0.2)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels, label_smoothing=0.2))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_label_smoothing_is_a_prior(epsilon):
    logits, labels = torch.randn(6, 12, requires_grad=True), torch.randint(0, 12, (6,))
    prior = label_smoothing_prior(12, epsilon)
    got = kd_loss(logits, prior, labels, alpha=1.0, divergence="cross_entropy")
    wanted = F.cross_entropy(logits, labels, label_smoothing=epsilon)
    torch.testing.assert_close(got, wanted)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (got, wanted))
    torch.testing.assert_close(a, b)


def test_given_vectors(tmp_path):
    path = tmp_path / "vectors"
    path.write_text("2 3\n▁b 1 2 3\nx 4 5 6\n▁a 0.5 0 -1e-1\n", encoding="utf-8")
    embeddings = read_embeddings(path, ["▁a", "▁b", "▁c"])
    assert embeddings[:2].tolist() == [[0.5, 0.0, pytest.approx(-0.1)], [1, 2, 3]]
    assert bool((embeddings[2] == 1e-6).all())
    for text, message in (
        ("a 1 2\nb 1\n", "line 2: must have 2 numbers; got 1"),
        ("a 1 2\nb 1 x\n", "line 2: must be a piece and 2 numbers"),
        ("a 1 2\nb 1 nan\n", "line 2: must have finite numbers"),
        ("zz 1 2\n", "has no vector of any piece"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_embeddings(path, ["a", "b"])


def test_refusals():
    with pytest.raises(ValueError, match=r"width must be in \[1, 5\]; got 6"):
        rank_table(torch.randn(5, 2), 6)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        rank_table(torch.tensor([[1.0], [torch.nan]]), 1)
    with pytest.raises(ValueError, match="shape must be 'gaussian', 'linear' or 'cosine'"):
        rank_weights(5, shape="square")
    with pytest.raises(ValueError, match="sigma must be > 0"):
        rank_weights(5, sigma=0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        d2gpo_loss(torch.randn(1, 5), label_smoothing_prior(5, 0.1), torch.tensor([1]), alpha=2)
    with pytest.raises(ValueError, match="temperature must be > 0; got 0"):
        d2gpo_loss(torch.randn(1, 5), label_smoothing_prior(5, 0.1), torch.tensor([1]), temperature=0)
