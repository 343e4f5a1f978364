"""Steps made in place: against the modules' own states and teacher forcing; what they ask of a device; on a GPU."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import Launches, fake_gpu

from condgen_fast.decode import BeamSearch, Greedy, decode
from condgen_fast.decode.captured import Captured
from condgen_fast.models import compiled
from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.reserved import ReservedState
from condgen_fast.models.transformer import Transformer, TransformerState

SMALL = {"vocab_size": 61, "width": 24, "feed_forward": 50, "encoder_layers": 2, "decoder_layers": 2, "heads": 3}


@pytest.fixture(autouse=True)
def by_modules(monkeypatch):
    monkeypatch.setattr(compiled, "stands_in", lambda *modules: False)


def small(**more):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sources(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 61, (n,), generator=generator).tolist() for n in lengths]
    return torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows]), torch.tensor(lengths)


class InPlace:
    """A model whose every step is made in place, for strategies that do not ask for it on this device."""

    def __init__(self, model, steps):
        self.model, self.steps = model, steps
        for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "max_positions", "encode"):
            setattr(self, name, getattr(model, name))

    def start(self, memory, beam_size):
        state = self.model.reserve(self.model.start(memory, beam_size), self.steps)
        assert isinstance(state, ReservedState)
        return state

    def step(self, tokens, state):
        logits, after = self.model.step(tokens, state)
        assert after is state
        return logits, state

    def reorder(self, state, parents):
        assert self.model.reorder(state, parents) is state
        return state

    def select(self, state, rows):
        selected = self.model.select(state, rows)
        state.places.fill_(-1)  # nothing goes on in what was left
        return selected


@pytest.mark.parametrize(
    "options",
    [{"norm": "pre"}, {"norm": "post", "positions": "learned", "activation": "gelu"}, {"heads": 1, "width": 64}],
    ids=str,
)
@pytest.mark.parametrize("double", [False, True], ids=["float", "double"])
@torch.no_grad()
def test_steps_equal_the_teacher_forced_pass(options, double, device):
    model = small(**options).to(device)
    model = model.double() if double else model
    source, lengths = (x.to(device) for x in sources(7, 3, 1))
    target = torch.randint(5, 61, (3, 2, 12), generator=torch.Generator().manual_seed(2)).to(device)
    memory = model.encode(source, lengths)
    state = InPlace(model, 12).start(memory, 2)
    steps = []
    for t in range(12):
        logits, state = model.step(target[:, :, t], state)
        steps.append(logits)
    slack = 1e-12 if double else 2e-5
    torch.testing.assert_close(torch.stack(steps, 2), model.force(target, memory), atol=slack, rtol=slack)


@pytest.mark.parametrize("beam", [1, 4])
@torch.no_grad()
def test_beams_and_sentences_come_and_go(beam, device):
    """Parents repeated and forgotten, sentences that leave and change places, beside the modules' own state."""
    model = small().to(device)
    memory = model.encode(*(x.to(device) for x in sources(5, 9, 2, 7)))
    generator = torch.Generator().manual_seed(3)
    in_place = InPlace(model, 20)
    ours, theirs = in_place.start(memory, beam), model.start(memory, beam)
    assert isinstance(theirs, TransformerState)
    batch, held = 4, (ours.cache, ours.places, ours.position)
    for step in range(20):
        tokens = torch.randint(5, 61, (batch, beam), generator=generator).to(device)
        own, ours = in_place.step(tokens, ours)
        expected, theirs = model.step(tokens, theirs)
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=2e-5)
        rows = {5: [3, 0, 1], 11: [2, 0], 15: [1]}.get(step)
        if rows is not None:
            assert all(a is b for a, b in zip(held, (ours.cache, ours.places, ours.position), strict=True))
            rows = torch.tensor(rows, device=device)
            batch = len(rows)
            ours, theirs = in_place.select(ours, rows), model.select(theirs, rows)
            assert ours.cache is held[0]
            held = (ours.cache, ours.places, ours.position)
        parents = torch.randint(0, beam, (batch, beam), generator=generator).to(device)
        ours, theirs = in_place.reorder(ours, parents), model.reorder(theirs, parents)
    assert ours.position.tolist() == [20]


@pytest.mark.parametrize(
    "strategy",
    [BeamSearch(beam_size=4, n_best=4), BeamSearch(beam_size=1), BeamSearch(beam_size=3, no_repeat_ngram=2), Greedy()],
    ids=["beam", "one", "constrained", "greedy"],
)
def test_hypotheses_are_those_of_the_modules(strategy):
    """In double precision, so that only the search is compared; any batch, order and padding."""
    model = small(tie_embeddings=False).double()
    source, lengths = sources(*(1 + i % 9 for i in range(12)), seed=4)
    in_place = InPlace(model, 40)
    expected = decode(model, source, strategy, source_lengths=lengths)
    found = decode(in_place, source, strategy, source_lengths=lengths)
    assert found.to_lists() == expected.to_lists()
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)
    assert len(set(found.iterations.tolist())) > 3  # sentences left at different steps
    backwards = decode(in_place, source.flip(0), strategy, source_lengths=lengths.flip(0))
    assert backwards.to_lists() == expected.to_lists()[::-1]
    for i in (0, 5, 11):
        alone = decode(in_place, source[i : i + 1, : lengths[i]], strategy)
        assert alone.to_lists()[0] == expected.to_lists()[i]


@torch.no_grad()
def test_nothing_is_copied_or_allocated_but_the_step():
    """One cache of the tokens asked for and no more, in the type of the weights; the source's keys as they lay."""
    model = small().bfloat16()
    memory = model.encode(*sources(5, 9))
    state = InPlace(model, 17).start(memory, 3)
    assert state.cache.dtype == torch.bfloat16
    assert state.cache.numel() == 2 * 2 * (2 * 3 * 17) * 24  # layers, key and value, tokens, width
    selected = model.select(state, torch.tensor([1]))
    assert selected.cache is state.cache and selected.memory is memory


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_narrow_types_and_autocast(autocast, device):
    """The modules' own state in the same types is the measure; weights, or products alone, are bfloat16."""
    model = small().to(device)
    model = model if autocast else model.bfloat16()
    tokens = torch.randint(5, 61, (6, 2, 3), generator=torch.Generator().manual_seed(5)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        memory = model.encode(*(x.to(device) for x in sources(5, 9)))
        ours, theirs = model.reserve(model.start(memory, 3), 6), model.start(memory, 3)
        assert ours.cache.dtype == torch.bfloat16
        for step in tokens:
            own, ours = model.step(step, ours)
            expected, theirs = model.step(step, theirs)
            assert own.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(own, expected, atol=0.15, rtol=0.02)


def base_on(device):
    with torch.device(device):
        return Transformer(TransformerConfig(vocab_size=32000)).eval()


@torch.no_grad()
def test_a_step_waits_for_nothing_and_has_so_many_launches(monkeypatch):
    with fake_gpu(monkeypatch) as device:
        model = base_on(device).bfloat16()
        source = torch.zeros(8, 32, dtype=torch.int64, device=device)
        memory = model.encode(source, torch.zeros(8, dtype=torch.int64, device=device))
        state = model.reserve(model.start(memory, 4), 32)
        tokens = torch.zeros(8, 4, dtype=torch.int64, device=device)
        with Launches() as step:
            logits, state = model.step(tokens, state)
        with Launches() as reorder:
            model.reorder(state, tokens)
    assert logits.shape == (8, 4, 32000) and logits.dtype == torch.bfloat16
    layer = {"native_layer_norm": 3, "addmm": 6, "target_attention": 1, "source_attention": 1, "relu": 1, "add": 3}
    once = {"embedding": 1, "index_select": 1, "add": 1, "native_layer_norm": 1, "mm": 1, "add_": 1}
    expected = {name: 6 * layer.get(name, 0) + once.get(name, 0) for name in {*layer, *once}}
    assert step.counts == expected and sum(expected.values()) == 96
    assert reorder.counts == {"gather": 1, "copy_": 1}


@torch.no_grad()
def test_where_steps_cannot_be_made_in_place(monkeypatch):
    model = small()
    start = model.start(model.encode(*sources(4)), 2)
    assert isinstance(model.reserve(start, 3), ReservedState)
    with torch.enable_grad():
        assert model.reserve(start, 3) is None
    handle = model.decoder.layers[1].attention.output.register_forward_hook(lambda *_: None)
    assert model.reserve(start, 3) is None
    handle.remove()
    own = type("Own", (type(model.decoder.layers[0].attention),), {})
    model.decoder.layers[0].attention.__class__ = own
    assert model.reserve(start, 3) is None
    monkeypatch.undo()
    model = small()
    state = model.start(model.encode(*sources(4)), 2)
    if not isinstance(state, TransformerState):  # the CPU's kernels have a state of their own
        assert model.reserve(state, 3) is None


@torch.no_grad()
def test_refusals():
    model = small(max_positions=5)
    start = model.start(model.encode(*sources(4, 2)), 2)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 5\]; got 6"):
        model.reserve(start, 6)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 5\]; got 0"):
        model.reserve(start, 0)
    tokens = torch.full((2, 2), 7)
    _, after = model.step(tokens, start)
    with pytest.raises(ValueError, match="state must be one that start returned"):
        model.reserve(after, 3)
    state = model.reserve(start, 1)
    with pytest.raises(ValueError, match="state must be one that start returned"):
        model.reserve(state, 3)
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, K\] with B=2, K=2; got \[2, 3\]"):
        model.step(torch.full((2, 3), 7), state)
    with pytest.raises(ValueError, match=r"parents must have shape \[B, K\] with B=2, K=2; got \[2, 1\]"):
        model.reorder(state, tokens[:, :1])
    model.step(tokens, state)
    with pytest.raises(ValueError, match=r"position must be in \[0, 1\); got 1"):
        model.step(tokens, state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_captured_steps_are_the_uncaptured(dtype):
    """Replayed, with parents chosen on the device, sentences leaving in between: bit for bit what runs uncaptured."""

    def run(captured):
        state = model.reserve(model.start(model.encode(*given), 4), 24)
        tokens = torch.full((4, 4), model.bos_id, device="cuda")
        logits = torch.empty(4, 4, 61, dtype=dtype, device="cuda")
        found = []

        def advance():
            values, _ = model.step(tokens, state)
            logits.copy_(values)
            best = values.float().topk(3, dim=2).indices
            tokens.copy_(best[:, :, 1])
            model.reorder(state, best[:, :, 2] % 4)

        for rows in ([0, 1, 2, 3], [3, 1], [1]):
            if rows != [0, 1, 2, 3]:
                index = torch.tensor(rows, device="cuda")
                state, tokens, logits = (
                    model.select(state, index),
                    tokens[: len(rows)].clone(),
                    logits[: len(rows)].clone(),
                )
            run_once = Captured(advance, torch.device("cuda")) if captured else advance
            for _ in range(8):
                run_once()
                found.append(logits.clone())
        return found

    model = small(width=48).to("cuda", dtype)
    given = [x.cuda() for x in sources(5, 9, 2, 7)]
    torch.cuda.set_sync_debug_mode("default")
    for own, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(own, expected)
    if dtype == torch.float32:
        on_gpu = run(False)[0]
        model = model.cpu()
        state = InPlace(model, 24).start(model.encode(*sources(5, 9, 2, 7)), 4)
        on_cpu, _ = model.step(torch.full((4, 4), model.bos_id), state)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", [BeamSearch(beam_size=4), Greedy()], ids=["beam", "greedy"])
def test_a_gpu_finds_what_the_modules_find(strategy, dtype, monkeypatch):
    """Many sentences of different lengths, so that some leave. Near ties may fall otherwise in narrow types."""
    model = small(width=48, tie_embeddings=False).to("cuda", dtype)
    source, lengths = sources(*(1 + i % 20 for i in range(64)), seed=4)
    found = decode(model, source, strategy, source_lengths=lengths)
    monkeypatch.setattr(Transformer, "reserve", lambda self, state, steps: None)
    expected = decode(model, source, strategy, source_lengths=lengths)
    same = sum(a == b for a, b in zip(found.to_lists(), expected.to_lists(), strict=True))
    assert same >= (64 if dtype == torch.float32 else 48)
    if dtype == torch.float32:
        assert decode(model.cpu(), source, strategy, source_lengths=lengths).to_lists() == found.to_lists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_on_a_gpu_is_weights_one_cache_and_logits(dtype):
    """Of 32 sentences, 4 beams and 32 tokens at base size; cuBLAS has its workspaces already."""
    B, K, T = 32, 4, 32
    model = base_on("cuda").to(dtype)
    source = torch.randint(5, 32000, (B, T), device="cuda")
    strategy = BeamSearch(beam_size=K, min_length=T, max_length=T)
    decode(model, source, strategy)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode(model, source, strategy)
    cache = 2 * 6 * (B * K * T + B * T) * 512  # of the target and the source
    needed = sum(p.numel() for p in model.parameters()) + cache + B * K * 32000
    used = torch.cuda.max_memory_allocated() - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights + used <= 1.1 * needed * dtype.itemsize
