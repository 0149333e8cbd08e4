"""Alerts reach a real HTTP receiver, signed, and a real mail server over TLS; once, across restarts, whatever fails."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import logging
import re
import socketserver
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

from pertoken.errors import InputError
from pertoken.fleet import Alerts
from pertoken.web import _send, alerts
from pertoken.web.alerts import FILE, Alarm
from tests.report.test_crossings import NOW, standing

SECRET = "a secret of the house"
PASSWORD = "correct horse battery staple"
ROOT = Path(__file__).parents[2]


class Receiver:
    """A web server that takes webhooks, or refuses them."""

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        self.tries = 0
        receiver = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.tries += 1
                if receiver.status == 200:
                    receiver.taken.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.status)
                if receiver.status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' * bool(tls)}://localhost:{self.server.server_address[1]}/hook/of-the-house?x=1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.taken]


class Mailbox:
    """A mail server that speaks as much SMTP as a client needs, over TLS or with STARTTLS."""

    def __init__(self, tls: tuple[Path, Path], implicit: bool = False) -> None:
        self.mails: list[str] = []
        self.seen: list[str] = []
        self.secure: list[bool] = []
        self.refuse = ""
        box = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)

        class Talk(socketserver.StreamRequestHandler):
            def say(self, text: str) -> None:
                self.wfile.write(f"{text}\r\n".encode())

            def handle(self) -> None:
                secure = implicit
                if implicit:
                    self.wrap()
                self.say("220 mail.example ready")
                while line := self.rfile.readline().decode().strip():
                    box.seen.append(line)
                    verb = line.split()[0].upper()
                    if verb == "EHLO":
                        offers = ["AUTH PLAIN"] if secure else ["STARTTLS"]
                        for offer in ["mail.example", *offers[:-1]]:
                            self.say(f"250-{offer}")
                        self.say(f"250 {offers[-1]}")
                    elif verb == "STARTTLS":
                        self.say("220 go on")
                        self.wrap()
                        secure = True
                    elif verb == "AUTH":
                        right = base64.b64encode(f"\0pertoken\0{PASSWORD}".encode()).decode()
                        self.say("235 welcome" if line.split()[-1] == right else f"535 {line} is wrong")
                    elif verb == "DATA":
                        if box.refuse:
                            self.say(box.refuse)
                            continue
                        self.say("354 end with a dot")
                        lines = []
                        while (part := self.rfile.readline().decode()) != ".\r\n":
                            lines.append(part)
                        box.mails.append("".join(lines))
                        box.secure.append(secure)
                        self.say("250 taken")
                    elif verb == "QUIT":
                        self.say("221 bye")
                        return
                    else:
                        self.say("250 fine")

            def finish(self) -> None:
                super().finish()
                self.request.close()

            def wrap(self) -> None:
                super().finish()
                self.request = context.wrap_socket(self.request, server_side=True)
                self.setup()

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Talk)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert),
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Clock:
    """Seconds that stand still until moved."""

    def __init__(self) -> None:
        self.at_s = NOW.timestamp()

    def __call__(self) -> float:
        return self.at_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(f" {SECRET}\n")
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    return tmp_path


@pytest.fixture
def alarm_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Alarm]]:
    """Makes alarms on this test's folder; retries come quickly."""
    monkeypatch.setattr(alerts, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(alerts, "LONGEST_WAIT_S", 0.05)
    made: list[Alarm] = []

    def make(clock: Callable[[], float] | None = None, **channels: Any) -> Alarm:
        given = Alerts.model_validate(channels, context={"folder": folder})
        made.append(Alarm(given, folder, clock or Clock()))
        made[-1].start()
        return made[-1]

    yield make
    for alarm in made:
        alarm.stop()


def hook(url: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "ops", "url": url, "secret_file": "secret", **more}]


def mail(port: int, security: str = "starttls", **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": "finance", "host": "localhost", "port": port, "security": security, "user": "pertoken",
         "password_file": "password", "sender": "pertoken@example.com", "to": ["cfo@example.com", "ops@example.com"],
         **more}
    ]  # fmt: skip


def wait(check: Callable[[], object], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_webhook_is_signed_and_comes_once(alarm_of: Callable[..., Alarm], receiver: Receiver) -> None:
    alarm = alarm_of(webhooks=hook(receiver.url))
    for _ in range(3):
        alarm.look([standing(85)], NOW)
    wait(lambda: len(receiver.taken) == 2)
    assert [(e["budget"], e["kind"], e["percent"], e["state"]) for e in receiver.events] == [
        ("b", "actual", 50, "firing"),
        ("b", "actual", 80, "firing"),
    ]
    first = receiver.events[0]
    assert (first["figure"], first["amount"], first["unit"], first["severity"]) == (
        "85",
        "100",
        "USD",
        "warning",
    )
    headers, body = receiver.taken[0]
    assert headers["x-pertoken-id"] == first["id"]
    assert headers["x-pertoken-timestamp"] == str(int(NOW.timestamp()))
    told = f"{headers['x-pertoken-timestamp']}.".encode() + body
    right = hmac.new(SECRET.encode(), told, hashlib.sha256).hexdigest()
    assert headers["x-pertoken-signature"] == f"sha256={right}"
    alarm.look([standing(60)], NOW)
    wait(lambda: len(receiver.taken) == 3)
    assert (receiver.events[2]["state"], receiver.events[2]["percent"]) == ("resolved", 80)
    time.sleep(0.2)
    assert len(receiver.taken) == 3


def test_the_receiver_of_the_documents_refuses_what_is_old_or_changed(
    alarm_of: Callable[..., Alarm], receiver: Receiver
) -> None:
    text = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    alarm_of(webhooks=hook(receiver.url)).look([standing(55)], NOW)
    wait(lambda: receiver.taken)
    headers, body = receiver.taken[0]
    given = {"X-PerToken-Timestamp": headers["x-pertoken-timestamp"],
             "X-PerToken-Signature": headers["x-pertoken-signature"]}  # fmt: skip
    now_s = NOW.timestamp()
    assert names["genuine"](SECRET.encode(), given, body, now_s)
    assert not names["genuine"](SECRET.encode(), given, body, now_s + 301)
    assert not names["genuine"](SECRET.encode(), given, body + b" ", now_s)
    assert not names["genuine"](b"another", given, body, now_s)
    later = given | {"X-PerToken-Timestamp": str(int(now_s) + 200)}
    assert not names["genuine"](SECRET.encode(), later, body, now_s + 300)


def test_what_cannot_be_sent_waits_through_a_restart(
    alarm_of: Callable[..., Alarm], receiver: Receiver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receiver.status = 503
    first = alarm_of(webhooks=hook(receiver.url))
    first.look([standing(85)], NOW)
    wait(lambda: receiver.tries >= 3)
    assert first.problems() == {"ops": "it answers 503"}
    assert first.failing() == {"ops": True}
    first.stop()
    state = folder / FILE
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    kept = json.loads(state.read_bytes())
    assert [e["percent"] for e in kept["waiting"]["ops"]] == [50, 80]
    receiver.status = 200
    second = alarm_of(webhooks=hook(receiver.url))
    assert second.look([standing(85)], NOW) == []
    wait(lambda: len(receiver.taken) == 2)
    wait(lambda: not second.problems())
    assert [e["id"] for e in receiver.events] == [e["id"] for e in kept["waiting"]["ops"]]
    assert [e.percent for e in second.firing()] == [50, 80]
    assert [e.percent for e in second.history()] == [80, 50]
    written = state.read_text() + caplog.text
    for secret in (SECRET, "/hook/of-the-house"):
        assert secret not in written


def test_a_redirect_is_no_answer(alarm_of: Callable[..., Alarm], receiver: Receiver) -> None:
    receiver.status = 302
    alarm = alarm_of(webhooks=hook(receiver.url))
    alarm.look([standing(55)], NOW)
    wait(lambda: alarm.problems() == {"ops": "it answers 302"})
    assert receiver.taken == []


def test_what_nobody_takes_for_a_day_is_given_up_and_told(
    alarm_of: Callable[..., Alarm], receiver: Receiver
) -> None:
    receiver.status, clock = 500, Clock()
    alarm = alarm_of(clock, webhooks=hook(receiver.url))
    alarm.look([standing(55)], NOW)
    wait(lambda: receiver.tries)
    clock.at_s += 25 * 3600
    wait(lambda: alarm.problems() == {"ops": "1 alert given up after 24 h"})
    receiver.status = 200
    alarm.look([standing(85)], NOW + timedelta(hours=25))
    wait(lambda: receiver.taken)
    assert [e["percent"] for e in receiver.events] == [80]


def test_a_channel_hears_of_its_budgets_alone(alarm_of: Callable[..., Alarm], receiver: Receiver) -> None:
    alarm = alarm_of(webhooks=hook(receiver.url, budgets=["c"]))
    alarm.look([standing(55), standing(55, name="c")], NOW)
    wait(lambda: receiver.taken)
    time.sleep(0.1)
    assert [e["budget"] for e in receiver.events] == ["c"]


def test_tls_wants_a_certificate_that_is_trusted(
    alarm_of: Callable[..., Alarm], tls: tuple[Path, Path], folder: Path
) -> None:
    receiver = Receiver(tls)
    try:
        blind = alarm_of(webhooks=hook(receiver.url))
        blind.look([standing(55)], NOW)
        wait(lambda: "SSLCertVerificationError" in blind.problems().get("ops", ""))
        blind.stop()
        alarm_of(webhooks=hook(receiver.url, ca_file=str(tls[0])))
        wait(lambda: receiver.taken)
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_goes_over_tls_and_says_it_all_at_once(
    alarm_of: Callable[..., Alarm], tls: tuple[Path, Path], security: str
) -> None:
    box = Mailbox(tls, implicit=security == "tls")
    try:
        alarm = alarm_of(emails=mail(box.port, security, ca_file=str(tls[0])))
        alarm.look([standing(120, 200)], NOW)
        wait(lambda: box.mails)
        wait(lambda: not alarm.problems())
        (text,) = box.mails
        assert box.secure == [True]
        found = message_from_string(text)
        assert found["Subject"] == "PerToken: Passed 50 % of the budget b and 3 more"
        assert (found["From"], found["To"]) == ("pertoken@example.com", "cfo@example.com, ops@example.com")
        assert found.get_content_type() == "text/plain"
        body = str(found.get_payload(decode=True), "utf-8")  # type: ignore[arg-type]
        assert body.count("of the budget b (100.00 USD)") == 4
        told = [line.lower() for line in box.seen if line.lower().startswith("rcpt")]
        assert told == ["rcpt to:<cfo@example.com>", "rcpt to:<ops@example.com>"]
    finally:
        box.server.shutdown()
        box.server.server_close()


def test_a_mail_server_that_refuses_gives_no_secret_away(
    alarm_of: Callable[..., Alarm], tls: tuple[Path, Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "password").write_text("wrong but secret")
    box = Mailbox(tls)
    try:
        alarm = alarm_of(emails=mail(box.port, ca_file=str(tls[0])))
        alarm.look([standing(55)], NOW)
        wait(lambda: alarm.problems())
        assert alarm.problems() == {"finance": "the mail server refuses: SMTPAuthenticationError 535"}
        told = base64.b64encode(b"\0pertoken\0wrong but secret").decode()
        assert any(told in line for line in box.seen)
        assert told not in caplog.text
        (folder / "password").write_text(PASSWORD)
        wait(lambda: box.mails)
    finally:
        box.server.shutdown()
        box.server.server_close()


def test_a_state_that_cannot_be_read_is_begun_anew_and_told(
    alarm_of: Callable[..., Alarm], folder: Path, receiver: Receiver
) -> None:
    (folder / FILE).write_text("{")
    alarm = alarm_of(webhooks=hook(receiver.url))
    assert "could not be read and was begun anew" in alarm.problems()["state"]
    alarm.look([standing(55)], NOW)
    wait(lambda: receiver.taken)
    wait(lambda: not alarm.problems())


def test_a_state_that_cannot_be_written_is_told_and_alerts_go_on(
    alarm_of: Callable[..., Alarm], folder: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = alarm_of(webhooks=hook(receiver.url))
    (folder / FILE).with_suffix(".part").mkdir()
    alarm.look([standing(55)], NOW)
    wait(lambda: receiver.taken)
    assert alarm.problems()["state"] == f"{FILE} cannot be written: Is a directory"


def test_what_no_server_hears_is_one_line(folder: Path) -> None:
    channel = Alerts.model_validate(
        {"webhooks": hook("http://127.0.0.1:1/x"), "emails": mail(1)}, context={"folder": folder}
    )
    alarm = Alarm(Alerts(), folder, Clock())
    (event,) = alarm.look([standing(55)], datetime.fromtimestamp(NOW.timestamp(), UTC))
    with pytest.raises(InputError, match="ConnectionRefusedError: Connection refused"):
        _send.send_webhook(channel.webhooks[0], event, NOW)
    with pytest.raises(InputError, match="ConnectionRefusedError: Connection refused"):
        _send.send_email(channel.emails[0], [event], NOW)
