"""Knowledge-distillation losses on logits and on hidden states."""

from condgen_fast.ops.kd_loss.linear import linear_kd_loss
from condgen_fast.ops.kd_loss.op import kd_loss
from condgen_fast.ops.kd_loss.parts import KDLossParts, kd_loss_parts
from condgen_fast.ops.kd_loss.teachers import LabelPrior, TopK
from condgen_fast.ops.kd_loss.vocabulary_parallel import vocabulary_parallel_kd_loss

__all__ = [
    "KDLossParts",
    "LabelPrior",
    "TopK",
    "kd_loss",
    "kd_loss_parts",
    "linear_kd_loss",
    "vocabulary_parallel_kd_loss",
]
