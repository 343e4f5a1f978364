"""What the training recipes share: the run's folder, checkpoints and resuming, the optimiser step, the learning curve.

The loops themselves stand in the recipes. A run is a pure function of its options: batches are drawn from (seed,
epoch) and the random generator is re-seeded from (seed, update, rank), so a run that was killed and resumed ends with
the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from condgen_fast._check import check_number
from condgen_fast.data.batching import ParallelBatch, ParallelDataset, token_batches
from condgen_fast.data.text import read_parallel
from condgen_fast.data.vocabulary import Vocabulary
from condgen_fast.metrics.bleu import bleu
from condgen_fast.models.checkpoint import load_model, load_weights, read_tensors, save_model
from condgen_fast.models.layers import SIZES, EncoderDecoder, TransformerConfig
from condgen_fast.recipes.evaluation import translate_lines


@dataclass(kw_only=True)
class TrainingOptions:
    """Options every training recipe has."""

    source: Path
    """training source, one sentence a line"""
    target: Path
    """training target, line-aligned with the source"""
    valid_source: Path
    """validation source"""
    valid_target: Path
    """validation target"""
    output: Path
    """folder of the run: checkpoints, log, learning curve and, at the end, the averaged model"""
    vocabulary: Path | None = None
    """a trained vocab.model to use; without it one is trained on the training text"""
    vocabulary_size: int = 8000
    """pieces of a vocabulary trained here, joint for both languages"""
    max_length: int = 200
    """training pairs with more tokens on either side are left out"""
    max_tokens: int = 4096
    """padded target tokens of a batch, per process"""
    updates: int = 100_000
    """optimiser steps of the whole run"""
    learning_rate: float = 5e-4
    """peak of the inverse-square-root schedule"""
    warmup: int = 4000
    """updates of linear warm-up to the peak"""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's averages (Vaswani 2017)"""
    weight_decay: float = 0.0
    """decoupled weight decay of the matrices"""
    clip: float = 1.0
    """largest norm of the gradient"""
    label_smoothing: float = 0.1
    """share of the target spread over the vocabulary"""
    seed: int = 1
    """seed of initial weights, batches, dropout and noise"""
    save_every: int = 1000
    """updates between checkpoints, each validated"""
    average: int = 5
    """checkpoints kept, and averaged into the final model (Vaswani 2017, section 6.1)"""
    precision: str = "auto"
    """auto (bf16 on a GPU, fp32 elsewhere), fp32 or bf16"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda"""
    resume: bool = False
    """go on from the newest checkpoint in `output`"""

    def __post_init__(self) -> None:
        for name in ("max_length", "max_tokens", "updates", "warmup", "save_every", "average"):
            check_number(getattr(self, name), name, minimum=1, integer=True)
        for name in ("learning_rate", "clip"):
            check_number(getattr(self, name), name, minimum=0, exclusive=True)
        check_number(self.weight_decay, "weight_decay", minimum=0)
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16; got {self.precision!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")


@dataclass(kw_only=True)
class ModelOptions:
    """Options for the shape of a reference model."""

    size: str = "tiny"
    """tiny, small, base or big; the next five replace single numbers of it"""
    width: int | None = None
    """model width"""
    feed_forward: int | None = None
    """inner width of the feed-forward blocks"""
    encoder_layers: int | None = None
    """encoder depth"""
    decoder_layers: int | None = None
    """decoder depth"""
    heads: int | None = None
    """attention heads"""
    dropout: float = 0.1
    """dropout of embeddings, residual branches and feed-forward blocks"""
    norm: str = "pre"
    """pre or post: where the LayerNorm stands"""

    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config_class(vocab_size=1, **self.model_fields())  # a shape that cannot be is refused before text is read

    def model_fields(self) -> dict[str, object]:
        """Fields of the model's config: the named size, with single numbers replaced where an option is given."""
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {self.size!r}")
        given = {name: getattr(self, name) for name in SIZES[self.size] if getattr(self, name) is not None}
        return SIZES[self.size] | given | {"dropout": self.dropout, "norm": self.norm}


def initialize(model: EncoderDecoder, vocabulary: Vocabulary, folder: Path) -> None:
    """Start from a trained model of the same shape: every weight of the same name is copied, new heads stay random."""
    teacher, teacher_vocabulary = load_model(folder)
    if teacher_vocabulary.fingerprint != vocabulary.fingerprint:
        raise ValueError(f"initialize_from {folder} has another vocabulary; pass --vocabulary {folder}/vocab.model")
    given, own = teacher.state_dict(), model.state_dict()
    with torch.no_grad():
        for name in own.keys() & given.keys():
            if own[name].shape != given[name].shape:
                raise ValueError(
                    f"initialize_from {folder}: {name} must have shape {list(own[name].shape)};"
                    f" got {list(given[name].shape)}"
                )
            own[name].copy_(given[name])


def inverse_square_root(update: int, peak: float, warmup: int) -> float:
    """Learning rate of an update counted from 1: linear to `peak` over `warmup`, then falling with 1/sqrt(update)."""
    return peak * min(update / warmup, math.sqrt(warmup / update))


def choose_device(name: str) -> str:
    """The device an option names: "cpu", "cuda", or "auto" for a GPU where torch sees one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu where torch sees no GPU; got 'cuda'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def start_process_group(timeout: timedelta | None = None) -> tuple[int, int]:
    """(rank, world size), joining the group torchrun describes; (0, 1) outside torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.get_rank(), dist.get_world_size()


class _Loss(nn.Module):
    """The training loss as a module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model: EncoderDecoder, loss: Callable[[EncoderDecoder, ParallelBatch], dict[str, Tensor]]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: ParallelBatch) -> dict[str, Tensor]:
        return self.loss(self.model, batch)


class Run:
    """One training run in its folder.

    `model` may come initialised from another; `loss(model, batch)` returns named losses, their sum under "loss".
    `teacher` is a fingerprint of what the loss reads beside the batch, which must be the same when a run goes on.
    """

    def __init__(
        self, options: TrainingOptions, model: EncoderDecoder, vocabulary: Vocabulary, loss: Callable, teacher: str = ""
    ):
        self.options, self.vocabulary, self._teacher = options, vocabulary, teacher
        self.rank, self.world_size = start_process_group()
        if options.max_length + 1 > model.max_positions:
            raise ValueError(
                f"max_length must be below the model's {model.max_positions} positions; got {options.max_length}"
            )
        self.device = torch.device(choose_device(options.device))
        self.model = model.to(self.device)
        bf16 = options.precision == "bf16" or (options.precision == "auto" and self.device.type == "cuda")
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        if bf16 and self.device.type == "cpu":
            # oneDNN keeps the compiled product of each of the last 1024 shapes, torch as many again, and batches differ
            # in shape: gigabytes. Both limits are read at the first product.
            for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                os.environ.setdefault(name, "128")
        self._module: nn.Module = _Loss(self.model, loss)
        if self.world_size > 1:
            self._module = DistributedDataParallel(self._module)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate, betas=options.betas, fused=True,
        )  # fmt: skip
        self.update = 0
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._interrupted = False
        self._seconds = 0.0
        self._clock = time.monotonic()
        self._prepare_folder()

    # -- the loop -----------------------------------------------------------------------------------------------

    def batches(self, data: ParallelDataset) -> Iterator[ParallelBatch]:
        """Training batches from where the run stands to its last update; stops early, and cleanly, on Ctrl-C."""
        options = self.options
        bar = tqdm(total=options.updates, initial=self.update, unit="update", disable=self.rank != 0, smoothing=0.05)
        self._bar = bar
        with self._stop_on_interrupt():
            epoch, skip = 0, self.update
            while self.update < options.updates:
                plan = token_batches(
                    data.source_lengths, data.target_lengths, max_tokens=options.max_tokens,
                    seed=options.seed, epoch=epoch, rank=self.rank, world_size=self.world_size,
                )  # fmt: skip
                if not plan:
                    raise ValueError("the training text has no pair that fits max_length")
                for indices in plan[skip:]:
                    if self._stopping() or self.update >= options.updates:
                        break
                    torch.manual_seed(options.seed * 1_000_003 + self.update * self.world_size + self.rank)
                    yield data.batch(indices).to(self.device)
                if self._interrupted:
                    break
                epoch, skip = epoch + 1, max(0, skip - len(plan))
        bar.close()

    def step(self, batch: ParallelBatch) -> bool:
        """One optimiser update on a batch; true when a checkpoint is due."""
        options = self.options
        self.update += 1
        rate = inverse_square_root(self.update, options.learning_rate, options.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self._module.train()
        with self._autocast:
            losses = self._module(batch)
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimiser.step()
        for name, value in (losses | {"gradient_norm": norm}).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._bar.update()
        if self.update % 50 == 0 and self.rank == 0:
            self._bar.set_postfix_str(f"loss {self._mean('loss'):.3f} lr {rate:.2e}")
        return self.update % options.save_every == 0 or self.update == options.updates

    @torch.no_grad()
    def validate(self, data: ParallelDataset, strategy: object) -> dict[str, float]:
        """Mean of every named loss over a data set, in eval mode, and BLEU of a strategy's output on it.

        The processes share the batches and the sentences; what they find does not depend on their number.
        """
        self.model.eval()
        loss = _Loss(self.model, self._inner.loss)
        plan = token_batches(
            data.source_lengths, data.target_lengths, max_tokens=self.options.max_tokens, seed=0, epoch=0, shuffle=False
        )
        losses: dict[int, dict[str, float]] = {}
        for number in range(self.rank, len(plan), self.world_size):
            torch.manual_seed(number)  # the same noise every time
            with self._autocast:
                found = loss(data.batch(plan[number]).to(self.device))
            losses[number] = {name: float(value) for name, value in found.items()}
        mine, sources = range(self.rank, len(data), self.world_size), self.vocabulary.decode(data.source)
        texts = translate_lines(self.model, self.vocabulary, [sources[i] for i in mine], strategy)
        outputs = dict(zip(mine, texts, strict=True))
        if self.world_size > 1:
            parts: list = [None] * self.world_size
            dist.all_gather_object(parts, (losses, outputs))
            losses = {key: value for theirs, _ in parts for key, value in theirs.items()}
            outputs = {key: value for _, theirs in parts for key, value in theirs.items()}
        count = sum(map(len, plan))
        measures = {
            f"valid_{name}": sum(losses[n][name] * len(rows) for n, rows in enumerate(plan)) / count
            for name in losses[0]
        }
        references = self.vocabulary.decode(data.target)
        return measures | {"valid_bleu": bleu([outputs[i] for i in range(len(data))], references).score}

    @property
    def _inner(self) -> _Loss:
        return self._module.module if self.world_size > 1 else self._module

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self, measures: dict[str, float]) -> None:
        """Log a row, write checkpoint step-<update> whole, drop all but the newest `average`, redraw the curve."""
        self._seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        row = {"update": self.update, "seconds": round(self._seconds, 1)}
        row |= {f"train_{name}": round(self._mean(name), 5) for name in self._sums}
        row |= {name: round(value, 5) for name, value in measures.items()}
        self._sums = {}
        self.rows.append(row)
        if self.rank:
            return
        tqdm.write("  ".join(f"{name} {value:g}" for name, value in row.items()))
        names = {id(p): name for name, p in self.model.named_parameters()}
        moments = {
            f"{key}.{names[id(p)]}": value.detach().cpu().reshape(value.shape or (1,))
            for p, state in self.optimiser.state.items()
            for key, value in state.items()
        }
        state = {"update": self.update, "seconds": self._seconds, "rows": self.rows, "options": _plain(self.options)}
        state |= {"text": self._text, "teacher": self._teacher, "processes": self.world_size}
        folder = self._checkpoints / f"step-{self.update:08d}"
        save_model(folder, self.model, self.vocabulary, extra=moments, state=state)
        for old in self.checkpoints()[: -self.options.average]:  # never half a folder under a checkpoint's name
            old.rename(old.with_name(f".{old.name}.old"))
            shutil.rmtree(old.with_name(f".{old.name}.old"))
        _write_csv(self.options.output / "log.csv", self.rows)
        draw_curve(self.rows, self.options.output / "curve.png")

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of this run, oldest first."""
        return sorted(p for p in self._checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))

    def finish(self) -> None:
        """Write the mean of the kept checkpoints as the run's model; KeyboardInterrupt if the run was stopped."""
        if self.world_size > 1:
            dist.barrier()
        if self._interrupted:
            if self.rank == 0:
                print(f"stopped at update {self.update}; --resume goes on from the newest checkpoint")
            raise KeyboardInterrupt
        if self.rank == 0:
            average_checkpoints(self.model, self.checkpoints()[-self.options.average :])
            save_model(self.options.output, self.model, self.vocabulary)

    def _prepare_folder(self) -> None:
        options = self.options
        self._checkpoints = options.output / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._text = _digest(options.source, options.target, options.valid_source, options.valid_target)
        if self.rank == 0:
            for left_over in self._checkpoints.glob(".step-*"):  # of a process that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        found = self.checkpoints()
        if found and not options.resume:
            raise ValueError(f"output {options.output} already holds a run; use --resume or another folder")
        if options.resume and found:
            self._load(found[-1])

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        free = {"resume", "updates", "output", "device"}  # what may differ between the halves of one run
        for name, value in _plain(self.options).items():
            if name not in free and state["options"].get(name) != value:
                raise ValueError(f"resume: {name} was {state['options'].get(name)!r} in {folder}; got {value!r}")
        trained_with = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocabulary"]
        if state["text"] != self._text or trained_with != self.vocabulary.fingerprint:
            raise ValueError(f"resume: the text or the vocabulary is not the one that {folder} was trained with")
        if state.get("teacher", "") != self._teacher:
            raise ValueError(f"resume: the teacher, its store or the embeddings are not what {folder} was trained with")
        if state["processes"] != self.world_size:
            raise ValueError(f"resume: {folder} was trained by {state['processes']} processes; got {self.world_size}")
        load_weights(self.model, folder / "model.safetensors")
        moments = read_tensors(folder / "training.safetensors")
        for name, parameter in self.model.named_parameters():
            state_of = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                tensor = moments[f"{key}.{name}"]
                state_of[key] = (tensor.reshape(()) if key == "step" else tensor).to(self.device)
            self.optimiser.state[parameter] = state_of
        self.update, self.rows, self._seconds = state["update"], state["rows"], state["seconds"]

    def _mean(self, name: str) -> float:
        done = self.update - (self.rows[-1]["update"] if self.rows else 0)
        return float(self._sums[name]) / max(done, 1)

    def _stopping(self) -> bool:
        """Whether to stop here. Several processes agree on it every few updates, or one would wait for the others."""
        if self.world_size > 1:
            if self.update % 10:
                return False
            flag = torch.tensor(int(self._interrupted), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self._interrupted = bool(flag)
        return self._interrupted

    @contextlib.contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self._interrupted = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def average_checkpoints(model: EncoderDecoder, folders: list[Path]) -> None:
    """Set the model's weights to the mean of the checkpoints' weights, summed in float32."""
    if not folders:
        raise ValueError("average_checkpoints needs at least one checkpoint; got none")
    total: dict[str, Tensor] = {}
    for folder in folders:
        for name, tensor in read_tensors(folder / "model.safetensors").items():
            total[name] = total[name] + tensor.float() if name in total else tensor.float()
    own = dict(model.state_dict())
    with torch.no_grad():
        for name, tensor in total.items():
            own[name].copy_(tensor / len(folders))


def prepare_data(options: TrainingOptions) -> tuple[Vocabulary, ParallelDataset, ParallelDataset]:
    """Read the four text files and the vocabulary (or train one) -> vocabulary, training data, validation data."""
    source, target = read_parallel(options.source, options.target)
    valid_source, valid_target = read_parallel(options.valid_source, options.valid_target)
    if options.vocabulary is not None:
        vocabulary = Vocabulary.load(options.vocabulary)
    else:
        vocabulary = Vocabulary.train(source + target, options.vocabulary_size)
    train = ParallelDataset.encode(source, target, vocabulary, max_length=options.max_length)
    valid = ParallelDataset.encode(valid_source, valid_target, vocabulary, max_length=options.max_length)
    if not len(valid):
        raise ValueError(f"valid_source {options.valid_source} must have a pair that fits max_length; it has none")
    return vocabulary, train, valid


def draw_curve(rows: list[dict[str, float]], path: Path) -> None:
    """The learning curve as a picture: losses over updates on the left axis, BLEU on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    updates = [row["update"] for row in rows]
    for name, style in (("train_loss", "C0"), ("valid_loss", "C1")):
        if name in rows[-1]:
            axis.plot(updates, [row.get(name, math.nan) for row in rows], style, label=name.replace("_", " "))
    axis.set(xlabel="update", ylabel="loss")
    handles = axis.get_legend_handles_labels()
    if "valid_bleu" in rows[-1]:
        right = axis.twinx()
        right.plot(updates, [row.get("valid_bleu", math.nan) for row in rows], "C2--", label="valid BLEU")
        right.set_ylabel("BLEU")
        handles = [a + b for a, b in zip(handles, right.get_legend_handles_labels(), strict=True)]
    axis.legend(*handles, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _digest(*paths: Path) -> str:
    """SHA-256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _plain(options: TrainingOptions) -> dict[str, object]:
    """The options as JSON can hold them."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))
