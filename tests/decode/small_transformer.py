"""A small random Transformer of ours, and sentences for it."""

from __future__ import annotations

import torch

from condgen_fast.models.layers import TransformerConfig
from condgen_fast.models.transformer import Transformer


def small_transformer() -> Transformer:
    """In double precision, so that the size of a matrix product does not show and what is compared is the search."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=29, width=16, feed_forward=32, encoder_layers=1, decoder_layers=2, heads=2, tie_embeddings=False
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.double()


def sources(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(5, 29, (n,), generator=generator).tolist() for n in lengths]
