from condgen_fast.ops.transformer.op import linear, transformer_pass, transformer_step

__all__ = ["linear", "transformer_pass", "transformer_step"]
