from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources import get_source
from flame_moe.data.sources._clinic_truth import best_auroc, correlation
from flame_moe.data.sources.clinic import ClinicOptions, read, truth
from flame_moe.data.store import Store
from flame_moe.data.work import Work
from flame_moe.errors import RecipeError

NINE = ["ihm", "los", "pheno", "rad", "mor", "birads", "risk", "density", "diag"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("clinic", None, tmp_path_factory.mktemp("stores") / "clinic", options={"samples": 200})


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A cohort of plain vectors without missing modalities, large enough to measure an AUROC."""
    missing = dict.fromkeys(("t1", "t2", "t3", "t4", "t5"), 0.0)
    options = {"samples": 4000, "cohorts": ["eicu"], "missing": missing}
    return prepare("clinic", None, tmp_path_factory.mktemp("stores") / "eicu", options=options)


def probe(store: Store, task: str, modalities: list[str]) -> float:
    """Test AUROC of a linear model on the mean vector of each modality."""

    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        indices = store.indices(task, split)
        return np.hstack([store.gather(m, indices).values for m in modalities]), store.target(task, indices)[:, 0]

    model = LogisticRegression(C=0.1, max_iter=2000).fit(*features("train"))
    x, y = features("test")
    return float(roc_auc_score(y, model.predict_proba(x)[:, 1]))


def test_all_nine_tasks_are_offered_with_the_modalities_of_the_paper(small: Store) -> None:
    assert list(small.tasks) == NINE
    assert [len(small.tasks[t].modalities) for t in NINE] == [3, 3, 3, 5, 5, 4, 4, 4, 4]
    assert small.modalities["ts"].features == 30
    assert small.tasks["pheno"].target_width == 25
    assert small.tasks["risk"].loss == "focal"
    assert len(small) == 800


def test_a_probe_reads_the_signal_where_it_is_and_only_there(vectors: Store) -> None:
    known = truth(ClinicOptions.parse(vectors.manifest["options"], where="test"))["tasks"]["rad"]
    assert known["signal"]["t3"] == 0.0
    assert probe(vectors, "rad", ["t2"]) > 0.64
    assert probe(vectors, "rad", ["t3"]) == pytest.approx(0.5, abs=0.07)
    everything = probe(vectors, "rad", list(vectors.tasks["rad"].modalities))
    assert probe(vectors, "rad", ["t2"]) < everything < known["auroc"] + 0.03


def test_class_balances_are_those_of_the_table(vectors: Store) -> None:
    for task, positive in (("rad", 0.12), ("mor", 0.06)):
        target = vectors.target(task, range(len(vectors)))
        assert np.mean(target) == pytest.approx(positive, abs=0.02)


def test_sharing_correlates_the_tasks(tmp_path: Path) -> None:
    def agreement(sharing: float) -> float:
        options = ClinicOptions(
            samples=3000,
            cohorts=("eicu",),
            sharing=sharing,
            signal={"rad": {"t2": 3.0}, "mor": {"t2": 3.0}},
        )
        assert truth(options)["correlation"]["rad"]["mor"] == pytest.approx(sharing)
        samples = list(read(None, options, Funnel(), Work(".steps")))
        rad, mor = (np.array([s.targets[t][0] for s in samples]) for t in ("rad", "mor"))
        return float(np.corrcoef(rad, mor)[0, 1])

    assert agreement(0.0) == pytest.approx(0.0, abs=0.06)
    assert agreement(1.0) > 0.4


def test_missingness_is_what_was_asked_for(tmp_path: Path) -> None:
    options = {"samples": 1500, "cohorts": ["embed"], "missing": {"cc": 0.6, "mlo": 0.0}}
    store = prepare("clinic", None, tmp_path / "s", options=options)
    assert store.present("mlo").all()
    assert 1 - store.present("cc").mean() == pytest.approx(0.6 * 0.75, abs=0.04)


def test_subjects_come_back_and_resemble_themselves(vectors: Store) -> None:
    subjects = np.array(vectors.subjects(range(len(vectors))))
    values = vectors.gather("t5", np.arange(len(vectors))).values
    again = np.flatnonzero(subjects[1:] == subjects[:-1])
    assert len(again) > 500

    def related(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.mean(values[first] * values[second]))

    assert related(again, again + 1) > related(again, (again + 1000) % len(values)) + 0.1


def test_few_samples_are_the_first_of_many() -> None:
    few = list(read(None, ClinicOptions(samples=5), Funnel(), Work(".steps")))
    many = list(read(None, ClinicOptions(samples=9), Funnel(), Work(".steps")))
    by_id = {s.id: s for s in many}
    for sample in few:
        for name, part in sample.modalities.items():
            np.testing.assert_array_equal(part.values, by_id[sample.id].modalities[name].values)
        for name, target in sample.targets.items():
            np.testing.assert_array_equal(target, by_id[sample.id].targets[name])
    other = next(read(None, ClinicOptions(samples=5, seed=1), Funnel(), Work(".steps")))
    assert not np.array_equal(other.modalities["ts"].values, few[0].modalities["ts"].values)


def test_samples_are_made_one_at_a_time() -> None:
    stream = read(None, ClinicOptions(samples=10**9), Funnel(), Work(".steps"))
    assert next(stream).id == "mimic_0_0"


@given(st.floats(0, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_best_auroc_grows_with_the_signal(rho: float, positive: float) -> None:
    low, high = best_auroc(rho * 0.9, (1 - positive, positive)), best_auroc(rho, (1 - positive, positive))
    assert 0.5 - 1e-6 <= low <= high + 1e-9
    assert high <= 1.0


def test_the_best_auroc_is_the_one_measured() -> None:
    generator = np.random.default_rng(0)
    signal = {"a": 0.8, "b": 0.4}
    rho = correlation(signal, signal)
    score = generator.standard_normal(200_000)
    y = rho * score + np.sqrt(1 - rho**2) * generator.standard_normal(len(score))
    label = y > np.quantile(y, 0.84)
    assert best_auroc(rho, (0.84, 0.16)) == pytest.approx(roc_auc_score(label, score), abs=0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": {"imh": {}}}, "Did you mean 'ihm'"),
        ({"signal": {"ihm": {"t1": 1.0}}}, "task 'ihm' reads no 't1'"),
        ({"missing": {"txt": 0.1}}, "Did you mean 'text'"),
        ({"widths": {"ts": 5}}, "30 named channels"),
        ({"sharing": 1.5}, "sharing"),
        ({"cohorts": ["eicu", "eicu"]}, "named twice"),
    ],
)
def test_impossible_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_source("clinic").options.parse(options, where="options")
