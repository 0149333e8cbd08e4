"""A plan put into a running service, and the report that splits its difference from what really happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from tests.end_to_end.conftest import Service
from tests.end_to_end.test_verbs import pertoken

MODEL = "meta-llama/Llama-3.1-8B"
FLEET = """
pools:
  api: {price: {term: api, input_usd_per_mtok: 2, output_usd_per_mtok: 8}}
"""
SCENARIO = """
name: shop
horizon: {{start: {today}, days: 2, timezone: UTC}}
pools:
  api: {{price: {{term: api, input_usd_per_mtok: {input_usd}, output_usd_per_mtok: 4}}}}
workloads:
  chat: {{kind: serving, model: {model}, requests_per_day: 24000, input_tokens: 500, output_tokens: 200, profile: flat}}
"""


def planning(folder: Path, input_usd: float) -> list[str]:
    """The command that plans today and tomorrow, 1,000 requests an hour."""
    file = folder / "scenario.yaml"
    today = datetime.now(UTC).date()
    file.write_text(SCENARIO.format(today=today, input_usd=input_usd, model=MODEL))
    return ["plan", str(file), "--no-savings"]


def test_forecast_against_actual_in_one_service(service: Callable[..., Service], tmp_path: Path) -> None:
    ours = service(FLEET)
    ours.start()
    data = str(ours.data)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = {"prompt_tokens": 750_000, "completion_tokens": 100_000}
    event = {
        "key": "a", "ts": hour.timestamp(), "pool": "api", "model": MODEL, "tenant": "chat", "usage": usage
    }  # fmt: skip
    assert ours.ask("POST", "/v1/events", [event])[0] == 200
    end = hour + timedelta(hours=1)
    window = ["--from", hour.isoformat(), "--to", end.isoformat()]
    assert pertoken("close", "--data", data, *window).returncode == 0
    before = ours.get("/v1/cost", book="actual")["rows"]

    # Once with another price, then as it shall be: the second takes the first's place.
    for input_usd in (9, 1):
        done = pertoken(*planning(tmp_path, input_usd), "--data", data)
        assert done.returncode == 0, done.stderr
        assert f"put plan:shop into the ledger of {data}" in done.stderr
    told = pertoken(
        "report", "--data", data, "--book", "actual", "--book", "plan:shop", "--by", "pool,model", *window, "--json"
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    (line,) = json.loads(told.stdout)["lines"]
    # By hand. Planned: 0.5 M × 1 + 0.2 M × 4 USD. Actual: 0.75 M × 2 + 0.1 M × 8 USD.
    assert (line["pool"], line["model"]) == ("api", MODEL)
    assert Decimal(line["forecast_usd"]) == Decimal("1.3")
    assert Decimal(line["actual_usd"]) == Decimal("2.3")
    # Tokens grew from 0.7 to 0.85 M: 1.3 × (0.85 / 0.7 − 1). Prices: 0.75 M × (2 − 1) + 0.1 M × (8 − 4).
    assert abs(Decimal(line["volume_usd"]) - Decimal("1.3") * 15 / 70) < Decimal("1e-8")
    assert abs(Decimal(line["price_usd"]) - Decimal("1.15")) < Decimal("1e-8")
    drivers = sum(Decimal(line[f"{name}_usd"]) for name in ("price", "volume", "efficiency", "mix"))
    assert drivers == Decimal("1.0")

    # The plan's prices charge nobody else: closed again, the actual book is the same to the digit.
    assert pertoken("close", "--data", data, *window).returncode == 0
    assert ours.get("/v1/cost", book="actual")["rows"] == before

    # From elsewhere, with a token; and without the service, straight into its folder.
    token = tmp_path / "token"
    token.write_text(pertoken("token", "add", "planner", "--scope", "admin", "--data", data).stdout)
    far = pertoken(*planning(tmp_path, 3), "--to", ours.here["url"], "--token-file", str(token))
    assert far.returncode == 0, far.stderr
    planned = {"book": "plan:shop", "start": hour.isoformat(), "end": end.isoformat()}
    assert Decimal(ours.get("/v1/cost", **planned)["rows"][0]["cost_usd"]) == Decimal("2.3")
    (tmp_path / "wrong").write_text("pt_0_0")
    refused = pertoken(
        *planning(tmp_path, 3), "--to", ours.here["url"], "--token-file", str(tmp_path / "wrong")
    )
    assert (refused.returncode, refused.stderr) == (2, "pertoken: this token is not known\n")
    astray = pertoken(*planning(tmp_path, 3), "--to", "meter.example")
    assert (astray.returncode, "is no address of a service" in astray.stderr) == (2, True)
    assert ours.stop() == 0
    assert pertoken(*planning(tmp_path, 5), "--data", data).returncode == 0
    ours.start()
    assert Decimal(ours.get("/v1/cost", **planned)["rows"][0]["cost_usd"]) == Decimal("3.3")
    assert ours.get("/v1/cost", book="actual")["rows"] == before
