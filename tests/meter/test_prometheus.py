"""The exposition parser agrees with prometheus_client; counters become quantities, none lost, none
invented."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from pertoken.errors import InputError
from pertoken.meter import _counters
from pertoken.meter._counters import State
from pertoken.meter._exposition import parse
from pertoken.meter._names import NAME_MAP, rules_of
from pertoken.meter.prometheus import Target, read
from pertoken.meter.records import EVIDENCE
from pertoken.units import METERS

ROOT = Path(__file__).parents[2]
AUTHENTIC = ROOT / ".." / "shared" / "data" / "metrics_samples"
OURS = ROOT / "tests" / "samples"
T0 = 1_795_503_600.0  # on the hour
TARGET = Target("a", pool="h100", gpus=2.0)


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    found = parse(text)
    return [(s.name, dict(s.labels), v) for s, v in zip(found.series, found.values, strict=True)]


def reference(text: str) -> list[tuple[str, dict[str, str], float]]:
    return [
        (s.name, dict(s.labels), s.value) for f in text_string_to_metric_families(text) for s in f.samples
    ]


def same(one: list[tuple[str, dict[str, str], float]], two: list[tuple[str, dict[str, str], float]]) -> bool:
    def key(row: tuple[str, dict[str, str], float]) -> tuple[str, str, str]:
        return row[0], str(sorted(row[1].items())), repr(float(row[2]) + 0.0)

    return sorted(map(key, one)) == sorted(map(key, two))


def authentic(name: str) -> str:
    path = AUTHENTIC / name
    if not path.exists():
        pytest.skip(f"no authentic sample at ../shared/data/metrics_samples/{name}")
    return path.read_text()


def sums(table: pa.Table) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for row in table.to_pylist():
        key = (row["meter"], row["model"])
        found[key] = found.get(key, 0.0) + row["quantity"]
    return found


def scrapes(
    *texts: str, target: Target = TARGET, step_s: float = 15.0, start_s: float = T0 + 100
) -> pa.Table:
    """Records of scrapes one after another, watched since long before."""
    state, tables = State(start_s), []
    for number, text in enumerate(texts):
        table, state = read(text, target, State.from_bytes(state.to_bytes()), now_s=start_s + number * step_s)
        tables.append(table)
    return pa.concat_tables(tables)


@pytest.mark.parametrize("name", ["vllm_0.32.0_full.prom", "vllm.prom", "sglang.prom", "dcgm_exporter.prom"])
def test_authentic_samples_parse_as_prometheus_client_does(name: str) -> None:
    text = authentic(name)
    assert same(samples(text), reference(text))
    assert len(samples(text)) > 5


@pytest.mark.parametrize("path", sorted(OURS.glob("*.prom")), ids=lambda p: p.name)
def test_our_samples_parse_as_prometheus_client_does(path: Path) -> None:
    assert same(samples(path.read_text()), reference(path.read_text()))


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


@settings(max_examples=150)
@given(
    st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True), _TEXT, max_size=3),
    st.floats(),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_prometheus_client_writes_is_read_back(
    labels: dict[str, str], gauge: float, seen: float
) -> None:
    labels = {f"l_{k}": v for k, v in labels.items()}
    registry = CollectorRegistry()
    g = Gauge("pt:gauge", "a gauge", list(labels), registry=registry)
    c = Counter("pt_counter", "a counter \\ with\nlines", list(labels), registry=registry)
    h = Histogram("pt_histogram", "a histogram", list(labels), registry=registry)
    (g.labels(**labels) if labels else g).set(gauge)
    (c.labels(**labels) if labels else c).inc(abs(seen))
    (h.labels(**labels) if labels else h).observe(seen)
    text = generate_latest(registry).decode()
    assert same(samples(text), reference(text))
    assert same(samples(text), reference(text)), "the second time from memory"


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=200),
        st.binary(max_size=200),
        st.from_regex(r'[a-c]{1,3}(\{[a-c="\\, ]{0,12}\})? [0-9.eE_ -]{1,8}'),
    )
)
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        found = parse(text)
        assert all(isinstance(s.labels, dict) for s in found.series)
    except InputError:
        return
    assert len(found.series) == len(found.values)


@settings(max_examples=300)
@given(
    st.from_regex(
        r'[a-c_]{1,3}(\{([ab]="[^"\\\n]{0,5}",?){0,3}\})? {1,2}-?[0-9]{1,4}(\.[0-9])?( [0-9]{1,5})?\n',
        fullmatch=True,
    )
)
def test_lines_near_the_grammar_are_read_alike_or_refused_by_us(line: str) -> None:
    try:
        ours = samples(line)
    except InputError:
        return  # we may be stricter, never laxer in what a number is
    assert same(ours, reference(line))


def test_timestamps_exemplars_quoted_names_and_odd_blanks() -> None:
    text = (
        'a{x="1"} 5 1700000000123\n'
        "# HELP a b\n\n"
        '  b { x = "}{ ," , y="\\"q\\\\\\n" , } +Inf  \n'
        "c\t7\n"
        '{"my.name", x="é"} NaN\n'
    )
    found = parse(text)
    assert found.times_s == {0: 1_700_000_000.123}
    assert found.series[1].labels == {"x": "}{ ,", "y": '"q\\\n'}
    assert found.series[3].name == "my.name"
    assert math.isnan(found.values[3])
    openmetrics = '# TYPE f counter\nf_total{a="b"} 3 1.5 # {trace_id="x"} 0.7 1.2\n# EOF\n'
    exact = parse(openmetrics, openmetrics=True)
    families = openmetrics_families(openmetrics)  # type: ignore[no-untyped-call]
    (sample,) = [s for f in families for s in f.samples]
    assert (exact.series[0].labels, exact.values[0], exact.times_s[0]) == (sample.labels, sample.value, 1.5)


@pytest.mark.parametrize(
    "line",
    [
        "a",
        "a b",
        'a{b="c} 1',
        'a{b="c"',
        'a{b="c"d="e"} 1',
        'a{b="1",b="2"} 1',
        "1a 3",
        "a 1_000",
        'a{:b="c"} 1',
    ],
)
def test_what_is_no_exposition_is_named(line: str) -> None:
    with pytest.raises(InputError, match=r"line 2|stands twice"):
        samples(f"ok 1\n{line}\n")


def test_every_name_maps_to_a_meter_we_have() -> None:
    for rules in NAME_MAP.values():
        for rule in rules:
            assert rule.how == "start" or rule.meter in METERS or rule.meter in EVIDENCE


def test_vllm_counts_what_its_client_counted() -> None:
    text = authentic("vllm_0.32.0_full.prom")
    after = text.replace(" 4396.0", " 5396.0").replace(" 2554.0", " 3554.0").replace(" 67.0", " 77.0")
    after = after.replace('reason="abort",model_name="tiny"} 0.0', 'reason="abort",model_name="tiny"} 3.0')
    after = after.replace(
        'cached_total{engine="0",model_name="tiny"} 0.0', 'cached_total{engine="0",model_name="tiny"} 400.0'
    )
    found = sums(scrapes(text, after))
    assert found["prompt_tokens", "tiny"] == 1000
    assert found["cached_input_tokens", "tiny"] == 400
    assert found["output_tokens", "tiny"] == 1000
    assert found["requests", "tiny"] == 10
    assert found["aborted_requests", "tiny"] == 3
    assert found["seen_seconds", ""] == 15
    assert found["held_gpus", ""] == 30


def test_a_process_started_while_we_watched_is_counted_from_its_first_token() -> None:
    text = authentic("vllm_0.32.0_full.prom")  # started at 1795502768
    table, _ = read(text, TARGET, State(1_795_502_000.0), now_s=1_795_502_900.0)
    assert sums(table)["output_tokens", "tiny"] == 4396
    table, _ = read(text, TARGET, State(1_795_502_800.0), now_s=1_795_502_900.0)
    assert ("output_tokens", "tiny") not in sums(table)


def test_dcgm_energy_is_in_millijoules_and_activity_is_a_share() -> None:
    text = authentic("dcgm_exporter.prom")
    after = text.replace("15152422938", "15153446598")  # 1,023,660 mJ in 15 s: 68.244 W
    found = sums(scrapes(text, after))
    assert found["gpu_energy_kwh", ""] == pytest.approx(68.244 * 15 / 3_600_000)
    assert found["active_seconds", ""] == pytest.approx(0.156205 * 15)
    assert found["gpu_seen_seconds", ""] == 15


def test_power_is_integrated_where_there_is_no_energy_counter() -> None:
    text = "\n".join(x for x in authentic("dcgm_exporter.prom").splitlines() if "ENERGY" not in x)
    table = scrapes(text, text.replace("68.244000", "88.244"))
    (row,) = [r for r in table.to_pylist() if r["meter"] == "gpu_energy_kwh"]
    assert row["quantity"] == pytest.approx(78.244 * 15 / 3_600_000)
    assert row["basis"] == "measured:power"


def counter(value: float, name: str = "vllm:generation_tokens_total", extra: str = "") -> str:
    return f'{name}{{model_name="m"}} {value}\n{extra}'


def test_a_counter_that_gains_its_suffix_continues_without_a_jump() -> None:
    table = scrapes(counter(100, "vllm:generation_tokens"), counter(150), counter(170))
    assert sums(table)["output_tokens", "m"] == 70


def test_a_counter_renamed_by_an_upgrade_is_counted_from_the_restart() -> None:
    start = "process_start_time_seconds {}\n"
    old = counter(100, "vllm:request_generation_tokens_sum", start.format(T0))
    new = counter(30, extra=start.format(T0 + 110))
    assert sums(scrapes(old, new))["output_tokens", "m"] == 30


def test_two_names_of_one_quantity_count_once() -> None:
    def text(value: float) -> str:
        return counter(value, "vllm:request_generation_tokens_sum") + counter(value + 7)

    assert sums(scrapes(text(0), text(50)))["output_tokens", "m"] == 50


def test_a_restart_counts_from_zero_and_loses_nothing_after_it() -> None:
    start = "process_start_time_seconds {}\n"
    by_fall = scrapes(counter(1000), counter(1100), counter(40), counter(90))
    assert sums(by_fall)["output_tokens", "m"] == 100 + 40 + 50
    # The counter passed its old value before the next scrape: only the start time tells.
    by_time = scrapes(
        counter(1000, extra=start.format(T0)), counter(1100, extra=start.format(T0)),
        counter(1500, extra=start.format(T0 + 120)),
    )  # fmt: skip
    assert sums(by_time)["output_tokens", "m"] == 100 + 1500


def test_one_fallen_counter_restarts_them_all() -> None:
    def text(output: float, prompt: float) -> str:
        return counter(output) + counter(prompt, "vllm:prompt_tokens_total")

    found = sums(scrapes(text(1000, 10), text(5, 300)))
    assert found["output_tokens", "m"] == 5
    assert found["prompt_tokens", "m"] == 300


def test_growth_over_an_hour_is_split_whole_tokens_staying_whole() -> None:
    table = scrapes(counter(0), counter(101), start_s=T0 - 5.0)
    rows = {r["ts"].hour: r["quantity"] for r in table.to_pylist() if r["meter"] == "output_tokens"}
    assert sorted(rows.values()) == [34, 67]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("grown", "hours"),
    [(900, [225, 450, 225]), (7, [2, 3, 2]), (1, [0, 1, 0]), (2, [0, 1, 1]), (0, [0, 0, 0])],
)
def test_a_silence_is_marked_and_its_growth_split_by_time_to_the_token(grown: int, hours: list[int]) -> None:
    table = scrapes(counter(0), counter(grown), step_s=7200.0, start_s=T0 + 1800)
    rows = table.to_pylist()
    tokens = [r for r in rows if r["meter"] == "output_tokens"]
    assert {r["ts"].hour: r["quantity"] for r in tokens} == dict(zip((7, 8, 9), hours, strict=True))
    assert {r["basis"] for r in tokens} == {"assumed:mean_over_gap"}
    gaps = {r["ts"].hour: r["quantity"] for r in rows if r["meter"] == "gap_seconds"}
    assert gaps == {7: 1800, 8: 3600, 9: 1800}
    assert not [r for r in rows if r["meter"] == "seen_seconds"]


def test_energy_over_a_silence_is_its_mean_power_and_no_peak() -> None:
    """Four hours from half past seven, 4 kWh: one in each, and not all in the last, whose peak would be billed."""
    text = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0",UUID="A"}} {}\n'
    table = scrapes(text.format(1e9), text.format(1e9 + 4 * 3.6e9), step_s=4 * 3600.0, start_s=T0 + 1800)
    found = [r for r in table.to_pylist() if r["meter"] == "gpu_energy_kwh"]
    by_hour = {r["ts"].hour: r["quantity"] for r in found}
    assert by_hour == pytest.approx({7: 0.5, 8: 1, 9: 1, 10: 1, 11: 0.5})
    assert {r["basis"] for r in found} == {"measured:mean_over_gap"}
    assert sum(r["quantity"] for r in table.to_pylist() if r["meter"] == "gap_seconds") == 4 * 3600
    # A counter that fell (a driver was loaded anew) began at a time nobody knows: no peak, but its mean is assumed.
    table = scrapes(text.format(9e12), text.format(3.6e9), step_s=4 * 3600.0, start_s=T0 + 1800)
    found = [r for r in table.to_pylist() if r["meter"] == "gpu_energy_kwh"]
    by_hour = {r["ts"].hour: r["quantity"] for r in found}
    assert by_hour == pytest.approx({7: 0.125, 8: 0.25, 9: 0.25, 10: 0.25, 11: 0.125})
    assert {r["basis"] for r in found} == {"assumed:mean_over_gap"}


def test_an_engine_that_began_anew_in_a_silence_counts_from_its_start() -> None:
    """Its start stands on the page: its tokens are spread from there on, not over the hours it did not run."""
    text = 'process_start_time_seconds {}\nvllm:generation_tokens_total{{model_name="m"}} {}\n'
    started = T0 + 2 * 3600 + 1800
    pages = text.format(T0 - 60, 5000), text.format(started, 600)
    table = scrapes(*pages, step_s=3 * 3600.0, start_s=T0 + 1800)
    found = [r for r in table.to_pylist() if r["meter"] == "output_tokens"]
    assert {r["ts"].hour: r["quantity"] for r in found} == {9: 300, 10: 300}


def test_a_restart_seen_before_a_silence_does_not_say_that_the_process_ran_through_it() -> None:
    """No start on the page, a fallen counter before: an engine that was then stopped for hours held nothing."""
    state, tables = State(T0 - 60), []
    for now_s, value in ((T0, 900), (T0 + 15, 10), (T0 + 30, 20), (T0 + 4 * 3600, 20)):
        table, state = read(counter(value), TARGET, state, now_s=now_s)
        tables.append(table)
    assert state.start_s > T0
    assert not [r for r in pa.concat_tables(tables).to_pylist() if r["meter"] == "held_unseen"]


def test_a_clock_that_steps_back_counts_nothing_twice() -> None:
    state = State(T0)
    total = 0.0
    for now_s, value in ((T0, 0), (T0 + 15, 10), (T0 + 5, 20), (T0 + 14, 25), (T0 + 30, 30)):
        table, state = read(counter(value), TARGET, state, now_s=now_s)
        total += sums(table).get(("output_tokens", "m"), 0.0)
    assert total == 30


def test_a_pod_label_that_changes_makes_no_new_gpu() -> None:
    def text(pod: str, energy: int) -> str:
        return f'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{gpu="0",UUID="GPU-1",pod="{pod}"}} {energy}\n'

    found = sums(scrapes(text("", 10**12), text("a", 10**12 + 3_600_000), text("b", 10**12 + 7_200_000)))
    assert found["gpu_energy_kwh", ""] == pytest.approx(0.002)


def test_a_gpu_shown_once_per_mig_slice_is_counted_once_and_slices_by_their_size() -> None:
    def text(energy: int) -> str:
        lines = ""
        for number, profile in enumerate(("3g.40gb", "2g.20gb")):
            labels = f'gpu="0",UUID="GPU-1",GPU_I_ID="{number}",GPU_I_PROFILE="{profile}"'
            lines += f"DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{labels}}} {energy}\n"
            lines += f"DCGM_FI_PROF_GR_ENGINE_ACTIVE{{{labels}}} 0.5\n"
        return lines

    found = sums(scrapes(text(10**9), text(10**9 + 3_600_000)))
    assert found["gpu_energy_kwh", ""] == pytest.approx(0.001)
    assert found["active_seconds", ""] == pytest.approx(15 * 0.5 * (3 + 2) / 7)
    assert found["gpu_seen_seconds", ""] == 15


def test_watts_in_milliwatts_are_noticed() -> None:
    text = 'gpu_power_usage_watts{gpu="0"} %s\ngpu_power_limit_watts{gpu="0"} 700\n'
    found = sums(scrapes(text % 350_000, text % 350_000))
    assert found["gpu_energy_kwh", ""] == pytest.approx(350 * 15 / 3_600_000)


def test_an_engine_is_busy_while_requests_run() -> None:
    text = 'vllm:num_requests_running{{engine="0"}} {}\nvllm:num_requests_running{{engine="1"}} {}\n'
    found = sums(scrapes(text.format(3, 0), text.format(1, 0), text.format(0, 0)))
    assert found["running_seconds", ""] == pytest.approx((15 + 7.5) / 2)


def test_llama_cpp_counts_computed_prompts_under_the_targets_model() -> None:
    text = (OURS / "llamacpp.prom").read_text()
    target = Target("b", pool="cpu", model="smollm2-135m")
    after = text.replace("prompt_tokens_total 512", "prompt_tokens_total 612")
    after = after.replace("tokens_predicted_total 2048", "tokens_predicted_total 2098")
    found = sums(scrapes(text, after, target=target))
    assert found["input_tokens", "smollm2-135m"] == 100
    assert found["output_tokens", "smollm2-135m"] == 50


@pytest.mark.parametrize(
    ("sample", "kind", "meters"),
    [
        ("tgi.prom", "engine", {"prompt_tokens", "output_tokens", "requests", "prefill_seconds", "decode_seconds"}),
        ("trtllm.prom", "engine", {"prompt_tokens", "cached_input_tokens", "output_tokens", "decode_seconds"}),
        ("dynamo.prom", "gateway", {"prompt_tokens", "output_tokens", "requests"}),
        ("nim.prom", "engine", {"prompt_tokens", "output_tokens", "requests"}),
        ("kepler.prom", "node", {"it_energy_kwh"}),
        ("sglang.prom", "engine", {"prompt_tokens", "output_tokens", "cached_input_tokens", "requests", "preemptions"}),
        ("triton.prom", "device", {"gpu_energy_kwh"}),
        ("vllm.prom", "engine", {"prompt_tokens", "output_tokens", "prefill_seconds", "decode_seconds", "requests",
                                  "preemptions", "drafted_tokens", "accepted_draft_tokens", "aborted_requests"}),
    ],
)  # fmt: skip
def test_each_engine_tells_its_meters(sample: str, kind: str, meters: set[str]) -> None:
    text = (OURS / sample).read_text()

    def grown(line: str) -> str:
        head, _, value = line.rpartition(" ")
        return line if line.startswith("#") or not head else f"{head} {float(value) + 1000}"

    after = "\n".join(map(grown, text.splitlines()))
    table = scrapes(text, after, target=Target("x", pool="p"))
    told = {r["meter"] for r in table.to_pylist() if r["source"] == f"{kind}/x"}
    assert meters <= told


def test_a_page_of_engine_and_boards_is_both_seen() -> None:
    """NIM and Triton show their GPUs on the engine's page: each kind is seen, and both are silent together."""
    text = (
        'nv_inference_request_success{{model="m"}} {0}\nnv_gpu_utilization{{gpu_uuid="A"}} 0.5\n'
        'nv_energy_consumption{{gpu_uuid="A"}} {0}\nnv_energy_consumption{{gpu_uuid="B"}} {0}\n'
    )
    table = scrapes(text.format(10), text.format(20))
    found = {(r["source"], r["meter"]): r["quantity"] for r in table.to_pylist()}
    assert found["engine/a", "seen_seconds"] == 15
    assert found["engine/a", "held_gpus"] == 30
    assert found["device/a", "seen_seconds"] == 15
    assert found["device/a", "gpu_seen_seconds"] == 30
    assert found["device/a", "active_seconds"] == 7.5
    silent = scrapes(text.format(10), text.format(20), step_s=600.0, start_s=T0)
    gaps = {(r["source"], r["quantity"]) for r in silent.to_pylist() if r["meter"] == "gap_seconds"}
    assert gaps == {("engine/a", 600.0), ("device/a", 600.0)}


def test_requests_are_known_by_their_latencies_where_nothing_else_counts_them() -> None:
    """SGLang of some versions has no counter of requests: its histograms count them, the best one there."""
    first = 'sglang:time_to_first_token_seconds_count{{model_name="m"}} {}\n'
    whole = 'sglang:e2e_request_latency_seconds_count{{model_name="m"}} {}\n'
    counted = 'sglang:num_requests_total{{model_name="m"}} {}\n'
    assert sums(scrapes(first.format(5), first.format(12)))["requests", "m"] == 7
    both = first + whole
    assert sums(scrapes(both.format(5, 5), both.format(12, 11)))["requests", "m"] == 6
    every = first + whole + counted
    assert sums(scrapes(every.format(5, 5, 5), every.format(12, 11, 15)))["requests", "m"] == 10


def test_a_name_this_meter_has_just_learnt_counts_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of ours knows a series that has counted for long: it is no growth since the last reading."""

    def text(count: int) -> str:
        return counter(0) + f'vllm:num_preemptions_total{{model_name="m"}} {count}\n'

    before = State(T0)
    with monkeypatch.context() as older:
        older.setattr(_counters, "_WORDS", 1)
        older.setattr(_counters, "rules_of", lambda name: rules_of(name) if "generation" in name else ())
        for at_s in (T0 + 100, T0 + 115):
            _, before = read(text(5000), TARGET, before, now_s=at_s)
    found, state = read(text(5100), TARGET, State.from_bytes(before.to_bytes()), now_s=T0 + 130)
    assert ("preemptions", "m") not in sums(found)
    found, _ = read(text(5107), TARGET, state, now_s=T0 + 145)
    assert sums(found)["preemptions", "m"] == 7


def test_series_of_names_that_are_not_ours_are_ignored() -> None:
    assert rules_of("python_gc_objects_collected_total") == ()
    assert scrapes("go_goroutines 5\n", "go_goroutines 9\n").num_rows == 0


def test_states_of_a_flood_of_series_stay_bounded() -> None:
    text = "".join(f'vllm:generation_tokens_total{{model_name="m{i}"}} 1\n' for i in range(120_000))
    _, state = read(text, TARGET, State(T0), now_s=T0)
    assert len(state.last) <= 100_000


@pytest.mark.parametrize(
    "line",
    [
        'a{b="c"' + "  " * 40 + 'd="e"' * 3 + '  x="y"  ' * 40 + "!",
        "a" + " " * 100_000 + "x y z",
        'a{b="' + "\\\\" * 50_000,
    ],
)
def test_a_hostile_line_takes_no_time(line: str) -> None:
    with pytest.raises(InputError, match="line 1"):
        parse(line)


def test_an_exposition_of_too_many_lines_is_refused_unread() -> None:
    with pytest.raises(InputError, match="lines"):
        parse("a 1\n" * 1_300_000)
