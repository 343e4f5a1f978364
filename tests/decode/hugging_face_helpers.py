"""What tests of `adapt` share: sentences, models that end, and what `generate` returns for them."""

from __future__ import annotations

import torch

V = 40


def raise_eos(model, args, kwargs, output):
    """Forward hook: each position adds to the logit of eos, so that every hypothesis ends, at various lengths."""
    logits = output.logits
    last = output.past_key_values.get_seq_length()
    positions = torch.arange(last - logits.shape[1], last)
    logits[..., model.config.eos_token_id] += (0.4 * positions - 1) * (positions > 0)
    return output


def sources(count, pad_id, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator)
    tokens = torch.randint(3, V - 1, (count, int(lengths.max())), generator=generator)
    return tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], pad_id), lengths


def generated(model, tokens, lengths, n, **options):
    """Token ids without start, eos and padding, and sequence scores where beams were used."""
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=60,
        suppress_tokens=[model.config.pad_token_id],
        num_return_sequences=n,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in out.sequences[:, 1:].tolist():
        length = next((i for i, token in enumerate(row) if token in ends), None)
        assert length is not None, "a hypothesis reached the limit, where the two differ by definition"
        rows.append(row[:length])
    scores = out.get("sequences_scores")
    return [rows[i : i + n] for i in range(0, len(rows), n)], None if scores is None else scores.view(-1, n)
