from condgen_fast.ops.levenshtein.op import AppliedEdits, EditLabels, apply_edits, edit_distance, edit_oracle

__all__ = ["AppliedEdits", "EditLabels", "apply_edits", "edit_distance", "edit_oracle"]
