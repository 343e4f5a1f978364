from condgen_fast.ops.beam_search.op import Adjustments, Allowed, BeamTopK, beam_topk

__all__ = ["Adjustments", "Allowed", "BeamTopK", "beam_topk"]
