"""A set of token sequences that hypotheses are held to, as flat arrays that a device can walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen_fast import _library


class Trie:
    """The sequences that a target may be (`whole`), or that it may begin with, whatever follows.

    Built on the host, in compiled code; `BeamSearch(trie=...)` copies it to the device once a search. A search costs
    the same however many sequences there are: a hypothesis knows its node, and a node's children are one range of an
    array.

    Raises ValueError where there is no sequence, an empty one, or a negative id.

        BeamSearch(trie=Trie([[5, 8], [5, 9, 7]]))
    """

    def __init__(self, sequences: Sequence[Sequence[int]], *, whole: bool = True) -> None:
        try:
            from condgen_fast import _C

            build = _C.Trie
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"a Trie is built by compiled code, which is missing ({error}); build it in the source folder with\n"
                f"    {_library.BUILD_COMMAND}"
            ) from error
        tree = build([list(map(int, sequence)) for sequence in sequences])
        self.whole = whole
        self._parents, self._tokens, self._finals = map(torch.tensor, (tree.parents, tree.tokens, tree.finals))

    def to(self, device: torch.device, ends: Tensor) -> DeviceTrie:
        """On the device, with `ends` [n] after each whole sequence."""
        parents, tokens, finals = self._parents, self._tokens, self._finals
        nodes = tokens.shape[0] + 1
        targets = torch.arange(1, nodes)
        ends = ends.cpu()
        if self.whole:
            closing = finals.repeat_interleave(ends.shape[0])  # where an end leads to does not matter
            parents, targets = torch.cat([parents, closing]), torch.cat([targets, closing])
            tokens = torch.cat([tokens, ends.repeat(finals.shape[0])])
        else:
            inside = ~torch.isin(parents, finals)
            parents, tokens = parents[inside], tokens[inside]
            targets = targets[inside].masked_fill(torch.isin(targets[inside], finals), -1)
        stride = int(tokens.max()) + 1
        keys, order = (parents * stride + tokens).sort()
        once = torch.cat([torch.ones(1, dtype=torch.bool), keys.diff() > 0])  # a sequence may end with an end itself
        keys, order = keys[once], order[once]
        parents, tokens, targets = parents[order], tokens[order], targets[order]
        is_end = torch.isin(tokens, ends)
        ends_first = (2 * parents + (~is_end).long()).argsort(stable=True)
        first = torch.searchsorted(parents[ends_first], torch.arange(nodes + 1))
        end_counts = torch.zeros(nodes, dtype=torch.int64).index_add_(0, parents, is_end.long())
        parts = (first, tokens[ends_first], end_counts, keys, targets)
        return DeviceTrie(*(part.to(device) for part in parts), stride)


@dataclass(frozen=True)
class DeviceTrie:
    """Node n has children tokens[first[n] : first[n + 1]], ends first; -1 is where everything is allowed."""

    first: Tensor  # [nodes + 1]
    tokens: Tensor  # [edges]
    end_counts: Tensor  # [nodes]
    keys: Tensor  # [edges] ascending, node * stride + token
    targets: Tensor  # [edges] in the order of the keys
    stride: int

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """First and behind the last child of each node, -1 where it has no say."""
        inside = nodes.clamp(min=0)
        free = nodes < 0
        return self.first[inside].masked_fill(free, -1), self.first[inside + 1].masked_fill(free, -1)

    def ends_among_children(self, nodes: Tensor) -> Tensor:
        return self.end_counts[nodes.clamp(min=0)].masked_fill(nodes < 0, 0)

    def follow(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Where the tokens lead to; they are children of their nodes, or the hypothesis is dead."""
        wanted = nodes.clamp(min=0) * self.stride + tokens.clamp(max=self.stride - 1)
        place = torch.searchsorted(self.keys, wanted.contiguous()).clamp(max=self.keys.shape[0] - 1)
        return torch.where(nodes < 0, nodes, self.targets[place])
