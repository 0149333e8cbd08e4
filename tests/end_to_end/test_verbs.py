"""The verbs beside a running service and without one: close, doctor, token, report; TLS; a gentle end."""

from __future__ import annotations

import http.client
import json
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.end_to_end.conftest import Service, free_port

FLEET = """
pools:
  api: {price: {term: api, input_usd_per_mtok: 3, output_usd_per_mtok: 15}}
"""


def pertoken(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it."""
    command = [str(Path(sys.executable).with_name("pertoken")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=meter.test"
    command = ["openssl", "req", "-x509", *options.split(), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return str(cert), str(key)


def window() -> tuple[str, str]:
    """The hour before this one, and this one."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return (now - timedelta(hours=1)).isoformat(), (now + timedelta(hours=1)).isoformat()


def test_the_verbs_beside_a_service_and_without_one(service: Callable[..., Service]) -> None:
    ours = service(FLEET)
    start, end = window()
    data, fleet = str(ours.data), str(ours.fleet)
    nothing = pertoken("close", "--data", data, "--from", start, "--to", end)
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("pertoken: no service runs on")
    ours.start()
    note = ours.data / "service.json"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    event = {
        "key": "a",
        "pool": "api",
        "model": "m",
        "tenant": "t",
        "meter": "output_tokens",
        "quantity": 1_000_000,
    }
    assert ours.ask("POST", "/v1/events", [event])[0] == 200

    closed = pertoken("close", "--data", data, "--from", start, "--to", end, "--json")
    assert (closed.returncode, json.loads(closed.stdout)) == (0, {"hours": 1, "unmetered": 1, "unpriced": {}})
    assert ours.get("/v1/cost")["rows"] == [{"cost_usd": "15.000000000"}]
    healthy = pertoken("doctor", "--data", data)
    assert healthy.returncode == 0, healthy.stdout
    assert "nothing to complain of" in healthy.stdout
    unpriced = {**event, "key": "b", "meter": "training_tokens"}
    assert ours.ask("POST", "/v1/events", [unpriced])[0] == 200
    closed = pertoken("close", "--data", data, "--from", start, "--to", end)
    assert closed.returncode == 1
    assert "no rate for training_tokens in pool 'api'" in closed.stdout
    ill = pertoken("doctor", "--data", data, "--json")
    assert ill.returncode == 1
    assert [c["kind"] for c in json.loads(ill.stdout)["complaints"]] == ["unpriced"]
    wrong = pertoken("report", "--data", data, "--book", "actual", "--book", "plan:shop")
    assert wrong.returncode == 2
    assert "unknown book 'plan:shop'" in wrong.stderr
    assert "Traceback" not in wrong.stderr

    second = pertoken("serve", "--fleet", fleet, "--data", data, "--port", str(free_port()))
    assert second.returncode == 2
    assert "another process" in second.stderr
    assert note.exists()

    assert ours.stop(signal.SIGTERM) == 0
    assert not note.exists()
    offline = pertoken("doctor", "--data", data, "--fleet", fleet)
    assert offline.returncode == 1
    assert "service: not running" in offline.stdout
    assert "training_tokens has no rate" in offline.stdout
    closed = pertoken("close", "--data", data, "--fleet", fleet, "--from", start, "--to", end)
    assert closed.returncode == 1
    assert "0 hours closed" in closed.stdout


def test_beyond_loopback_tokens_and_tls(service: Callable[..., Service], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    ours = service(FLEET, "data", "--host", "0.0.0.0", "--tls-cert", cert, "--tls-key", key)
    data = str(ours.data)
    refused = pertoken("serve", "--fleet", str(ours.fleet), "--data", data, "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "pertoken token add" in refused.stderr
    token = pertoken("token", "add", "gateway", "--scope", "write", "--data", data).stdout.strip()
    reader = pertoken(
        "token", "add", "shop", "--scope", "read", "--tenant", "shop", "--data", data
    ).stdout.strip()
    assert pertoken("token", "list", "--data", data).stdout.splitlines()[1].startswith("shop\tread\tshop\t")

    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False

    def ask(method: str, path: str, body: object = None, bearer: str = "") -> tuple[int, object]:
        url = urlsplit(ours.here["url"])
        assert url.scheme == "https"
        connection = http.client.HTTPSConnection("127.0.0.1", url.port, timeout=30, context=context)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {bearer}"} if bearer else {}
        )
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    ours.ask = lambda method, path, *_: ask(method, path)  # type: ignore[method-assign]
    ours.start()
    event = {
        "key": "a",
        "pool": "api",
        "model": "m",
        "tenant": "shop",
        "meter": "output_tokens",
        "quantity": 1000,
    }
    assert ask("POST", "/v1/events", [event])[0] == 401
    assert ask("POST", "/v1/events", [event], bearer=reader)[0] == 403
    assert ask("POST", "/v1/events", [event], bearer=token)[0] == 200
    start, end = window()
    closed = pertoken("close", "--data", data, "--from", start, "--to", end)
    assert (closed.returncode, closed.stdout) == (
        0,
        "1 hour closed\n1 hour left out: nothing was metered before the others\n",
    )
    assert ask("GET", "/v1/cost", bearer=reader) == (
        200,
        {"units": {"cost_usd": "USD"}, "rows": [{"cost_usd": "0.015000000"}], "next": None},
    )
    pertoken("token", "remove", "shop", "--data", data)
    time.sleep(1.2)  # the service looks at the file once a second
    assert ask("GET", "/v1/cost", bearer=reader)[0] == 401
    plain = http.client.HTTPConnection("127.0.0.1", ours.port, timeout=10)
    plain.request("GET", "/healthz")
    with pytest.raises((OSError, http.client.HTTPException)):
        plain.getresponse()
    plain.close()
    assert ours.stop() == 0
    told = ours.log.read_text()
    assert token not in told
    assert reader not in told
    assert ours.here["token"] not in told
    assert "Traceback" not in told


def test_a_file_is_imported_through_the_service_and_without_it(
    service: Callable[..., Service], tmp_path: Path
) -> None:
    ours = service(FLEET)
    file = tmp_path / "usage.jsonl"
    row = {"key": "a", "ts": time.time(), "pool": "api", "model": "m", "input_tokens": 7, "output_tokens": 5}
    file.write_text(json.dumps(row) + "\n{\n")
    command = ["import", str(file), "--data", str(ours.data), "--format", "pertoken", "--json"]
    ours.start()
    found = pertoken(*command)
    assert found.returncode == 1, found.stderr
    told = json.loads(found.stdout)
    assert (told["records"], told["duplicates"], told["refused"]) == (3, 0, 1)
    assert ours.stop() == 0
    again = json.loads(pertoken(*command, "--fleet", str(ours.fleet)).stdout)
    assert (again["records"], again["duplicates"]) == (0, 3)
