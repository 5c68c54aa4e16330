"""On a CUDA device: what the processor says, waiting for nothing, and no earlier prediction changed.

Skipped where PyTorch finds none. `python -m benchmarks.gpu` measures there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks import models
from benchmarks.rows import encoders, moe
from flame_moe.data.loader import to_device
from flame_moe.nn import Flame
from flame_moe.nn.losses import task_loss
from flame_moe.nn.stacked import StackedMatrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
GPU = torch.device("cuda")


@contextmanager
def unwaiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(net: Flame, device: torch.device, cursor: int) -> dict[str, Tensor]:
    part = to_device(models.batch(), device)
    net.zero_grad(set_to_none=True)  # moving a network moves its gradients with it
    net.to(device)
    out = net(part, cursor)
    (task_loss(models.TASK, out.logits, part.target).mean() + out.aux).backward()
    return {name: p.grad.cpu().clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stages", [1, 4])
def test_logits_and_gradients_are_those_of_the_processor(stages: int) -> None:
    net = models.model().eval()
    models.learn(net, stages)
    models.begin(net, stages)
    net.eval()
    with torch.no_grad():
        want = net(models.batch(), stages).logits
    slow = gradients(net, torch.device("cpu"), stages)
    fast = gradients(net, GPU, stages)
    with torch.no_grad():
        got = net(to_device(models.batch(), GPU), stages).logits.cpu()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert slow.keys() == fast.keys()
    assert len(slow) > 20
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("stages", [1, 4])
def test_inference_and_a_training_step_wait_for_nothing(stages: int) -> None:
    net = models.model()
    models.learn(net, stages)
    part = to_device(models.batch(), GPU)
    call = models.inference(net.to(GPU), part, stages - 1)
    call()
    with unwaiting():
        call()
    models.begin(net, stages)
    net.to(GPU)
    step = models.training_step(net, part, stages)
    step()
    with unwaiting():
        step()


def test_no_logit_of_an_earlier_stage_changes_by_one_bit() -> None:
    net = models.model().to(GPU).eval()
    part = to_device(models.batch(), GPU)
    seen: list[Tensor] = []
    for stage in range(4):
        if stage:
            models.grow(net, stage)
            net.to(GPU)
            with torch.no_grad():
                for _, weight in net.growables(models.TASK.modalities):
                    weight.commit(models.by_weight(models.RANK) if isinstance(weight, StackedMatrix) else None)
        net.to(GPU)
        with torch.no_grad():
            seen.append(net(part, stage).logits.clone())
            for earlier, logits in enumerate(seen):
                assert torch.equal(net(part, earlier).logits, logits)


@pytest.mark.parametrize("workload", list(moe.WORKLOADS))
def test_the_mixture_is_the_published_one(workload: str) -> None:
    made = moe.pair(workload, 8, 1)
    batches = [{name: x.to(GPU) for name, x in batch.items()} for batch in made.batches]
    moe.check(moe.Pair(made.ours.to(GPU), made.theirs.to(GPU), batches), workload, atol=2e-4)


def test_time_attention_is_the_published_one() -> None:
    sides = encoders.sides(2, 20, "cuda")
    encoders.check(sides["ours"], sides["theirs"])


def test_bfloat16_routes_as_float32_does() -> None:
    sides = moe.pair("mimic3", 32, 1)
    ours = sides.ours.to(GPU).eval()
    (batch,) = moe.Pair(ours, sides.theirs, [{n: x.to(GPU) for n, x in b.items()} for b in sides.batches]).for_ours()
    with torch.no_grad():
        plain, full = ours.route(batch), ours(batch)[0]
        with torch.autocast("cuda", torch.bfloat16):
            cast, half = ours.route(batch), ours(batch)[0]
    for name in batch:
        assert torch.equal(plain[name].chosen, cast[name].chosen)
        torch.testing.assert_close(half[name].float(), full[name], atol=0.05, rtol=0.05)
