from condgen_fast.ops.beam_search.op import (
    beam_hypotheses,
    beam_topk,
    beam_update,
    unchecked_beam_topk,
    unchecked_beam_update,
)
from condgen_fast.ops.beam_search.reference import Adjustments, Allowed, BeamTopK
from condgen_fast.ops.beam_search.state import BeamConstraints, BeamRules, BeamState, Candidates

__all__ = [
    "Adjustments",
    "Allowed",
    "BeamConstraints",
    "BeamRules",
    "BeamState",
    "BeamTopK",
    "Candidates",
    "beam_hypotheses",
    "beam_topk",
    "beam_update",
    "unchecked_beam_topk",
    "unchecked_beam_update",
]
