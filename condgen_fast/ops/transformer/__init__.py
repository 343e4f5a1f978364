from condgen_fast.ops.transformer.attention import source_attention, target_attention
from condgen_fast.ops.transformer.op import linear, transformer_pass, transformer_step

__all__ = ["linear", "source_attention", "target_attention", "transformer_pass", "transformer_step"]
