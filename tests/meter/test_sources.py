"""Files, NVML and training logs become records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError, MissingExtraError
from pertoken.meter import concat, files, nvml, open_journal, training
from pertoken.meter._counters import State
from pertoken.meter.prometheus import Target
from tests.nvml_stub import compiled

NOW = 1_795_503_600.0
HERE = Path(__file__).parent


def rows(path: Path, kind: str, **where: Any) -> tuple[list[dict[str, Any]], list[str]]:
    place = files.Where(**{"source": "usage/file", **where})
    found = list(files.read(path, kind, place, now_s=NOW))
    return concat(b.records for b in found).to_pylist(), [r for b in found for r in b.refused]


def counts(found: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(r["key"], r["meter"]): r["quantity"] for r in found}


# -- files

LITELLM = [
    {
        "request_id": "r1",
        "call_type": "acompletion",
        "spend": 0.01,
        "total_tokens": 140,
        "prompt_tokens": 100,
        "completion_tokens": 40,
        "startTime": "2026-11-24 06:59:58.5",
        "endTime": "2026-11-24T07:00:01Z",
        "model": "openai/gpt-x",
        "custom_llm_provider": "openai",
        "team_id": "",
        "user": "blue",
        "cache_hit": "False",
        "metadata": {
            "usage_object": {
                "prompt_tokens": 100,
                "completion_tokens": 40,
                "prompt_tokens_details": {"cached_tokens": 64},
            }
        },
    },
    {
        "request_id": "r2",
        "prompt_tokens": 9,
        "completion_tokens": 9,
        "endTime": "2026-11-24T07:00:02Z",
        "model": "m",
        "cache_hit": "True",
    },
    {
        "request_id": "r3",
        "prompt_tokens": "5",
        "completion_tokens": 1,
        "endTime": "2026-11-24T07:00:03Z",
        "model": "m",
        "team_id": "red",
        "metadata": '{"additional_usage_values": {"cache_read_input_tokens": 2}}',
    },
    {"prompt_tokens": 1},
    {"request_id": "r4", "prompt_tokens": -4, "completion_tokens": 1},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_litellm_spend_logs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"spend{suffix}"
    path.write_text(json.dumps(LITELLM) if suffix == ".json" else "\n".join(map(json.dumps, LITELLM)))
    found, refused = rows(path, "litellm", pools={("openai", "gpt-x"): "gpt"}, pool="h100")
    assert counts(found) == {
        ("r1", "input_tokens"): 36,
        ("r1", "cached_input_tokens"): 64,
        ("r1", "output_tokens"): 40,
        ("r1", "requests"): 1,
        ("r3", "input_tokens"): 3,
        ("r3", "cached_input_tokens"): 2,
        ("r3", "output_tokens"): 1,
        ("r3", "requests"): 1,
    }
    assert {(r["key"], r["pool"], r["tenant"]) for r in found} == {
        ("r1", "gpt", "blue"),
        ("r3", "h100", "red"),
    }
    assert found[0]["ts"].isoformat() == "2026-11-24T07:00:01+00:00"
    assert [r.partition(":")[0] for r in refused] == ["row 4", "row 5"]


def test_a_routers_alias_hides_no_deployment(tmp_path: Path) -> None:
    """LiteLLM's group is a name for several deployments: pool, price and engine are the deployment's."""
    base = {
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "endTime": "2026-11-24T07:00:03Z",
        "model_group": "prod",
    }
    lines = [
        {**base, "request_id": "r1", "model": "groq/llama-x", "custom_llm_provider": "groq"},
        {**base, "request_id": "r2", "model": "hosted_vllm/org/tiny", "custom_llm_provider": "hosted_vllm"},
        {**base, "request_id": "r3", "model": ""},
    ]
    path = tmp_path / "spend.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found, refused = rows(path, "litellm", pools={("groq", "llama-x"): "api"}, pool="h100")
    assert not refused
    assert {(r["key"], r["pool"], r["model"]) for r in found} == {
        ("r1", "api", "llama-x"), ("r2", "h100", "org/tiny"), ("r3", "h100", "prod"),
    }  # fmt: skip


def test_api_answers_alone_and_from_a_batch(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    lines = [
        {"id": "c1", "created": 1_795_503_000, "model": "gpt-x", "usage": usage},
        {"custom_id": "b1", "response": {"status_code": 200, "body": {"model": "gpt-x", "usage": usage}}},
        {"id": "c2", "object": "list"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    found, refused = rows(path, "openai")
    assert counts(found)["c1", "input_tokens"] == 10
    assert counts(found)["b1", "output_tokens"] == 5
    assert len(found) == 6
    assert refused[0].startswith("row 4")


def test_langfuse_details_add_up_or_stand_inside(tmp_path: Path) -> None:
    observations = [
        {
            "id": "o1",
            "type": "GENERATION",
            "endTime": "2026-11-24T07:00:00Z",
            "model": "m",
            "usageDetails": {
                "input": 36,
                "input_cached_tokens": 64,
                "output": 10,
                "output_reasoning_tokens": 30,
                "total": 140,
            },
        },
        {
            "id": "o2",
            "type": "GENERATION",
            "model": "m",
            "usageDetails": {
                "input": 100,
                "input_cached_tokens": 64,
                "output": 40,
                "output_reasoning_tokens": 30,
                "total": 140,
            },
        },
        {
            "id": "o3",
            "type": "GENERATION",
            "model": "m",
            "usage": {"input": 7, "output": 2, "total": 9, "unit": "TOKENS"},
        },
        {"id": "o4", "type": "SPAN"},
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"data": observations}))
    found, refused = rows(path, "langfuse")
    assert not refused
    for key in ("o1", "o2"):
        assert counts(found)[key, "input_tokens"] == 36
        assert counts(found)[key, "cached_input_tokens"] == 64
        assert counts(found)[key, "output_tokens"] == 40
    assert counts(found)["o3", "input_tokens"] == 7


def test_opencost_gpu_hours_are_spread_over_their_window(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    allocation = {
        "properties": {"cluster": "c", "namespace": "blue"},
        "start": "2026-11-24T06:30:00Z",
        "end": "2026-11-24T08:30:00Z",
        "gpuHours": 8.0,
        "gpuCost": 99.0,
    }
    path.write_text(
        json.dumps(
            {
                "code": 200,
                "data": [{"blue": allocation, "bad": {"start": "x"}, "cpu": {**allocation, "gpuHours": 0}}],
            }
        )
    )
    found, refused = rows(path, "opencost", pool="h100")
    assert {r["ts"].hour: r["quantity"] for r in found} == {6: 2.0, 7: 4.0, 8: 2.0}
    assert {(r["source"], r["tenant"], r["meter"]) for r in found} == {("bill/file", "blue", "gpu_hours")}
    assert len(refused) == 1


def test_what_no_namespace_held_is_idle_or_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    hour = {"start": "2026-11-24T06:00:00Z", "end": "2026-11-24T07:00:00Z", "gpuHours": 2.0}
    path.write_text(json.dumps({"data": [dict.fromkeys(("__idle__", "__unallocated__", "blue"), hour)]}))
    found, _ = rows(path, "opencost", pool="h100")
    assert {r["key"].partition("@")[0]: r["tenant"] for r in found} == {
        "/__idle__": "(idle)", "/__unallocated__": "", "/blue": "blue",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_our_own_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"usage{suffix}"
    columns = {
        "key": ["a", "b"],
        "ts": ["2026-11-24T07:00:00Z", "1795503000"],
        "model": ["m", "x"],
        "tenant": ["blue", "red"],
        "input_tokens": [10, 20],
        "cached_input_tokens": [3, 0],
        "output_tokens": [5, 6],
    }
    if suffix == ".csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.table(columns), path)
    found, refused = rows(path, "pertoken", pool="h100", names={"x": "ours"})
    assert not refused
    assert counts(found) == {
        ("a", "input_tokens"): 10,
        ("a", "cached_input_tokens"): 3,
        ("a", "output_tokens"): 5,
        ("a", "requests"): 1,
        ("b", "input_tokens"): 20,
        ("b", "output_tokens"): 6,
        ("b", "requests"): 1,
    }
    assert {r["model"] for r in found} == {"m", "ours"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("kind", ["litellm", "openai", "langfuse", "pertoken"])
def test_a_row_without_token_counts_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    """A file given under another's name must not be taken for one of nothing."""
    path = tmp_path / f"file{suffix}"
    columns = {"a": [1, 3], "b": [2, 4]}
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".csv":
        path.write_text("a,b\n1,2\n3,4\n")
    else:
        path.write_text(json.dumps(lines) if suffix == ".json" else "\n".join(map(json.dumps, lines)))
    found, refused = rows(path, kind)
    assert not found
    assert [r.partition(f"; {kind}")[0] for r in refused] == [
        f"row {n}: no token counts found; columns are a, b" for n in (1, 2)
    ]


def test_what_has_no_tokens_of_its_own_is_left_out(tmp_path: Path) -> None:
    """Calls that failed, parts of a stream, spans: no row of them was to be booked; an answer without a count was."""
    path = tmp_path / "answers.jsonl"
    lines = [
        {"id": "c1", "object": "chat.completion.chunk", "usage": None},
        {
            "custom_id": "b1",
            "response": {"status_code": 400, "body": {"error": {"message": "no"}}},
            "error": None,
        },
        {"id": "c2", "object": "chat.completion", "model": "m", "usage": {}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found, refused = rows(path, "openai")
    assert (found, len(refused)) == ([], 1)
    assert refused[0].startswith(
        "row 3: no token counts found; columns are id, object, model, usage; openai tells"
    )
    lines = [{"id": "o1", "type": "SPAN"}, {"id": "o2", "level": "ERROR"}, {"id": "o3", "type": "GENERATION"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found, refused = rows(path, "langfuse")
    assert (found, [r[:28] for r in refused]) == ([], ["row 3: no token counts found"])


def test_an_allocation_without_gpu_hours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({"data": [{"blue": {"a": 1, "b": 2}, "red": 5}]}))
    found, refused = rows(path, "opencost")
    assert (found, refused) == ([], ["blue: no gpuHours found; fields are a, b", "red: it is no allocation"])


def test_one_bad_row_spoils_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "usage.csv"
    path.write_text("key,meter,quantity\na,requests,1\nb,request,1\nc,requests,2\nd,requests,-1\n")
    found, refused = rows(path, "pertoken", pool="h100")
    assert counts(found) == {("a", "requests"): 1, ("c", "requests"): 2}
    assert refused == [
        "the record of key 'b': unknown meter 'request': did you mean requests, requests_in_slo, aborted_requests?",
        "the record of key 'd': a quantity of -1.0 cannot be counted: it must lie between 0 and 1e+12",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown file format 'litelm': one of litellm, openai"):
        rows(tmp_path / "a.json", "litelm")
    with pytest.raises(InputError, match=r"nothing\.json"):
        rows(tmp_path / "nothing.json", "openai")
    (tmp_path / "a.xls").write_text("")
    with pytest.raises(InputError, match=r"none of \.json"):
        rows(tmp_path / "a.xls", "openai")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read"):
        rows(tmp_path / "a.parquet", "openai")


_NAMES = st.sampled_from(
    [
        "request_id",
        "id",
        "key",
        "usage",
        "usageDetails",
        "metadata",
        "model",
        "endTime",
        "ts",
        "input",
        "total",
        "data",
        "prompt_tokens",
        "completion_tokens",
        "response",
        "body",
        "custom_id",
        "start",
        "end",
        "gpuHours",
        "properties",
    ]
)
_ANY = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=150)
@given(_ANY, st.sampled_from(files.FORMATS), st.sampled_from([".json", ".jsonl", ".csv"]))
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Any, kind: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"file{suffix}"
    path.write_text(json.dumps(value))
    try:
        rows(path, kind)
    except InputError:
        return


# -- NVML


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nvml"))


_READ = """
import json, sys
from pathlib import Path
from pertoken.meter import nvml
from pertoken.meter._counters import State
from pertoken.meter.prometheus import Target
from tests.nvml_stub import stand
file, counters = Path(sys.argv[1]), sys.argv[2] == "True"
state, target, rows = State(0.0), Target("here", pool="h100", pools={"GPU-stub-1": "other"}), []
for seconds in (0, 15, 30):
    stand(file, *((w * seconds if counters else -1, w, busy) for w, busy in ((360, 50), (720, 100))))
    table, state = nvml.read(target, state, now_s=1_795_503_700.0 + seconds)
    rows += [(r["pool"], r["meter"], r["quantity"], r["basis"]) for r in table.to_pylist()]
print(json.dumps(rows))
"""


@pytest.mark.parametrize("counters", [True, False])
def test_nvml_through_the_real_library_on_a_stub(stub: Path, tmp_path: Path, counters: bool) -> None:
    file = tmp_path / "boards"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub), "PT_STUB_FILE": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(file), str(counters)],
        env={**environment, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sums: dict[tuple[str, str], float] = {}
    for pool, meter, quantity, basis in json.loads(done.stdout):
        sums[pool, meter] = sums.get((pool, meter), 0.0) + quantity
        if meter == "gpu_energy_kwh":
            assert basis == ("measured" if counters else "measured:power")
    # 360 W for 30 s are 3 Wh; the second GPU draws 720 W
    assert sums["h100", "gpu_energy_kwh"] == pytest.approx(0.003)
    assert sums["other", "gpu_energy_kwh"] == pytest.approx(0.006)
    assert sums["h100", "active_seconds"] == pytest.approx(15)
    assert sums["other", "gpu_seen_seconds"] == 30


def test_without_a_driver_or_the_extra_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    target, state = Target("here", pool="h100"), State(NOW)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(nvml, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pertoken\[gpu\]"):
        nvml.read(target, state, now_s=NOW)
    monkeypatch.undo()
    real = import_module("pynvml")

    def no_driver() -> None:
        raise real.NVMLError(real.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(real, "nvmlInit", no_driver)
    with pytest.raises(InputError, match="NVML cannot be used"):
        nvml.read(target, state, now_s=NOW)


# -- training

RUN = training.Run("r", pool="h100", model="m", tenant="blue", gpus=64, sequence_tokens=4096)


def trained(*lines: str) -> tuple[dict[tuple[str, str], float], list[str]]:
    table, refused = training.read(lines, RUN, now_s=NOW)
    sums: dict[tuple[str, str], float] = {}
    for row in table.to_pylist():
        key = (row["meter"], row["phase"])
        sums[key] = sums.get(key, 0.0) + row["quantity"]
    return sums, refused


def step(number: int, **more: Any) -> str:
    return json.dumps({"ts": NOW + number, "step": number, "tokens": 1000, "seconds": 36.0, **more})


def test_steps_lost_to_a_restart_are_waste() -> None:
    sums, refused = trained(
        *(step(i) for i in range(5)), json.dumps({"resumed_at_step": 3}), *(step(i) for i in range(3, 6))
    )
    assert sums["training_tokens", "training"] == 6000
    assert sums["lost_training_tokens", "waste"] == 2000
    assert sums["gpu_hours", "training"] == pytest.approx(6 * 0.64)
    assert sums["gpu_hours", "waste"] == pytest.approx(2 * 0.64)
    assert not refused
    implicit, _ = trained(*(step(i) for i in range(5)), *(step(i) for i in range(3, 6)))
    assert implicit == sums


def test_trainer_and_megatron_logs() -> None:
    sums, refused = trained(
        "{'loss': 2.1, 'num_input_tokens_seen': 81920, 'step': 10}",
        '{"loss": 2.0, "num_input_tokens_seen": 163840, "step": 20}',
        "{'train_runtime': 12.0}",
        "some other line",
        "{'broken': ",
    )
    assert sums["training_tokens", "training"] == 163840
    assert refused == [refused[0]]
    assert refused[0].startswith("line 5")
    sums, _ = trained(
        " [2026-11-24 07:00:01] iteration       12/     500 | consumed samples: 12288 | "
        "elapsed time per iteration (ms): 3600.0 | learning rate: 3E-4 | global batch size:  1024 | lm loss: 2.1 |"
    )
    assert sums["training_tokens", "training"] == 1024 * 4096
    assert sums["gpu_hours", "training"] == pytest.approx(3.6 * 64 / 3600)


def test_python_text_that_is_no_dictionary_is_refused() -> None:
    _, refused = trained(
        "{{'p': 0}}", "{'a': {[]}}", "{1: 2", "{'loss': 1, 'num_input_tokens_seen': [1], 'step': 1}"
    )
    assert [text.partition(":")[0] for text in refused] == ["line 1", "line 2", "line 3", "line 4"]


def test_a_run_that_restarts_without_end_is_read_in_one_pass() -> None:
    sums, refused = trained(*[step(1)] * 20_000)
    assert sums["training_tokens", "training"] == 1000
    assert sums["lost_training_tokens", "waste"] == 19_999_000
    assert not refused


def test_a_log_read_again_counts_once(tmp_path: Path) -> None:
    lines = [step(i) for i in range(4)]
    with open_journal(tmp_path) as journal:
        assert journal.append(training.read(lines[:2], RUN, now_s=NOW)[0]).rows == 4
        assert journal.append(training.read(lines, RUN, now_s=NOW)[0])[:2] == (4, 4)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=60), _ANY.map(json.dumps), _ANY.map(repr)), max_size=4))
def test_any_log_is_read_or_refused(lines: list[str]) -> None:
    _, refused = training.read(lines, RUN, now_s=NOW)
    assert all(r.startswith("line ") for r in refused)
