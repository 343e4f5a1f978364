"""Toy models whose next-token distribution is a table lookup, small enough to search by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


def sentence_key(source: Tensor, source_lengths: Tensor) -> Tensor:
    """A number [B] that depends on a sentence's tokens and their order, not on padding."""
    positions = torch.arange(source.shape[1], device=source.device)
    inside = positions < source_lengths[:, None]
    return torch.where(inside, source * (positions + 1), 0).sum(1)


class TableModel:
    """A StepModel whose logits are `table[sentence, node]` [sentences, nodes, V], the node standing for the prefix.

    With nodes >= 1 + V + ... + V**(max_length - 1) every prefix has its own node; with fewer they share. Source [[s]]
    selects sentence s. `calls` counts steps, `row_counts` lists how many sentences each had.
    """

    def __init__(self, table: Tensor, *, pad_id: int = 0, bos_id: int = 0, eos_id: int = 1) -> None:
        self.table = table
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.vocab_size = table.shape[2]
        self.row_counts: list[int] = []

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        assert (source_lengths > 0).all()
        return sentence_key(source, source_lengths) % self.table.shape[0]

    def start(self, memory: Tensor, beam_size: int) -> tuple[Tensor, Tensor | None]:
        return memory, None

    def step(self, tokens: Tensor, state: tuple[Tensor, Tensor | None]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sentences, nodes = state
        self.row_counts.append(tokens.shape[0])
        if nodes is None:
            assert (tokens == self.bos_id).all()
            nodes = torch.zeros_like(tokens)
        else:
            nodes = (nodes * self.vocab_size + tokens + 1) % self.table.shape[1]
        return self.table[sentences[:, None], nodes], (sentences, nodes)

    def reorder(self, state: tuple[Tensor, Tensor], parents: Tensor) -> tuple[Tensor, Tensor]:
        return state[0], state[1].gather(1, parents)


class ShrinkingTableModel(TableModel):
    """A TableModel that lets finished sentences leave the batch."""

    def select(self, state: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return state[0][rows], state[1][rows]


def random_table(sentences: int, nodes: int, vocab_size: int, *, seed: int, eos_bias: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(sentences, nodes, vocab_size, generator=generator)
    table[:, :, 1] += eos_bias
    return table


def log_probs_of(model: TableModel, sentence: int, tokens: list[int]) -> list[float]:
    """Teacher forcing: log-probability of each token and of eos after them, in double precision."""
    node, result = 0, []
    for token in [*tokens, model.eos_id]:
        row = model.table[sentence, node].double().log_softmax(0)
        result.append(float(row[token]))
        node = (node * model.vocab_size + token + 1) % model.table.shape[1]
    return result


def norm(length: int, normalization: str, length_penalty: float) -> float:
    if normalization == "none":
        return 1.0
    return (length if normalization == "power" else (5 + length) / 6) ** length_penalty


def all_hypotheses(model: TableModel, sentence: int, max_length: int, **score: object) -> list[tuple[float, list[int]]]:
    """Every hypothesis of at most `max_length` tokens, eos included, with its score, best first."""
    ordinary = [t for t in range(model.vocab_size) if t not in (model.pad_id, model.bos_id, model.eos_id)]
    found = []
    for length in range(max_length):
        for tokens in itertools.product(ordinary, repeat=length):
            total = math.fsum(log_probs_of(model, sentence, list(tokens)))
            found.append((total / norm(length + 1, **score), list(tokens)))
    return sorted(found, key=lambda pair: -pair[0])


@dataclass
class Reference:
    """What `plain_beam_search` found, and how close its closest decision was."""

    hypotheses: list[tuple[float, list[int]]]
    steps: int
    margin: float


def plain_beam_search(
    model: TableModel,
    sentence: int,
    *,
    max_length: int,
    beam_size: int,
    n_best: int = 1,
    length_penalty: float = 1.0,
    normalization: str = "power",
    stopping: str = "exact",
    patience: float = 1.0,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> Reference:
    """The rules of BeamSearch in plain Python and double precision, one sentence, no cache."""
    score = dict(normalization=normalization, length_penalty=length_penalty)
    capacity = max(n_best, round(patience * beam_size))
    beam: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    margin = math.inf
    for length in range(1, max_length + 1):
        candidates = []
        for total, tokens in beam:
            node = 0
            for token in tokens:
                node = (node * model.vocab_size + token + 1) % model.table.shape[1]
            row = model.table[sentence, node].double().log_softmax(0).tolist()
            for token, log_prob in enumerate(row):
                if token == model.eos_id:
                    allowed = length >= min_length or length == max_length
                else:
                    allowed = length < max_length and token not in (model.pad_id, model.bos_id)
                    n = no_repeat_ngram
                    if n and len(tokens) >= n:
                        extended = [*tokens, token]
                        earlier = [extended[i : i + n] for i in range(len(extended) - n)]
                        allowed = allowed and extended[-n:] not in earlier
                if allowed and log_prob > -math.inf:
                    candidates.append((total + log_prob, tokens, token))
        candidates.sort(key=lambda c: -c[0])
        margin = min([margin, *(a[0] - b[0] for a, b in itertools.pairwise(candidates))])
        for total, tokens, token in candidates[:beam_size]:
            if token == model.eos_id:
                finished.append((total / norm(length, **score), tokens))
        finished.sort(key=lambda pair: -pair[0])
        margin = min([margin, *(a[0] - b[0] for a, b in itertools.pairwise(finished))])
        finished = finished[:capacity]
        beam = [(total, [*tokens, token]) for total, tokens, token in candidates if token != model.eos_id][:beam_size]
        if length == max_length or not beam:
            break
        best = beam[0][0]
        full = len(finished) == capacity
        if stopping == "first" and full:
            break
        if stopping == "heuristic" and full:
            margin = min(margin, abs(finished[-1][0] - best / norm(length, **score)))
            if finished[-1][0] >= best / norm(length, **score):
                break
        if stopping == "exact" and len(finished) >= n_best:
            lengths = range(min(max(length + 1, min_length), max_length), max_length + 1)
            bound = max(best / norm(possible, **score) for possible in lengths)
            margin = min(margin, abs(finished[n_best - 1][0] - bound))
            if finished[n_best - 1][0] >= bound:
                break
    return Reference(finished[:n_best], length, margin)


def assert_same(a, b, places=None):
    """Hypotheses of the sentences `places` of `b` are those of `a`, whatever the widths."""
    for i in range(a.tokens.shape[0]):
        j = i if places is None else places[i]
        assert a.to_lists()[i] == b.to_lists()[j]
        torch.testing.assert_close(a.scores[i], b.scores[j], rtol=0, atol=0)
        assert a.iterations[i] == b.iterations[j]
        width = min(a.token_log_probs.shape[2], b.token_log_probs.shape[2])
        torch.testing.assert_close(a.token_log_probs[i, :, :width], b.token_log_probs[j, :, :width], rtol=0, atol=0)
        assert (a.token_log_probs[i, :, width:] == 0).all() and (b.token_log_probs[j, :, width:] == 0).all()


def assert_consistent(model, sources, hypotheses, normalization="power", length_penalty=1.0, atol=1e-5):
    """Padding, lengths, per-token log-probabilities by teacher forcing, and the score made of them."""
    for i, sentence in enumerate(sources):
        for j, length in enumerate(hypotheses.lengths[i].tolist()):
            tokens = hypotheses.tokens[i, j].tolist()
            assert tokens[length:] == [model.pad_id] * (len(tokens) - length)
            assert not {model.bos_id, model.eos_id, model.pad_id} & set(tokens[:length])
            score = hypotheses.scores[i, j].item()
            if score == -math.inf:
                assert length == 0
                continue
            log_probs = hypotheses.token_log_probs[i, j].tolist()
            expected = log_probs_of(model, sentence, tokens[:length])
            assert log_probs[: length + 1] == pytest.approx(expected, abs=atol)
            assert log_probs[length + 1 :] == [0.0] * (len(log_probs) - length - 1)
            total = math.fsum(log_probs) / norm(length + 1, normalization, length_penalty)
            assert total == pytest.approx(score, abs=atol)
