"""Every boundary and every kind of bad input that the sources promise to handle, and the test that shows it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from tests import example_mimic
from tests.eicu_release import TABLES, patient, samples, write_release
from tests.example_mimic import START, Hospital, one_stay

MIMIC, EICU, COHORT = "test_sources_mimic_iv", "test_eicu", "test_eicu_cohort"
TASKS = ("ihm", "los", "readmission")

SHOWN: dict[str, tuple[str, ...]] = {
    "mimic_iv: death at 47:59 and 48:00": (f"{MIMIC}.test_mortality_is_of_those_who_outlive_their_48th_hour",),
    "eicu: death at 47:59 and 48:00": (
        f"{COHORT}.test_a_death_counts_if_it_comes_after_the_prediction",
        "test_boundaries.test_death_at_47_59_and_48_00_is_before_the_prediction_of_eicu_at_48_hours",
    ),
    "mimic_iv: stay of exactly 7 days": (
        f"{MIMIC}.test_length_of_stay_counts_the_rest_or_a_short_stay_that_was_survived",
    ),
    "eicu: stay of exactly 7 days": (
        f"{COHORT}.test_a_stay_is_long_if_more_than_three_days_remain",
        "test_boundaries.test_a_stay_of_exactly_seven_days_is_not_longer_than_seven_days",
    ),
    "mimic_iv: readmission at day 30": (f"{MIMIC}.test_readmission_is_another_admission_up_to_day_30",),
    "eicu: readmission at day 30": (
        f"{COHORT}.test_a_readmission_is_a_return_to_intensive_care_within_thirty_days_of_the_end",
    ),
    "mimic_iv: age 18, age over 89": (f"{MIMIC}.test_adults_are_18_and_everyone_over_89_is_91",),
    "eicu: age 18, age over 89": (f"{COHORT}.test_only_adults_of_known_age_are_kept_and_over_89_is_90_or_left_out",),
    "mimic_iv: two stays in one admission": (
        f"{MIMIC}.test_the_first_stay_of_an_admission_is_the_sample_whatever_the_order_of_lines",
    ),
    "eicu: two stays in one admission": (
        f"{COHORT}.test_the_first_stay_is_that_of_the_first_visit_in_the_first_year",
        f"{COHORT}.test_a_return_after_a_step_down_stay_is_a_readmission_of_both",
    ),
    "mimic_iv: events before admission and after discharge": (
        f"{MIMIC}.test_the_window_holds_both_its_ends_and_nothing_beyond",
        f"{MIMIC}.test_a_short_stay_ends_its_window",
        f"{MIMIC}.test_laboratory_values_of_the_hours_before_are_an_option_and_move_the_origin",
    ),
    "eicu: events before admission and after discharge": (
        f"{EICU}.test_the_window_reaches_from_the_lookback_to_the_prediction_inclusive",
        f"{EICU}.test_events_are_typed_coded_and_timed_by_when_they_were_known",
    ),
    "mimic_iv: DST-free times": ("test_boundaries.test_no_clock_is_put_forward_or_back_in_mimic_iv",),
    "eicu: DST-free times": ("test_boundaries.test_eicu_counts_minutes_and_reads_no_clock",),
    "mimic_iv: duplicate events": (
        f"{MIMIC}.test_values_at_the_same_time_become_their_mean",
        f"{MIMIC}.test_lines_that_are_repeated_or_belong_to_nobody_are_counted",
        "test_boundaries.test_a_line_of_mimic_iv_that_is_there_twice_changes_no_value",
    ),
    "eicu: duplicate events": (
        f"{EICU}.test_of_a_draw_with_two_results_the_last_that_was_known_counts",
        f"{EICU}.test_repeated_events_count_once_and_the_latest_are_kept",
        f"{COHORT}.test_an_exact_repetition_of_a_stay_is_one_and_a_contradiction_is_refused",
    ),
    "mimic_iv: unit changes": (f"{MIMIC}.test_units_are_converted_and_what_cannot_be_used_is_counted",),
    "eicu: unit changes": (f"{EICU}.test_units_and_slips_of_laboratory_values_are_mended_and_counted",),
    "mimic_iv: absent tables": (
        f"{MIMIC}.test_an_optional_table_that_is_absent_costs_what_it_brings_and_is_counted",
        f"{MIMIC}.test_a_needed_table_that_is_missing_or_there_twice_is_refused",
    ),
    "eicu: absent tables": (
        f"{EICU}.test_absent_tables_leave_their_modalities_out_and_the_funnel_says_so",
        f"{EICU}.test_wrong_folders_options_and_cells_are_refused_in_one_sentence",
    ),
    "bad input: missing table, optional": (
        f"{MIMIC}.test_an_optional_table_that_is_absent_costs_what_it_brings_and_is_counted",
        f"{EICU}.test_absent_tables_leave_their_modalities_out_and_the_funnel_says_so",
        "test_sources_adni.test_an_absent_table_is_told_with_what_is_lost",
        "test_sources_oasis.test_an_absent_table_is_counted_with_what_is_lost",
        "test_sources_cbis_ddsm.test_a_missing_kind_is_left_out_and_new_findings_need_no_pathology",
    ),
    "bad input: missing table, required": (
        f"{MIMIC}.test_a_needed_table_that_is_missing_or_there_twice_is_refused",
        f"{EICU}.test_wrong_folders_options_and_cells_are_refused_in_one_sentence",
        "test_sources_adni.test_what_is_missing_altogether_is_named",
        "test_sources_embed.test_tables_that_cannot_be_used_are_one_sentence",
    ),
    "bad input: changed column names": (
        "test_tables.test_what_cannot_be_read_is_one_sentence_with_its_place",
        f"{MIMIC}.test_what_is_wrong_is_one_sentence_with_its_place",
    ),
    "bad input: mixed encodings": ("test_tables.test_what_cannot_be_read_is_one_sentence_with_its_place",),
    "bad input: BOM and CRLF": ("test_tables.test_marks_blanks_line_ends_and_case_of_names_are_understood",),
    "bad input: gz and plain": (
        "test_tables.test_packed_and_plain_tables_and_parquet_give_the_same",
        f"{MIMIC}.test_layouts_and_packing_change_nothing",
    ),
    "bad input: truncated gz": (
        "test_tables.test_what_cannot_be_read_is_one_sentence_with_its_place",
        "test_tables.test_a_step_that_fails_leaves_nothing_behind",
    ),
    "bad input: DICOM without pixels": (
        "test_imaging.test_a_dicom_file_without_a_picture_is_one_sentence",
        "test_sources_embed.test_a_dicom_file_is_a_view_unless_it_holds_no_pixels",
    ),
    "bad input: NIfTI with odd orientation": (
        "test_imaging.test_how_a_volume_was_stored_changes_nothing",
        "test_imaging.test_a_volume_that_cannot_be_used_is_one_sentence",
        "test_folder_times.test_a_volume_is_the_same_as_an_array_and_as_a_file_of_any_orientation",
    ),
    "bad input: impossible times": (
        "test_tables.test_what_cannot_be_read_is_one_sentence_with_its_place",
        "test_folder_times.test_a_time_that_cannot_be_is_one_sentence",
        "test_boundaries.test_times_of_mimic_iv_that_go_backwards_are_counted_and_label_nothing",
        "test_boundaries.test_a_stay_of_eicu_that_ends_before_it_begins_is_no_sample",
    ),
    "bad input: nothing half-written": (
        "test_prepare.test_nothing_is_lost_or_left_when_something_is_wrong",
        "test_tables.test_a_step_that_fails_leaves_nothing_behind",
        f"{MIMIC}.test_what_is_wrong_is_one_sentence_with_its_place",
    ),
}


@pytest.mark.parametrize("promise", SHOWN)
def test_every_promise_has_its_test(promise: str) -> None:
    for name in SHOWN[promise]:
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), function))


def labels(raw: Path, task: str, **options: Any) -> dict[str, float | None]:
    found, _ = samples(raw, **options)
    return {name: float(s.targets[task][0]) if task in s.targets else None for name, s in found.items()}


def test_death_at_47_59_and_48_00_is_before_the_prediction_of_eicu_at_48_hours(tmp_path: Path) -> None:
    dead = {"unitdischargestatus": "Expired", "hospitaldischargestatus": "Expired"}
    ends = {1: 2879, 2: 2880, 3: 2881}
    patients = [patient(stay, **dead, unitdischargeoffset=end) for stay, end in ends.items()]
    raw = write_release(tmp_path / "raw", {"patient": patients})
    assert labels(raw, "mortality", hours=48, apache=False) == {"3": 1.0}


def test_a_stay_of_exactly_seven_days_is_not_longer_than_seven_days(tmp_path: Path) -> None:
    week = 7 * 1440
    patients = [patient(i, unitdischargeoffset=week + i - 2) for i in (1, 2, 3)]
    raw = write_release(tmp_path / "raw", {"patient": patients})
    assert labels(raw, "los", los_days=6) == {"1": 0.0, "2": 0.0, "3": 1.0}
    assert list(labels(raw, "los", max_days=7)) == ["1", "2"]


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The computer stands where clocks are put forward in the night of the second Sunday of March."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_no_clock_is_put_forward_or_back_in_mimic_iv(tmp_path: Path, new_york: None) -> None:
    midnight = (datetime(2150, 3, 8) - START).total_seconds() / 3600
    assert datetime(2150, 3, 8).weekday() == 6
    assert time.localtime(datetime(2024, 3, 10, 4).timestamp()).tm_isdst == 1
    hospital = Hospital().patient(1).admission(1, 10, midnight - 2, midnight + 100)
    hospital.stay(1, 10, 100, midnight, midnight + 60)
    for hours in (1.5, 2.5, 3.5, 48.0):
        hospital.chart(100, midnight + hours, 60 + hours)
    (sample,) = example_mimic.read(hospital.write(tmp_path / "raw"), tasks=TASKS)
    times = sample.modalities["vitals"].times
    assert times is not None
    assert (times * 48).tolist() == pytest.approx([1.5, 2.5, 3.5, 48.0])


def test_eicu_counts_minutes_and_reads_no_clock(tmp_path: Path) -> None:
    def build(folder: str, **clock: str) -> dict[str, Sample]:
        patients = [{**row, **clock} for row in TABLES["patient"]]
        return samples(write_release(tmp_path / folder, {**TABLES, "patient": patients}))[0]

    plain = build("a")
    moved = build("b", unitadmittime24="01:59:00", unitdischargetime24="03:01:00", hospitaladmittime24="02:30:00")
    assert plain.keys() == moved.keys()
    for name, sample in plain.items():
        assert sample.targets == moved[name].targets
        for modality, part in sample.modalities.items():
            for one, other in zip(part, moved[name].modalities[modality], strict=True):
                np.testing.assert_array_equal(one, other)


def test_a_line_of_mimic_iv_that_is_there_twice_changes_no_value(tmp_path: Path) -> None:
    once = one_stay().chart(100, 2.0, 90).lab(1, 3.0, 1.5)
    twice = one_stay().chart(100, 2.0, 90).chart(100, 2.0, 90).lab(1, 3.0, 1.5).lab(1, 3.0, 1.5)
    one, other = (
        example_mimic.read(hospital.write(tmp_path / name / "raw"), tasks=TASKS)[0]
        for name, hospital in (("once", once), ("twice", twice))
    )
    for modality, part in one.modalities.items():
        for a, b in zip(part, other.modalities[modality], strict=True):
            np.testing.assert_array_equal(a, b)


def test_times_of_mimic_iv_that_go_backwards_are_counted_and_label_nothing(tmp_path: Path) -> None:
    hospital = one_stay(60.0, discharge=-5.0).patient(2).admission(2, 20, 0.0, 90.0, 20.0)
    hospital.stay(2, 20, 200, 1.0, 61.0).chart(200, 6.0, 80, subject=2)
    hospital.patient(3).admission(3, 30, 0.0, 90.0).stay(3, 30, 300, 10.0, 5.0).chart(300, 6.0, 80, subject=3)
    funnel = Funnel()
    found = {s.id: s for s in example_mimic.read(hospital.write(tmp_path / "raw"), funnel, tasks=TASKS)}
    assert list(found) == ["100", "200"]
    assert set(found["100"].targets) == {"ihm", "los"}
    assert not found["200"].targets
    assert [step.dropped for step in funnel.steps if step.text == "begins before it ends"] == [1]
    assert funnel.counts["hospital admission that ends before it begins, no label of readmission"] == 1
    assert funnel.counts["time of death before the end of the stay in the unit, both kept"] == 1


def test_a_stay_of_eicu_that_ends_before_it_begins_is_no_sample(tmp_path: Path) -> None:
    raw = write_release(tmp_path / "raw", {"patient": [patient(1, unitdischargeoffset=-5), patient(2)]})
    found, funnel = samples(raw)
    assert list(found) == ["2"]
    assert [step.dropped for step in funnel.steps if "until prediction" in step.text] == [1]
