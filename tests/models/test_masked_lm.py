"""The masked language model: what its positions see, its prefix, its loss, and a short training through the command."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from condgen_fast import _library
from condgen_fast.cli import main
from condgen_fast.data import embedded
from condgen_fast.data.batching import ParallelDataset
from condgen_fast.losses.masked_lm import masked_lm_loss, prompted_canvas
from condgen_fast.models.masked_lm import MaskedLM, MaskedLMConfig

BLOCKS = pytest.mark.parametrize("block_length", [None, 3])


def model_of(block_length, **options) -> MaskedLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=20, width=16, feed_forward=32, encoder_layers=2, heads=2, dropout=0.0)
    return MaskedLM(MaskedLMConfig(**shape | options, block_length=block_length)).double().eval()


def batch_of(pairs):
    data = ParallelDataset([a for a, _ in pairs], [b for _, b in pairs], pad_id=0, bos_id=2, eos_id=3)
    return data.batch(range(len(pairs)))


@BLOCKS
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_token_sees_its_block_and_what_is_before_it(block_length, norm):
    model = model_of(block_length, norm=norm)
    tokens = torch.randint(5, 20, (1, 10))
    states = model.fill_states(tokens)
    for changed in range(10):
        other = tokens.clone()
        other[0, changed] = 5 + (tokens[0, changed] - 4) % 15
        differs = (model.fill_states(other) - states).abs().amax(-1)[0] > 1e-9
        first = 0 if block_length is None else changed // block_length * block_length
        assert differs.tolist() == [i >= first for i in range(10)]


@BLOCKS
def test_padding_is_not_seen(block_length):
    model = model_of(block_length)
    tokens = torch.randint(5, 20, (3, 7))
    padded = torch.nn.functional.pad(tokens, (0, 4), value=0)
    torch.testing.assert_close(model.fill(padded)[:, :7], model.fill(tokens))
    assert model.fill(torch.zeros(2, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.skipif(not _library.load(), reason="the compiled library is not built")
@pytest.mark.parametrize("options", [{}, {"norm": "post", "activation": "gelu"}, {"positions": "learned"}])
@torch.no_grad()
def test_in_float32_a_canvas_has_the_same_bits_in_any_batch(options):
    model = model_of(None, width=48, heads=3, **options).float()
    lengths = [9, 3, 17, 1, 12]
    canvases = [torch.randint(5, 20, (n,)) for n in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(canvases, batch_first=True, padding_value=0)
    together = model.fill(batch)
    for b, canvas in enumerate(canvases):
        assert torch.equal(model.fill(canvas[None])[0], together[b, : len(canvas)])
    with torch.enable_grad():  # the modules
        torch.testing.assert_close(model.fill_states(batch)[0, :9], model.fill_states(canvases[0][None])[0])
        expected = model.fill(batch)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(together[b, :n], expected[b, :n], rtol=1e-4, atol=1e-5)


def test_extend_gives_the_states_of_the_whole_canvas_piece_by_piece():
    model = model_of(3)
    tokens = torch.randint(5, 20, (2, 12))
    tokens[1, 10:] = 0
    whole, prefix = model.fill_states(tokens), model.prefix(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(model.extend(tokens[:, :6], torch.tensor([0, 0]), prefix), whole[:, :6])
        # The second canvas goes one block back; what it leaves behind that block is not seen again.
        starts = torch.tensor([6, 3])
        pieces = torch.stack([tokens[b, s : s + 3] for b, s in enumerate(starts)])
        noise = torch.randint(5, 20, (2, 3))
        model.extend(noise, starts, prefix)
        got = model.extend(pieces, starts, prefix)
        torch.testing.assert_close(got, torch.stack([whole[b, s : s + 3] for b, s in enumerate(starts)]))
        prefix = model.select(prefix, torch.tensor([1, 0, 1]))
        starts = torch.tensor([6, 9, 6])
        pieces = torch.stack([tokens[b, s : s + 3] for b, s in zip((1, 0, 1), starts, strict=True)])
        want = torch.stack([whole[b, s : s + 3] for b, s in zip((1, 0, 1), starts, strict=True)])
        torch.testing.assert_close(model.extend(pieces, starts, prefix), want)
        # The last piece of the padded canvas has one token that is real, which does not see the padding.
        end = model.extend(tokens[[1, 0, 1], 9:], torch.tensor([9, 9, 9]), prefix)
        torch.testing.assert_close(end[:, 0], whole[[1, 0, 1], 9])


PAIRS = [([7, 8], [9, 10, 11]), ([7], [9]), ([5, 6, 7, 8, 9], [10] * 9)]


def test_a_canvas_is_prompt_response_and_eos_to_the_end_of_a_block():
    torch.manual_seed(0)
    model, batch = model_of(4), batch_of(PAIRS)
    wholes = [[7, 8, 3, 9, 10, 11, 3, 3], [7, 3, 9, 3], [5, 6, 7, 8, 9, 3, *[10] * 9, 3]]
    seen = set()
    for _ in range(60):
        canvas = prompted_canvas(model, batch)
        for b, (tokens, maskable) in enumerate(zip(canvas.tokens.tolist(), canvas.maskable.tolist(), strict=True)):
            learned = [i for i, flag in enumerate(maskable) if flag]
            block, prompt = learned[0] // 4, len(PAIRS[b][0]) + 1
            seen.add((b, block))
            end = 4 * block + 4
            assert tokens == wholes[b][:end] + [0] * (len(tokens) - end)
            assert learned == list(range(max(prompt, 4 * block), end))
    assert seen == {(0, 0), (0, 1), (1, 0), (2, 1), (2, 2), (2, 3)}


def test_without_blocks_the_number_of_masks_does_not_tell_the_length():
    torch.manual_seed(0)
    model, batch = model_of(None), batch_of(PAIRS)
    lengths = [set(), set(), set()]
    for _ in range(200):
        canvas = prompted_canvas(model, batch)
        for b, (source, target) in enumerate(PAIRS):
            n = int((canvas.tokens[b] != 0).sum())
            whole = [*source, 3, *target] + [3] * (n - len(source) - len(target) - 1)
            assert canvas.tokens[b, :n].tolist() == whole
            assert canvas.maskable[b].tolist() == [len(source) < i < n for i in range(canvas.tokens.shape[1])]
            lengths[b].add(n - len(source) - 1)
    for (source, target), found in zip(PAIRS, lengths, strict=True):
        assert min(found) == len(target) + 1 and max(found) == 2 * (len(source) + 1) + 10


@BLOCKS
def test_the_loss_of_a_uniform_model_is_the_entropy_of_a_uniform_token(block_length):
    model = model_of(block_length)
    with torch.no_grad():
        model.embedding.tokens.weight.zero_()
    for _ in range(5):
        loss = masked_lm_loss(model, batch_of(PAIRS))["loss"].detach()
        assert float(loss) == pytest.approx(math.log(20), rel=1e-5)


def test_the_loss_weighs_what_is_masked_by_how_little_is(monkeypatch):
    model, batch = model_of(None), batch_of([([7], [9, 10, 11])])
    canvas = prompted_canvas(model, batch)
    place = int(canvas.maskable[0].int().argmax())
    masked = torch.zeros_like(canvas.maskable)
    masked[0, place] = True
    monkeypatch.setattr("condgen_fast.losses.masked_lm.prompted_canvas", lambda *_: canvas)
    monkeypatch.setattr("condgen_fast.losses.masked_lm.mask_uniformly", lambda *_: masked)
    logits = model.fill(canvas.tokens.masked_fill(masked, model.mask_id))[0, place]
    log_p = logits.detach().log_softmax(0)
    want = -log_p[canvas.tokens[0, place]]  # one of n tokens, n times, over n
    with torch.no_grad():
        assert float(masked_lm_loss(model, batch)["loss"]) == pytest.approx(float(want))
        smoothed = masked_lm_loss(model, batch, label_smoothing=0.5)["loss"]
    assert float(smoothed) == pytest.approx(float(0.5 * want - 0.5 * log_p.mean()))


@pytest.mark.parametrize("block_length", [[], ["--block-length", "8"]])
def test_a_short_training_on_the_embedded_corpus_learns(block_length, tmp_path, capsys):
    for split in ("train", "valid"):
        for language, lines in zip(("en", "de"), embedded.load(split), strict=True):
            lines = lines[: 1200 if split == "train" else 24]
            (tmp_path / f"{split}.{language}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    files = [
        f"--{name}={tmp_path / file}"
        for name, file in (
            ("source", "train.en"), ("target", "train.de"), ("valid-source", "valid.en"), ("valid-target", "valid.de"),
            ("output", "run"),
        )
    ]  # fmt: skip
    model = ["--width", "32", "--feed-forward", "64", "--encoder-layers", "2", "--heads", "2", "--dropout", "0"]
    run = ["--vocabulary-size", "400", "--max-tokens", "1000", "--updates", "40", "--save-every", "20"]
    rate = ["--learning-rate", "0.01", "--warmup", "10", "--max-length", "40", "--device", "cpu"]
    assert main(["train", "masked_lm", *files, *model, *run, *rate, *block_length]) == 0
    with open(tmp_path / "run" / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["valid_loss"]) < float(rows[0]["train_loss"]) < math.log(400) + 1
    assert float(rows[-1]["valid_loss"]) < math.log(400) - 1
    capsys.readouterr()
    options = ["--policy", "quota", "--steps", "2", "--block-length", "8", "--max-length", "12"]
    lines = ["Open the file.", "", "Click the button."]
    (tmp_path / "in").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    arguments = ["--model", str(tmp_path / "run"), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["translate", *arguments, *options]) == 0
    translated = (tmp_path / "out").read_text(encoding="utf-8").split("\n")
    assert len(translated) == 4 and translated[1] == ""
    assert main(["translate", *arguments, "--beam-size", "3"]) == 1
    assert "beam_size is not an option of strategy 'block_diffusion'" in capsys.readouterr().err
