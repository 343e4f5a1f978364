"""What a decoding strategy asks of a model: any class with these attributes and methods will do, no base class needed.

`memory` (the encoded source) and `state` (a decoder's cache) are the model's own business; strategies only hand them
back. `source` is right-padded with `pad_id`; `source_lengths` says where each sentence ends and is never 0.
Two optional attributes are used where a model has them: `max_positions` (int, the longest target it can decode, eos
included) and `device` (where `source` is put; without it, where the model's first parameter is). A FillModel or
EditModel may offer `fill_states(tokens, memory)` [B, L, D] with `project(states)` [..., V], which together are `fill`:
then only the positions that are read are projected to the vocabulary, and what `project` returns may be written to,
unless it is a view of its argument. The same holds of a MaskedModel.
A FillModel, EditModel or MaskedModel may say that it is `capturable`: true where, on a GPU, the methods that take a
canvas neither wait for the device nor depend on anything but their arguments' values, so that a loop's passes become a
CUDA graph.
An EditModel whose deletion and placeholder head read the same states may say so: `shares_edit_states` true,
`edit_states(tokens, memory)` [B, L, D], `delete_head(states)`, `insert_head(states)`; then a canvas from which nothing
was deleted is passed through once.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class StepModel(Protocol):
    """A left-to-right decoder with a cache: one call a token.

    A StepModel may also have `select(state, rows) -> state`: the state of those rows [R] of the batch, in that order.
    Where it is present, finished sentences leave the batch. `eos_ids` (ints, eos_id among them) are all the ids that
    end a hypothesis, where there are several. `force(target [B, n, T], memory) -> logits [B, n, T, V]` is teacher
    forcing, for `score`.

    `reserve(state, steps) -> state`, of a state that `start` returned: one in which so many steps are made in place, or
    None where the model as it stands has to go on step by step. Its `step` and `reorder` return the state they were
    given: they write into tensors that stay where they are, with shapes that stay as they are (as many parents as
    beams), the position being on the device, and wait for nothing; so a strategy may capture them in a CUDA graph.
    `select` returns another such state, of fewer rows and with as many steps left.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, source: Tensor, source_lengths: Tensor) -> Any:
        """Memory of `source` [B, S] int64 with `source_lengths` [B]; called once, never copied per beam."""
        ...

    def start(self, memory: Any, beam_size: int) -> Any:
        """State before the first token, for `beam_size` hypotheses a sentence."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits [B, K, V] that follow the last tokens [B, K] (bos at first), and the state that holds these tokens."""
        ...

    def reorder(self, state: Any, parents: Tensor) -> Any:
        """State in which hypothesis k of sentence b is what hypothesis parents[b, k] was; parents [B, K] int64."""
        ...


@runtime_checkable
class FillModel(Protocol):
    """A bidirectional decoder that fills masked canvases of a predicted length.

    A canvas begins with bos and ends with eos; a predicted length counts neither. `tokens` always has as many rows as
    `memory`.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def encode(self, source: Tensor, source_lengths: Tensor) -> Any:
        """Memory of `source` [B, S] int64 with `source_lengths` [B]."""
        ...

    def select(self, memory: Any, rows: Tensor) -> Any:
        """Memory of those rows [R] int64, in that order, repeats allowed."""
        ...

    def length_logits(self, memory: Any) -> Tensor:
        """Scores [B, Lmax] of the target lengths 0 .. Lmax-1."""
        ...

    def fill(self, tokens: Tensor, memory: Any) -> Tensor:
        """Logits [B, L, V] of the token at every position of the canvas [B, L]."""
        ...


@runtime_checkable
class EditModel(Protocol):
    """A decoder that deletes tokens, inserts masks and fills them (Levenshtein Transformer).

    A canvas begins with bos and ends with eos. `tokens` always has as many rows as `memory`.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def encode(self, source: Tensor, source_lengths: Tensor) -> Any:
        """Memory of `source` [B, S] int64 with `source_lengths` [B]."""
        ...

    def select(self, memory: Any, rows: Tensor) -> Any:
        """Memory of those rows [R] int64, in that order, repeats allowed."""
        ...

    def delete_logits(self, tokens: Tensor, memory: Any) -> Tensor:
        """Logits [B, L, 2] of keeping (0) and deleting (1) every token of the canvas [B, L]."""
        ...

    def insert_logits(self, tokens: Tensor, memory: Any) -> Tensor:
        """Logits [B, L-1, max_insert+1] of how many masks to insert after each token but the last."""
        ...

    def fill(self, tokens: Tensor, memory: Any) -> Tensor:
        """Logits [B, L, V] of the token at every position of the canvas [B, L]."""
        ...


@runtime_checkable
class InsertionModel(Protocol):
    """A decoder that says of every slot between two tokens which token comes there (Insertion Transformer).

    A canvas begins with bos and ends with eos. `tokens` always has as many rows as `memory`.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def encode(self, source: Tensor, source_lengths: Tensor) -> Any:
        """Memory of `source` [B, S] int64 with `source_lengths` [B]."""
        ...

    def select(self, memory: Any, rows: Tensor) -> Any:
        """Memory of those rows [R] int64, in that order, repeats allowed."""
        ...

    def slot_logits(self, tokens: Tensor, memory: Any) -> Tensor:
        """Logits [B, L-1, V] of the token to insert after each token but the last; eos means nothing."""
        ...


@runtime_checkable
class MaskedModel(Protocol):
    """A FillModel without encoder (a masked-diffusion language model): what is given stands in the canvas itself.

    A canvas is given tokens and masks, padded on the right, without bos or eos of the strategy's making; `pad_id` is
    none of the other ids, and padding must not be seen by other positions. `memory` is always None.

    A model that is block-causal may say so: `block_length` (int), where a token sees its own block of that many
    positions (counted from the canvas's first) and all before it, and nothing behind it. Then decoded blocks need not
    be computed again, if it also offers (beside `project`):
    `prefix(rows, width) -> prefix`, room for the keys of `rows` canvases of `width` positions;
    `extend(tokens [R, n], start [R], prefix) -> [R, n, D]`, the states of the tokens at positions start[r] … of each
    canvas, which see every earlier position as the last `extend` over it left it; `start` and n are multiples of
    `block_length`; the prefix may be changed in place;
    `select(prefix, rows [R]) -> prefix` of those rows.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def fill(self, tokens: Tensor, memory: None) -> Tensor:
        """Logits [B, L, V] of the token at every position of the canvas [B, L]."""
        ...


def missing_members(model: Any, protocol: type) -> list[str]:
    """Names of the attributes and methods of `protocol` that `model` lacks, in the order the protocol states them."""
    names = [*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))]
    return [name for name in names if not hasattr(model, name)]
