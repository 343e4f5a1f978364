"""Beam search with selectable length normalisation and stopping, its whole state on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen_fast import _library
from condgen_fast._check import check_choice, check_number
from condgen_fast.decode.candidates import StochasticBeams, best, of_groups, sampled, without_replacement
from condgen_fast.decode.captured import Captured
from condgen_fast.decode.constraints import (
    Prefixes,
    check_ids,
    check_lists,
    constraints_of,
    joined,
    penalised,
    penalties,
    room_for,
    without,
)
from condgen_fast.decode.finished import Lattice, hypotheses_of
from condgen_fast.decode.hypotheses import Hypotheses
from condgen_fast.decode.left_to_right import (
    STEPS_IN_PLACE,
    Unfinished,
    check_due,
    check_lengths,
    end_ids,
    longest_target,
    may_capture,
    never_generated,
    target_limits,
    worth_leaving,
)
from condgen_fast.decode.protocols import StepModel
from condgen_fast.decode.sampling import random_keys
from condgen_fast.decode.stopping import RULES, STOPPING, norms
from condgen_fast.decode.trie import Trie
from condgen_fast.ops.beam_search import Adjustments, BeamRules, BeamState, Candidates, unchecked_beam_update

_MOST_BEAMS = 65536
_MOST_CANDIDATES_ON_A_GPU = 1024  # that `beam_topk` finds for a group


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
    max_length       tokens of the longest, eos included; None: 2 * source length + 10, at most `model.max_positions`,
                     but no less than the sentence's prefix and its eos
    no_repeat_ngram  n > 0: no n tokens follow each other twice in a hypothesis
    repetition_penalty  logits of tokens that the hypothesis has are divided by it where positive, multiplied where
                     negative (Keskar et al. 2019); with compat="hf" log-probabilities, which then do not add up to 1
    banned           ids that are never generated
    prefixes         for each sentence, the ids that its target begins with (none: []); they keep their log-probability
                     and leave room for eos within max_length
    trie             `Trie` of the sequences that what follows the prefix may be, or may begin with
    groups           diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): so many groups share the beams;
                     at each step a group's ranks lose `diversity` for each earlier group's hypothesis that chose the
                     same token. Groups finish on their own; scores are sums of log-probabilities as ever
    diversity        Hamming penalty between groups, at most 100
    choose           best; sample, continuations drawn without replacement from softmax(sums / temperature) (beam
                     sampling); stochastic, hypotheses drawn without replacement from the model (Gumbel top-k, Kool et
                     al. 2019, arXiv:1903.06059), where scores are perturbed log-probabilities and nothing is divided
    temperature      of choose="sample"
    seed             of the draws, which depend on it and on the sentence alone; None: from torch's global generator
    impl             auto | reference, of the ops
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
        check_choice(self.stopping_rule, "stopping", STOPPING if self.compat is None else rules.choices)
        check_number(self.patience, "patience", minimum=0.0, exclusive=True)
        if self.stopping_rule == "exact" and self.patience != 1:
            raise ValueError(f"patience must be 1 with exact stopping; got {self.patience}")
        check_number(self.no_repeat_ngram, "no_repeat_ngram", minimum=0, integer=True)
        check_number(self.repetition_penalty, "repetition_penalty", minimum=0.0, exclusive=True)
        check_lengths(self.min_length, self.max_length, self.length_penalty)
        check_ids(self.banned, "banned")
        if self.prefixes is not None:
            check_lists(self.prefixes, "prefixes")
            for i, prefix in enumerate(self.prefixes):
                check_ids(prefix, f"prefixes[{i}]")
        if self.trie is not None and not isinstance(self.trie, Trie):
            raise TypeError(f"trie must be a Trie; got {type(self.trie).__name__}")
        check_number(self.groups, "groups", minimum=1, integer=True)
        if self.beam_size % self.groups:
            raise ValueError(f"groups must divide beam_size = {self.beam_size}; got {self.groups}")
        check_number(self.diversity, "diversity", minimum=0.0, maximum=100.0)  # float32 sums lose what is far less
        check_choice(self.choose, "choose", ("best", "sample", "stochastic"))
        check_number(self.temperature, "temperature", minimum=0.0, exclusive=True)
        if self.choose != "best" and self.groups > 1:
            raise ValueError(f"groups must be 1 with choose={self.choose!r}; got {self.groups}")
        if self.choose == "stochastic" and (self.stopping_rule != "exact" or self.compat is not None):
            raise ValueError("stopping must be exact and compat None with choose='stochastic'")
        if self.seed is not None:
            check_number(self.seed, "seed", minimum=0, maximum=2**63 - 1, integer=True)
        check_choice(self.impl, "impl", ("auto", "reference"))

    @property
    def stopping_rule(self) -> str:
        """When a sentence is finished: `stopping`, or what it stands for where it is None."""
        return RULES[self.compat].stopping if self.stopping is None else self.stopping

    def run(self, model: StepModel, source: Tensor, source_lengths: Tensor) -> Hypotheses:
        self._check_on(source.device, len(end_ids(model)), model.vocab_size)
        search = _Search(self, model, source, source_lengths)
        device, rows, longest = source.device, source.shape[0], search.beams.steps
        unfinished = Unfinished(search.beams.finished_count, rows)
        in_place = search.reserve(longest)
        advance = Captured(search.step_and_follow, device) if in_place else search.step
        for step in range(longest):
            advance()
            ask = (step + 1) % STEPS_IN_PLACE == 0 if in_place else check_due(step, device)
            left = unfinished.count(ask=ask)
            if left == 0 or step + 1 == longest:
                break
            if left is not None and search.may_leave and worth_leaving(left, rows, at_most=0.5 if in_place else 0.75):
                rows = left
                search.leave(left)
                if in_place:
                    advance = Captured(search.step_and_follow, device)
            if not in_place:
                search.follow()
        beams = search.beams
        found = hypotheses_of(beams, self.n_best, step + 1, model.pad_id, self.impl)
        if not self.keep_lattice:
            return found
        steps = int(found.iterations.max())  # where the host learns late that all are finished, more have been made
        return replace(found, lattice=Lattice.of(beams, steps).until(found.iterations))

    def _check_on(self, device: torch.device, ends: int, vocab_size: int) -> None:
        """Refuse what the kernels of a GPU would only refuse at the first step."""
        of_beam = min(1 + ends, vocab_size)
        most = self.groups * (_MOST_CANDIDATES_ON_A_GPU // of_beam)
        if device.type == "cuda" and self.choose == "best" and self.impl == "auto" and self.beam_size > most:
            raise ValueError(f"beam_size must be at most {most} on a GPU with {ends} end(s); got {self.beam_size}")

    def _limits(self, model: Any, ends: list[int], source: Tensor, source_lengths: Tensor) -> tuple[Tensor, int]:
        """Of each sentence [B], and no less than the longest of them; its prefix and an end always fit."""
        limits = target_limits(model, source_lengths, self.max_length, self.min_length)
        longest = longest_target(model, source.shape[1], self.max_length, self.min_length)
        if not self.prefixes:
            return limits, longest
        behind = 0 if RULES[self.compat].cut_at_limit else 1
        needed = [room_for(prefix, ends, behind) for prefix in self.prefixes]
        name, most = "max_length", self.max_length
        if most is None:
            name, most = "model.max_positions", getattr(model, "max_positions", None)
        if most is not None and max(needed) > most:
            raise ValueError(
                f"prefixes must have at most {most - behind} tokens with {name} = {most}; "
                f"got one of {len(self.prefixes[needed.index(max(needed))])}"
            )
        if self.max_length is None:
            limits = torch.maximum(limits, torch.tensor(needed, device=limits.device))
            longest = max(longest, *needed)
        return limits, longest

    def _start(self, model: Any, ends: list[int], source: Tensor, source_lengths: Tensor) -> BeamState:
        """The beams before the first step, and all that is asked of them."""
        rules, k, device = RULES[self.compat], self.beam_size // self.groups, source.device
        if any(not 0 <= token < model.vocab_size for token in self.banned):
            raise ValueError(f"banned must hold ids in [0, {model.vocab_size}); got {list(self.banned)}")
        prefixes = None
        if self.prefixes is not None:
            prefixes = Prefixes.of(self.prefixes, source.shape[0], model.vocab_size, device)
        limits, longest = self._limits(model, ends, source, source_lengths)
        never = [] if rules.allow_specials else never_generated(model)
        normalization = "none" if self.choose == "stochastic" or self.length_penalty == 0 else self.normalization
        n_best = -(-self.n_best // self.groups)  # of each group
        return BeamState.start(
            BeamRules(
                stopping="topped" if self.compat == "ctranslate2" and normalization == "none" else self.stopping_rule,
                wanted=max(n_best, round(self.patience * k)),
                n_best=n_best,
                min_length=self.min_length,
                rising=self.length_penalty >= 0,
                cut_at_limit=rules.cut_at_limit,
                overflow=rules.overflow,
                by_rank=self.choose == "stochastic",
                no_repeat_ngram=self.no_repeat_ngram,
            ),
            constraints_of(
                ends=ends,
                banned=sorted({*never, *self.banned}),
                early=self.min_length > 1,
                prefixes=prefixes,
                trie=self.trie,
                device=device,
            ),
            limits,
            norms(normalization, self.length_penalty, longest, device),
            beams=self.beam_size,
            groups=self.groups,
            ranked=self.groups > 1 or self.choose == "stochastic",
            first_token=model.bos_id,
            # Hugging Face counts the token that a decoder starts with
            history=int(self.compat == "hf") if self.no_repeat_ngram or self.repetition_penalty != 1 else None,
        )


class _Search:
    """A search under way: what is repeated at each step."""

    def __init__(self, options: BeamSearch, model: Any, source: Tensor, source_lengths: Tensor) -> None:
        self.options, self.model, self.ends = options, model, end_ids(model)
        # first, as lists that are copied to a GPU wait for whatever it has to do
        self.beams = options._start(model, self.ends, source, source_lengths)
        self.state = model.start(model.encode(source, source_lengths), options.beam_size)
        self.may_leave = hasattr(model, "select")
        self.noise: StochasticBeams | None = None
        if options.choose != "best":
            keys = random_keys(source, source_lengths, options.beam_size, options.seed, None)
            self.noise = StochasticBeams(keys)
        if options.choose == "stochastic":
            self.beams.ranks.copy_(self.noise.start(self.beams.sums))
        self._begun = options.compat == "hf"  # hypotheses have tokens
        self._alters_logits = options.repetition_penalty != 1 or RULES[options.compat].renormalise
        if options.impl == "auto":
            _library.require(source.device)

    def reserve(self, steps: int) -> bool:
        """Whether the model makes so many steps in place from here on."""
        may = hasattr(self.model, "reserve") and may_capture(self.beams.tokens.device) and self.options.impl == "auto"
        reserved = self.model.reserve(self.state, steps) if may else None
        self.state = self.state if reserved is None else reserved
        return reserved is not None

    def step(self) -> None:
        logits, self.state = self.model.step(self.beams.tokens, self.state)
        unchecked_beam_update(self.beams, self._candidates(logits), self.options.impl)
        self._begun = True

    def follow(self) -> None:
        self.state = self.model.reorder(self.state, self.beams.parents)

    def step_and_follow(self) -> None:
        self.step()
        self.follow()

    def leave(self, left: int) -> None:
        """The finished sentences leave the batch, in which so many are left."""
        stay = self.beams.unfinished(left)
        self.state, self.beams = self.model.select(self.state, stay), self.beams.select(stay)

    def _candidates(self, logits: Tensor) -> Candidates:
        """The continuations to choose from, in order: enough that beam_size are left when all the ends are gone."""
        options, beams = self.options, self.beams
        V, k = logits.shape[2], options.beam_size // options.groups
        count = k * min(1 + len(self.ends), V)
        adjust, allowed, sums, ranks = beams.adjust, beams.allowed, beams.sums, beams.ranks
        if self._alters_logits:
            logits, adjust = self._altered(logits, adjust)
        if self.noise is not None:
            places, _, steps = beams.sentences
            noise = self.noise.noise(places, steps, V)
            if options.choose == "sample":
                return sampled(logits, sums, noise, count, options.temperature, adjust, allowed)
            return without_replacement(logits, sums, ranks, noise, count, adjust, allowed)
        if options.groups == 1:
            return best(logits, sums, sums, count, adjust, allowed, options.impl)
        groups = options.groups, options.diversity
        return of_groups(logits, sums, ranks, *groups, count, adjust, allowed, options.impl)

    def _altered(self, logits: Tensor, adjust: Adjustments | None) -> tuple[Tensor, Adjustments | None]:
        """With penalties on what a hypothesis has, and what is banned taken from the distribution."""
        options = self.options
        if options.repetition_penalty != 1 and self._begun:
            if options.compat == "hf":
                adjust = joined(adjust, penalties(logits, self.beams.generated(), options.repetition_penalty))
            else:
                logits = penalised(logits, self.beams.generated(), options.repetition_penalty)
        if RULES[options.compat].renormalise and adjust is not None:
            logits, adjust = without(logits, adjust), None
        return logits, adjust
