"""A browser's way in: a token in a cookie that no script reads and no other site sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pertoken.web.tokens import Tokens
from tests.web.conftest import LIGHT, Client, serving, watched

HTML = {"accept": "text/html"}


@pytest.fixture
def guarded(client_of: Callable[..., Client]) -> Client:
    return client_of(require_tokens=True)


@pytest.fixture
def token(tmp_path: Path) -> str:
    return Tokens(tmp_path / "data").add("looker", ("read",), tenant="a")


def sign_in(client: Client, token: str, to: str = "/figure/cost_usd") -> str:
    answer = client.post("/login", data={"token": token, "to": to}, follow_redirects=False)
    assert answer.status_code == 303
    return str(answer.headers["location"])


def test_who_is_not_known_is_led_to_the_door_and_back(guarded: Client, token: str) -> None:
    asked = "/figure/cost_usd?by=pool&from=2026-11-24T00:00Z"
    answer = guarded.get(asked, headers=HTML, follow_redirects=False)
    assert answer.status_code == 303
    page = guarded.get(answer.headers["location"], headers=HTML)
    assert 'value="/figure/cost_usd?by=pool&amp;from=2026-11-24T00:00Z"' in page.text
    assert sign_in(guarded, token, asked) == asked
    assert guarded.get(asked, headers=HTML).status_code == 200
    # A program still gets its line.
    guarded.cookies.clear()
    assert guarded.get(asked).json() == {"detail": "send a token: Authorization: Bearer pt_…"}


def test_the_cookie_is_hidden_from_scripts_and_from_other_sites(guarded: Client, token: str) -> None:
    answer = guarded.post("/login", data={"token": token}, follow_redirects=False)
    flags = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= flags
    assert "secure" not in flags  # this address is plain HTTP
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    assert guarded.get("/figure/cost_usd", headers=foreign).status_code == 403
    assert guarded.get("/figure/cost_usd").status_code == 200


def test_a_wrong_token_is_told_and_guessing_is_slowed(guarded: Client) -> None:
    answer = guarded.post("/login", data={"token": "pt_00000000_x"})
    assert answer.status_code == 401
    assert "not known here" in answer.text
    assert "set-cookie" not in answer.headers
    found = [guarded.post("/login", data={"token": f"pt_{i}"}).status_code for i in range(40)]
    assert found[-1] == 429


@pytest.mark.parametrize(
    "to", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x", "", "/a\nb"]
)
def test_the_way_back_leads_nowhere_else(guarded: Client, token: str, to: str) -> None:
    assert sign_in(guarded, token, to) == "/"


def test_a_removed_token_opens_nothing_more(guarded: Client, token: str, tmp_path: Path) -> None:
    sign_in(guarded, token)
    guarded.app.state.gate.tokens.remove("looker")  # type: ignore[attr-defined]
    assert guarded.get("/figure/cost_usd").status_code == 401


def test_an_error_is_a_page_to_who_looks(guarded: Client, token: str) -> None:
    sign_in(guarded, token)
    page = guarded.get("/figure/<b>", headers=HTML)
    assert page.status_code == 404
    assert "<b>" not in page.text
    assert "&lt;b&gt;" in page.text


def test_an_address_that_is_none_says_what_is_near(guarded: Client, token: str) -> None:
    sign_in(guarded, token)
    page = guarded.get("/energie", headers=HTML)
    assert (page.status_code, "did you mean /energy?" in page.text) == (404, True)
    assert (
        guarded.get("/v1/nothing").json()["detail"]
        == "there is nothing at '/v1/nothing': see /openapi.json, or /"
    )
    assert guarded.post("/energy").json()["detail"] == "'/energy' takes no POST: see /openapi.json"
    figure = guarded.get("/figure/usd_per_mtok_outputs").json()["detail"]
    assert figure.startswith("there is no figure 'usd_per_mtok_outputs'; there is usd_per_mtok_output")
    assert "there is no budget 'x'" in guarded.get("/budgets/x").json()["detail"]


def test_in_a_browser(guarded: Client, token: str, browser: Browser) -> None:
    with serving(guarded) as served, watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/figure/cost_usd")
        page.wait_for_url("**/login?to=*")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/figure/cost_usd*")
        assert page.evaluate("document.cookie") == ""
        page.get_by_text("looker (a)").wait_for()
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/login")


def test_no_other_site_signs_anybody_in_or_out(guarded: Client, token: str) -> None:
    for foreign in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        for path, form in (("/login", {"token": token}), ("/logout", {})):
            answer = guarded.post(path, data=form, headers=foreign, follow_redirects=False)
            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    own = {"origin": "http://127.0.0.1:8700", "sec-fetch-site": "same-origin"}
    assert (
        guarded.post("/login", data={"token": token}, headers=own, follow_redirects=False).status_code == 303
    )


def test_a_form_of_too_many_fields_is_refused(guarded: Client) -> None:
    answer = guarded.post("/login", data={f"f{n}": "" for n in range(1_001)})
    assert (answer.status_code, "1000 fields" in answer.json()["detail"]) == (400, True)
