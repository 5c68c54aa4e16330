"""The page of a store is one offline file whose every number is in the profile, and nothing in it can inject."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flame_moe.cli import app
from flame_moe.data.profile import profile
from flame_moe.data.store import Store
from flame_moe.profile import StoreProfile
from flame_moe.report.store_page import measure, percent, render_store, write_store_report
from tests.example_stores import random_samples, write
from tests.test_report import Reader, numbers_in

FIGURES = ("funnel", "labels", "patterns", "together", "lengths", "times")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("paged") / "store", random_samples(90, seed=5))


@pytest.fixture(scope="module")
def found(store: Store) -> StoreProfile:
    return profile(store)


@pytest.fixture(scope="module")
def page(found: StoreProfile) -> str:
    return render_store(found)


def test_the_page_is_well_formed_and_shows_every_section_and_figure(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {f"figure-{name}" for name in FIGURES} <= set(reader.ids)
    assert {"headline", "cohort", "labels", "missing", "sequences", "values", "made"} <= set(reader.ids)


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    reader = Reader(page)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_every_number_in_a_table_is_in_the_profile(page: str, found: StoreProfile) -> None:
    known = numbers_in(json.loads(found.model_dump_json()))
    written = set()
    for x in known:
        written |= {f"{x:,.0f}", measure(x).replace("\u2212", "-"), percent(x).removesuffix(" %"), f"{x:g}"}
    shown = 0
    for cell in Reader(page).cells:
        if re.fullmatch(r"[0-9a-f]{64}\s*", cell):
            continue
        for text in re.findall(r"-?\d[\d,]*(?:\.\d+)?", cell.replace("\u2212", "-")):
            shown += 1
            assert text in written, f"{text} in '{cell}'"
    assert shown > 100


def test_every_figure_and_table_says_what_it_shows(page: str) -> None:
    pictures = Reader(page).pictures
    assert len(pictures) == len(FIGURES)
    assert all(len(picture["aria-label"] or "") > 20 for picture in pictures)
    assert page.count("<figcaption>") == len(pictures)
    assert page.count("<table>") == page.count("<caption>")


def test_texts_cannot_inject(found: StoreProfile) -> None:
    attack = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>$x^2$"
    funnel = found.funnel.model_copy(update={"counts": {attack: 1}})
    step = found.funnel.steps[0].model_copy(update={"text": attack})
    task = found.tasks[0].model_copy(update={"description": attack, "caveat": attack})
    changes = {
        "source": attack,
        "options": {attack: attack},
        "funnel": funnel.model_copy(update={"steps": (step,)}),
        "tasks": (task,),
        "looks": (attack,),
    }
    page = render_store(found.model_copy(update=changes))
    assert "<script" not in page
    assert "<img" not in page
    assert Reader(page).open == []


def test_the_command_prints_the_same_and_writes_the_page(store: Store, tmp_path: Path) -> None:
    plain = CliRunner().invoke(app, ["describe", str(store.path)])
    both = CliRunner().invoke(app, ["describe", str(store.path), "--report", str(tmp_path / "page.html")])
    assert both.exit_code == 0
    assert both.stdout == f"{plain.stdout}Report: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_store_for_scoring_without_labels_has_a_page_too(tmp_path: Path) -> None:
    bare = [s._replace(targets={}) for s in random_samples(12)]
    page = render_store(profile(write(tmp_path / "store", bare, "test", require_labels=False)))
    assert Reader(page).open == []
    assert "there is no training split" in page


def test_a_browser_renders_the_page_without_a_complaint(found: StoreProfile, page: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine: the page is only checked as text")
    path = write_store_report(found, tmp_path / "page.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    assert set(Reader(page).ids) <= set(Reader(done.stdout).ids)
