from condgen_fast.ops.levenshtein.application import AppliedEdits, apply_edits
from condgen_fast.ops.levenshtein.noise import random_delete, random_mask, random_shuffle
from condgen_fast.ops.levenshtein.op import EditAlignment, EditLabels, edit_alignment, edit_distance, edit_oracle

__all__ = [
    "AppliedEdits",
    "EditAlignment",
    "EditLabels",
    "apply_edits",
    "edit_alignment",
    "edit_distance",
    "edit_oracle",
    "random_delete",
    "random_mask",
    "random_shuffle",
]
