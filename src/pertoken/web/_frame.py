"""The frame around every page: navigation, style, figures, who is looking; and the way in with a token."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from pertoken.errors import InputError
from pertoken.report._written import counted
from pertoken.web._doors import COOKIE
from pertoken.web._limits import body_of

if TYPE_CHECKING:
    import jinja2

router = APIRouter(include_in_schema=False)

NAVIGATION = (
    # path, name, whether a tenant's token may see it
    ("/", "Now", True),
    ("/where", "Where it goes", True),
    ("/by", "By", True),
    ("/variance", "Plan against actual", False),
    ("/compare", "Compare", False),
    ("/plan", "Plan", False),
    ("/budgets", "Budgets", True),
    ("/energy", "Energy", True),
    ("/sources", "Sources", False),
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_MOST_FIELDS = 1_000
_COOKIE_S = int(timedelta(days=30).total_seconds())


def page(request: Request, template: str, *, title: str, status: int = 200, **context: Any) -> Response:
    """A page from a template in ``templates`` that extends ``frame.html``.

    Names in `context` are the template's; a Vega-Lite specification goes through its ``figure`` macro.
    """
    caller = getattr(request.state, "caller", None)
    own = bool(caller and caller.tenant)
    text = (
        _environment()
        .get_template(template)
        .render(
            title=title,
            here=request.url.path,
            navigation=[(path, name) for path, name, shared in NAVIGATION if shared or not own],
            caller=caller,
            signed_in=COOKIE in request.cookies,
            **context,
        )
    )
    return Response(text, status, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@router.get("/login")
async def login(request: Request, to: str = "/") -> Response:
    """Asks for a token."""
    return page(request, "login.html", title="Sign in", to=_local(to), wrong=False)


@router.post("/login")
async def enter(request: Request) -> Response:
    """Puts the token into a cookie that no script can read and no other site can send."""
    request.app.state.gate.own_page(request)  # nobody is to be signed in as somebody else
    form = await form_of(request)
    text, to = form.get("token", "").strip(), _local(form.get("to", "/"))
    try:
        request.app.state.gate.known(request, text)
    except HTTPException as error:
        if error.status_code != 401:
            raise
        return page(request, "login.html", title="Sign in", status=401, to=to, wrong=True)
    answer = RedirectResponse(to, 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, text, _COOKIE_S, httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout")
async def leave(request: Request) -> Response:
    """Forgets the cookie."""
    request.app.state.gate.own_page(request)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """The pages' own style and scripts; nothing of the ledger."""
    if name not in _static_names():
        raise HTTPException(404, "there is no such file")
    content, tag = await asyncio.to_thread(_file, name)
    headers = {"Cache-Control": "public, max-age=86400", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[name[name.rindex(".") :]], headers=headers)


async def form_of(request: Request, most_bytes: int = 16_384) -> dict[str, str]:
    """The fields of a form as a browser sends it by default, the last of each name. 413 where it is larger.

    Raises InputError on more than 1,000 fields.
    """
    body = await body_of(request, most_bytes)
    text = body.decode("utf-8", "replace")
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError as error:
        raise InputError(f"a form of more than {_MOST_FIELDS} fields is none of ours") from error


def prepare() -> None:
    """Read what every page is made of: the figures' library takes a second, which the first who looks would wait."""
    _environment()
    for name in sorted(_static_names()):
        _file(name)


def _local(address: str) -> str:
    """An address of this service; of another, the first page."""
    parts = urlsplit(address)
    plain = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable()
    return address if plain and not parts.scheme and not parts.netloc else "/"


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("pertoken.web"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # "<" inside a script element could end it; in JSON the escape is equal.
    found.filters["inline_json"] = lambda value: Markup(json.dumps(value).replace("<", "\\u003c"))
    found.globals["counted"] = counted
    found.globals["static"] = lambda name: f"/static/{name}?{_file(name)[1].strip(chr(34))}"
    return found


@cache
def _static_names() -> frozenset[str]:
    folder = resources.files("pertoken.web").joinpath("static")
    return frozenset(
        {"vega.js", *(file.name for file in folder.iterdir() if file.name.endswith((".css", ".js")))}
    )


@cache
def _file(name: str) -> tuple[str, str]:
    import hashlib

    if name == "vega.js":
        from pertoken.report._page import _bundle

        text = _bundle()
    else:
        text = resources.files("pertoken.web").joinpath("static", name).read_text(encoding="utf-8")
    return text, f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
