"""The serving fit is reproducible: rows, file and package agree, and a refit of a sample lands where it did."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pertoken.catalog.gpus import gpus
from pertoken.catalog.models import model
from pertoken.perf._coefficients import DIRECTIONS, NAMES, fitted, level_keys, lookup, signature

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".." / "shared" / "data" / "performance"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not DATA.is_dir():
        pytest.skip("shared/data is not beside the checkout: the measured points are needed")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.fit.serving")


@pytest.fixture
def fitting(serving: Any) -> Any:
    return importlib.import_module("bench.fit.serving_fit")


def test_the_file_names_only_what_the_package_knows() -> None:
    file = fitted()
    keys = set(level_keys(model("meta-llama/Llama-3.1-8B"), gpus()["H100-SXM"], "vllm", "fp8"))
    assert set(file["effects"]) <= keys
    directions = {d for table in file["effects"].values() for entry in table.values() for d in entry}
    assert directions <= set(DIRECTIONS)
    assert set(file["base"]) == set(NAMES)
    assert set(file["seen"]["gpu"]) <= set(gpus())
    assert all(math.isfinite(v) for t in file["effects"].values() for e in t.values() for v in e.values())


def test_intervals_widen_with_distance_from_what_was_measured() -> None:
    spread = fitted()["spread"]
    for quantity in ("tokens_per_s", "tpot_s", "ttft_s"):
        widths = [spread[name][quantity] for name in ("none", "engine", "gpu", "architecture", "vendor")]
        assert widths == sorted(widths)
        assert spread["none"][quantity] < spread["model"][quantity]


def test_coverage_of_left_out_rows_is_what_the_interval_promises() -> None:
    for split in ("random", "model", "gpu"):
        assert 0.75 <= fitted()["coverage"][split]["tokens_per_s"] <= 0.85
        assert 0.75 <= fitted()["coverage"][split]["tpot_s"] <= 0.85


def test_rows_are_the_ones_the_file_was_fitted_to(serving: Any, fitting: Any) -> None:
    rows = serving.load_rows()
    fitted_rows = fitting.batch(rows).rows
    assert len(fitted_rows) == fitted()["rows"]
    assert sum(r.scored for r in fitted_rows) == fitted()["scored"]
    assert all(r.concurrency >= 1 and r.output_tokens >= 1 and r.gpus > 0 for r in rows)
    assert len({id(r) for r in rows}) == len(rows)


def test_one_measurement_is_one_row_whatever_layouts_it_stands_under(serving: Any) -> None:
    """B200, DeepSeek fp4, sglang 0.5.9, 128 in flight: once as 4 GPUs, once as 16, TTFT and TPOT to the digit."""
    same = [r for r in serving.load_rows() if r.tpot_s == 0.025289 and r.ttft_s == 0.75995]
    assert len(same) == 1
    assert same[0].layout.gpus == 4


def test_a_refit_of_a_sample_predicts_as_the_shipped_file_does(serving: Any, fitting: Any) -> None:
    """General effects are held by all rows; a sample of two configurations moves them, its predictions hardly."""
    rows = [
        r
        for r in serving.load_rows()
        if (r.gpu, r.engine, r.source) == ("H100-SXM", "vllm", "inferencemax")
        or (r.gpu, r.engine, r.source) == ("MI355X", "sglang", "inferencemax")
    ]
    b = fitting.batch(rows)
    refitted = fitting.evaluate(b, fitting.fit(b).logs(b))
    shipped = fitting.evaluate(b, fitting.shipped_logs(b))
    for quantity, tolerance in (("tokens_per_s", 0.05), ("tpot_s", 0.05)):
        apart = np.abs(np.log(refitted[quantity] / shipped[quantity]))
        assert np.median(apart) < tolerance
        error = np.abs(np.log(refitted[quantity] / b.measured[quantity]))
        assert np.median(error) < tolerance


def test_errors_of_the_shipped_file_are_those_it_states(serving: Any, fitting: Any) -> None:
    """Median error over all scored rows is below that of random folds, which the file states."""
    rows = [r for r in serving.load_rows() if r.scored]
    b = fitting.batch(rows)
    answer = fitting.evaluate(b, fitting.shipped_logs(b))
    error = 100 * np.abs(np.expm1(np.log(answer["tokens_per_s"] / b.measured["tokens_per_s"])))
    assert np.median(error) <= fitted()["residuals"]["random"]["tokens_per_s median"]


def test_a_configuration_that_stands_out_whole_weighs_less_in_what_all_share(
    serving: Any, fitting: Any
) -> None:
    """A median error of STRAY: half the weight of one without error, relative to the mean of 1."""
    b = fitting.batch([r for r in serving.load_rows() if r.gpu == "MI355X" and r.scored])
    keys = sorted({k["configuration"] for k in b.keys})
    answer = {q: b.measured[q].copy() for q in ("tokens_per_s", "tpot_s")}
    stray = b.rows_of("configuration", keys[0])
    for values in answer.values():
        values[stray] *= np.exp(fitting.STRAY)
    trust = fitting._trust(b, answer)
    assert trust.mean() == pytest.approx(1.0)
    assert trust[stray[0]] / trust[b.rows_of("configuration", keys[1])[0]] == pytest.approx(0.5)


def test_rows_that_are_not_scored_do_not_narrow_the_interval() -> None:
    """Chat rows at low weight give a configuration effects of its own; what its errors are, they do not tell."""
    aside = [key for key in fitted()["range"] if key not in fitted()["spread_own"] and "split" not in key]
    assert "H100-SXM|vllm|bf16|70.6B-A69.5B" in aside
    found = lookup(model("meta-llama/Llama-3.3-70B-Instruct"), gpus()["H100-SXM"], "vllm", "bf16")
    assert found.spread.tokens_per_s >= fitted()["spread"]["model"]["tokens_per_s"]
    assert "rows at low weight alone" in found.source


def test_a_median_interval_is_a_step_without_other_prompts(serving: Any, fitting: Any) -> None:
    rows = [r for r in serving.load_rows() if r.source == "mlenergy"][:20]
    assert all(r.median_interval and math.isnan(r.ttft_s) for r in rows)
    as_tpot = fitting.batch([replace(r, median_interval=False) for r in rows])
    b = fitting.batch(rows)
    logs = fitting.base_logs(b)
    assert np.all(fitting.evaluate(b, logs)["tpot_s"] <= fitting.evaluate(as_tpot, logs)["tpot_s"] * 1.001)


def test_ranges_hold_every_row_of_their_configuration(serving: Any, fitting: Any) -> None:
    ranges = serving.ranges(fitting.batch(serving.load_rows()).rows)
    assert {key: list(span) for key, span in ranges.items()} == fitted()["range"]
    assert set(fitted()["effects"]["configuration"]) == set(ranges)
    assert all(0.0 < slope < 1.0 for slope in fitted()["far"].values())


def test_summary_counts_percent(serving: Any) -> None:
    row = next(r for r in serving.load_rows() if r.scored)
    off = serving.Scored(row, 1.1 * row.tokens_per_s, row.ttft_s, 0.9 * row.tpot_s)
    assert serving.summary([off])["tokens_per_s MAPE"] == pytest.approx(10.0)
    assert serving.summary([off])["tpot_s bias"] == pytest.approx(-10.0)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.3-70B-Instruct",
        "openai/gpt-oss-120b",
        "deepseek-ai/DeepSeek-R1",
    ],
)
def test_measured_models_are_still_recognised_by_their_sizes(name: str) -> None:
    """A catalogue edit that moves a model's sizes would silently orphan what was fitted for it."""
    assert signature(model(name)) in fitted()["seen"]["model"]
