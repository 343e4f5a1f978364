"""Beam search with selectable length normalisation and stopping, its whole state on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.candidates import Candidates, StochasticBeams, best, sampled, without_replacement
from condgen_fast.decode.constraints import Constraints, Prefixes, joined, penalised, penalties
from condgen_fast.decode.finished import Finished, Lattice, hypotheses_of
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import (
    Unfinished,
    check_due,
    check_lengths,
    end_ids,
    is_any,
    may_look,
    never_generated,
    take,
    target_limits,
    worth_leaving,
)
from condgen_fast.decode.protocols import StepModel
from condgen_fast.decode.sampling import random_keys
from condgen_fast.decode.stopping import RULES, STOPPING, Stop, norms
from condgen_fast.decode.trie import Trie
from condgen_fast.ops.beam_search import Adjustments

_MOST_BEAMS = 65536


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `beam_size` best unfinished hypotheses of each sentence; return the `n_best` best finished ones.

    beam_size        hypotheses that are extended
    n_best           hypotheses returned, at most beam_size
    length_penalty   score = sum of log-probabilities, eos included / norm(length), the length counting eos
    normalization    norm: power, length ** length_penalty; gnmt, ((5 + length) / 6) ** length_penalty (Wu et al. 2016);
                     none, 1
    stopping         when a sentence is finished; None: as `compat` has it, otherwise exact
                     exact      no continuation of a kept hypothesis can still enter the n_best
                     heuristic  the finished list is full, and the best kept hypothesis, scored as if it ended now,
                                is no better than the worst in it (Hugging Face's early_stopping=False)
                     first      the finished list is full (fairseq; Hugging Face's early_stopping=True)
    patience         the finished list holds round(patience * beam_size) hypotheses, at least n_best (Kasai et al.
                     2022); must be 1 with exact stopping, which does not ask how many are finished
    compat           hf | fairseq | ctranslate2: what that system returns for the same logits and options. hf and
                     ctranslate2 generate pad and bos like other tokens and cut what reaches the limit instead of
                     ending it, so that max_length is their max_new_tokens or max_decoding_length; min_length counts
                     eos as ever
    min_length       tokens of the shortest hypothesis, eos included
    max_length       tokens of the longest, eos included; None: 2 * source length + 10, at most `model.max_positions`
    no_repeat_ngram  n > 0: no n tokens follow each other twice in a hypothesis
    repetition_penalty  logits of tokens that the hypothesis has are divided by it where positive, multiplied where
                     negative (Keskar et al. 2019); with compat="hf" log-probabilities, which then do not add up to 1
    banned           ids that are never generated
    prefixes         for each sentence, the ids that its target begins with (none: []); they keep their log-probability
    trie             `Trie` of the sequences that what follows the prefix may be, or may begin with
    groups           diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): so many groups share the beams;
                     at each step a group's ranks lose `diversity` for each earlier group's hypothesis that chose the
                     same token. Groups finish on their own; scores are sums of log-probabilities as ever
    diversity        Hamming penalty between groups
    choose           best; sample, continuations drawn without replacement from softmax(sums / temperature) (beam
                     sampling); stochastic, hypotheses drawn without replacement from the model (Gumbel top-k, Kool et
                     al. 2019, arXiv:1903.06059), where scores are perturbed log-probabilities and nothing is divided
    temperature      of choose="sample"
    seed             of the draws, which depend on it and on the sentence alone; None: from torch's global generator
    impl             implementation of `beam_topk`
    trace            record the best hypothesis's tokens in `Hypotheses.trace`
    keep_lattice     record everything that was kept in `Hypotheses.lattice`

    A hypothesis finishes when its eos is among the beam_size best allowed continuations of a step; the beam is refilled
    with the best that are not eos, so finished hypotheses take no place in it. At the limit each kept hypothesis ends
    with eos. pad and bos are never generated. Whatever is not allowed keeps its share of the probability: scores are
    sums of the model's own log-probabilities. Ties go to the lower parent, then the lower token, then the hypothesis
    finished earlier. A model with `eos_ids` has several ends; which of them it was is not in the hypothesis.
    """

    beam_size: int = 5
    n_best: int = 1
    length_penalty: float = 1.0
    normalization: str = "power"
    stopping: str | None = None
    patience: float = 1.0
    compat: str | None = None
    min_length: int = 0
    max_length: int | None = None
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    banned: Sequence[int] = ()
    prefixes: Sequence[Sequence[int]] | None = None
    trie: Trie | None = None
    groups: int = 1
    diversity: float = 0.5
    choose: str = "best"
    temperature: float = 1.0
    seed: int | None = None
    impl: str = "auto"
    trace: bool = False
    keep_lattice: bool = False

    model_protocol: ClassVar[type] = StepModel

    def __post_init__(self) -> None:
        check_number(self.beam_size, "beam_size", minimum=1, maximum=_MOST_BEAMS, integer=True)
        check_number(self.n_best, "n_best", minimum=1, integer=True)
        if self.n_best > self.beam_size:
            raise ValueError(f"n_best must be at most beam_size = {self.beam_size}; got {self.n_best}")
        check_choice(self.normalization, "normalization", ("power", "gnmt", "none"))
        if self.compat is not None:
            check_choice(self.compat, "compat", tuple(name for name in RULES if name))
            if self.normalization == "gnmt":
                raise ValueError(f"normalization must be power or none with compat={self.compat!r}; got 'gnmt'")
        rules = RULES[self.compat]
        if self.stopping is None:
            object.__setattr__(self, "stopping", rules.stopping)
        check_choice(self.stopping, "stopping", STOPPING if self.compat is None else rules.choices)
        check_number(self.patience, "patience", minimum=0.0, exclusive=True)
        if self.stopping == "exact" and self.patience != 1:
            raise ValueError(f"patience must be 1 with exact stopping; got {self.patience}")
        check_number(self.no_repeat_ngram, "no_repeat_ngram", minimum=0, integer=True)
        check_number(self.repetition_penalty, "repetition_penalty", minimum=0.0, exclusive=True)
        check_lengths(self.min_length, self.max_length, self.length_penalty)
        if self.trie is not None and not isinstance(self.trie, Trie):
            raise TypeError(f"trie must be a Trie; got {type(self.trie).__name__}")
        check_number(self.groups, "groups", minimum=1, integer=True)
        if self.beam_size % self.groups:
            raise ValueError(f"groups must divide beam_size = {self.beam_size}; got {self.groups}")
        check_number(self.diversity, "diversity", minimum=0.0, maximum=1e6)
        check_choice(self.choose, "choose", ("best", "sample", "stochastic"))
        check_number(self.temperature, "temperature", minimum=0.0, exclusive=True)
        if self.choose != "best" and self.groups > 1:
            raise ValueError(f"groups must be 1 with choose={self.choose!r}; got {self.groups}")
        if self.choose == "stochastic" and (self.stopping != "exact" or self.compat is not None):
            raise ValueError("stopping must be exact and compat None with choose='stochastic'")
        if self.seed is not None:
            check_number(self.seed, "seed", minimum=0, integer=True)
        check_choice(self.impl, "impl", ("auto", "reference"))

    def run(self, model: StepModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        B, K, G, device = source.shape[0], self.beam_size, self.groups, source.device
        rules, k = RULES[self.compat], K // G
        ends = end_ids(model)
        limits = target_limits(model, source_lengths, self.max_length, self.min_length)
        limit_steps = set(limits.tolist())
        longest = max(limit_steps)
        constraints, history, nodes = self._constraints(model, ends, B, device)
        norm = self._norms(longest, device)
        n_best = -(-self.n_best // G)  # of each group
        wanted = max(n_best, round(self.patience * k))
        stop = Stop(self.stopping, wanted, n_best, self.min_length, self.length_penalty >= 0)
        choice = self._choice(source, source_lengths)

        rows = torch.arange(B, device=device)  # [R] the sentences still in the batch
        places = rows  # [B] where a sentence stands in it
        state = model.start(model.encode(source, source_lengths), K)
        tokens = torch.full((B, K), model.bos_id, dtype=torch.int64, device=device)
        sums = torch.full((B, G, k), -torch.inf, device=device)
        sums[:, :, 0] = 0.0
        sums = sums.view(B, K)
        ranks = choice.start(sums) if self.choose == "stochastic" else sums
        done = torch.zeros(B * G, dtype=torch.bool, device=device)  # groups
        topped = done  # groups of which once the best continuation of all was an end
        iterations = torch.zeros(B, dtype=torch.int64, device=device)
        finished = Finished.empty(B * G, wanted + (k - 1 if rules.overflow == "room" else 0), device)
        result = finished
        columns: list[tuple[Tensor, ...]] = []  # tokens, parents, sums, ranks, places of each step
        unfinished = Unfinished()
        select = getattr(model, "select", None)

        for step in range(longest):
            length = step + 1
            logits, state = model.step(tokens, state)
            at_limit = limits == length if length in limit_steps else None
            adjust, allowed, forced = constraints.lists(step, rows, history, nodes, at_limit, K)
            if self.repetition_penalty != 1 and history.shape[2] > 0:
                if self.compat == "hf":
                    adjust = joined(adjust, penalties(logits, history, self.repetition_penalty))
                else:
                    logits = penalised(logits, history, self.repetition_penalty)
            if rules.renormalise and adjust is not None:
                logits, adjust = _without(logits, adjust), None
            found = self._candidates(logits, sums, ranks, adjust, allowed, len(ends), choice, rows, step)
            del logits  # before the next are made

            finished, topped = self._finish(finished, topped, found, ends, at_limit, done, length, norm, k)
            kept, dead = _first((found.ranks > -torch.inf) & ~is_any(found.tokens, ends), k)
            R = rows.shape[0]
            sums = found.sums.gather(1, kept).masked_fill(dead, -torch.inf).view(R, K)
            ranks = found.ranks.gather(1, kept).masked_fill(dead, -torch.inf).view(R, K)
            tokens, parents = found.tokens.gather(1, kept).view(R, K), found.parents.gather(1, kept).view(R, K)
            columns.append((tokens, parents, sums, ranks, places))
            if history is not None:
                history = torch.cat([take(history, parents), tokens[:, :, None]], 2)
            if nodes is not None:
                before = nodes.gather(1, parents)
                after = constraints.trie.follow(before, tokens)
                nodes = after if forced is None else torch.where(forced[:, None], before, after)

            iterations[rows] += (~done.view(R, G).all(1)).long()
            values = ranks if self.choose == "stochastic" else sums
            group_limits = limits.repeat_interleave(G)
            if self.compat == "ctranslate2" and (self.length_penalty == 0 or self.normalization == "none"):
                over = (topped & (finished.scores[:, self.n_best - 1] > -torch.inf)) | (group_limits <= length)
            else:
                over = stop(finished.scores, values.view(R * G, k).amax(1), length, group_limits, norm)
            done = done | over
            all_done = done.view(R, G).all(1)
            left = unfinished.count(all_done, step, device, ask=check_due(step, device) or length == longest)
            if left == 0:
                break
            if left is not None and select is not None and worth_leaving(left, R):
                stay = all_done.long().sort(stable=True).indices[:left]
                groups = _groups_of(stay, G)
                result = result.written(_groups_of(rows, G), finished)
                state = select(state, stay)
                finished, topped, done = finished.rows(groups), topped[groups], done[groups]
                rows, limits, sums, ranks = rows[stay], limits[stay], sums[stay], ranks[stay]
                tokens, parents = tokens[stay], parents[stay]
                history = history if history is None else history[stay]
                nodes = nodes if nodes is None else nodes[stay]
                places = torch.zeros_like(places).index_copy(0, rows, torch.arange(left, device=device))
            state = model.reorder(state, parents)

        lattice = Lattice.of_steps(columns)
        result = result.written(_groups_of(rows, G), finished).of_groups(G)
        found = hypotheses_of(result, self.n_best, lattice, ends, iterations, model.pad_id)
        return replace(found, lattice=lattice.until(iterations)) if self.keep_lattice else found

    def _norms(self, longest: int, device: torch.device) -> Tensor:
        return norms(
            "none" if self.choose == "stochastic" else self.normalization, self.length_penalty, longest, device
        )

    def _constraints(
        self, model: Any, ends: list[int], batch: int, device: torch.device
    ) -> tuple[Constraints, Tensor | None, Tensor | None]:
        """The constraints, and where they begin: [B, K, t] tokens generated and [B, K] nodes of the trie."""
        rules = RULES[self.compat]
        banned = [] if rules.allow_specials else never_generated(model)
        if any(not 0 <= token < model.vocab_size for token in self.banned):
            raise ValueError(f"banned must hold ids in [0, {model.vocab_size}); got {list(self.banned)}")
        prefixes = None
        if self.prefixes is not None:
            prefixes = Prefixes.of(self.prefixes, batch, model.vocab_size, device)
        constraints = Constraints(
            ends=ends,
            banned=sorted({*banned, *self.banned}),
            min_length=self.min_length,
            no_repeat_ngram=self.no_repeat_ngram,
            prefix_tokens=prefixes.tokens if prefixes else None,
            prefix_lengths=prefixes.lengths if prefixes else None,
            trie=self.trie,
            only_ends_at_limit=not rules.cut_at_limit,
            device=device,
        )
        history = nodes = None
        if self.no_repeat_ngram or self.repetition_penalty != 1:
            # Hugging Face counts the token that a decoder starts with
            shape = (batch, self.beam_size, 1 if self.compat == "hf" else 0)
            history = torch.full(shape, model.bos_id, dtype=torch.int64, device=device)
        if self.trie is not None:
            nodes = torch.zeros(batch, self.beam_size, dtype=torch.int64, device=device)
        return constraints, history, nodes

    def _choice(self, source: Tensor, source_lengths: Tensor) -> StochasticBeams | None:
        if self.choose == "best":
            return None
        keys = random_keys(source, source_lengths, self.beam_size, self.seed, None)
        return StochasticBeams(keys)

    def _candidates(
        self,
        logits: Tensor,
        sums: Tensor,
        ranks: Tensor,
        adjust: Adjustments | None,
        allowed: Any,
        ends: int,
        choice: StochasticBeams | None,
        rows: Tensor,
        step: int,
    ) -> Candidates:
        """The continuations to choose from, in order: enough that beam_size are left when all the ends are gone."""
        V, k = logits.shape[2], self.beam_size // self.groups
        count = min(k * (1 + ends), k * V)
        if choice is not None:
            noise = choice.noise(rows, step, V)
            if self.choose == "sample":
                return sampled(logits, sums, noise, count, self.temperature, adjust, allowed)
            return without_replacement(logits, sums, ranks, noise, count, adjust, allowed)
        if self.groups == 1:
            return best(logits, sums, sums, count, adjust, allowed, self.impl)
        return self._of_groups(logits, sums, ranks, count, adjust, allowed, ends)

    def _of_groups(
        self,
        logits: Tensor,
        sums: Tensor,
        ranks: Tensor,
        count: int,
        adjust: Adjustments | None,
        allowed: Any,
        ends: int,
    ) -> Candidates:
        R, K, V = logits.shape
        k = K // self.groups
        parts, chosen = [], None
        for g in range(self.groups):
            beams = slice(g * k, (g + 1) * k)
            own = None if adjust is None else Adjustments(*(part[:, beams] for part in adjust))
            limited = None if allowed is None else allowed._replace(first=allowed.first[:, beams].contiguous())
            limited = limited and limited._replace(last=allowed.last[:, beams].contiguous())
            if chosen is not None:
                shape = (R, k, chosen.shape[1])
                amounts = torch.full((1, 1, 1), -self.diversity, device=logits.device).expand(shape)
                own = joined(own, Adjustments(chosen[:, None].expand(shape), amounts))
            found = best(logits[:, beams], sums[:, beams], ranks[:, beams], count, own, limited, self.impl)
            if chosen is not None:
                same = (found.tokens[:, :, None] == chosen[:, None]).sum(2)
                found = found._replace(sums=found.sums + self.diversity * same)
            kept = found.tokens[:, :k]
            chosen = kept if chosen is None else torch.cat([chosen, kept], 1)
            parts.append(found._replace(parents=found.parents + g * k))
        return Candidates(*(torch.stack(column, 1).flatten(0, 1) for column in zip(*parts, strict=True)))

    def _finish(
        self,
        finished: Finished,
        topped: Tensor,
        found: Candidates,
        ends: list[int],
        at_limit: Tensor | None,
        done: Tensor,
        length: int,
        norm: Tensor,
        k: int,
    ) -> tuple[Finished, Tensor]:
        """With those of the k best continuations that end."""
        rules = RULES[self.compat]
        is_end = is_any(found.tokens, ends)
        ending = is_end
        if at_limit is not None and rules.cut_at_limit:
            ending = is_end | at_limit.repeat_interleave(self.groups)[:, None]
        ending = ending & (found.ranks > -torch.inf) & ~done[:, None]
        ending = ending & (torch.arange(ending.shape[1], device=ending.device) < k)
        if rules.overflow == "order":
            room = (finished.scores == -torch.inf).sum(1, keepdim=True)
            ending = ending & (ending.cumsum(1) <= room)
        if may_look(ending.device) and not ending.any():
            return finished, topped
        values = found.ranks if self.choose == "stochastic" else found.sums
        scores = torch.where(ending, values / norm[length], -torch.inf)
        return finished.merged(scores, found.sums, found.parents, found.tokens, length), topped | ending[:, 0]


def _without(logits: Tensor, banned: Adjustments) -> Tensor:
    """Logits [R, K, V] of -inf for what is banned, which has no share of the probability then."""
    tokens = banned.tokens.where(banned.tokens >= 0, 0)
    amounts = torch.where(banned.tokens >= 0, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(2, tokens, amounts, "amin")


def _groups_of(rows: Tensor, groups: int) -> Tensor:
    """Places of the groups of `rows` [R] where all sentences' groups stand in a line."""
    return rows if groups == 1 else (rows[:, None] * groups + torch.arange(groups, device=rows.device)).view(-1)


def _first(wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the first k true of `wanted` [R, C], and where there are fewer: [R, k] each."""
    columns = torch.arange(wanted.shape[1], device=wanted.device)
    order = torch.where(wanted, columns, columns + wanted.shape[1])
    order = order.topk(k, largest=False, sorted=True).values
    return order % wanted.shape[1], order >= wanted.shape[1]
