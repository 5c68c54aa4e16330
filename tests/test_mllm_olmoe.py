"""FLAME's stages on a small OLMoE: moments of the experts' inputs, cutting, cursors, and the experiment itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_moe.continual.truncation import Plan, truncate
from flame_moe.errors import RecipeError

pytest.importorskip("transformers", reason="the extra mllm is not installed")

from flame_moe.mllm.olmoe.model import SMALL, TEXT_WORDS, TextTask, base_model, build, task_data
from flame_moe.mllm.olmoe.run import FILES, chosen_mode, learn_stages, write_stages
from flame_moe.mllm.olmoe.stages import Stages, expert_weights, gather
from flame_moe.mllm.stream.words import UNKNOWN

SIZE = SMALL.model_copy(update={"samples": 400, "steps": 25, "stage_steps": 8, "train": 120, "test": 30})


@pytest.fixture(scope="module")
def task() -> TextTask:
    return task_data("chart", SIZE)


@pytest.fixture
def model() -> Any:
    return build(SIZE).requires_grad_(False).eval()


def test_every_word_of_the_texts_is_known() -> None:
    unknown = TEXT_WORDS.index(UNKNOWN)
    for name in ("shapes", "digits", "chart", "ocr", "math"):
        assert not (task_data(name, SIZE).train.ids == unknown).any(), name


def test_moments_are_those_of_the_tokens_that_reach_an_expert(model: Any, task: TextTask) -> None:
    """Against a loop over samples of one without any padding."""
    found = gather(model, task.train, [torch.arange(6)])
    layer = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    for i in range(6):
        batch = task.train.batch(torch.tensor([i]), model.get_input_embeddings())
        model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
    handle.remove()
    states = torch.cat(seen)
    _, _, chosen = layer.gate(states)
    moment = found["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(SIZE.experts):
        rows = states[(chosen == expert).any(-1)].double()
        assert int(moment.seen[expert]) == len(rows)
        if len(rows):
            assert torch.allclose(moment.second[expert], rows.T @ rows / len(rows), atol=1e-4)
    assert int(moment.seen.sum()) == SIZE.top_k * len(states)
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(down.seen, moment.seen)


def test_cutting_by_inputs_loses_least_of_the_layer_s_output(model: Any, task: TextTask) -> None:
    stages = Stages(model)
    torch.manual_seed(1)
    for p in expert_weights(model).values():
        p.add_(0.05 * torch.randn_like(p))
    delta = stages.update()
    moments = gather(model, task.train, torch.arange(60).split(20))
    lost = {
        mode: {n: t.functional_error or 0.0 for n, t in truncate(delta, Plan(mode=mode, rank=2), moments).items()}
        for mode in ("weight", "activation")
    }
    assert all(lost["activation"][name] <= lost["weight"][name] + 1e-9 for name in delta)
    assert sum(lost["activation"].values()) < 0.9 * sum(lost["weight"].values())


def test_a_cursor_reads_the_same_bits_whatever_comes_later(model: Any) -> None:
    stages = Stages(model)
    torch.manual_seed(2)
    for rank in (1, 4):
        stages.read(len(stages.slices) - 1)
        for p in expert_weights(model).values():
            p.add_(0.1 * torch.randn_like(p))
        stages.slices.append({n: t.part for n, t in truncate(stages.update(), Plan(rank=rank)).items()})
    then = stages.weights(0)
    stages.slices.append({})
    assert all(torch.equal(weight, stages.weights(0)[name]) for name, weight in then.items())
    assert all(torch.equal(weight, stages.base[name]) for name, weight in stages.weights(-1).items())
    assert not all(torch.equal(weight, then[name]) for name, weight in stages.weights(1).items())
    experts, hidden, width = SIZE.experts, SIZE.hidden, SIZE.width
    assert stages.stored() == SIZE.layers * experts * (1 + 4) * (2 * hidden + width + width + hidden)


def test_the_experiment_measures_every_rank_and_keeps_old_outputs(tmp_path: Path) -> None:
    lines: list[str] = []
    found = learn_stages(SIZE, tmp_path / "cache", rank=1, mode="weight", show=lines.append)
    assert [stage["task"] for stage in found["stages"]] == ["shapes", "math"]
    assert all(stage["bitwise_equal"] for stage in found["stages"])
    for stage in found["stages"]:
        energy = stage["energy"]
        assert energy["weight 1"] < energy["weight 2"] < energy["weight 4"] < energy["weight 8"] <= 1
        assert energy["activation 1"] > 0.2
        assert len(stage["cut"]) == 8
    assert found["stages"][1]["stored"] == 2 * found["stages"][0]["stored"]
    assert found["stages"][0]["stored"] < found["stages"][0]["dense"] / 5
    assert len(lines) == 3
    write_stages(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / FILES[0]).read_text()) == json.loads(json.dumps(found))
    assert "bitwise equal" in (tmp_path / "out" / FILES[1]).read_text()
    again = base_model(SIZE, tmp_path / "cache", lambda text, share: None)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not any(p.requires_grad for p in again.parameters())


def test_an_unknown_mode_is_told() -> None:
    assert chosen_mode("weight") == "weight"
    with pytest.raises(RecipeError, match="Did you mean 'activation'"):
        chosen_mode("activations")
