"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from flame_moe.data.store import Store
from flame_moe.nn import products
from flame_moe.report.figures import DRAWN
from tests.example_stores import random_samples, write

if TYPE_CHECKING:
    from flame_moe.mllm.stream.tiers import Stream

# Tests compare bits between processes; on a busy machine the probe of each could decide otherwise.
os.environ.setdefault(products.VARIABLE, products.in_use())

# What fails fails everywhere; HYPOTHESIS_PROFILE=search looks for examples that nobody has seen.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real public data beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real public data (../shared/data) is not here")
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Ninety random samples with every kind of modality and task."""
    return write(tmp_path_factory.mktemp("tiny") / "store", random_samples(90))


@pytest.fixture(scope="session")
def mllm_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One cache of language models for all workers of the suite, so that a base model is trained once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if hasattr(request.config, "workerinput") else base) / "mllm-cache"


@pytest.fixture
def stream(mllm_cache: Path) -> Stream:
    """The small stream of language tasks, in order a."""
    from tests.mllm_stream import small_stream  # brings transformers and peft, which few tests need

    return small_stream(mllm_cache)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Reports without pictures, which take longer than everything else about a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flame_moe.report.page.figures.draw", lambda results: dict.fromkeys(DRAWN))
        yield
