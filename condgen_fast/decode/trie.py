"""A set of token sequences that hypotheses are held to, as flat arrays that a device can walk."""

from __future__ import annotations

from collections.abc import Sequence

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

    def laid_out(self, ends: list[int]) -> tuple[Tensor, Tensor, int, int]:
        """With an end after each whole sequence: the children of all nodes, and the rest of the trie, its nodes and its
        stride as `BeamConstraints` has them; on the host."""
        parents, tokens, finals = self._parents, self._tokens, self._finals
        nodes = tokens.shape[0] + 1
        targets = torch.arange(1, nodes)
        closing = torch.tensor(ends)
        if self.whole:
            closed = finals.repeat_interleave(len(ends))  # where an end leads to does not matter
            parents, targets = torch.cat([parents, closed]), torch.cat([targets, closed])
            tokens = torch.cat([tokens, closing.repeat(finals.shape[0])])
        else:
            inside = ~torch.isin(parents, finals)
            parents, tokens = parents[inside], tokens[inside]
            targets = targets[inside].masked_fill(torch.isin(targets[inside], finals), -1)
        stride = int(tokens.max()) + 1
        keys, order = (parents * stride + tokens).sort()
        once = torch.cat([torch.ones(1, dtype=torch.bool), keys.diff() > 0])  # a sequence may end with an end itself
        keys, order = keys[once], order[once]
        parents, tokens, targets = parents[order], tokens[order], targets[order]
        is_end = torch.isin(tokens, closing)
        ends_first = (2 * parents + (~is_end).long()).argsort(stable=True)
        first = torch.searchsorted(parents[ends_first], torch.arange(nodes + 1))
        end_counts = torch.zeros(nodes, dtype=torch.int64).index_add_(0, parents, is_end.long())
        return tokens[ends_first], torch.cat([first, end_counts, keys, targets]), nodes, stride
