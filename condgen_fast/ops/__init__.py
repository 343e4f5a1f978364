"""Functions of tensors, each with a reference, kernels and one contract."""

from condgen_fast.ops.beam_search import BeamTopK, beam_topk
from condgen_fast.ops.kd_loss import (
    KDLossParts,
    LabelPrior,
    TopK,
    kd_loss,
    kd_loss_parts,
    linear_kd_loss,
    vocabulary_parallel_kd_loss,
)
from condgen_fast.ops.levenshtein import (
    AppliedEdits,
    EditAlignment,
    EditLabels,
    apply_edits,
    edit_alignment,
    edit_distance,
    edit_oracle,
    random_delete,
    random_mask,
    random_shuffle,
)
from condgen_fast.ops.refinement import Commit, RowStats, commit, remask, row_stats

__all__ = [
    "AppliedEdits",
    "BeamTopK",
    "Commit",
    "EditAlignment",
    "EditLabels",
    "KDLossParts",
    "LabelPrior",
    "RowStats",
    "TopK",
    "apply_edits",
    "beam_topk",
    "commit",
    "edit_alignment",
    "edit_distance",
    "edit_oracle",
    "kd_loss",
    "kd_loss_parts",
    "linear_kd_loss",
    "random_delete",
    "random_mask",
    "random_shuffle",
    "remask",
    "row_stats",
    "vocabulary_parallel_kd_loss",
]
