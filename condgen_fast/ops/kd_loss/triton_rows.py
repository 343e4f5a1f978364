"""The Triton kernel of kd_loss: one program a row, any kind of teacher, the gradient in the same launch."""

from __future__ import annotations

import triton
import triton.language as tl

from condgen_fast.ops.kd_loss.triton_terms import (
    CROSS_ENTROPY,
    DENSE,
    FORWARD_KL,
    JSD,
    LN_2,
    LOG2_E,
    NO_TEACHER,
    PRIOR,
    REVERSE_KL,
    TVD,
    UNIFORM,
    entropy_sum,
    finite_or_zero,
    first_of,
    gradient_entries,
    listed_distribution,
    most_probable,
    sums,
    terms,
)


@triton.jit
def kd_loss_kernel(
    student,  # [A, B, V]
    student_outer_stride,
    student_stride,
    teacher,  # [A, B, W or more] logits, or None
    teacher_outer_stride,
    teacher_stride,
    ids,  # [N, k], of a LabelPrior [V, k], or None
    listed,  # as ids, or of a LabelPrior [k]: log-probabilities, of a LabelPrior weights
    listed_stride,  # k or 0
    labels,  # [N] or None
    coefficient,  # [N]
    losses,  # [N]
    gradient,  # [A, B, V] with the strides of the student if it is the student, else contiguous; or None
    gradient_outer_stride,
    gradient_stride,
    parts,  # [N, 8] or None: PARTS of the row
    inner,  # B
    vocab_size,  # V
    shared_size,  # W = min(V, V'): beyond it the teacher is -inf
    k,
    floor,
    hard,
    soft,
    inverse_temperature,
    inverse_teacher_temperature,
    beta,
    label_smoothing,
    z_loss,
    DIVERGENCE: tl.constexpr,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # 1 or 2 where it is that, else 0
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    PARTS: tl.constexpr,
    SOFT_COUNTS: tl.constexpr,  # the teacher for the loss, not for the parts alone
    HARD_COUNTS: tl.constexpr,
    RESIDENT: tl.constexpr,  # the row is one tile, read once
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SOFT: tl.constexpr = KIND != NO_TEACHER
    SPARSE: tl.constexpr = SOFT and KIND != DENSE
    FORWARD: tl.constexpr = DIVERGENCE == CROSS_ENTROPY or DIVERGENCE == FORWARD_KL
    LINEAR: tl.constexpr = (HARD and SMOOTH) or (FORWARD and (KIND == UNIFORM or KIND == PRIOR))
    MIXTURE: tl.constexpr = SOFT and (DIVERGENCE == JSD or DIVERGENCE == TVD or (SPARSE and DIVERGENCE == REVERSE_KL))
    NONE: tl.constexpr = -float("inf")

    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(coefficient + row)
    columns = tl.arange(0, BLOCK)
    if GRADIENT:
        gradient += (row // inner) * gradient_outer_stride + (row % inner) * gradient_stride
    if factor == 0:
        tl.store(losses + row, 0.0)
        if PARTS:
            tl.store(parts + row * 8 + tl.arange(0, 8), tl.zeros([8], tl.float32))
        if GRADIENT:
            for start in range(0, vocab_size, BLOCK):
                column = start + columns
                zeros = tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty)
                tl.store(gradient + column, zeros, mask=column < vocab_size)
        return
    student += (row // inner) * student_outer_stride + (row % inner) * student_stride
    if KIND == DENSE:
        teacher += (row // inner) * teacher_outer_stride + (row % inner) * teacher_stride
    wrong = False
    safe = row * 0
    if LABELS:
        label = tl.load(labels + row).to(tl.int64)
        wrong = (label < 0) | (label >= vocab_size)
        safe = tl.where(wrong, 0, label)
    s_factor = inverse_temperature * LOG2_E
    t_factor = inverse_teacher_temperature * LOG2_E

    mass, floor_q, floor_log2 = 1.0, 0.0, NONE
    if SPARSE:
        others = row * 0 + vocab_size - k
        first = row
        if KIND == PRIOR:
            first = safe
        token, q_k, log2_q_k, floor_q, mass = listed_distribution(
            ids + first * k, listed + first * listed_stride, floor, k, others, inverse_teacher_temperature, KIND, LISTED
        )
        floor_log2 = tl.log2(floor_q)
        here = tl.arange(0, LISTED) < k
        stray = here & ((token < 0) | (token >= vocab_size))
        wrong = wrong | (tl.sum(stray.to(tl.int32)) > 0)
        here = here & (token >= 0) & (token < vocab_size)
        s_k = tl.load(student + token, mask=here, other=NONE).to(tl.float32)

    tiles = tl.cdiv(vocab_size, BLOCK)
    if RESIDENT:
        tiles = 1

    # --- The sums, relative to the highest logits so far
    s_highest, t_highest = NONE, NONE
    s_sum, hard_sum, x_sum, gone, t_sum, dot = 0.0, 0.0, 0.0, 0, 0.0, 0.0
    s_dot, t_dot, s_chosen, t_chosen = 0.0, 0.0, -1, -1
    if RESIDENT:
        inside = columns < vocab_size
        s = tl.load(student + columns, mask=inside, other=NONE)
        t = s
        s_highest = tl.max(s.to(tl.float32))
        if KIND == DENSE:
            t = tl.load(teacher + columns, mask=columns < shared_size, other=NONE)
            t_highest = tl.max(t.to(tl.float32))
        s_sum, hard_sum, x_sum, gone, t_sum, dot = sums(
            s, t, inside, finite_or_zero(s_highest), finite_or_zero(t_highest), s_factor, t_factor,
            DIVERGENCE, KIND, HARD, TEMPERATURE, LINEAR,
        )  # fmt: skip
        if PARTS:
            s_dot = entropy_sum(s, finite_or_zero(s_highest), s_factor)
            s_chosen = tl.where(s_highest == NONE, -1, first_of(s, s_highest, columns))
            if KIND == DENSE:
                t_dot = entropy_sum(t, finite_or_zero(t_highest), t_factor)
                t_chosen = tl.where(t_highest == NONE, -1, first_of(t, t_highest, columns))
    else:
        for start in range(0, vocab_size, BLOCK):
            column = start + columns
            inside = column < vocab_size
            s = tl.load(student + column, mask=inside, other=NONE)
            t = s
            s_before, s_shift_before = s_highest, finite_or_zero(s_highest)
            s_highest = tl.maximum(s_highest, tl.max(s.to(tl.float32)))
            s_moved = s_shift_before - finite_or_zero(s_highest)
            z_moved = s_moved * s_factor
            s_scale = tl.where(s_before == NONE, 0.0, tl.exp2(z_moved))
            t_scale, y_moved = 0.0, 0.0
            if KIND == DENSE:
                t = tl.load(teacher + column, mask=column < shared_size, other=NONE)
                t_before, t_shift_before = t_highest, finite_or_zero(t_highest)
                t_highest = tl.maximum(t_highest, tl.max(t.to(tl.float32)))
                y_moved = (t_shift_before - finite_or_zero(t_highest)) * t_factor
                t_scale = tl.where(t_before == NONE, 0.0, tl.exp2(y_moved))
            more_s, more_hard, more_x, more_gone, more_t, more_dot = sums(
                s, t, inside, finite_or_zero(s_highest), finite_or_zero(t_highest), s_factor, t_factor,
                DIVERGENCE, KIND, HARD, TEMPERATURE, LINEAR,
            )  # fmt: skip
            if PARTS:
                s_shift = finite_or_zero(s_highest)
                s_dot = (s_dot + s_sum * z_moved) * s_scale + entropy_sum(s, s_shift, s_factor)
                s_chosen = tl.where(s_highest > s_before, first_of(s, s_highest, column), s_chosen)
                if KIND == DENSE:
                    t_shift = finite_or_zero(t_highest)
                    t_dot = (t_dot + t_sum * y_moved) * t_scale + entropy_sum(t, t_shift, t_factor)
                    t_chosen = tl.where(t_highest > t_before, first_of(t, t_highest, column), t_chosen)
            if DIVERGENCE == CROSS_ENTROPY:
                dot = tl.where(t_scale == 0, 0.0, (dot + t_sum * z_moved) * t_scale) + more_dot  # dot may be infinite
            elif DIVERGENCE == FORWARD_KL:
                dot = tl.where(t_scale == 0, 0.0, (dot + t_sum * (y_moved - z_moved)) * t_scale) + more_dot
            elif DIVERGENCE == REVERSE_KL:
                dot = tl.where(s_scale == 0, 0.0, (dot + s_sum * (z_moved - y_moved)) * s_scale) + more_dot
            t_sum = t_sum * t_scale + more_t
            s_sum = s_sum * s_scale + more_s
            hard_scale = tl.where(s_before == NONE, 0.0, tl.exp2(s_moved * LOG2_E))
            hard_sum = hard_sum * hard_scale + more_hard
            x_sum = x_sum + s_moved * (start - gone) + more_x
            gone += more_gone
    if TEMPERATURE == 1:
        hard_sum = s_sum

    s_shift, t_shift = finite_or_zero(s_highest), finite_or_zero(t_highest)
    dead = s_sum == 0  # a row of -inf has no distribution, and gets no gradient
    s_log2 = tl.where(dead, 0.0, tl.log2(s_sum))
    hard_log2 = tl.where(dead, 0.0, tl.log2(hard_sum))
    t_log2 = 0.0
    if KIND == DENSE:
        t_log2 = tl.where(t_sum == 0, 0.0, tl.log2(t_sum))
        mass = tl.where(t_sum == 0, 0.0, 1.0)

    # --- The divergence
    divergence, ratio = 0.0, 0.0  # ratio: sum of p times the derivative
    if SPARSE:
        log2_p_k = (s_k - s_shift) * s_factor - s_log2
    if MIXTURE:
        alive = 0.0
        for step in range(0, tiles):
            if RESIDENT:
                column = columns
            else:  # backwards: what was read last is still near
                column = (tiles - 1 - step) * BLOCK + columns
                s = tl.load(student + column, mask=column < vocab_size, other=NONE)
            log2_p = (s.to(tl.float32) - s_shift) * s_factor - s_log2
            if KIND == DENSE:
                if not RESIDENT:
                    t = tl.load(teacher + column, mask=column < shared_size, other=NONE)
                log2_q = (t.to(tl.float32) - t_shift) * t_factor - t_log2
            else:
                log2_q = tl.where(column < vocab_size, floor_log2, NONE)
                if DIVERGENCE == REVERSE_KL:
                    log2_q = tl.where(floor_q == 0, 0.0, log2_q)
            part, weighted, p = terms(log2_p, log2_q, beta, DIVERGENCE)
            divergence += tl.sum(part)
            ratio += tl.sum(weighted)
            if SPARSE and DIVERGENCE == REVERSE_KL:
                alive += tl.sum((p > 0).to(tl.float32))
        if SPARSE:  # the listed tokens were counted as any others
            counted = floor_log2
            if DIVERGENCE == REVERSE_KL:
                counted = tl.where(floor_q == 0, 0.0, floor_log2)
            part, weighted, p = terms(log2_p_k, log2_q_k, beta, DIVERGENCE)
            wrong_part, wrong_weighted, p = terms(log2_p_k, counted + q_k * 0, beta, DIVERGENCE)
            divergence += tl.sum(tl.where(here, part - wrong_part, 0.0))
            ratio += tl.sum(tl.where(here, weighted - wrong_weighted, 0.0))
            if DIVERGENCE == REVERSE_KL:  # infinite where the teacher has nothing and the student something
                alive -= tl.sum((here & (p > 0)).to(tl.float32))
                divergence = tl.where((floor_q == 0) & (alive > 0), float("inf"), divergence)
    elif SPARSE:
        distance = -log2_p_k
        if DIVERGENCE == FORWARD_KL:
            distance = log2_q_k - log2_p_k
        divergence = LN_2 * tl.sum(tl.where(q_k == 0, 0.0, q_k * distance))
        if KIND == UNIFORM or KIND == PRIOR:
            x_k = s_k - s_shift
            finite = here & (x_k != NONE)
            others_gone = gone - tl.sum((here & (x_k == NONE)).to(tl.int32))
            others_log2 = (x_sum - tl.sum(tl.where(finite, x_k, 0.0))) * s_factor - others * s_log2
            others_log2 = tl.where(others_gone > 0, NONE, others_log2)
            gap = -others_log2
            if DIVERGENCE == FORWARD_KL:
                gap = others * floor_log2 - others_log2
            divergence += tl.where(floor_q == 0, 0.0, LN_2 * floor_q * gap)
        divergence = tl.where(dead, tl.where(mass == 0, 0.0, float("inf")), divergence)
    elif SOFT:
        if FORWARD:
            divergence = tl.where(t_sum == 0, 0.0, dot / t_sum)
            if DIVERGENCE == CROSS_ENTROPY:
                divergence = LN_2 * (mass * s_log2 - divergence)
            else:
                divergence = LN_2 * (divergence + mass * (s_log2 - t_log2))
            divergence = tl.where(dead, tl.where(t_sum == 0, 0.0, float("inf")), divergence)
        else:
            divergence = tl.where(dead, 0.0, LN_2 * (dot / s_sum - s_log2 + t_log2))
            ratio = divergence

    # --- The loss
    loss, nll = 0.0, 0.0
    if SOFT_COUNTS:
        loss = soft * divergence
    lse = s_shift + LN_2 * hard_log2
    gold = 0.0
    if HARD:
        gold = tl.load(student + safe).to(tl.float32)
        nll = tl.where(label_smoothing < 1, (1 - label_smoothing) * (LN_2 * hard_log2 - (gold - s_shift)), 0.0)
        if SMOOTH:
            even_nll = LN_2 * hard_log2 - x_sum / vocab_size
            nll += label_smoothing * tl.where(gone > 0, float("inf"), even_nll)
        nll += tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
        nll = tl.where(dead, float("inf"), nll)
    if HARD_COUNTS:
        loss += hard * nll
    tl.store(losses + row, tl.where(wrong, float("nan"), factor * loss))

    if PARTS:
        t_lse, t_entropy = 0.0, 0.0
        if KIND == DENSE:
            empty = t_sum == 0
            t_lse = tl.where(empty, NONE, t_shift * inverse_teacher_temperature + LN_2 * t_log2)
            t_entropy = tl.where(empty, 0.0, LN_2 * (t_log2 - t_dot / t_sum))
        elif SPARSE:
            empty = mass == 0
            t_lse = tl.where(empty, NONE, LN_2 * tl.log2(mass))
            t_entropy = -LN_2 * tl.sum(tl.where(q_k == 0, 0.0, q_k * log2_q_k))
            t_entropy -= tl.where(floor_q == 0, 0.0, LN_2 * floor_q * floor_log2 * others)
            t_chosen = tl.where(empty, -1, most_probable(token, q_k, here, floor_q, others, k))
        into = parts + row * 8
        tl.store(into, tl.where(wrong, float("nan"), nll))
        tl.store(into + 1, tl.where(wrong, float("nan"), divergence))
        tl.store(into + 2, tl.where(dead, NONE, s_shift * inverse_temperature + LN_2 * s_log2))
        tl.store(into + 3, t_lse)
        tl.store(into + 4, tl.where(dead, 0.0, LN_2 * (s_log2 - s_dot / s_sum)))
        tl.store(into + 5, t_entropy)
        tl.store(into + 6, tl.where((t_chosen == s_chosen) & (t_chosen >= 0), 1.0, 0.0))
        right = 0.0
        if LABELS:
            right = tl.where((s_chosen == label) & (s_chosen >= 0), 1.0, 0.0)
        tl.store(into + 7, right)

    # --- The gradient
    if GRADIENT:
        factor = tl.where(dead, 0.0, tl.where(wrong, float("nan"), factor))
        scale = factor * soft * inverse_temperature
        hard_scale = factor * hard * (1 + 2 * z_loss * lse)
        even = factor * hard * label_smoothing / vocab_size
        at_label = factor * hard * (1 - label_smoothing)
        if TEMPERATURE == 2:
            hard_scale *= tl.exp2(2 * s_log2 - hard_log2)
        gold_log2 = floor_log2
        if KIND == DENSE and HARD_COUNTS:
            t_gold = tl.load(teacher + safe, mask=safe < shared_size, other=NONE).to(tl.float32)
            gold_log2 = (t_gold - t_shift) * t_factor - t_log2
        g_k = 0.0
        if SPARSE and SOFT_COUNTS:
            g_k = gradient_entries(
                s_k, log2_q_k, s_shift, s_factor, s_log2, hard_log2, mass, ratio, beta, scale, hard_scale, even,
                DIVERGENCE, SOFT_COUNTS, HARD_COUNTS, TEMPERATURE,
            )  # fmt: skip
        for step in range(0, tiles):
            if RESIDENT:
                column = columns
            elif MIXTURE:
                column = step * BLOCK + columns
            else:
                column = (tiles - 1 - step) * BLOCK + columns
            if not RESIDENT:
                s = tl.load(student + column, mask=column < vocab_size, other=NONE, eviction_policy="evict_first")
            log2_q = floor_log2
            if KIND == DENSE:
                if not RESIDENT:
                    t = tl.load(teacher + column, mask=column < shared_size, other=NONE, eviction_policy="evict_first")
                log2_q = (t.to(tl.float32) - t_shift) * t_factor - t_log2
            g = gradient_entries(
                s, log2_q, s_shift, s_factor, s_log2, hard_log2, mass, ratio, beta, scale, hard_scale, even,
                DIVERGENCE, SOFT_COUNTS, HARD_COUNTS, TEMPERATURE,
            )  # fmt: skip
            tl.store(gradient + column, g.to(gradient.dtype.element_ty), mask=column < vocab_size, cache_modifier=".cs")
        # The label's entry, then those of listed tokens, over what the sweep wrote
        if HARD_COUNTS:
            g = gradient_entries(
                gold, gold_log2, s_shift, s_factor, s_log2, hard_log2, mass, ratio, beta, scale, hard_scale, even,
                DIVERGENCE, SOFT_COUNTS, HARD_COUNTS, TEMPERATURE,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(gradient + safe, (g - at_label).to(gradient.dtype.element_ty))
        if SPARSE and SOFT_COUNTS:
            if HARD_COUNTS:
                g_k = tl.where(token == safe, g_k - at_label, g_k)
            tl.debug_barrier()
            tl.store(gradient + token, g_k.to(gradient.dtype.element_ty), mask=here)
