"""Fast conditional generation: decoding, edit oracles, distillation losses and refinement for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from condgen_fast.decode import (
    BeamSearch,
    BlockDiffusion,
    Greedy,
    Hypotheses,
    InsertionDecoding,
    IterativeRefinement,
    LevenshteinRefinement,
    MaskPredict,
    Rescored,
    Sampling,
    Trie,
    adapt,
    decode,
    score,
)
from condgen_fast.ops import (
    AppliedEdits,
    BeamTopK,
    Commit,
    EditAlignment,
    EditLabels,
    KDLossParts,
    LabelPrior,
    RowStats,
    TopK,
    apply_edits,
    beam_topk,
    commit,
    edit_alignment,
    edit_distance,
    edit_oracle,
    kd_loss,
    kd_loss_parts,
    linear_kd_loss,
    random_delete,
    random_mask,
    random_shuffle,
    remask,
    row_stats,
    vocabulary_parallel_kd_loss,
)

if TYPE_CHECKING:
    from condgen_fast.models.checkpoint import load_model

__version__ = "0.1.0"

__all__ = [
    "AppliedEdits",
    "BeamSearch",
    "BeamTopK",
    "BlockDiffusion",
    "Commit",
    "EditAlignment",
    "EditLabels",
    "Greedy",
    "Hypotheses",
    "InsertionDecoding",
    "IterativeRefinement",
    "KDLossParts",
    "LabelPrior",
    "LevenshteinRefinement",
    "MaskPredict",
    "Rescored",
    "RowStats",
    "Sampling",
    "TopK",
    "Trie",
    "adapt",
    "apply_edits",
    "beam_topk",
    "commit",
    "decode",
    "edit_alignment",
    "edit_distance",
    "edit_oracle",
    "kd_loss",
    "kd_loss_parts",
    "linear_kd_loss",
    "load_model",
    "random_delete",
    "random_mask",
    "random_shuffle",
    "remask",
    "row_stats",
    "score",
    "vocabulary_parallel_kd_loss",
]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # reads SentencePiece and safetensors, which ops and decoding do without
        from condgen_fast.models.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
