"""The report is one offline page whose every number comes from the results, and nothing in it can inject."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flame_moe.measures import FORMULAS
from flame_moe.progression import progression
from flame_moe.report import figures, stream, summary_table, tables, write_report
from flame_moe.report.page import render
from flame_moe.results import Results
from tests.example_results import MORTALITY, binary_task, example, nine_tasks, with_gaps

SECTIONS = ["headline", "performance", "trajectories", "drift", "footprint", "routing", "calibration", "training"]
SECTIONS += ["cohort", "method", "glossary"]
FIGURES = ["trajectories", "matrix", "drift", "footprint", "routing", "calibration", "training"]
VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}
CASES = {
    "three stages": example(),
    "gaps": with_gaps(),
    "one stage": example(((MORTALITY,),), comparison=False, data=False),
    "nine tasks": example(nine_tasks()),
}
SMALL = example(((MORTALITY,), (binary_task("event"),)), comparison=False, data=False)
PAGES = {name: render(results) for name, results in CASES.items()}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())


class Reader(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.cells: list[str] = []
        self.reading = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action") and value]
        if tag == "svg":
            self.pictures.append(found)
        if tag == "td":
            self.reading = "data-derived" not in found
            self.cells += [""] if self.reading else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self.reading = self.reading and tag != "td"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.reading:
            self.cells[-1] += data + ("" if data.endswith("_") else " ")


def numbers_in(data: object) -> set[float]:
    """Every number anywhere in the results, also those inside of their texts."""
    if isinstance(data, dict):
        return set().union(*(numbers_in(value) for pair in data.items() for value in pair)) if data else set()
    if isinstance(data, list):
        return set().union(*(numbers_in(value) for value in data)) if data else set()
    if isinstance(data, bool) or data is None:
        return set()
    if isinstance(data, str):
        return {float(digits) for digits in re.findall(r"\d+(?:\.\d+)?", data)}
    return {float(data)}


@every_page
def test_the_page_is_well_formed(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


@every_page
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


@pytest.mark.parametrize("name", CASES)
def test_every_number_in_a_table_is_in_the_results(name: str) -> None:
    known = numbers_in(json.loads(CASES[name].model_dump_json()))
    written = {f"{sign}{text}" for x in known for sign in ("", "-") for text in forms(abs(x))}
    shown = 0
    for cell in Reader(PAGES[name]).cells:
        for text in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", cell.replace("\u2212", "-").replace("_", " ")):
            shown += 1
            assert text in written, f"{text} in '{cell}' is not in the results"
    assert shown > 10


def forms(value: float) -> set[str]:
    plain = {f"{value:.0f}", f"{value:,.0f}"} if value == int(value) else set()
    return plain | {f"{value:,.3f}", f"{value:,.1f}", f"{value:.3g}", f"{value:g}"}


def test_a_number_that_is_not_in_the_results_would_be_found() -> None:
    assert "0.999" not in {text for x in numbers_in(json.loads(example().model_dump_json())) for text in forms(x)}


@every_page
def test_every_figure_says_in_words_what_it_shows(page: str) -> None:
    pictures = Reader(page).pictures
    assert pictures
    assert all(picture["role"] == "img" and len(picture["aria-label"] or "") > 20 for picture in pictures)
    assert page.count("<figcaption>") == len(pictures)


@every_page
def test_every_table_has_a_caption_and_scoped_heads(page: str) -> None:
    assert page.count("<table>") == page.count("<caption>") > 0
    assert "<th>" not in page
    assert '<html lang="en">' in page


@pytest.mark.parametrize(("name", "sections"), [("three stages", SECTIONS), ("nine tasks", SECTIONS)])
def test_a_full_run_shows_every_section_and_figure(name: str, sections: list[str]) -> None:
    ids = set(Reader(PAGES[name]).ids)
    assert set(sections) <= ids
    assert {f"figure-{figure}" for figure in FIGURES} <= ids


def test_one_stage_says_that_there_is_nothing_to_forget_yet() -> None:
    page = PAGES["one stage"]
    assert "1 task learned in 1 stage." in page
    assert "no later learning could have changed a task" in page
    assert "bitwise equal: every" not in page


def test_the_headline_promises_stability_only_when_every_bit_is_equal() -> None:
    results = SMALL
    assert "Not one earlier prediction changed." in PAGES["three stages"]
    moved = results.drift[0].model_copy(update={"bitwise_equal": False, "max_abs_logit_change": 2.5e-7})
    page = render(results.model_copy(update={"drift": (moved, *results.drift[1:])}))
    assert "Not one earlier prediction changed." not in page
    assert "Earlier predictions changed." in page
    assert "2.5e-07" in page


def test_a_change_of_sign_of_zero_is_not_called_bitwise_equal() -> None:
    results = SMALL
    unequal = tuple(row.model_copy(update={"bitwise_equal": False}) for row in results.drift)
    page = render(results.model_copy(update={"drift": unequal}))
    assert "bitwise equal: every" not in page
    assert "not bitwise equal" in page


def test_labels_of_tasks_that_the_run_does_not_learn_are_left_out() -> None:
    results = CASES["three stages"]
    assert results.data is not None
    other = results.data.prevalence[0].model_copy(update={"task": "elsewhere"})
    data = results.data.model_copy(update={"prevalence": (*results.data.prevalence, other)})
    labels = tables.prevalence(results.model_copy(update={"data": data}))
    assert labels == tables.prevalence(results)
    only = results.data.model_copy(update={"prevalence": (other,)})
    assert tables.prevalence(results.model_copy(update={"data": only})) is None


def test_the_cost_of_truncation_is_told_for_the_split_it_was_measured_on() -> None:
    table = tables.truncation(SMALL)
    assert table is not None
    row = SMALL.truncations[0]
    said = [[cell.text for cell in cells] for name, _, cells in table.rows if name == row.task]
    assert said[0][:3] == [str(row.stage), row.split, "AUROC"]
    assert [float(text) for text in said[0][3:]] == pytest.approx([row.before["auroc"], row.after["auroc"]], abs=1e-3)
    assert {cells[2] for cells in said} == {"AUROC", "F1", "ECE"}
    assert tables.truncation(SMALL.model_copy(update={"truncations": ()})) is None


def test_the_numbers_that_a_stage_stores_are_summed_over_its_matrices() -> None:
    commits = tables.commits(SMALL)
    assert commits is not None
    for name, _, cells in commits.rows:
        own = [c for c in SMALL.commits if f"Stage {c.stage}" == name]
        assert cells[0].text == str(len(own))
        assert cells[2].text == f"{sum(c.parameters or 0 for c in own):,}"
    old = [c.model_copy(update={"parameters": None}) for c in SMALL.commits]
    before = tables.commits(SMALL.model_copy(update={"commits": tuple(old)}))
    assert before is not None
    assert before.rows[0][2][2].text == "\u2013"


def test_the_figure_of_drift_shows_only_tasks_that_later_stages_could_have_changed() -> None:
    drawn = figures.draw(SMALL)["drift"]
    assert drawn is not None
    assert ">mortality<" in drawn.svg
    assert ">event<" not in drawn.svg
    alone = example(((MORTALITY,),), comparison=False, data=False)
    assert figures.draw(alone)["drift"] is None


def test_a_metric_that_does_not_exist_is_shown_as_absent_with_its_reason() -> None:
    late = SMALL
    last = late.final("mortality")
    assert last is not None
    hollow = last.model_copy(update={"metrics": {**last.metrics, "auroc": float("nan")}, "ci": {}, "note": "one class"})
    page = render(late.model_copy(update={"evaluations": tuple(hollow if e is last else e for e in late.evaluations)}))
    assert "n/a" in page
    assert "mortality: one class" in page
    assert ">nan<" not in page.lower()


def test_texts_cannot_inject() -> None:
    attack = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>$x^2$"
    task = binary_task("event").model_copy(update={"description": attack, "caveat": attack})
    results = example(((task,), (MORTALITY,))).model_copy(update={"method": attack, "recipe": {"name": attack}})
    page = render(results)
    reader = Reader(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert reader.open == []


def test_the_same_results_give_the_same_page() -> None:
    assert render(SMALL) == render(SMALL)


def test_every_measure_stands_beside_its_formula_for_every_method() -> None:
    results = CASES["three stages"]
    table = stream.measured(results)
    assert table is not None
    assert all(escape(formula) in PAGES["three stages"] for formula in FORMULAS.values())
    assert [(name, below) for name, below, _ in table.rows] == [
        (name, metric) for metric in ("AUROC", "R2") for name in ("FLAME", "Fine-tuning")
    ]
    values = progression(results, "auroc", evaluations=results.comparison[0].evaluations).values
    average, backward, *_ = table.rows[1][2]
    assert average.text == f"{np.nanmean(values[:, -1]):.3f}"
    assert backward.text == f"{((values[0, 2] - values[0, 0]) + (values[2, 2] - values[2, 1])) / 2:+.3f}".replace(
        "-", "\u2212"
    )


def test_forward_transfer_is_shown_where_a_compared_method_learned_each_stage_alone() -> None:
    results = CASES["three stages"]
    alone = results.comparison[0].model_copy(update={"name": "separate"})
    table = stream.measured(results.model_copy(update={"comparison": (alone,)}))
    assert table is not None
    mine, theirs = (progression(results, "auroc", evaluations=e).values for e in (None, alone.evaluations))
    by_hand = ((mine[2, 1] - theirs[2, 1]) + (mine[3, 2] - theirs[3, 2])) / 2
    assert table.rows[0][2][3].text == tables.change(by_hand)
    assert stream.measured(CASES["one stage"]) is None


def test_the_report_is_written_beside_nothing_else(tmp_path: Path) -> None:
    path = write_report(example(((MORTALITY,),)), tmp_path / "run" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_terminal_summary_holds_every_task_and_its_interval() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(summary_table(example()))
    text = console.file.getvalue()
    final = example().final("shock")
    assert final is not None
    assert f"{final.metrics['auroc']:.3f}" in text
    assert "0 (bitwise equal)" in text
    assert "no later stage" in text


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine: the page is only checked as text")
    return found


@pytest.mark.parametrize("name", ["three stages", "one stage"])
def test_a_browser_renders_the_page_without_a_complaint(name: str, browser: str, tmp_path: Path) -> None:
    results: Results = CASES[name]
    page = write_report(results, tmp_path / "report.html")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", profile]
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    drawn = Reader(done.stdout)
    assert set(Reader(PAGES[name]).ids) <= set(drawn.ids)
    assert len(drawn.pictures) == len(Reader(PAGES[name]).pictures)
