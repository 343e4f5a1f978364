from condgen_fast.ops.refinement.op import Commit, RowStats, commit, remask, row_stats

__all__ = ["Commit", "RowStats", "commit", "remask", "row_stats"]
