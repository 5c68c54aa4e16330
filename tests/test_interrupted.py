"""Two writers, a kill in the middle of saving, a full disk: one clear error, and what was there before is whole."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flame_moe import files
from flame_moe.certification import certify, verify
from flame_moe.continual import Learner
from flame_moe.data.store import Store
from flame_moe.errors import BusyError, CheckpointError
from flame_moe.files import replacing_folder, restore_folder, whole
from flame_moe.locking import writing
from flame_moe.runs import Run, extend, run
from flame_moe.schema import Stage
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint
from tests.test_cli import flame, refused
from tests.test_runs import tree
from tests.test_training import Crash, CutOff
from tests.tiny import recipe

pytestmark = pytest.mark.usefixtures("no_figures")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = recipe((("death",),), train={"epochs": 1, "bootstrap": 0})
    path = run(plan, tmp_path_factory.mktemp("finished") / "run", store=tiny_store).path
    certify(path)
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@contextmanager
def child(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that has printed a line and waits; killed with -9 at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    command = [sys.executable, "-c", code, *(str(word) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


WAIT = "import sys, time\ndef stop(*args, **options):\n    print('here', flush=True)\n    time.sleep(600)\n"
HOLD = WAIT + "from flame_moe.locking import writing\nwith writing(sys.argv[1], 'flame extend'):\n    stop()\n"


def test_who_else_writes_is_told_by_process_and_host_and_waits_for_nobody(copy: Path, tiny_store: Store) -> None:
    before = tree(copy)
    with child(HOLD, copy) as process:
        for command in (
            ("extend", copy, "--task", "days"),
            ("certify", copy),
        ):
            refused(flame(*command), f"process {process.pid} on ", "(flame extend, since 20", "is at work on it")
        plan = recipe((("death",),), train={"epochs": 1})
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(BusyError, match=f"process {process.pid} on "):
                run(plan, copy, store=tiny_store, **options)
        assert flame("verify", copy).exit_code == 0
    assert tree(copy) == before


def test_the_lock_of_a_dead_process_is_taken_over_and_said_so(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with child(HOLD, copy) as process:
        pass
    lock = copy.with_name(".run.lock")
    assert lock.exists()
    with caplog.at_level(logging.WARNING), writing(copy, "a test"):
        assert f"left behind by process {process.pid} on " in caplog.text
        assert "which has ended; it is taken over" in caplog.text
    assert not lock.exists()


def test_one_process_does_not_write_twice_at_a_time_either(tmp_path: Path) -> None:
    with (
        writing(tmp_path / "run", "one"),
        pytest.raises(BusyError, match=r"\(one, since "),
        writing(tmp_path / "run", "two"),
    ):
        pass
    with writing(tmp_path / "run", "three"):
        pass
    assert list(tmp_path.iterdir()) == []


REPLACE = (
    WAIT
    + "from flame_moe import files\n"
    + "if sys.argv[2] == 'before': files.os.fsync = stop\n"
    + "if sys.argv[2] == 'between': files._exchange = lambda *a: False; files.sync_folder = print\n"
    + "if sys.argv[2] == 'after': files.sync_folder = stop\n"
    + "rename = files.Path.rename\n"
    + "def once(self, other):\n    rename(self, other)\n    other.name.endswith('.aside') and stop()\n"
    + "files.Path.rename = once\n"
    + "with files.replacing_folder(sys.argv[1]) as work:\n    (work / 'a').write_text('new')\n"
)


@pytest.mark.parametrize(("place", "found"), [("before", "old"), ("between", "old"), ("after", "new")])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, place: str, found: str
) -> None:
    """ "between" is a file system that cannot exchange names, killed at the worst moment."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    with child(REPLACE, tmp_path / "run", place):
        pass
    assert (whole(tmp_path / "run") / "a").read_text() == found
    with writing(tmp_path / "run", "a test"):
        restore_folder(tmp_path / "run")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "a").read_text() == found
    with replacing_folder(tmp_path / "run") as work:
        (work / "a").write_text("newer")
    assert (tmp_path / "run" / "a").read_text() == "newer"
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_names_are_exchanged_in_one_step_here(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()


def test_a_checkpoint_left_aside_is_still_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", {"x": torch.ones(2)}, {}, kind="k", version=1)
    (tmp_path / "model").rename(tmp_path / ".model.aside")
    assert load_checkpoint(tmp_path / "model", kind="k", version=1)[0]["x"].tolist() == [1, 1]


EXTEND = (
    WAIT
    + "from flame_moe import files, runs\n"
    + "from flame_moe.report import page\nfrom flame_moe.report.figures import DRAWN\n"
    + "page.figures.draw = lambda results: dict.fromkeys(DRAWN)\n"
    + "runs.save_checkpoint = stop\n"
    + "runs.extend(sys.argv[1], ['days'])\n"
)


def test_a_kill_in_the_middle_of_saving_a_stage_costs_nothing_but_the_stage(copy: Path) -> None:
    """The new model is on the disk, its reference is not: the run is the old one, and can be extended again."""
    before = tree(copy)
    with child(EXTEND, copy):
        pass
    half = [f for f in copy.parent.iterdir() if f.name.startswith(".run.") and f.is_dir()]
    assert len(half) == 1
    assert (half[0] / "model" / "manifest.json").exists()
    assert {k: v for k, v in tree(copy).items() if not k.startswith("resume/")} == before
    assert verify(copy).holds
    assert list(Run.open(copy).learner.tasks) == ["death"]
    done = extend(copy, ["days"])
    assert list(Run.open(copy).learner.tasks) == ["death", "days"]
    assert done.results.stages[1].epochs_run == 1
    assert verify(copy).holds
    assert [f.name for f in copy.parent.iterdir()] == ["run"]


def test_a_replacement_that_was_killed_gives_the_old_run_back(copy: Path, tiny_store: Store) -> None:
    before = tree(copy)
    copy.rename(copy.with_name(".run.replaced"))
    copy.mkdir()
    (copy / "recipe.json").write_bytes(before["recipe.json"])
    with pytest.raises(CutOff):
        run(recipe((("death",),), train={"epochs": 1}), copy, store=tiny_store, overwrite=True, monitor=Crash(step=1))
    assert tree(copy) == before
    assert [f.name for f in copy.parent.iterdir()] == ["run"]


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may become larger than so many bytes: what the kernel then says is not made up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("free", [1_000, 20_000])
def test_a_full_disk_is_a_sentence_and_leaves_everything_as_it_was(copy: Path, free: int) -> None:
    before = tree(copy)
    with full_disk(free):
        said = flame("extend", copy, "--task", "days")
    refused(said, "File too large")
    assert {k: v for k, v in tree(copy).items() if not k.startswith("resume/")} == before
    assert [f.name for f in copy.parent.iterdir()] == ["run"]
    assert verify(copy).holds


def test_a_disk_that_fills_up_while_certifying_leaves_no_half_certificate(copy: Path) -> None:
    shutil.rmtree(copy / "certificate")
    with full_disk(2_000):
        refused(flame("certify", copy), "File too large")
    assert not (copy / "certificate").exists()
    assert not [f for f in copy.iterdir() if f.name.startswith(".")]


def test_a_training_state_of_another_model_is_not_gone_on_with(tiny_store: Store, tmp_path: Path) -> None:
    stages = (("death",), ("days",))
    for seed, resume in ((0, True), (1, False)):
        plan = recipe(stages, seed=seed)
        learner = Learner(plan)
        learner.learn(tiny_store, plan.stages[0])
        if resume:
            with pytest.raises(CutOff):
                learner.learn(tiny_store, plan.stages[1], state_folder=tmp_path / "resume", monitor=Crash(step=6))
            assert (tmp_path / "resume").exists()
            continue
        before = tree(tmp_path / "resume")
        with pytest.raises(CheckpointError, match="was begun on another model"):
            learner.learn(tiny_store, plan.stages[1], state_folder=tmp_path / "resume")
        assert tree(tmp_path / "resume") == before
        learner.learn(tiny_store, Stage(tasks=("days",), epochs=1))


def test_a_run_put_together_from_two_is_refused(copy: Path, tiny_store: Store, tmp_path: Path) -> None:
    other = recipe((("death",),), train={"epochs": 1, "bootstrap": 0}, seed=1)
    run(other, tmp_path / "other", store=tiny_store)
    shutil.rmtree(copy / "model")
    shutil.copytree(tmp_path / "other" / "model", copy / "model")
    before = tree(copy)
    refused(flame("extend", copy, "--task", "days"), "the model and the results are of two different runs")
    said = flame("verify", copy)
    assert said.exit_code == 1
    assert "death: DIFFERS, tensor paths.vitals.encoder." in said.stdout
    assert tree(copy) == before
