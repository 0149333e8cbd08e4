"""Bearer tokens: who may send, ask and close. Only their hashes are kept, in ``tokens.json`` of the data folder.

A token is ``pt_<id>_<secret>`` with 256 random bits in the secret, so that one SHA-256 is a safe hash of it (a
slow hash defends short secrets; nobody guesses this one).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pertoken.errors import InputError, UnknownNameError

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
_FILE = "tokens.json"
_RELOAD_S = 1.0


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of a token. `tenant`: whose rows alone it sees and writes; empty: all."""

    id: str
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    hash: str
    scopes: tuple[Scope, ...]
    tenant: str = ""
    created: str = ""


@dataclass(frozen=True)
class Caller:
    """Who asks: a token's name and rights, or the person at this machine."""

    name: str
    scopes: frozenset[str]
    tenant: str = ""

    def may(self, scope: Scope) -> bool:
        """Whether the caller has a scope; admin has all."""
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Caller("local", frozenset(SCOPES))
"""Whoever reaches a service that binds loopback and asks for no tokens."""


class Tokens:
    """The tokens of a data folder, read again when the file changes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._lock = threading.Lock()
        self._known: dict[str, Token] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked_s = float("-inf")

    def caller(self, text: str) -> Caller | None:
        """Whose token this is; None where it is nobody's."""
        with self._lock:
            self._refresh()
            known = self._known
        parts = text.split("_", 2)
        found = known.get(parts[1]) if len(parts) == 3 and parts[0] == "pt" else None
        # A comparison is made either way, so that its time does not tell whether an id exists.
        same = hmac.compare_digest(_hash(text), found.hash if found else _hash(""))
        if found is None or not same:
            return None
        return Caller(found.name, frozenset(found.scopes), found.tenant)

    def all(self) -> list[Token]:
        """All tokens, without their secrets, in order of their making."""
        with self._lock:
            self._refresh(force=True)
            return list(self._known.values())

    def add(self, name: str, scopes: tuple[str, ...], tenant: str = "") -> str:
        """Make a token and return it; it is shown this once and cannot be read again.

        Raises InputError on a name in use, no scope, or admin for a tenant; UnknownNameError on a scope that is none.
        """
        for scope in scopes:
            if scope not in SCOPES:
                raise UnknownNameError("scope", scope, SCOPES)
        if not scopes:
            raise InputError(f"a token needs a scope: {', '.join(SCOPES)}")
        if tenant and "admin" in scopes:
            raise InputError("an admin token sees all tenants: leave out the tenant, or give read or write")
        if not 1 <= len(name) <= 64 or not name.isprintable():
            raise InputError(f"a token's name has 1 to 64 printable characters, found {name!r}")
        identity, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        text = f"pt_{identity}_{secret}"
        with self._lock:
            self._refresh(force=True)
            if any(token.name == name for token in self._known.values()):
                raise InputError(f"a token named {name!r} exists: remove it first, or take another name")
            made = Token(
                identity,
                name,
                _hash(text),
                tuple(s for s in SCOPES if s in scopes),
                tenant,
                datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self._write([*self._known.values(), made])
        return text

    def remove(self, name: str) -> None:
        """Forget a token. Raises UnknownNameError."""
        with self._lock:
            self._refresh(force=True)
            names = {token.name: token for token in self._known.values()}
            if name not in names:
                raise UnknownNameError("token", name, names)
            self._write([token for token in self._known.values() if token.name != name])

    def _refresh(self, force: bool = False) -> None:
        now_s = time.monotonic()
        if not force and now_s - self._looked_s < _RELOAD_S:
            return
        self._looked_s = now_s
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._known, self._stamp = {}, None
            return
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp == self._stamp:
            return
        try:
            tokens = msgspec.json.decode(self._path.read_bytes(), type=list[Token])
        except (msgspec.MsgspecError, OSError) as error:
            raise InputError(f"{self._path} cannot be read: {error}") from error
        self._known, self._stamp = {token.id: token for token in tokens}, stamp

    def _write(self, tokens: list[Token]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path.with_suffix(f".{os.getpid()}.part")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(tokens), indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._known, self._stamp = {token.id: token for token in tokens}, None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
