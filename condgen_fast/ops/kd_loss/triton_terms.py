"""What the Triton kernel of kd_loss computes of a tile of a row: sums, divergences, gradients; and listed teachers.

Exponents are of base 2 throughout: that is the exponential the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

CROSS_ENTROPY, FORWARD_KL, REVERSE_KL, JSD, TVD = (tl.constexpr(i) for i in range(5))  # DIVERGENCES of checks.py
NO_TEACHER, DENSE, DROP, UNIFORM, RENORMALISE, PRIOR = (tl.constexpr(i) for i in range(6))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # the least normal number: half of it is 0 to a GPU


@triton.jit
def finite_or_zero(highest):
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def listed_distribution(ids, listed, floor, k, others, inverse_temperature, KIND: tl.constexpr, LISTED: tl.constexpr):
    """The tempered teacher of a row: ids, q and log2(q) of what it lists, then q of every other token, and the mass.

    In float64: 1 - sum cancels, and a high temperature magnifies that.
    """
    position = tl.arange(0, LISTED)
    inside = position < k
    token = tl.load(ids + position, mask=inside, other=0).to(tl.int64)
    given = tl.load(listed + position, mask=inside, other=0).to(tl.float64)
    outcomes = tl.where(others > 0, 1, 0).to(tl.float64)  # besides the listed ones: a ghost outside the vocabulary,
    if KIND == UNIFORM or KIND == PRIOR:
        outcomes = others.to(tl.float64)  # the other tokens,
    if KIND == RENORMALISE:
        outcomes = outcomes * 0  # or none
    if KIND == PRIOR:
        logs = tl.log(given)
        other_log = tl.log(outcomes * 0 + floor)
    else:
        logs = given
        rest = tl.maximum(1 - tl.sum(tl.where(inside, tl.exp(given), 0.0)), 0.0)
        other_log = tl.log(rest / tl.maximum(outcomes, 1.0))
    logs = tl.where(inside, logs, -float("inf")) * inverse_temperature
    other_log = tl.where(outcomes > 0, other_log, -float("inf")) * inverse_temperature
    highest = tl.maximum(tl.max(logs), other_log)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - highest)) + outcomes * tl.exp(other_log - highest)
    normaliser = highest + tl.where(total == 0, 0.0, tl.log(total))  # a row with no mass stays without
    q = tl.exp(logs - normaliser)
    other_q = tl.exp(other_log - normaliser)
    if KIND == DROP:
        other_q = other_q * 0
    mass = tl.sum(q) + other_q * others.to(tl.float64)
    log2_q = (logs - normaliser) * 1.4426950408889634
    return token, q.to(tl.float32), log2_q.to(tl.float32), other_q.to(tl.float32), mass.to(tl.float32)


@triton.jit
def sums(
    s, t, inside, s_shift, t_shift, s_factor, t_factor,
    DIVERGENCE: tl.constexpr, KIND: tl.constexpr, HARD: tl.constexpr, TEMPERATURE: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """Sums over a tile: e = 2^z with z = (s - s_shift) * s_factor, e at temperature 1, s - s_shift where finite, the
    number of -inf, q = 2^y likewise, and what the divergence needs."""
    hard_sum, x_sum, gone, t_sum, dot = 0.0, 0.0, 0, 0.0, 0.0
    x = s.to(tl.float32) - s_shift
    z = x * s_factor
    e = tl.exp2(z)
    s_sum = tl.sum(e)
    if HARD:
        if TEMPERATURE == 2:
            hard_sum = tl.sum(e * e)
        elif TEMPERATURE != 1:
            hard_sum = tl.sum(tl.exp2(x * LOG2_E))
    if LINEAR:
        finite = inside & (x != -float("inf"))
        x_sum = tl.sum(tl.where(finite, x, 0.0))
        gone = tl.sum((inside & (x == -float("inf"))).to(tl.int32))
    if KIND == DENSE:
        y = (t.to(tl.float32) - t_shift) * t_factor
        q = tl.exp2(y)
        t_sum = tl.sum(q)
        if DIVERGENCE == CROSS_ENTROPY:
            dot = tl.sum(tl.where(q == 0, 0.0, q * z))
        elif DIVERGENCE == FORWARD_KL:
            dot = tl.sum(tl.where(q == 0, 0.0, q * (y - z)))
        elif DIVERGENCE == REVERSE_KL:
            dot = tl.sum(tl.where(e == 0, 0.0, e * (z - y)))
    return s_sum, hard_sum, x_sum, gone, t_sum, dot


@triton.jit
def entropy_sum(logits, shift, factor):
    """Sum over a tile of e * log2(e), with e = 2^((logits - shift) * factor)."""
    z = (logits.to(tl.float32) - shift) * factor
    e = tl.exp2(z)
    return tl.sum(tl.where(e == 0, 0.0, e * z))


@triton.jit
def first_of(logits, highest, column):
    """The first column of a tile with the highest logit."""
    return tl.min(tl.where(logits.to(tl.float32) == highest, column, 2147483647))


@triton.jit
def most_probable(token, q_k, here, floor_q, others, k):
    """The first of the most probable tokens of a listed teacher."""
    highest = tl.max(tl.where(here, q_k, 0.0))
    found = tl.min(tl.where(here & (q_k == highest), token, 2147483647))
    if (others > 0) & (floor_q >= highest):  # the first token that is not listed below the floor
        found = found * 0
        for _ in range(0, k):
            below = tl.sum((here & (token == found) & (q_k < floor_q)).to(tl.int32))
            found = tl.where(below > 0, found + 1, found)
    return found


@triton.jit
def derivative(log2_p, p, log2_q, q, beta, DIVERGENCE: tl.constexpr):
    """Of the divergence with respect to p, up to a constant."""
    if DIVERGENCE == REVERSE_KL:
        return tl.where(p == 0, 0.0, LN_2 * (log2_p - log2_q))
    elif DIVERGENCE == JSD:
        m = tl.maximum(beta * q + (1 - beta) * p, LEAST)
        return tl.where(p == 0, 0.0, (1 - beta) * LN_2 * (log2_p - tl.log2(m)))
    else:
        return tl.where(p > q, 0.5, tl.where(p < q, -0.5, p - q))


@triton.jit
def terms(log2_p, log2_q, beta, DIVERGENCE: tl.constexpr):
    """Of every token: its part of the divergence, p times the derivative, and p."""
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    weighted = p * derivative(log2_p, p, log2_q, q, beta, DIVERGENCE)
    part = weighted
    if DIVERGENCE == JSD:
        m = tl.maximum(beta * q + (1 - beta) * p, LEAST)
        part = weighted + tl.where(q == 0, 0.0, beta * LN_2 * q * (log2_q - tl.log2(m)))
    elif DIVERGENCE == TVD:
        part = 0.5 * tl.abs(p - q)
    return part, weighted, p


@triton.jit
def gradient_entries(
    s, log2_q, s_shift, s_factor, s_log2, hard_log2, mass, ratio, beta, scale, hard_scale, even,
    DIVERGENCE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Entries of the gradient, without what the label has more; log2_q is that of the normalised teacher."""
    x = s.to(tl.float32) - s_shift
    log2_p = x * s_factor - s_log2
    p = tl.exp2(log2_p)
    g = -even
    if SOFT:
        q = tl.exp2(log2_q)
        if DIVERGENCE == CROSS_ENTROPY or DIVERGENCE == FORWARD_KL:
            g = (scale * mass) * p - (scale * q + even)
        else:
            g = scale * p * (derivative(log2_p, p, log2_q, q, beta, DIVERGENCE) - ratio) - even
    if HARD:
        if TEMPERATURE == 1:
            g += hard_scale * p
        elif TEMPERATURE == 2:  # hard_scale holds the ratio of p ** 2 to the probability at temperature 1
            g += hard_scale * p * p
        else:
            g += hard_scale * tl.exp2(x * LOG2_E - hard_log2)
    return g
