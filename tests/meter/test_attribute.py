"""GPU-hours and kWh are conserved to the digit, and land where the work was."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken import catalog
from pertoken.errors import InputError, NoEvidenceError
from pertoken.ledger import open_ledger
from pertoken.meter import Attribution, State, attribute, concat, prometheus, records, totals
from pertoken.meter._split import MICRO, explained, quantised, split
from pertoken.meter.attribute import FINDINGS, Predictor, Served, Work
from pertoken.meter.files import api_pools
from pertoken.scenario import Fleet
from pertoken.tables import USAGE, rate_rows
from pertoken.units import IDLE

HOUR = datetime(2026, 11, 24, 7, tzinfo=UTC)
OWNED = {"term": "owned", "usd_per_gpu": 25_000.0}
RENTED = {"term": "on_demand", "usd_per_gpu_hour": 2.0}
SITE = {"timezone": "UTC", "pue": 1.25, "tariff": {"usd_per_kwh": 0.1}}


def fleet(**pools: dict[str, Any]) -> Fleet:
    made = {name: {"gpu": "H100-SXM", "site": "s", "price": OWNED, **pool} for name, pool in pools.items()}
    return Fleet.model_validate({"sites": {"s": SITE}, "pools": made})


ONE = fleet(h100={"count": 8})
_API_PRICE = {
    "term": "api",
    "provider": "p",
    "model": "gpt-x",
    "input_usd_per_mtok": 1.0,
    "output_usd_per_mtok": 4.0,
}
API = Fleet.model_validate({"pools": {"gpt": {"price": _API_PRICE}}})


def told(source: str, *counts: tuple[str, float], model: str = "m", tenant: str = "", pool: str = "h100",
         hour: datetime = HOUR, phase: str | None = None, key: str = "k") -> pa.Table:  # fmt: skip
    columns: dict[str, Any] = {
        "ts": [hour.timestamp() + 5.0] * len(counts),
        "source": source,
        "key": key,
        "pool": pool,
        "model": model,
        "tenant": tenant,
        "meter": [meter for meter, _ in counts],
        "quantity": [quantity for _, quantity in counts],
    }
    if phase is not None:
        columns["phase"] = phase
    return records(columns, len(counts))


def run(*tables: pa.Table, of: Fleet = ONE, predictor: Predictor | None = None) -> Attribution:
    return attribute(totals(concat(tables)), of, [HOUR], predictor)


def by(usage: pa.Table, meter: str, *names: str) -> dict[Any, float]:
    found: dict[Any, Decimal] = defaultdict(Decimal)
    for row in usage.to_pylist():
        if row["meter"] == meter:
            key = tuple(row[n] for n in names)
            found[key[0] if len(names) == 1 else key] += row["quantity"]
    return {k: float(v) for k, v in found.items()}


def total(usage: pa.Table, meter: str, pool: str = "h100") -> Decimal:
    return sum(
        (r["quantity"] for r in usage.to_pylist() if r["meter"] == meter and r["pool"] == pool), Decimal()
    )


ENGINE = (
    ("seen_seconds", 3600.0), ("running_seconds", 1800.0), ("prompt_tokens", 1000.0), ("output_tokens", 500.0),
    ("cached_input_tokens", 200.0), ("requests", 10.0), ("prefill_seconds", 900.0), ("decode_seconds", 2700.0),
)  # fmt: skip


def test_an_hour_by_hand() -> None:
    """8 GPUs, half the hour busy, a quarter of the busy time prefill: 4 idle, 1 prefill, 3 decode."""
    usage = run(told("engine/a", *ENGINE)).usage
    assert usage.schema == USAGE
    assert by(usage, "gpu_hours", "phase") == {"idle": 4, "input": 1, "output": 3}
    assert by(usage, "gpu_hours", "tenant", "phase")["(idle)", "idle"] == 4
    assert by(usage, "input_tokens", "phase") == {"input": 800}
    assert by(usage, "cached_input_tokens", "phase") == {"input": 200}
    assert by(usage, "output_tokens", "phase") == {"output": 500}
    assert by(usage, "requests", "model") == {"m": 10}
    assert set(usage.column("basis").to_pylist()) == {"measured", "measured:engine_seconds"}
    assert set(usage.column("book").to_pylist()) == {"actual"}


def test_tenants_share_phases_by_their_tokens() -> None:
    usage = run(
        told("engine/a", *ENGINE),
        told("usage/x", ("input_tokens", 600.0), ("output_tokens", 100.0), tenant="blue"),
        told("usage/x", ("input_tokens", 200.0), ("output_tokens", 300.0), tenant="red", key="2"),
    ).usage
    # 800 computed prompt tokens: blue 600, red 200. 500 output: blue 100, red 300, 100 nobody claimed.
    assert by(usage, "gpu_hours", "tenant", "phase") == {
        ("(idle)", "idle"): 4, ("blue", "input"): 0.75, ("red", "input"): 0.25,
        ("blue", "output"): 0.6, ("red", "output"): 1.8, ("", "output"): 0.6,
    }  # fmt: skip
    assert by(usage, "output_tokens", "tenant") == {"blue": 100, "red": 300, "": 100}


def test_usage_beyond_the_engines_count_is_scaled_down_and_reported() -> None:
    done = run(told("engine/a", *ENGINE), told("usage/x", ("output_tokens", 1000.0), tenant="blue"))
    assert by(done.usage, "output_tokens", "tenant") == {"blue": 500}
    (finding,) = [f for f in done.findings if f.kind == "disagree"]
    assert finding.amount == 500
    assert finding.kind in FINDINGS


def test_a_second_counter_is_a_check_and_no_second_posting() -> None:
    gateway = told("gateway/router", ("prompt_tokens", 1000.0), ("output_tokens", 700.0))
    done = run(told("engine/a", *ENGINE), gateway)
    assert by(done.usage, "output_tokens", "model") == {"m": 500}
    assert [f.amount for f in done.findings if f.kind == "disagree"] == [200]


def test_cached_tokens_only_the_gateway_knows_are_taken_out_of_the_prompt() -> None:
    plain = [c for c in ENGINE if c[0] != "cached_input_tokens"]
    usage = run(
        told("engine/a", *plain),
        told("usage/x", ("input_tokens", 300.0), ("cached_input_tokens", 700.0), tenant="blue"),
    ).usage
    assert by(usage, "input_tokens", "tenant") == {"blue": 300}
    assert by(usage, "cached_input_tokens", "tenant") == {"blue": 700}


def test_two_instances_share_a_pool_and_a_stated_share_holds() -> None:
    idle = told("engine/b", ("seen_seconds", 3600.0), ("held_gpus", 2 * 3600.0), ("running_seconds", 0.0))
    usage = run(told("engine/a", *ENGINE), idle).usage
    # b states 2 GPUs, a has the other 6: half busy.
    assert by(usage, "gpu_hours", "phase") == {"idle": 5, "input": 0.75, "output": 2.25}


def test_mig_slices_share_one_gpu_by_their_size() -> None:
    of = fleet(h100={"count": 1, "gpus_per_machine": 1})
    small = [(m, q) for m, q in ENGINE if m != "running_seconds"]
    usage = run(
        told("engine/a", *small, ("held_gpus", 3600 * 3 / 7), ("running_seconds", 3600.0), model="a"),
        told("engine/b", *small, ("held_gpus", 3600 * 2 / 7), ("running_seconds", 3600.0), model="b"),
        of=of,
    ).usage
    assert by(usage, "gpu_hours", "model") == pytest.approx({"a": 3 / 7, "b": 2 / 7, "": 2 / 7}, abs=1e-6)
    assert total(usage, "gpu_hours") == 1


def test_a_gap_is_idle_of_unknown_kind_and_reported() -> None:
    counts = [("seen_seconds", 1800.0), ("gap_seconds", 1800.0), *ENGINE[2:], ("running_seconds", 1800.0)]
    done = run(told("engine/a", *counts))
    assert by(done.usage, "gpu_hours", "phase", "basis")["idle", "assumed:unseen"] == 4
    assert by(done.usage, "gpu_hours", "phase")["output"] == 3
    assert [(f.kind, f.amount) for f in done.findings if f.kind == "gap"] == [("gap", 1800)]


def test_what_a_silent_engine_counts_later_is_not_booked_by_events_too() -> None:
    """Three hours: heard, silent, heard again. The engine's count over the silence is split by time, and events say
    whose each hour's is: tokens count once, the tenant keeps its own, what the GPU-hours were used for nobody knows."""
    target, state, tables = prometheus.Target("a", "h100", model="m"), State(0.0), []
    text = "process_start_time_seconds 5\nvllm:prompt_tokens_total {0}\nvllm:generation_tokens_total {0}\n"
    start = HOUR.timestamp()
    for minute, count in ((-1, 0), *((m, m) for m in range(1, 58)), *((m, 2 * m) for m in range(125, 180))):
        table, state = prometheus.read(text.format(count), target, state, now_s=start + 60 * minute)
        tables.append(table)
    hours = [HOUR + timedelta(hours=n) for n in range(3)]
    tables += [
        told(
            "usage/x",
            ("output_tokens", 80.0),
            ("input_tokens", 80.0),
            ("requests", 1.0),
            tenant="blue",
            hour=h,
        )
        for h in hours[:2]
    ]
    found = attribute(totals(concat(tables)), ONE, hours)
    tokens = by(found.usage, "output_tokens", "hour", "tenant")
    assert tokens == {(hours[0], "blue"): 66, (hours[1], "blue"): 80, (hours[1], ""): 90, (hours[2], ""): 122}
    assert sum(tokens.values()) == 2 * 179
    assert by(found.usage, "input_tokens", "hour") == by(found.usage, "output_tokens", "hour")
    silent = [r for r in found.usage.to_pylist() if r["hour"] == hours[1] and r["meter"] == "gpu_hours"]
    assert [(r["tenant"], r["phase"], r["basis"]) for r in silent] == [(IDLE, "idle", "assumed:unseen")]
    assert [f.kind for f in found.findings if f.hour == hours[1]] == ["gap", "no_energy"]


def test_a_silent_engine_that_ran_on_keeps_its_share_of_an_owned_pool() -> None:
    """Neither engine says its GPUs: the one that was silent shares in them, its neighbour is not booked all of them."""
    silent = told("engine/a", ("gap_seconds", 3600.0), ("held_unseen", 0.0), model="")
    busy = told(
        "engine/b",
        ("seen_seconds", 3600.0),
        ("running_seconds", 3600.0),
        ("output_tokens", 10.0),
        ("requests", 1.0),
    )
    pool = fleet(h100={"count": 8})
    found = attribute(totals(concat([silent, busy])), pool, [HOUR])
    assert by(found.usage, "gpu_hours", "tenant") == {IDLE: 4, "": 4}
    bill = told("bill/b", ("gpu_hours", 8.0), tenant="red")
    found = attribute(totals(concat([silent, bill])), pool, [HOUR])
    assert by(found.usage, "gpu_hours", "tenant") == {"red": 8}


@pytest.mark.parametrize(("fell", "held"), [(False, [1, 1, 1]), (True, [0.5, 0, 0.5])])
def test_energy_of_boards_stands_in_every_hour_of_a_silence(fell: bool, held: list[float]) -> None:
    """A rented board whose counter ran on was held; where it fell nobody knows: what was measured stands."""
    target, state, tables = prometheus.Target("d", "h100"), State(0.0), []
    start = HOUR.timestamp()
    text = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0",UUID="A"}} {}\n'
    for minute in (*range(31), *range(150, 181)):
        since = minute - 100 if fell and minute > 30 else minute + 1000
        table, state = prometheus.read(
            text.format(since * 6e6), target, state, now_s=start + 60 * minute - 0.001
        )
        tables.append(table)
    hours = [HOUR + timedelta(hours=n) for n in range(3)]
    found = attribute(totals(concat(tables)), fleet(h100={"price": RENTED}), hours)
    gpu_hours = by(found.usage, "gpu_hours", "hour")
    assert [float(gpu_hours.get(h, 0)) for h in hours] == pytest.approx(held, abs=1e-3)
    energy = by(found.usage, "gpu_energy_kwh", "hour")
    assert sum(energy.values()) == pytest.approx((110 if fell else 180) * 6e-3 / 3.6, abs=2e-6)
    assert all(energy[h] > 0 for h in hours)
    texts = [f.text for f in found.findings if f.kind == "no_gpu_hours"]
    assert len(texts) == fell
    assert all("kWh were metered in an hour in which nothing" in t for t in texts)


@pytest.mark.parametrize(("began", "held"), [(5.0, (1, 1, 1)), (7000.0, (0.5, 0, 0.5)), (0.0, (0.5, 0, 0.5))])
def test_a_rented_engine_that_ran_through_a_silence_held_its_gpus(
    began: float, held: tuple[float, ...]
) -> None:
    """Heard for half an hour, silent for two, heard again: whether it ran meanwhile its start time says, or nobody."""
    target, state, tables = prometheus.Target("a", "h100", model="m", gpus=1.0), State(0.0), []
    start = HOUR.timestamp()
    for minute in (*range(31), *range(150, 181)):
        first = start + (began if minute > 30 and began > 10 else -60)
        told_start = f"process_start_time_seconds {first}\n" if began else ""
        text = f"{told_start}vllm:generation_tokens_total {minute + 1}\nvllm:num_requests_running 1\n"
        table, state = prometheus.read(text, target, state, now_s=start + 60 * minute - 0.001)
        tables.append(table)
    hours = [HOUR + timedelta(hours=n) for n in range(3)]
    rented = fleet(h100={"price": RENTED})
    found = attribute(totals(concat(tables)), rented, hours)
    sums = by(found.usage, "gpu_hours", "hour")
    assert tuple(sums.get(hour, 0.0) for hour in hours) == pytest.approx(held, abs=1e-5)
    unseen = {r["quantity"] for r in found.usage.to_pylist() if r["basis"] == "assumed:unseen"}
    assert bool(unseen) == (began == 5.0)


def test_an_engine_that_began_anew_in_a_silence_counts_nothing_of_before() -> None:
    """Its first process took its count with it: what events tell of the silent hour is all that is known of it."""
    target, state, tables = prometheus.Target("a", "h100", model="m"), State(0.0), []
    start = HOUR.timestamp()
    for minute, count, began in ((1, 0, 5.0), (2, 40, 5.0), (125, 7, start + 7300)):
        text = f"process_start_time_seconds {began}\nvllm:generation_tokens_total {count}\n"
        table, state = prometheus.read(text, target, state, now_s=start + 60 * minute)
        tables.append(table)
    hours = [HOUR + timedelta(hours=n) for n in range(3)]
    tables.append(told("usage/x", ("output_tokens", 80.0), tenant="blue", hour=hours[1]))
    found = attribute(totals(concat(tables)), ONE, hours)
    assert by(found.usage, "output_tokens", "hour", "tenant") == {
        (hours[0], ""): 40, (hours[1], "blue"): 80, (hours[2], ""): 7,
    }  # fmt: skip


def test_what_an_idle_engine_has_no_counter_for_is_booked_from_events() -> None:
    """Requests and cached tokens that it never counts; cached ones not where it counted no prompts at all."""
    idle = told("engine/a", ("seen_seconds", 3600.0), ("output_tokens", 0.0))
    event = told("usage/x", ("cached_input_tokens", 3.0), ("requests", 1.0), tenant="blue")
    found = run(idle, event)
    assert by(found.usage, "requests", "tenant") == {"blue": 1}
    assert by(found.usage, "cached_input_tokens", "tenant") == {"blue": 3}
    found = run(idle, told("engine/a", ("prompt_tokens", 0.0)), event)
    assert by(found.usage, "requests", "tenant") == {"blue": 1}
    assert not by(found.usage, "cached_input_tokens", "tenant")
    texts = [f.text for f in found.findings if f.kind == "disagree"]
    assert texts == ["usage events tell 3 more cached_input_tokens of 'm' than the engine prompts"]


@pytest.mark.parametrize(("engine_of", "cached"), [("", {"blue": 60, "red": 40}), ("blue", {"blue": 100})])
def test_no_more_prompt_tokens_are_booked_than_were_counted(engine_of: str, cached: dict[str, int]) -> None:
    """Events tell more cached tokens than the engine prompts: theirs are scaled down, and it is found."""
    engine = told(
        "engine/a",
        ("seen_seconds", 3600.0),
        ("prompt_tokens", 100.0),
        ("output_tokens", 1.0),
        tenant=engine_of,
    )
    events = [
        told("usage/x", ("input_tokens", 7.0), ("cached_input_tokens", n), tenant=tenant)
        for tenant, n in (("blue", 180.0), ("red", 120.0))
    ]
    found = run(engine, *events)
    assert by(found.usage, "cached_input_tokens", "tenant") == cached
    assert not by(found.usage, "input_tokens", "tenant")
    assert sum(f.amount for f in found.findings if "cached_input_tokens" in f.text) == 200
    if not engine_of:
        assert any("14 more input_tokens" in f.text for f in found.findings)


def test_an_engine_that_counts_none_is_believed() -> None:
    """An event at the edge of an hour whose engine counted it in the next one is not booked twice."""
    idle = told(
        "engine/a",
        ("seen_seconds", 3600.0),
        ("running_seconds", 0.0),
        ("output_tokens", 0.0),
        ("requests", 0.0),
    )
    event = told("usage/x", ("input_tokens", 3.0), ("output_tokens", 9.0), ("requests", 1.0), tenant="blue")
    found = run(idle, event)
    assert {r["meter"] for r in found.usage.to_pylist()} == {"gpu_hours"}
    assert [f.amount for f in found.findings if f.kind == "disagree"] == [3, 9, 1]
    nameless = told("usage/x", ("output_tokens", 9.0), model="")
    assert [f.kind for f in run(idle, nameless).findings] == ["unmatched", "no_energy"]
    # One without a counter of tokens leaves them to who has one.
    assert by(run(told("engine/a", ("seen_seconds", 3600.0)), event).usage, "output_tokens", "tenant") == {
        "blue": 9
    }


def test_a_pool_nobody_watches_is_held_all_the_same() -> None:
    done = run()
    assert by(done.usage, "gpu_hours", "phase", "basis", "tenant") == {
        ("idle", "assumed:unseen", "(idle)"): 8
    }
    assert [f.kind for f in done.findings] == ["no_energy"]


def test_a_pool_known_by_its_usage_alone_is_spent_on_it() -> None:
    usage = told("usage/x", ("input_tokens", 300.0), ("output_tokens", 100.0), tenant="blue")
    done = run(usage)
    assert by(done.usage, "gpu_hours", "tenant", "phase", "basis") == {
        ("blue", "input", "assumed:tokens"): 6,
        ("blue", "output", "assumed:tokens"): 2,
    }
    seen = told("device/d", ("gpu_seen_seconds", 8 * 3600.0), ("active_seconds", 2 * 3600.0), model="")
    done = run(usage, seen, predictor=lambda served: Work(1.0, 1.0, "fitted"))
    assert by(done.usage, "gpu_hours", "phase") == {"idle": 6, "input": 1, "output": 1}


def test_rejected_drafts_preemptions_and_aborts_are_waste() -> None:
    base = {**dict(ENGINE), "running_seconds": 3600.0}
    drafts = run(
        told("engine/a", *base.items(), ("drafted_tokens", 1000.0), ("accepted_draft_tokens", 500.0))
    ).usage
    assert by(drafts, "gpu_hours", "phase") == {"input": 2, "output": 3, "waste": 3}
    aborted = run(told("engine/a", *base.items(), ("aborted_requests", 10.0))).usage
    assert by(aborted, "gpu_hours", "phase") == {"input": 1, "output": 3, "waste": 4}
    preempted = run(told("engine/a", *base.items(), ("preemptions", 10.0))).usage
    # ten times a mean request of 80 computed and 25 generated tokens: 1,050 again beside 800
    assert by(preempted, "gpu_hours", "phase")["waste"] == pytest.approx(2 * 1050 / 1850, abs=1e-6)


def test_without_engine_seconds_a_predictor_splits_and_is_named() -> None:
    counts = [c for c in ENGINE if "fill" not in c[0] and "decode" not in c[0]]
    asked: list[Served] = []

    def predictor(served: Served) -> Work:
        asked.append(served)
        return Work(10.0, 30.0, "roofline")

    usage = run(told("engine/a", *counts), predictor=predictor).usage
    assert by(usage, "gpu_hours", "phase", "basis")["input", "roofline:predicted_work"] == 1
    assert asked == [Served("H100-SXM", "vllm", "m", 800.0, 200.0, 500.0, 10.0)]

    guessed = run(told("engine/a", *counts), predictor=lambda served: Work(10.0, 30.0, "assumed"))
    assert by(guessed.usage, "gpu_hours", "phase", "basis")["input", "assumed:predicted_work"] == 1
    assert "assumed_phase" in [f.kind for f in guessed.findings]

    def ignorant(served: Served) -> Work:
        raise NoEvidenceError("no such model")

    done = run(told("engine/a", *counts), predictor=ignorant)
    assert by(done.usage, "gpu_hours", "phase", "basis")["output", "assumed:tokens"] == pytest.approx(
        4 * 500 / 1300
    )
    assert "assumed_phase" in [f.kind for f in done.findings]


def test_the_roofline_predicts_an_engine_that_tells_nothing() -> None:
    from pertoken.meter._work import predicted_work

    work = predicted_work(Served("H100-SXM", "vllm", "llama-3.1-8b", 4e5, 1e5, 1e5, 500.0))
    assert work.prefill_s > 0
    assert work.decode_s > work.prefill_s
    with pytest.raises(NoEvidenceError):
        predicted_work(Served("H100-SXM", "vllm", "llama-3.1-8b", 4e5, 1e5, 0.0, 500.0))


def test_requests_too_short_for_the_readings_still_cost_something() -> None:
    counts = {**dict(ENGINE), "running_seconds": 0.0, "prefill_seconds": 9.0, "decode_seconds": 27.0}
    usage = run(told("engine/a", *counts.items())).usage
    assert by(usage, "gpu_hours", "phase") == {"idle": 7.92, "input": 0.02, "output": 0.06}


def test_energy_is_boards_plus_host_times_pue_and_idle_takes_its_idle_power() -> None:
    card = catalog.gpu("H100-SXM")
    usage = run(told("engine/a", *ENGINE), told("device/d", ("gpu_energy_kwh", 4.0), model="")).usage
    host_w = card.host_idle_w + (card.host_busy_w - card.host_idle_w) * 0.5
    plug = 4.0 + 8 * host_w / 1000
    assert float(total(usage, "gpu_energy_kwh")) == 4.0
    assert float(total(usage, "it_energy_kwh")) == pytest.approx(plug, abs=1e-6)
    assert float(total(usage, "energy_kwh")) == pytest.approx(plug * 1.25, abs=1e-6)
    assert by(usage, "gpu_energy_kwh", "phase")["idle"] == pytest.approx(4 * card.idle_w / 1000, abs=1e-6)
    assert by(usage, "energy_kwh", "phase", "basis").keys() == {
        (phase, "measured:gpu+host×pue") for phase in ("idle", "input", "output")
    }
    busy = by(usage, "gpu_energy_kwh", "phase")
    assert busy["output"] == pytest.approx(3 * busy["input"], abs=2e-6)


def test_energy_of_boards_nobody_read_is_told_as_missing() -> None:
    boards = (("gpu_energy_kwh", 4.0), ("gpu_seen_seconds", 4 * 3600.0))
    (finding,) = (
        f for f in run(told("engine/a", *ENGINE), told("device/d", *boards, model="")).findings
        if f.kind == "no_energy"
    )  # fmt: skip
    assert finding.text.startswith("boards were read in 4.000 of 8.000 GPU·h")
    assert finding.amount == 4
    for more in (
        told("device/e", ("gpu_seen_seconds", 3.8 * 3600.0), model=""),  # nearly all
        told("node/k", ("it_energy_kwh", 6.0), model=""),  # the machine was read whole
        told("device/e", ("gap_seconds", 1800.0), model=""),  # a silence, told as such
    ):
        found = run(told("engine/a", *ENGINE), told("device/d", *boards, model=""), more).findings
        assert "no_energy" not in [f.kind for f in found]


def test_a_whole_node_and_its_boards_are_the_same_joules() -> None:
    tables = [
        told("engine/a", *ENGINE),
        told("device/d", ("gpu_energy_kwh", 4.0), model=""),
        told("node/k", ("it_energy_kwh", 6.0), model=""),
    ]
    usage = run(*tables).usage
    assert total(usage, "it_energy_kwh") == 6
    assert total(usage, "energy_kwh") == Decimal("7.5")
    metered = run(*tables, told("site/m", ("energy_kwh", 8.0), model="")).usage
    assert total(metered, "energy_kwh") == 8
    assert total(metered, "it_energy_kwh") == 6


def test_rented_pools_hold_what_was_seen_billed_or_claimed() -> None:
    rented = fleet(h100={"count": 16, "price": RENTED})
    assert total(run(told("device/d", ("gpu_seen_seconds", 4 * 3600.0)), of=rented).usage, "gpu_hours") == 4
    claimed = run(told("engine/a", *ENGINE, ("held_gpus", 7200.0)), of=rented).usage
    assert by(claimed, "gpu_hours", "phase") == {"idle": 1, "input": 0.25, "output": 0.75}
    billed = told("bill/opencost", ("gpu_hours", 3.0), model="", tenant="blue", phase="idle")
    assert by(run(billed, of=rented).usage, "gpu_hours", "tenant", "basis") == {("blue", "assumed:unseen"): 3}
    nothing = run(told("engine/a", *ENGINE), of=rented)
    assert total(nothing.usage, "gpu_hours") == 0
    assert [f.kind for f in nothing.findings] == ["no_gpu_hours"]


def test_claims_beyond_the_pool_are_scaled_down_and_reported() -> None:
    done = run(told("engine/a", *ENGINE, ("held_gpus", 16 * 3600.0)))
    assert by(done.usage, "gpu_hours", "phase") == {"idle": 4, "input": 1, "output": 3}
    assert "overcommitted" in [f.kind for f in done.findings]


def test_training_claims_its_hours_and_lost_steps_are_waste() -> None:
    usage = run(
        told("training/r", ("training_tokens", 900.0), ("gpu_hours", 3.0), phase="training"),
        told("training/r", ("lost_training_tokens", 100.0), ("gpu_hours", 1.0), phase="waste"),
    ).usage
    assert by(usage, "gpu_hours", "phase") == {"training": 3, "waste": 1, "idle": 4}
    assert by(usage, "training_tokens", "phase") == {"training": 900}
    assert by(usage, "lost_training_tokens", "phase") == {"waste": 100}


def test_a_routers_usage_finds_the_pools_that_serve_its_model() -> None:
    of = fleet(h100={"count": 8}, other={"count": 8})
    usage = run(
        told("engine/a", *ENGINE),
        told(
            "engine/b",
            *[(m, q * 3) for m, q in ENGINE if m.endswith("tokens")],
            ("seen_seconds", 3600.0),
            pool="other",
        ),
        told("usage/x", ("output_tokens", 1000.0), tenant="blue", pool=""),
        of=of,
    ).usage
    assert by(usage, "output_tokens", "pool", "tenant") == {
        ("h100", "blue"): 250, ("h100", ""): 250, ("other", "blue"): 750, ("other", ""): 750,
    }  # fmt: skip
    lost = run(told("usage/x", ("output_tokens", 7.0), model="gone", pool=""), of=of)
    assert [f.kind for f in lost.findings if f.kind == "unmatched"] == ["unmatched"]


@pytest.mark.parametrize(
    ("engine", "event"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b-instruct"),  # case, maker
        ("tiny", "hosted_vllm/Tiny"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3:70b"),  # a variant the catalogue knows
        ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "Llama-3.3-70B"),  # the one there is
    ],
)
def test_events_of_a_model_under_another_name_are_of_that_model(engine: str, event: str) -> None:
    """The tenant gets its tokens and its GPU-hours, under the engine's name; also where the event knew no pool."""
    for pool in ("h100", ""):
        found = run(
            told("engine/a", *ENGINE, model=engine),
            told(
                "usage/x",
                ("input_tokens", 800.0),
                ("output_tokens", 500.0),
                model=event,
                tenant="blue",
                pool=pool,
            ),
        )
        assert by(found.usage, "output_tokens", "model", "tenant") == {(engine, "blue"): 500}
        assert by(found.usage, "gpu_hours", "tenant") == {"blue": 4, "(idle)": 4}
        assert [f.kind for f in found.findings] == ["no_energy"]


def test_a_name_that_might_be_two_models_is_left_and_told() -> None:
    served = ("nvidia/Llama-3.3-70B-Instruct-FP8", "nvidia/Llama-3.3-70B-Instruct-FP4")
    found = run(
        *(told("engine/a", *ENGINE, model=model, key=model) for model in served),
        told("usage/x", ("output_tokens", 100.0), model="llama-3.3-70b", tenant="blue"),
    )
    assert by(found.usage, "output_tokens", "tenant") == {"": 1000}
    assert [(f.kind, f.amount) for f in found.findings if f.kind != "no_energy"] == [("unmatched", 100.0)]


def test_engines_that_name_one_model_differently_are_told() -> None:
    found = run(
        told("engine/a", *ENGINE, model="meta-llama/Llama-3.3-70B-Instruct"),
        told("engine/b", *ENGINE, model="llama-3.3-70b"),
    )
    (finding,) = (f for f in found.findings if f.kind == "two_names")
    assert finding.text == (
        "'llama-3.3-70b' and 'meta-llama/Llama-3.3-70B-Instruct' may be one model: "
        "if they are, give their sources `names` that make them one"
    )


def test_a_flood_of_model_names_is_looked_up_in_part() -> None:
    events = [told("usage/x", ("requests", 1.0), model=f"no such model {i}", key=str(i)) for i in range(300)]
    found = run(told("engine/a", *ENGINE), *events)
    assert by(found.usage, "output_tokens", "model") == {"m": 500}


def test_an_api_pool_has_tokens_and_no_hours() -> None:
    counts = (
        ("input_tokens", 70.0),
        ("cached_input_tokens", 30.0),
        ("output_tokens", 9.0),
        ("requests", 1.0),
    )
    for pool in ("gpt", ""):
        usage = run(told("usage/x", *counts, model="gpt-x", tenant="blue", pool=pool), of=API).usage
        assert by(usage, "output_tokens", "pool", "tenant") == {("gpt", "blue"): 9}
        assert by(usage, "input_tokens", "tenant") == {"blue": 70}
        assert total(usage, "gpu_hours", "gpt") == 0


def test_api_calls_find_their_pools() -> None:
    assert api_pools(API) == {("p", "gpt-x"): "gpt"}
    assert api_pools(ONE) == {}


def test_another_models_calls_in_an_api_pool_are_reported() -> None:
    done = run(told("usage/x", ("output_tokens", 9.0), model="dearer", pool="gpt"), of=API)
    assert [f.kind for f in done.findings] == ["unmatched"]


def test_records_of_strange_pools_and_hours_without_zone() -> None:
    done = run(told("engine/a", *ENGINE, pool="h10"))
    assert "unknown_pool" in [f.kind for f in done.findings]
    with pytest.raises(InputError, match="time zone"):
        attribute(totals(concat([])), ONE, [HOUR.replace(tzinfo=None)])
    with pytest.raises(InputError, match="columns"):
        attribute(pa.table({"a": [1]}), ONE, [HOUR])


def test_the_ledger_closes_what_is_attributed() -> None:
    hours = [HOUR, HOUR + timedelta(hours=1)]
    tables = [told("engine/a", *ENGINE, hour=h) for h in hours]
    ledger = open_ledger()
    ledger.add_usage(attribute(totals(concat(tables)), ONE, hours).usage)
    import numpy as np

    stamps = np.array([h.replace(tzinfo=None) for h in hours], "datetime64[h]")
    ledger.add_rates(
        rate_rows(
            stamps, 2.0, pool="h100", meter="gpu_hours", component="capital", basis="assumed", source="test"
        )
    )
    ledger.close()
    costs = {r["phase"]: float(r["cost_usd"]) for r in ledger.cost("phase").to_pylist()}
    assert costs == {"idle": 16.0, "input": 4.0, "output": 12.0}


_METERS = st.sampled_from([m for m, _ in ENGINE] + [
    "held_gpus", "preemptions", "aborted_requests", "drafted_tokens", "accepted_draft_tokens", "input_tokens",
    "gap_seconds", "active_seconds", "gpu_seen_seconds",
])  # fmt: skip
_ROWS = st.lists(
    st.tuples(
        st.sampled_from(["engine/a", "engine/b", "usage/x", "gateway/g", "device/d"]),
        _METERS,
        st.floats(0, 1e5, allow_nan=False),
        st.sampled_from(["m", "n", ""]),
        st.sampled_from(["", "blue", "red"]),
    ),
    max_size=25,
)


@settings(max_examples=80)
@given(_ROWS, st.floats(0, 1e4), st.floats(0, 1e4))
def test_whatever_is_recorded_the_hour_is_conserved_to_the_digit(
    rows: list[tuple[str, str, float, str, str]], board: float, node: float
) -> None:
    board, node = round(board, 3), round(node, 3)
    tables = [
        told(source, (meter, quantity), model=model, tenant=tenant, key=str(i))
        for i, (source, meter, quantity, model, tenant) in enumerate(rows)
    ]
    energy = [
        told("device/d", ("gpu_energy_kwh", board), key="e"), told("node/k", ("it_energy_kwh", node), key="e")
    ]  # fmt: skip
    done = run(*tables, *energy)
    assert total(done.usage, "gpu_hours") == 8
    near = Decimal("0.000001")  # PUE times a reading may fall on the edge of a digit
    assert total(done.usage, "gpu_energy_kwh") == Decimal(quantised(board)) / MICRO
    if node:
        assert total(done.usage, "it_energy_kwh") == Decimal(quantised(node)) / MICRO
        assert abs(total(done.usage, "energy_kwh") - Decimal(quantised(node * 1.25)) / MICRO) <= near
    for meter in ("input_tokens", "cached_input_tokens", "output_tokens", "requests"):
        assert all(r["quantity"] == int(r["quantity"]) for r in done.usage.to_pylist() if r["meter"] == meter)
    again = run(*reversed(energy), *reversed(tables))
    assert again.usage.equals(done.usage), "the order of arrival does not matter"


@given(
    st.integers(0, 10**15),
    st.dictionaries(st.text(max_size=3), st.floats(1e-9, 1e9), min_size=1, max_size=12),
)
def test_parts_add_up(whole: int, weights: dict[str, float]) -> None:
    parts = split(whole, weights)
    assert sum(parts.values()) == whole
    assert all(value >= 0 for value in parts.values())
    for key, value in parts.items():
        assert abs(value - whole * weights[key] / sum(weights.values())) <= 1 + whole * 1e-12


@given(st.integers(0, 10**9), st.dictionaries(st.text(max_size=3), st.integers(0, 10**9), max_size=6))
def test_what_is_told_explains_at_most_the_total(whole: int, told_of: dict[str, int]) -> None:
    parts, over = explained(whole, told_of, "(rest)", step=1)
    assert sum(parts.values()) == whole
    assert over == sum(told_of.values()) - whole


def test_priced_meters_that_are_not_split_are_booked_as_told() -> None:
    """10 GB out for blue, 720 GB·h stored: rows of their pool, from the first kind that tells each."""
    done = run(
        told("usage/cdn", ("egress_gb", 10.0), tenant="blue"),
        told("usage/disk", ("storage_gb_hours", 720.0), model=""),
        told("gateway/cdn", ("egress_gb", 11.0)),
    )
    assert by(done.usage, "egress_gb", "pool", "model", "tenant") == {("h100", "m", "blue"): 10}
    assert by(done.usage, "storage_gb_hours", "model", "tenant") == {("", ""): 720}
    assert [f.amount for f in done.findings if f.kind == "unused"] == [11]


def test_a_priced_meter_nothing_books_is_found() -> None:
    done = run(
        told("usage/x", ("site_hours", 2.0), ("gpu_hours", 3.0), ("peak_kw", 5.0)),
        told("bill/aws", ("gpu_hours", 8.0)),
        told("usage/x", ("egress_gb", 1.0), pool=""),
    )
    assert total(done.usage, "gpu_hours") == 8
    assert total(done.usage, "site_hours") == 0
    unused = {(f.pool, f.amount) for f in done.findings if f.kind == "unused"}
    assert unused == {("h100", 2), ("h100", 3), ("h100", 5), ("", 1)}


def test_an_api_has_no_gpu_hours_to_bill() -> None:
    done = run(told("bill/x", ("gpu_hours", 8.0), pool="gpt"), of=API)
    assert [(f.kind, f.pool, f.amount) for f in done.findings] == [("unused", "gpt", 8)]


def test_price_steps_hold_in_an_api_pool_and_are_one_meter_elsewhere() -> None:
    counts = ("input_tokens", 100.0), ("input_tokens:above200000", 300_000.0), ("output_tokens", 7.0)
    api = run(told("usage/x", *counts, pool="gpt"), of=API).usage
    assert by(api, "input_tokens", "phase") == {"input": 100}
    assert by(api, "input_tokens:above200000", "phase") == {"input": 300_000}
    assert by(run(told("usage/x", *counts)).usage, "input_tokens", "phase") == {"input": 300_100}
