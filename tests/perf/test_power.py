"""Power: bounds, direction, boundaries by hand, and the fit against a refit on the data."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.catalog.gpus import gpu, gpus
from pertoken.catalog.models import model
from pertoken.errors import InputError
from pertoken.perf.power import gpu_power_w, joules_per_token, power_log_spread, server_power_w
from pertoken.perf.tasks import predict_task, term_name

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".." / "shared" / "data" / "performance" / "power_mlenergy.csv"
SHARE = st.floats(0.0, 1.0)


@given(name=st.sampled_from(sorted(gpus())), compute=SHARE, memory=SHARE, link=SHARE)
def test_a_busy_gpu_draws_between_idle_and_its_limit(
    name: str, compute: float, memory: float, link: float
) -> None:
    card = gpu(name)
    power = float(gpu_power_w(card, compute, memory, link))
    assert card.idle_w < power <= card.tdp_w


@given(
    name=st.sampled_from(["H100", "B200", "MI300X", "L40S"]),
    low=SHARE,
    high=SHARE,
    other=SHARE,
    of=st.sampled_from([None, "gpt-oss-120b", "Llama-3.1-8B", "Qwen3-235B-A22B"]),
    media=st.sampled_from(["", "image", "video"]),
)
def test_more_use_never_draws_less(
    name: str, low: float, high: float, other: float, of: str | None, media: str
) -> None:
    low, high = sorted((low, high))
    found = model(of) if of else None
    more_compute = gpu_power_w(gpu(name), [low, high], other, model=found, media=media)
    more_memory = gpu_power_w(gpu(name), other, [low, high], model=found, media=media)
    assert more_compute[0] <= more_compute[1]
    assert more_memory[0] <= more_memory[1]


def test_vectorised_over_any_shape() -> None:
    grid = gpu_power_w(gpu("H100"), np.linspace(0, 1, 5)[:, None], np.linspace(0, 1, 7)[None, :])
    assert grid.shape == (5, 7)
    assert grid[3, 2] == gpu_power_w(gpu("H100"), 0.75, 2 / 6)


def test_preprocessing_media_keeps_the_gpu_waiting() -> None:
    text, image, video = (float(gpu_power_w(gpu("H100"), 0.1, 0.4, media=m)) for m in ("", "image", "video"))
    assert video < image < text


def test_a_gpu_that_waits_for_its_host_draws_less() -> None:
    card = gpu("B200")
    shares = np.array([0.0, 0.3, 0.9])
    waiting = gpu_power_w(card, 0.1, 0.4, host_fraction=shares)
    assert waiting[0] > waiting[1] > waiting[2] > card.idle_w
    unknown = float(gpu_power_w(card, 0.1, 0.4))
    assert float(gpu_power_w(card, 0.1, 0.4, host_fraction=shipped()["typical host fraction"])) == unknown


@pytest.mark.parametrize(("wide", "narrow"), [("bf16", "fp8"), ("fp8", "fp4")])
def test_a_narrow_value_read_costs_more_than_its_bytes(wide: str, narrow: str) -> None:
    assert float(gpu_power_w(gpu("B200"), 0.1, 0.4, precision=wide)) < float(
        gpu_power_w(gpu("B200"), 0.1, 0.4, precision=narrow)
    )


def test_no_series_has_more_numbers_than_half_its_rows_rounded_up(bench: Any) -> None:
    rows = bench.load_rows()
    series = bench.Design(rows).series.tolist()
    for curves in (shipped()["curves"], shipped()["task"]["curves"]):
        assert set(curves) == set(series)
        assert all(len(values) <= min(3, -(-series.count(key) // 2)) for key, values in curves.items())


def test_interval_is_wider_where_less_was_measured() -> None:
    measured = power_log_spread(gpu("H100"), "bf16", model("Llama-3.1-8B"), 1)
    assert 0 < measured <= power_log_spread(gpu("H100")) <= power_log_spread(gpu("MI300X"))


def test_server_adds_its_host_at_rest_and_at_load() -> None:
    card = gpu("H100")
    assert server_power_w(card, 600.0, 1.0) == 600.0 + card.host_busy_w
    assert server_power_w(card, 600.0, 0.0) == card.idle_w + card.host_idle_w
    assert server_power_w(card, np.array([500.0, 600.0]), 0.5).shape == (2,)


def test_joules_by_hand_at_each_boundary() -> None:
    card = gpu("H100")
    board = float(joules_per_token(card, 600.0, 8, 4000.0))
    assert board == pytest.approx(8 * 600 / 4000)
    server = float(joules_per_token(card, 600.0, 8, 4000.0, boundary="server"))
    assert server == pytest.approx(8 * (600 + card.host_busy_w) / 4000)
    assert joules_per_token(card, 600.0, 8, 4000.0, boundary="facility", pue=1.3) == pytest.approx(
        1.3 * server
    )
    parts = [float(joules_per_token(card, 600.0, 8, 4000.0, phase_fraction=f)) for f in (0.3, 0.7)]
    assert sum(parts) == pytest.approx(board)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gpu_power_w(gpu("H100"), 1.2, 0.5),
        lambda: gpu_power_w(gpu("H100"), 0.2, float("nan")),
        lambda: gpu_power_w(gpu("H100"), 0.2, 0.5, media="smell"),
        lambda: gpu_power_w(gpu("H100"), 0.2, 0.5, host_fraction=-0.1),
        lambda: server_power_w(gpu("H100"), 500.0, -0.1),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 100.0, pue=0.9),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 0.0),
        lambda: joules_per_token(gpu("H100"), 500.0, 8, 1.0, boundary="rack"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(InputError):
        call()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not DATA.exists():
        pytest.skip("../shared/data is absent: the fit cannot be repeated")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.fit.power")


def shipped() -> Any:
    return json.loads(
        resources.files("pertoken.perf").joinpath("data/power.json").read_text(encoding="utf-8")
    )


def test_the_shipped_file_is_what_the_fit_makes(bench: Any) -> None:
    rows = bench.load_rows()
    found = bench.served(rows)
    again = bench.fit(rows, found)
    old = bench.Fitted(shipped(), again.stack)
    assert shipped()["rows"] == len(rows) == 613
    # The shares in use come from the serving predictor, whose own refits move them a little.
    now = again.at_measured_throughput(found)
    moved = np.abs(np.log(now / old.at_measured_throughput(found)))
    assert np.median(moved) < 0.01
    assert np.max(moved) < 0.1
    errors = np.log(now / np.array([r.power_w for r in rows]))
    fitted = shipped()["residuals"]["fit at measured throughput"]["fit"]["mape"]
    assert bench.summary(errors)["mape"] == pytest.approx(fitted, abs=2e-3)


def test_the_package_computes_what_the_fit_computed(bench: Any) -> None:
    rows = bench.load_rows()
    found = bench.served(rows)
    slower = bench.measured_slowdown(rows, found)
    made = bench.Fitted(shipped(), tasks_fit(bench, rows))
    host = made.stack.host_fraction(found)
    fitted, pictured, plain = (
        made.watts(found, slower, host, "task"),
        made.watts(found, slower, host, "media"),
        made.watts(found, slower, told=""),
    )
    compute, memory = bench.in_use(rows, found, slower)
    for i in range(0, len(rows), 20):
        r = rows[i]
        at, of = (r.gpu, compute[i], memory[i], 0.0, r.precision), {"model": r.model, "gpus": r.gpus}
        told = of | {"media": r.media, "host_fraction": host[i]}
        assert float(gpu_power_w(*at, **told, task=r.task, requests=r.requests)) == pytest.approx(fitted[i])
        assert float(gpu_power_w(*at, **told)) == pytest.approx(pictured[i])
        assert float(gpu_power_w(*at, **of)) == pytest.approx(plain[i])


def tasks_fit(bench: Any, rows: Any) -> Any:
    """The fit of the stack's seconds as the file holds it."""
    design, file = bench.Design(rows), shipped()["task"]
    effects = np.array([file["effects"][term_name(*term)].get(key, 0.0) for term, key in design.names])
    curves = {key: np.array(values) for key, values in file["curves"].items()}
    return bench.tasks.Fit(design, effects, curves, 0.0, 0.0, frozenset(r.gpu.name for r in rows))


def test_a_task_is_predicted_as_the_fit_predicts_it(bench: Any) -> None:
    rows = bench.load_rows()
    found = bench.served(rows)
    fitted = found.tokens_per_s / tasks_fit(bench, rows).factor(found)
    for i in range(0, len(rows), 40):
        own = predict_task(rows[i].model, rows[i].gpu, rows[i].point, rows[i].task)
        assert float(own.tokens_per_s.value) == pytest.approx(fitted[i], rel=1e-6)


def test_a_gpu_whose_hosts_nobody_timed_gets_the_mean_over_their_prior(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.load_rows()[::25]
    train = np.array([r.gpu.name == "B200" for r in rows])
    found = bench.served(rows)
    made = bench.fit(rows, found, train)
    cases = made.stack.cases(found)
    rate = sum(weight * found.tokens_per_s / factor for weight, factor, _ in cases)
    watts = sum(weight * made.watts(found, factor, host) for weight, factor, host in cases)
    plain = found.tokens_per_s / made.stack.factor(found)
    assert sum(weight for weight, _, _ in cases) == pytest.approx(1)
    assert rate[train] == pytest.approx(plain[train])
    # A slow host costs more than a fast one can save.
    assert (rate[~train] < plain[~train]).all()
    without = _only_b200(made.document)
    monkeypatch.setattr("pertoken.perf.tasks._fit", lambda: shipped() | without)
    monkeypatch.setattr("pertoken.perf.power._fit", lambda: shipped() | without)
    for i in np.flatnonzero(~train).tolist():
        own = predict_task(rows[i].model, rows[i].gpu, rows[i].point, rows[i].task)
        assert float(own.tokens_per_s.value) == pytest.approx(rate[i], rel=1e-6)
        assert float(own.gpu_power_w.value) == pytest.approx(watts[i], rel=1e-6)


def _only_b200(document: dict[str, Any]) -> dict[str, Any]:
    """A fit of B200's rows as a file holds it: no key names the other GPU."""
    task = document["task"] | {"spread": shipped()["task"]["spread"]}
    task["effects"] = {
        term: {key: value for key, value in by_key.items() if not key.startswith("H100")}
        for term, by_key in task["effects"].items()
    }
    return document | {"task": task}


def test_curves_and_scales_come_from_the_rows_they_are_fitted_to_alone(bench: Any) -> None:
    rows = bench.load_rows()[::3]
    found = bench.served(rows)
    train = np.array([r.gpu.name == "H100-SXM" for r in rows])
    made = bench.fit(rows, found, train)
    other = [replace(r, power_w=0.9 * r.power_w, tokens_per_s=2 * r.tokens_per_s) if not t else r
             for r, t in zip(rows, train, strict=True)]  # fmt: skip
    again = bench.fit(other, found, train)
    assert again.document["weights"] == made.document["weights"]
    assert again.document["curves"] == made.document["curves"]
    assert again.document["task"] == made.document["task"]
    assert {key.split("|")[0] for key in made.document["curves"]} == {"H100-SXM"}
