"""The promises of discriminants: whose prompt it is, told by its density under each task and under the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from flame_moe.mllm.adapters.scores import discriminant
from tests.tiny_mllm import base
from tests.tiny_pool import TASKS, filled, logits, tensors

RANGES = {"charts": (3, 20), "shapes": (20, 35), "sums": (35, 45)}


def questions(low: int, high: int, seed: int, rows: int = 40) -> dict[str, Tensor]:
    """Prompts of six tokens from a range, and an answer of two from everywhere, told apart by labels."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(low, high, (rows, 6), generator=generator)
    answer = torch.randint(3, 50, (rows, 2), generator=generator)
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
    ids = torch.cat([prompt, answer], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def background(seed: int = 9) -> list[dict[str, Tensor]]:
    return [questions(45, 50, seed + i) for i in range(3)]


def fitted(granularity: str = "model", tasks: tuple[str, ...] = TASKS, **options: Any) -> Any:
    """A pool whose experts are random and whose discriminants are of prompts that differ by their words."""
    model = filled("llama", tasks, granularity=granularity, top_k=1, **options)
    for seed, task in enumerate(tasks):
        model.fit_gate(task, [questions(*RANGES[task], seed)], background())
    model.route(score="discriminant")
    return model


@pytest.mark.parametrize("granularity", ["sequence", "model"])
def test_a_prompt_that_is_told_decides_as_labels_do(granularity: str) -> None:
    model, batch = filled(granularity=granularity, top_k=2), questions(3, 50, seed=8)
    labels = batch.pop("labels")
    said = logits(model, batch | {"labels": labels})
    with model.prompted(labels == -100), torch.no_grad():
        assert torch.equal(model(**batch).logits, said)
        torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, said[:, -3:])
    assert not torch.equal(logits(model, batch), said), "the answer had no say"


@pytest.mark.parametrize("count", [6, 60])
def test_a_discriminant_is_the_ratio_of_two_normal_densities(count: int) -> None:
    torch.manual_seed(count)
    own, around = torch.randn(30, 8) + 1, torch.randn(count, 8) @ torch.randn(8, 8)
    vector, offset = discriminant(own, around, ridge=0.2)
    rows = (around - around.mean(0)).double()
    covariance = rows.T @ rows / count + 0.2 * rows.square().mean() * torch.eye(8, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    x = torch.randn(5, 8, dtype=torch.float64)
    want = normal(own.double().mean(0), covariance).log_prob(x) - normal(around.double().mean(0), covariance).log_prob(
        x
    )
    torch.testing.assert_close(x @ vector + offset, want, atol=1e-5, rtol=1e-5)


def test_a_discriminant_without_any_spread_is_a_number() -> None:
    vector, offset = discriminant(torch.ones(4, 3), torch.ones(5, 3), ridge=0.1)
    assert vector.isfinite().all()
    assert offset.isfinite()


@pytest.mark.parametrize("granularity", ["sequence", "model"])
def test_new_prompts_go_to_their_own_expert(granularity: str) -> None:
    model = fitted(granularity)
    for task in TASKS:
        with model.recording() as record:
            logits(model, questions(*RANGES[task], seed=50))
        assert record.mass()[task] > (0.95 if granularity == "model" else 0.6), "layers see what random experts did"


def test_prompts_like_the_background_are_answered_by_the_base_alone() -> None:
    model, batch = fitted(), questions(45, 50, seed=70)
    with torch.no_grad():
        alone = base("llama")(**batch).logits
    assert not torch.equal(logits(model, batch), alone)
    model.route(null_expert=True)
    assert torch.equal(logits(model, batch), alone)
    own = questions(*RANGES["charts"], seed=71)
    found = logits(model, own)
    model.use_expert("charts")
    assert float((logits(model, own) == found).all(-1).all(-1).float().mean()) > 0.9


def test_what_is_said_of_an_expert_does_not_depend_on_the_others(tmp_path: Path) -> None:
    two, three = fitted(tasks=TASKS[:2], null_expert=False), fitted()
    for task in TASKS[:2]:
        here = {k: v for k, v in tensors(two, task).items() if "lora_gate" in k or "lora_offset" in k}
        there = tensors(three, task)
        assert len(here) == 2 * 14
        assert all(torch.equal(value, there[key]) for key, value in here.items())
        assert any(bool(value.any()) for key, value in here.items() if "lora_offset" in key)
    before = tensors(three, "charts")
    three.add_expert("more")
    three.fit_gate("more", [questions(3, 50, seed=5)], background())
    assert all(torch.equal(value, before[key]) for key, value in tensors(three, "charts").items())


def test_fitting_leaves_what_is_trained_as_it_was() -> None:
    model = filled(granularity="model").train()
    model.train_expert("shapes")
    model.fit_gate("charts", [questions(3, 20, 0)], background())
    assert model.mode == ("expert", "shapes")
    assert model.training
    assert {k.split(".")[-2] for k, p in model.named_parameters() if p.requires_grad} == {"shapes"}


def test_discriminants_come_back_and_answer_with_a_cache_as_without(tmp_path: Path) -> None:
    model = fitted()
    model.route(null_expert=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama"), tmp_path)
    batch = {k: v[:, :6] for k, v in questions(3, 50, seed=8).items() if k != "labels"}
    assert torch.equal(logits(again, batch), logits(model, batch))
    told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        assert torch.equal(again.generate(**batch, **told), again.generate(**batch, **told, use_cache=False))
    stock = PeftModel.from_pretrained(base("llama"), tmp_path / "charts")
    assert type(stock.base_model).__name__ == "LoraModel"
