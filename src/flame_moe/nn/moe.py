"""Sparse mixture of experts over whole sequences: dispatch, experts, combine.

Shape suffixes: M modalities, n sequences of T steps, d width, K experts per sequence, E experts, k kernel width;
S = sum n T steps of all modalities together, P = sum n K (sequence, expert) pairs, R = sum n T K routed rows.

Every modality's pairs are dispatched together, by index, so each expert runs once. Y_i = sum_j gate_ij Expert_j(Z_i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.nn.blocks import by_blocks
from flame_moe.nn.experts import ExpertPool, Joined
from flame_moe.nn.gating import Routing
from flame_moe.nn.grouped import Rows, Weights, apply_experts


class Sequences(NamedTuple):
    """Sequences of one modality: x (n, T, d) and mask (n, T) bool, true on steps that exist."""

    x: Tensor
    mask: Tensor


def packed(every: Sequence[Sequences]) -> Tensor:
    """(S + 1, d): the steps of all sequences one after the other, zeros on padding, and a row of zeros."""
    flat = [s.x.flatten(0, 1) for s in every]
    x_ZD = torch.cat([*flat, flat[0].new_zeros(1, flat[0].shape[1])])
    if all(s.x.shape[1] == 1 for s in every):  # a sequence of one step has no padding
        return x_ZD
    gone = ~torch.cat([*(s.mask.flatten() for s in every), every[0].mask.new_zeros(1)])
    return x_ZD.masked_fill_(gone[:, None], 0.0)


class Dispatch(NamedTuple):
    """The plan of one layer.

    Attributes:
        rows: where routed rows come from and go to.
        gates: (S, K) weights of the rows of each step.
    """

    rows: Rows
    gates: Tensor


def plan(shapes: Sequence[tuple[int, int]], routings: Sequence[Routing], experts: int, kernel: int) -> Dispatch:
    """Sort (sequence, expert) pairs by expert and lay their steps out one after the other.

    Args:
        shapes: (n, T) per modality.
        routings: one per modality, with the same K.
        experts: E.
        kernel: k, odd.
    """
    index_PK = torch.cat([r.chosen for r in routings])
    device, K = index_PK.device, index_PK.shape[1]
    steps = sum(n * t for n, t in shapes)
    rows = steps * K
    lengths = torch.cat([torch.full((n,), t, device=device) for n, t in shapes])
    starts = lengths.cumsum(0) - lengths

    expert_P, order_P = torch.sort(index_PK.reshape(-1), stable=True)
    if steps == len(index_PK):
        return _plan_single(torch.cat([r.gates for r in routings]), expert_P, order_P, experts, kernel)
    sequence_P = order_P.div(K, rounding_mode="floor")
    length_P = lengths[sequence_P]
    pair_R = torch.repeat_interleave(length_P, output_size=rows)
    place_R = torch.arange(rows, device=device)
    within_R = place_R - (length_P.cumsum(0) - length_P)[pair_R]
    step_R = starts[sequence_P][pair_R] + within_R

    tap_k = torch.arange(kernel, device=device) - kernel // 2
    reach_Rk = within_R[:, None] + tap_k
    inside_Rk = (reach_Rk >= 0) & (reach_Rk < length_P[pair_R][:, None])
    near_Rk = torch.where(inside_Rk, step_R[:, None] + tap_k, steps)

    slot_R = (order_P % K)[pair_R]
    in_back_R = step_R * K + slot_R
    back_SK = torch.empty(rows, dtype=torch.long, device=device).scatter_(0, in_back_R, place_R)
    gates_SK = torch.repeat_interleave(torch.cat([r.gates for r in routings]), lengths, dim=0, output_size=steps)
    counts = torch.zeros(experts, dtype=torch.long, device=device).scatter_add(0, expert_P, length_P)
    return Dispatch(Rows(near_Rk, back_SK.view(steps, K), in_back_R, expert_P[pair_R], counts), gates_SK)


def _plan_single(gates: Tensor, expert_P: Tensor, order_P: Tensor, experts: int, kernel: int) -> Dispatch:
    """The plan where every sequence is one step: a row is a pair, and its neighbours are zeros."""
    steps, K = gates.shape
    near_Rk = torch.full((len(order_P), kernel), steps, device=gates.device)
    near_Rk[:, kernel // 2] = order_P.div(K, rounding_mode="floor")
    back = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=gates.device))
    counts = torch.zeros(experts, dtype=torch.long, device=gates.device).scatter_add(0, expert_P, torch.ones_like(back))
    return Dispatch(Rows(near_Rk, back.view(steps, K), order_P, expert_P, counts), gates)


def mixture(
    inputs: Mapping[str, Sequences], routings: Mapping[str, Routing], pool: ExpertPool | Joined, cursor: int
) -> dict[str, Tensor]:
    """Send every sequence through its experts and add up what they say, weighted by the gates.

    Args:
        inputs: modality -> Sequences; padding is replaced by zeros before any expert sees it.
        routings: modality -> Routing of the same n sequences.
        pool: the shared experts.
        cursor: stage whose weights are read.

    Returns:
        modality -> (n, T, d); padded steps hold nothing of use.
    """
    return mixtures([(inputs, routings, cursor)], pool)[0]


def mixtures(
    parts: Sequence[tuple[Mapping[str, Sequences], Mapping[str, Routing], int]], pool: ExpertPool | Joined
) -> list[dict[str, Tensor]]:
    """`mixture` for several tasks at once, each at its own cursor: (cursor, expert) is one key of the dispatch.

    Args:
        parts: inputs, routings and cursor of each task.
        pool: the shared experts.
    """
    cursors = sorted({cursor for _, _, cursor in parts})
    every = [(s, routed[name], cursor) for inputs, routed, cursor in parts for name, s in inputs.items()]
    # (cursor, expert) as one number; of the first cursor it is the expert's own.
    first = {cursor: pool.experts * place for place, cursor in enumerate(cursors)}
    keyed = [r._replace(chosen=r.chosen + first[c]) if first[c] else r for _, r, c in every]
    shapes = [(s.x.shape[0], s.x.shape[1]) for s, _, _ in every]
    single = all(t == 1 for _, t in shapes) and not pool.observed
    rows, gates_SK = plan(shapes, keyed, len(cursors) * pool.experts, 1 if single else pool.kernel)
    x_ZD = packed([s for s, _, _ in every])
    if pool.observed:
        out_SD = _observed(x_ZD, torch.cat([s.mask.flatten() for s, _, _ in every]), gates_SK, rows, pool, *cursors)
    else:
        rate = pool.dropout if pool.training else 0.0
        sets = [w for cursor in cursors for w in pool.sets(cursor)]
        if single:  # a step without neighbours meets the middle of the kernel alone
            width, middle = x_ZD.shape[1], pool.kernel // 2
            sets = [w._replace(conv=w.conv[..., middle * width : (middle + 1) * width]) for w in sets]
        if kind := autocast_type(x_ZD.device):
            x_ZD, sets = x_ZD.to(kind), [Weights(*(t.to(kind) for t in w)) for w in sets]
        run = apply_experts if x_ZD.device.type == "cpu" else by_blocks
        out_SD = run(x_ZD, gates_SK, sets, rows, rate)
    split = iter(out_SD.split([n * t for n, t in shapes]))
    return [{name: next(split).view_as(s.x) for name, s in inputs.items()} for inputs, _, _ in parts]


def _observed(
    x_ZD: Tensor, mask_S: Tensor, gates_SK: Tensor, rows: Rows, pool: ExpertPool | Joined, cursor: int
) -> Tensor:
    """The simple form, which shows the inputs of every matrix to whoever gathers them."""
    near_RkD = x_ZD.index_select(0, rows.near.flatten()).view(*rows.near.shape, -1)
    y_RD = pool(near_RkD, rows.counts.tolist(), cursor, mask_S[rows.near[:, pool.kernel // 2]])
    return F.embedding_bag(rows.back, y_RD, per_sample_weights=gates_SK.to(y_RD.dtype), mode="sum")


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type in which products are to be computed; None where autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
