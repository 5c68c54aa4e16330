"""Matrix products by another library: as exact, nobody else's setting, and only where a probe or the user says so."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch

from flame_moe.errors import RecipeError
from flame_moe.nn import products
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import noisy_top_k
from flame_moe.nn.grouped import Weights, apply_experts
from flame_moe.nn.moe import plan

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
switched = pytest.mark.skipif(
    not products.exact(), reason="oneDNN is not exact on this processor, or this PyTorch has no switch for it"
)


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing decided before the test, and after it what the process had decided: tests around it compare bits."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    for name in ("_default", "exact"):
        monkeypatch.setattr(products, name, cache(getattr(products, name).__wrapped__))


@switched
@pytest.mark.parametrize("rows", [0, 1, 64, 95, 96, 127, 128, 200])
def test_products_equal_those_of_the_default_library_for_any_number_of_rows(rows: int) -> None:
    torch.manual_seed(rows)
    a, b, bias, g = torch.randn(rows, 40), torch.randn(40, 24), torch.randn(24), torch.randn(rows, 24)
    with products.using("onednn"):
        added, plain, total = torch.empty(rows, 24), torch.empty(rows, 24), torch.ones(40, 24)
        products.addmm(bias, a, b, added)
        products.mm(a, b, plain)
        products.add_outer(total, a, g)
    torch.testing.assert_close(added, bias + a @ b, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(plain, a @ b, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(total, 1 + a.T @ g, atol=1e-4, rtol=1e-5)


@switched
@pytest.mark.parametrize("shapes", [[(200, 2), (30, 7), (3, 1)], [(1, 1)], [(400, 1)]])
def test_experts_give_the_same_values_and_gradients_with_both(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    pool = ExpertPool(4, 16, 24, 3, 0.0)
    logits = [torch.randn(n, 4) - torch.tensor([0.0, 0.0, 0.0, 50.0]) for n, _ in shapes]
    rows, gates = plan(shapes, [noisy_top_k(x, None, 2) for x in logits], 4, 3)
    assert rows.counts[3] == 0, "an expert without rows"
    steps = sum(n * t for n, t in shapes)
    x = torch.cat([torch.randn(steps, 16), torch.zeros(1, 16)])
    found = []
    for name in ("default", "onednn"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, gates, *pool.weights(0))]
        with products.using(name):
            out = apply_experts(leaves[0], leaves[1], [Weights(*leaves[2:])], rows, 0.0)
            (out * out.cos()).sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-4, rtol=1e-4)


@switched
@pytest.mark.parametrize("before", ["none", "ieee"])
def test_the_setting_of_the_process_comes_back(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    was = SETTING.fp32_precision
    seen = []
    real = torch.mm
    with products.using("onednn"):
        monkeypatch.setattr(torch, "mm", lambda *a, **k: seen.append(SETTING.fp32_precision) or real(*a, **k))
        try:
            SETTING.fp32_precision = before
            products.mm(torch.ones(130, 8), torch.ones(8, 8), torch.empty(130, 8))
            assert SETTING.fp32_precision == before
            with pytest.raises(RuntimeError):
                products.mm(torch.ones(128, 8), torch.ones(9, 8), torch.empty(128, 8))
            assert SETTING.fp32_precision == before
        finally:
            SETTING.fp32_precision = was
    assert seen == ["bf16", before, "bf16"], "oneDNN has the first 128 rows, the default library the last two"


@switched
def test_the_setting_comes_back_after_the_last_of_several_threads() -> None:
    before, meet = SETTING.fp32_precision, threading.Barrier(4)

    def multiply() -> None:
        meet.wait()
        for _ in range(50):
            products.mm(torch.ones(128, 8), torch.ones(8, 8), torch.empty(128, 8))

    with products.using("onednn"):
        threads = [threading.Thread(target=multiply) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert SETTING.fp32_precision == before


@pytest.mark.parametrize(
    ("gain", "exact", "chosen"), [(2.1, True, "onednn"), (1.1, True, "default"), (9.0, False, "default")]
)
def test_the_probe_takes_what_is_exact_and_much_faster(
    gain: float, exact: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "exact", lambda: exact)
    monkeypatch.setattr(products, "_gain", lambda: gain)
    assert products.in_use() == chosen


@switched
def test_a_library_that_rounds_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: real(a.bfloat16().float(), b.bfloat16().float()))
    products.exact.cache_clear()
    assert not products.exact()
    assert products.in_use() == "default"
    with pytest.raises(RecipeError, match="rounds float32"), products.using("onednn"):
        pass


@switched
def test_both_are_timed_and_the_probe_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    products.exact.cache_clear()
    assert products.exact()
    assert 0.05 < products._gain() < 20
    assert torch.equal(torch.get_rng_state(), state)


def test_the_user_decides_before_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_gain", lambda: pytest.fail("nothing to measure"))
    monkeypatch.setenv(products.VARIABLE, "default")
    assert products.in_use() == "default"
    products._default.cache_clear()
    monkeypatch.setenv(products.VARIABLE, "openblas")
    with pytest.raises(RecipeError, match="FLAME_MOE_PRODUCTS") as error:
        products.in_use()
    assert "onednn" in str(error.value)


@switched
def test_the_user_may_ask_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "onednn")
    assert products.in_use() == "onednn"
    with products.using("default"):
        assert products.in_use() == "default"
        with products.using("onednn"):
            assert products.in_use() == "onednn"
        assert products.in_use() == "default"
    assert products.in_use() == "onednn"
