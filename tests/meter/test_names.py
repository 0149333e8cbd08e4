"""One model under several names: what is merged, what never is, and what is told instead."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pertoken.meter import Attribution, attribute, concat, records, totals
from pertoken.meter._models import known_as, renamed, renamed_in, under_two_names
from pertoken.scenario import Fleet

HOUR = datetime(2026, 11, 24, 7, tzinfo=UTC)
_POOL = {"gpu": "H100-SXM", "site": "s", "count": 1, "price": {"term": "owned", "usd_per_gpu": 25_000.0}}
_SITE = {"timezone": "UTC", "pue": 1.25, "tariff": {"usd_per_kwh": 0.1}}
_API = {
    "term": "api",
    "provider": "p",
    "model": "tiny",
    "input_usd_per_mtok": 1.0,
    "output_usd_per_mtok": 4.0,
}
TWO = Fleet.model_validate({"sites": {"s": _SITE}, "pools": {"A": _POOL, "B": _POOL}})
WITH_API = Fleet.model_validate({"sites": {"s": _SITE}, "pools": {"A": _POOL, "api": {"price": _API}}})
_INSTRUCT, _THINKING = (f"Qwen/Qwen3-30B-A3B-{kind}-2507" for kind in ("Instruct", "Thinking"))
_LLAMA = "meta-llama/Llama-3.3-70B-Instruct"
_FP8 = "nvidia/Llama-3.3-70B-Instruct-FP8"


def told(source: str, model: str, pool: str, tenant: str, counts: dict[str, float]) -> pa.Table:
    return records(
        {
            "ts": [HOUR.timestamp() + 5.0] * len(counts),
            "source": source,
            "key": f"{source} {model} {pool} {tenant}",
            "pool": pool,
            "model": model,
            "tenant": tenant,
            "meter": [*counts],
            "quantity": [*counts.values()],
        },
        len(counts),
    )


def engine(pool: str, model: str, output: float = 100.0) -> pa.Table:
    counts = {
        "output_tokens": output,
        "seen_seconds": 3600.0,
        "running_seconds": 1800.0,
        "decode_seconds": 1800.0,
    }
    return told(f"engine/{pool}-{model}", model, pool, "", counts)


def event(model: str, tenant: str, pool: str = "", output: float = 100.0) -> pa.Table:
    return told("usage/router", model, pool, tenant, {"output_tokens": output})


def run(*tables: pa.Table, fleet: Fleet = TWO) -> Attribution:
    return attribute(totals(concat(tables)), fleet, [HOUR])


def output(found: Attribution) -> dict[tuple[str, str, str], float]:
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for row in found.usage.to_pylist():
        if row["meter"] == "output_tokens":
            sums[row["pool"], row["model"], row["tenant"]] += float(row["quantity"])
    return dict(sums)


def told_of(found: Attribution, *kinds: str) -> list[tuple[str, str, float]]:
    return [(f.kind, f.pool, f.amount) for f in found.findings if f.kind in kinds]


@pytest.mark.parametrize(
    ("in_a", "in_b"),
    [
        (_INSTRUCT, _THINKING),
        (_LLAMA, _FP8),
        ("acme/chat", "other/chat"),
        ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-Coder-32B-Instruct"),
        ("DeepSeek-R1", "DeepSeek-R1-0528"),
        ("tiny", "org/tiny"),  # to the letter here is to the letter here
    ],
)
def test_a_router_s_tokens_go_to_the_pool_that_serves_the_name_to_the_letter(in_a: str, in_b: str) -> None:
    found = run(engine("A", in_a), engine("B", in_b), event(in_a, "alice"), event(in_b, "bob"))
    assert output(found) == {("A", in_a, "alice"): 100, ("B", in_b, "bob"): 100}
    alone = run(engine("A", in_a), engine("B", in_b), event(in_b, "bob"))
    assert output(alone) == {("A", in_a, ""): 100, ("B", in_b, "bob"): 100}
    held: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in alone.usage.to_pylist():
        if row["meter"] == "gpu_hours" and row["phase"] != "idle":
            held[row["pool"], row["model"]].add(row["tenant"])
    assert held == {("A", in_a): {""}, ("B", in_b): {"bob"}}


@pytest.mark.parametrize(
    ("event_name", "engine_name"),
    [
        (_THINKING, _INSTRUCT),
        ("other/chat", "acme/chat"),
        (_FP8, _LLAMA),
        ("qwen2.5-coder-32b", "Qwen2.5-32B-Instruct"),
        ("qwen2.5-coder-32b", "Qwen/Qwen2.5-32B"),
        ("DeepSeek-R1-0528", "DeepSeek-R1"),
        ("deepseek-v3-0324", "deepseek-ai/DeepSeek-V3"),
        ("Qwen3-30B-A3B", _INSTRUCT),
        ("Qwen3-8B-Base", "Qwen3-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),  # the base's own name
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B"),
        ("teamA/llama-3.1-8b", _LLAMA.replace("3.3-70B", "3.1-8B")),
        ("Qwen3-8B", "Qwen3-32B"),
        ("llama-3.1-70b", "llama-3.3-70b"),
        ("Qwen3-32B-AWQ", "Qwen3-32B-FP8"),
        ("tiny", "tiny-instruct"),  # the catalogue knows neither
        ("model-1-18b", "model-11-8b"),
        ("gemma-2-9b", "gemma-2.9b"),
    ],
)
def test_two_models_are_not_one(event_name: str, engine_name: str) -> None:
    """Neither way, whether the event named the pool or not, and no advice makes them one."""
    for mine, other in ((event_name, engine_name), (engine_name, event_name)):
        assert known_as(mine, [other]) == ""
        assert renamed([mine], [other]) == {}
    assert under_two_names([event_name, engine_name]) == []
    for pool in ("A", ""):
        found = run(engine("A", engine_name), event(event_name, "bob", pool))
        assert output(found) == {("A", engine_name, ""): 100}
        assert told_of(found, "unmatched", "two_names") == [("unmatched", pool, found.findings[0].amount)]
    served = run(engine("A", engine_name), engine("A", event_name))
    assert told_of(served, "two_names") == []


@pytest.mark.parametrize(
    ("event_name", "engine_name"),
    [
        ("TINY", "org/tiny"),
        ("my_own:tiny", "My-Own-Tiny"),
        ("hosted_vllm/meta-llama/Llama-3.3-70B-Instruct", _LLAMA),
        (_LLAMA, "/models/Llama-3.3-70B-Instruct"),
        ("llama3.3:70b", _LLAMA),
        ("Llama-3.3-70B", "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic"),
        (_LLAMA, "llama-3.3-70b"),
        ("Qwen/Qwen3-32B", "Qwen/Qwen3-32B-FP8"),
    ],
)
def test_one_model_is_one(event_name: str, engine_name: str) -> None:
    for pool in ("A", ""):
        found = run(engine("A", engine_name), engine("B", "another"), event(event_name, "bob", pool))
        assert output(found) == {("A", engine_name, "bob"): 100, ("B", "another", ""): 100}
        assert told_of(found, "unmatched", "two_names") == []


def test_a_name_told_with_a_pool_is_not_taken_from_the_pool_that_has_it() -> None:
    found = run(engine("A", _FP8), engine("B", "llama-3.3-70b"), event("llama-3.3-70b", "bob", "A"))
    assert output(found) == {("A", _FP8, ""): 100, ("B", "llama-3.3-70b", ""): 100}
    assert told_of(found, "unmatched") == [("unmatched", "A", 100)]
    spelled = run(engine("A", _FP8), engine("B", "Llama-3.3-70B"), event("llama-3.3-70b", "bob", "A"))
    assert output(spelled)["A", _FP8, ""] == 100


def test_a_router_s_nickname_of_two_models_fits_none_and_of_one_fits_all_its_pools() -> None:
    found = run(engine("A", _LLAMA), engine("B", _FP8), event("llama-3.3-70b", "bob"))
    assert output(found) == {("A", _LLAMA, ""): 100, ("B", _FP8, ""): 100}
    assert [kind for kind, *_ in told_of(found, "unmatched")] == ["unmatched"]
    both = run(engine("A", "acme/chat"), engine("B", "other/chat"), event("chat", "bob"))
    assert output(both) == {("A", "acme/chat", ""): 100, ("B", "other/chat", ""): 100}
    same = run(
        engine("A", _LLAMA), engine("B", "Llama-3.3-70B-Instruct", 300.0), event("llama3.3:70b", "bob")
    )
    assert output(same) == {
        ("A", _LLAMA, "bob"): 25, ("A", _LLAMA, ""): 75,
        ("B", "Llama-3.3-70B-Instruct", "bob"): 75, ("B", "Llama-3.3-70B-Instruct", ""): 225,
    }  # fmt: skip
    near = run(engine("A", _LLAMA), engine("B", _FP8), event("llama-3.3-70b-instruct", "bob"))
    assert output(near) == {("A", _LLAMA, "bob"): 100, ("B", _FP8, ""): 100}


def test_pools_that_name_one_model_differently_are_told_where_a_router_tells_one_of_the_names() -> None:
    found = run(engine("A", "tiny"), engine("B", "org/Tiny"), event("tiny", "bob"))
    (finding,) = (f for f in found.findings if f.kind == "two_names")
    assert finding.text == (
        "'org/Tiny' and 'tiny' may be one model: if they are, give their sources `names` that make them one"
    )
    assert told_of(run(engine("A", _LLAMA), engine("B", _FP8), event(_FP8, "bob")), "two_names") == []
    assert (
        told_of(run(engine("A", "tiny"), engine("B", "org/Tiny"), event("tiny", "b", "A")), "two_names") == []
    )


def test_what_an_api_sells_to_the_letter_is_the_api_s() -> None:
    found = run(engine("A", "org/tiny"), event("tiny", "bob"), fleet=WITH_API)
    assert output(found) == {("A", "org/tiny", ""): 100, ("api", "tiny", "bob"): 100}


@pytest.mark.parametrize("pool", ["api", ""])
def test_an_api_s_model_is_its_gateway_s_under_another_name(pool: str) -> None:
    gateway = told("gateway/g", "org/Tiny", "api", "", {"output_tokens": 100.0})
    found = run(gateway, engine("A", "other"), event("tiny", "bob", pool), fleet=WITH_API)
    assert output(found) == {("A", "other", ""): 100, ("api", "org/Tiny", "bob"): 100}


@pytest.mark.parametrize("pool", ["A", ""])
@pytest.mark.parametrize(("name", "of"), [("llama-3.3-70b", _LLAMA), ("TINY", "org/tiny")])
def test_nobody_s_flood_of_names_takes_the_nicknames_away(pool: str, name: str, of: str) -> None:
    flood = [event(f"!{i:04}", "bob", pool, 1.0) for i in range(250)]
    flood += [event(f"Llama-3.3_{'_' * i}70B-FP8", "bob", pool, 0.0) for i in range(250)]
    found = run(engine("A", of), *flood, event(name, "alice", pool))
    assert output(found)["A", of, "alice"] == 100


def test_the_catalogue_is_asked_for_the_most_used_names_first() -> None:
    names = [f"llama-3.3{'-' * i}70b" for i in range(1, 400)]
    amounts: dict[str, Any] = {name: float(i) for i, name in enumerate(names)}
    assert set(renamed(names, [_LLAMA], amounts=amounts)) == set(names[-200:])
    assert set(renamed_in(amounts, {"A": [_LLAMA]})["A"]) == set(names[-200:])
    shouted = ["Tiny" + " " * i for i in range(400)]
    assert len(renamed(shouted, ["org/tiny"])) == 400


def test_names_in_one_place_that_may_be_one_model() -> None:
    assert under_two_names(["chat", "acme/chat", "other/chat"]) == []
    assert under_two_names(["tiny", "org/tiny", "Tiny-Instruct"]) == [["org/tiny", "tiny"]]
    assert under_two_names([_LLAMA, "llama-3.3-70b", _FP8, _INSTRUCT, _THINKING]) == [
        ["llama-3.3-70b", _LLAMA]
    ]
    assert known_as("TINY", ["tiny", "org/tiny"]) == "org/tiny"
    assert renamed(["TINY"], ["tiny", "org/tiny"]) == {}
