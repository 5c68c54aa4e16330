"""What the package is measured against computes the same as the package, and the table says what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import harness, models
from benchmarks.__main__ import line
from benchmarks.rows import ROWS, continual, encoders, moe
from benchmarks.table import markdown
from flame_moe.nn.stacked import StackedMatrix


@pytest.mark.parametrize("workload", list(moe.WORKLOADS))
def test_the_published_mixture_gives_the_same_outputs_and_gradients(workload: str) -> None:
    moe.check(moe.pair(workload, 3, 1), workload)


def test_a_difference_between_the_sides_is_refused() -> None:
    sides = moe.pair("embed4", 3, 1)
    with torch.no_grad():
        sides.theirs.experts[0].fc1.weight[0, 0] += 1.0
    with pytest.raises(AssertionError, match="the two sides differ"):
        moe.check(sides, "embed4")


def test_published_time_attention_gives_the_same_outputs_and_gradients() -> None:
    sides = encoders.sides(2, 20)
    encoders.check(sides["ours"], sides["theirs"])


def test_the_published_low_rank_expert_is_the_same_at_every_stage() -> None:
    ours, same, _, x = continual.three()
    outputs = [ours(x, cursor) for cursor in range(continual.STAGES)]
    for cursor, out in enumerate(outputs):
        harness.insist_equal(f"stage {cursor}", out, same(x, cursor))
        assert all(not torch.equal(out, other) for other in outputs[:cursor])


def test_saved_bytes_counts_each_memory_once_and_no_parameter() -> None:
    linear = torch.nn.Linear(4, 4)
    x = torch.zeros(8, 4, requires_grad=True)
    # Linear keeps x and its weight; squaring keeps what Linear gave.
    assert harness.saved_bytes(lambda: (linear(x) + linear(x)).square(), linear) == 2 * 8 * 4 * 4


def test_rounds_alternate_and_their_ratios_have_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SHORTEST", 0.0)
    took = {"ours": iter([1.0, 2.0, 1.0, 9.0]), "theirs": iter([1.0, 6.0, 2.0, 9.0])}
    calls: list[str] = []

    def ours() -> None:
        raise AssertionError("the stand-in below times it without a call")

    def theirs() -> None:
        ours()

    def seconds(call: Callable[[], object], times: int = 1, clock: object = None) -> float:
        calls.append(call.__name__)
        return next(took[call.__name__])

    monkeypatch.setattr(harness, "seconds", seconds)
    monkeypatch.setattr(harness, "_warm", lambda call, clock: seconds(call))
    found = harness.alternate(ours, theirs, 3)
    assert calls[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert found == harness.Sides(2.0, 6.0, 2.0)


@pytest.mark.parametrize(
    ("value", "gate", "most", "verdict"),
    [(2.0, 2.0, False, "PASS"), (1.9, 2.0, False, "FAIL"), (1.1, 1.05, True, "FAIL"), (1.0, None, False, "-")],
)
def test_a_row_says_whether_it_passes(value: float, gate: float | None, most: bool, verdict: str) -> None:
    assert verdict in line(harness.Measured("row", "ms", 1.0, 2.0, value, gate, most)).split()


def test_stages_that_were_learned_without_training_change_every_weight() -> None:
    net = models.model()
    models.learn(net, 3)
    assert all(m.stages == (1, 2) for m in net.modules() if isinstance(m, StackedMatrix))
    part = models.batch(4)
    net.eval()
    logits = [net(part, cursor).logits for cursor in range(3)]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


def test_every_row_of_the_table_is_there() -> None:
    """The rows of the performance specification; `trunc`, `stages` and others stand for several lines."""
    wanted = "moe-infer-small moe-infer-embed moe-infer-mimic moe-infer-ragged moe-train-small moe-train-embed"
    wanted += " moe-train-mimic moe-train-ragged moe-train-memory moe-bf16-infer shape-stability cl-infer-T16"
    wanted += " cl-train-T16 cl-mixed-cursors cl-forget-zero trunc-quality trunc-time data-bin identities"
    assert set(wanted.split()) <= set(ROWS)
    assert len(wanted.split()) == 19


def test_the_table_of_the_documentation_has_a_line_per_figure() -> None:
    rows = [
        harness.Measured("a", "ms", 1.0, 3.0, 3.0, 2.0).plain(),
        harness.Measured("b", "MB", 5.0, None, 5.0, 4.0, most=True).plain(),
        {"name": "c", "passed": None, "note": "not measured: no data"},
    ]
    assert markdown({"rows": rows}).splitlines()[2:] == [
        "| `a` | 1 ms | 3 ms | 3 | at least 2 | pass |",
        "| `b` | 5 MB |  | 5 | at most 4 | **fail** |",
        "| `c` | | | not measured: no data | | - |",
    ]
