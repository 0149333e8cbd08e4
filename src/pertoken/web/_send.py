"""How an alert leaves the house: a signed webhook, Alertmanager's API, a mail. Each raises InputError where it fails.

No error names an address's path, a header or a file's text: a path may be a secret of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import smtplib
import ssl
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pertoken import __version__
from pertoken.errors import InputError
from pertoken.fleet import Alertmanager, Email, Webhook
from pertoken.report._crossings import Event

TIMEOUT_S = 10.0
SILENT_AFTER = 4
"""An alert ends in Alertmanager by itself after so many times `resend_s` without us."""
_ALERT = "PerTokenBudget"
_PRINTED_LINES = 50


def send_webhook(channel: Webhook, event: Event, now: datetime) -> None:
    """POST an event as JSON, signed.

    ``X-PerToken-Signature: sha256=HEX`` is the HMAC-SHA256 of ``<X-PerToken-Timestamp>.<body>`` under the secret.
    """
    body = msgspec.json.encode({**msgspec.to_builtins(event), "severity": event.severity, "text": event.text})
    stamp = str(int(now.timestamp()))
    try:
        secret = channel.secret_file.read_bytes().strip()
    except OSError as error:
        raise InputError(f"its secret cannot be read: {error.strerror}") from error
    headers = {
        "Content-Type": "application/json",
        "X-PerToken-Id": event.id,
        "X-PerToken-Timestamp": stamp,
        "X-PerToken-Signature": signature(secret, stamp, body),
    }
    _post(channel.url, channel.ca_file, body, headers)


def signature(secret: bytes, stamp: str, body: bytes) -> str:
    """The signature of a webhook's body at a time (POSIX seconds, as text).

    >>> signature(b"0123456789abcdef", "1795510800", b"{}")
    'sha256=8e883a0a7765db1799700c49a960190434f80aafc4eabcaacac4f4c905821575'
    """
    return "sha256=" + hmac.new(secret, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def send_alertmanager(
    channel: Alertmanager, firing: Sequence[Event], resolved: Sequence[Event], now: datetime
) -> None:
    """POST what fires, to last a while, and what has recovered, to end."""
    later = now + timedelta(seconds=SILENT_AFTER * channel.resend_s)
    alerts = [_alert(event, later) for event in firing] + [_alert(event, event.at) for event in resolved]
    headers = {"Content-Type": "application/json"}
    if channel.authorization_file is not None:
        try:
            headers["Authorization"] = channel.authorization_file.read_text().strip()
        except (OSError, ValueError) as error:
            raise InputError(f"its authorization cannot be read: {type(error).__name__}") from error
    url = channel.url.rstrip("/") + "/api/v2/alerts"
    _post(url, channel.ca_file, json.dumps(alerts).encode(), headers)


def _alert(event: Event, ends: datetime) -> dict[str, Any]:
    labels = {
        "alertname": _ALERT,
        "budget": event.budget,
        "kind": event.kind,
        "threshold": f"{event.percent:g}",
        "severity": event.severity,
        **({"tenant": event.tenant} if event.tenant else {}),
    }
    return {
        "labels": labels,
        "annotations": {"summary": event.text},
        "startsAt": event.since.astimezone(UTC).isoformat(),
        "endsAt": ends.astimezone(UTC).isoformat(),
    }


def send_email(channel: Email, events: Sequence[Event], now: datetime) -> None:
    """One mail of all the events."""
    try:
        secret = channel.password_file.read_text().strip() if channel.password_file else ""
    except (OSError, ValueError) as error:
        raise InputError(f"its password cannot be read: {type(error).__name__}") from error
    context = _context(channel.ca_file)
    try:
        if channel.security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                channel.host, channel.port, timeout=TIMEOUT_S, context=context
            )
        else:
            server = smtplib.SMTP(channel.host, channel.port, timeout=TIMEOUT_S)
        with server:
            if channel.security == "starttls":
                server.starttls(context=context)
            if channel.user:
                server.login(channel.user, secret)
            server.send_message(_mail(channel, events, now))
    except (OSError, smtplib.SMTPException, ValueError) as error:
        raise InputError(f"the mail server refuses: {_told(error)}") from error


def _mail(channel: Email, events: Sequence[Event], now: datetime) -> EmailMessage:
    mail = EmailMessage()
    first = events[0].text.partition(" (")[0]
    mail["Subject"] = f"PerToken: {first}" + (f" and {len(events) - 1} more" if len(events) > 1 else "")
    mail["From"], mail["To"] = channel.sender, ", ".join(channel.to)
    mail["Date"] = format_datetime(now.astimezone(UTC))
    mail["Message-ID"] = make_msgid(events[0].id, channel.sender.rpartition("@")[2])
    mail["Auto-Submitted"] = "auto-generated"
    lines = [event.text for event in events[:_PRINTED_LINES]]
    more = [f"and {len(events) - _PRINTED_LINES} more"] if len(events) > _PRINTED_LINES else []
    mail.set_content("\n\n".join([*lines, *more]) + "\n")
    return mail


def _told(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        # The server's words are left out: some repeat what was sent.
        return f"{type(error).__name__} {error.smtp_code}"
    if isinstance(error, ssl.SSLError):
        return f"{type(error).__name__}: {getattr(error, 'verify_message', '') or error.reason}"
    return type(error).__name__ + (
        f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    )


def _context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"its ca_file cannot be used: {type(error).__name__}") from error


def _post(url: str, ca_file: Path | None, body: bytes, headers: Mapping[str, str]) -> None:
    """POST and want an answer of 2xx; a redirect is none."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=_context(ca_file)
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    sent = {"User-Agent": f"pertoken/{__version__}", **headers}
    try:
        connection.request("POST", path, body, sent)
        answer = connection.getresponse()
        answer.read(64 * 1024)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"it cannot be reached: {_told(error)}") from error
    finally:
        connection.close()
    if not 200 <= answer.status < 300:
        raise InputError(f"it answers {answer.status}")
