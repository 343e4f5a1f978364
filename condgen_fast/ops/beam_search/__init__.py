from condgen_fast.ops.beam_search.op import BeamTopK, beam_topk

__all__ = ["BeamTopK", "beam_topk"]
