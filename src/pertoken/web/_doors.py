"""What every endpoint needs: the service, and a caller who may do what is asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from pydantic import AfterValidator, AwareDatetime
from starlette.convertors import Convertor, register_url_convertor

from pertoken.errors import InputError
from pertoken.web.service import Service
from pertoken.web.tokens import Caller, Scope

COOKIE = "pertoken"
"""Holds a browser's token; HttpOnly and SameSite=Strict."""


def _in_utc(moment: datetime) -> datetime:
    try:
        moment.astimezone(UTC)
    except OverflowError as error:
        raise InputError(
            f"{moment.isoformat()} is no time in UTC: its year there is not 1 to 9999"
        ) from error
    return moment


class _Whole(Convertor[str]):
    """The rest of a path, whatever is in it: what Starlette calls `path` ends at a line break."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("whole", _Whole())


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A time that was sent: with its zone, and one in UTC too."""


def service_of(request: Request) -> Service:
    """The running service."""
    found: Service = request.app.state.service
    return found


def caller_with(scope: Scope, whole: bool = False) -> Callable[[Request], Caller]:
    """A dependency: the caller, who must have the scope, and be of no tenant where `whole` is asked."""

    def check(request: Request) -> Caller:
        caller: Caller = request.app.state.gate.caller(request)
        if not caller.may(scope):
            raise HTTPException(403, f"this token has no {scope} scope")
        if whole and caller.tenant:
            raise HTTPException(403, "a tenant's token may not ask or send what is not its own")
        return caller

    return check


ServiceHere = Annotated[Service, Depends(service_of)]
Reader = Annotated[Caller, Depends(caller_with("read"))]
WholeReader = Annotated[Caller, Depends(caller_with("read", whole=True))]
Writer = Annotated[Caller, Depends(caller_with("write"))]
WholeWriter = Annotated[Caller, Depends(caller_with("write", whole=True))]
Admin = Annotated[Caller, Depends(caller_with("admin"))]

_ERRORS = {
    400: "what was sent cannot be used",
    401: "a token is needed",
    403: "the token does not allow it",
    408: "the body did not arrive",
    409: "it cannot be done now",
    413: "the body is too large",
    415: "the body has a type that is not taken",
    422: "a parameter does not fit",
    429: "too many requests",
    503: "come back later: nothing was kept",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of an endpoint, for its OpenAPI entry."""
    schema = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
    return {
        status: {"description": _ERRORS[status], "content": {"application/json": {"schema": schema}}}
        for status in sorted(statuses)
    }
