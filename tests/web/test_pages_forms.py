"""Compare and Plan: a form that runs as it stands, keeps what was typed, opens nothing, and shows what was found."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from pertoken.scenario import parse
from pertoken.web import runs as web_runs
from pertoken.web.runs import Bounds, Runs
from pertoken.web.tokens import Tokens
from tests.web.conftest import DARK_PHONE, LIGHT, Client, serving, watched
from tests.web.test_who import bearer

VERBS = ("compare", "plan")
PATIENCE_S = 120.0
SHORT = {"days": "2", "against": ""}


def filled(client: Client, verb: str, **headers: str) -> dict[str, str]:
    """What a browser would send of the form as it is served, without pressing a button."""
    text = client.get(f"/{verb}", headers=headers).text
    form = re.search(r'<form method="post" action="/\w+" id="scenario".*?</form>', text, re.DOTALL)
    assert form
    fields: dict[str, str] = {}
    for tag in re.findall(r"<input [^>]*>", form[0]):
        given = dict(re.findall(r'([a-z-]+)="([^"]*)"', tag))
        if given.get("type") != "checkbox" or tag.endswith(" checked>"):
            fields[given["name"]] = unescape(given.get("value", ""))
    for name, options in re.findall(
        r'<select id="[^"]*" name="([^"]*)".*?>\n?(.*?)</select>', form[0], re.DOTALL
    ):
        chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', options)
        first = re.search(r'<option(?: value="([^"]*)")?[^>]*>([^<]*)', options)
        found = chosen or first
        assert found
        fields[name] = unescape(found[1] if found[1] is not None else found[2])
    area = re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", form[0], re.DOTALL)
    assert area
    fields["text"] = unescape(area[1])
    return fields


def started(client: Client, verb: str, **changes: str) -> str:
    """The address of a run of the form with these changes."""
    sent = {**filled(client, verb), **SHORT, "do": "run", **changes}
    answer = client.post(f"/{verb}", data=sent, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def ended(client: Client, address: str) -> str:
    """The page of a run that is over."""
    client.get(address)
    runs: Runs = client.app.state.runs  # type: ignore[attr-defined]
    run = runs.get(address.rpartition("/")[2])
    assert run is not None
    assert runs.wait(run, PATIENCE_S)
    return client.get(address).text


@pytest.mark.parametrize("verb", VERBS)
def test_the_form_can_be_run_as_it_stands(client: Client, verb: str) -> None:
    address = started(client, verb)
    page = ended(client, address)
    assert '<p class="problem" role="alert">' not in page
    assert "USD per M tokens" in page
    assert 'class="tiles"' in page
    text = client.get(f"{address}.yaml").text
    assert text.splitlines()[0].startswith(f"# pertoken {verb} scenario.yaml")
    scenario = parse(text)
    assert scenario.horizon.days == 2
    result = client.get(f"{address}.json").json()
    assert result["scenario"] == scenario.name
    assert list(csv.DictReader(io.StringIO(client.get(f"{address}.csv").text)))
    figures = sorted(set(re.findall(rf'href="({address}/figure/\d+)\.png"', page)))
    assert figures
    for figure in figures:
        assert client.get(f"{figure}.vl.json").json()["$schema"].startswith("https://vega.github.io/")
    assert client.get(f"{figures[0]}.png").content.startswith(b"\x89PNG")
    for wrong in (
        f"{address}.exe",
        f"{address}/figure/99.png",
        f"{figures[0]}.svg",
        f"{address}/figure/x.png",
    ):
        assert client.get(wrong).status_code == 404
    assert (client.get(f"{address}.ics").status_code == 200) is (verb == "plan")


def test_a_figure_on_the_page_is_a_figure_of_the_ledger(client: Client) -> None:
    address = started(client, "compare")
    page = ended(client, address)
    options = client.get(f"{address}.json").json()["workloads"]["serving"]["options"]
    cheapest = min(o["metrics"]["usd_per_mtok_total"] for o in options if not o.get("refused"))
    tile = re.search(r'class="value">([\d.]+)</span> <span class="unit">USD per M tokens', page)
    assert tile
    assert float(tile[1]) == pytest.approx(cheapest, rel=0.005)


def test_what_is_ticked_is_run_and_stays_ticked(client: Client) -> None:
    address = started(client, "plan", keep="on", prices="on", against="")
    page = ended(client, address)
    assert "at the margin" in page
    assert client.get(f"{address}.json").json()["shadow_prices"]
    assert "--keep --prices" in client.get(f"{address}.yaml").text.splitlines()[0]
    for name in ("keep", "prices"):
        assert re.search(rf'name="{name}" type="checkbox" value="on" checked>', page)


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_input_keeps_what_was_typed_and_says_one_line(client: Client, verb: str) -> None:
    typed = {
        **filled(client, verb), "pue": "very much", "name": "my <own> name", "budget_usd": "77", "gpu-5": "B200",
        "do": "run",
    }  # fmt: skip
    answer = client.post(f"/{verb}", data=typed)
    assert answer.status_code == 422
    told = re.findall(r'<p class="problem" role="alert" id="problem">(.*?)</p>', answer.text)
    assert len(told) == 1
    assert "a name begins with a letter" in told[0] or "PUE" in told[0]
    for name, value in (
        ("pue", "very much"),
        ("name", "my &lt;own&gt; name"),
        ("budget_usd", "77"),
        ("gpu-5", "B200"),
    ):
        assert re.search(rf'name="{name}"[^>]* value="{value}"', answer.text), name
    fixed = client.post(f"/{verb}", data={**typed, "name": "mine"})
    assert '<a href="#pue">PUE: &#39;very much&#39; is no number</a>' in fixed.text
    assert re.search(r'name="pue"[^>]* aria-invalid="true" aria-describedby="problem"', fixed.text)


@pytest.mark.parametrize(
    ("option", "value"), [("gap_percent", "-1"), ("time_limit_s", "1e9"), ("values", "a, b")]
)
def test_a_wrong_option_is_said_like_a_wrong_field(client: Client, option: str, value: str) -> None:
    sent = {**filled(client, "plan"), option: value, "do": "run"}
    answer = client.post("/plan", data=sent)
    assert answer.status_code == 422
    assert f'<a href="#{option}">' in answer.text
    assert f'value="{value}"' in answer.text


def test_the_text_is_the_one_source(client: Client) -> None:
    form = filled(client, "compare")
    written = client.post("/compare", data={**form, "name": "renamed", "do": "write"}).text
    assert "name: renamed" in written
    # Changed by hand, the fields do not write over it unless told to.
    by_hand = form["text"].replace("name: serving", "name: by hand")
    clash = client.post("/compare", data={**form, "text": by_hand, "do": "run"})
    assert clash.status_code == 422
    assert "changed by hand" in clash.text
    assert "name: by hand" in clash.text
    over = client.post("/compare", data={**form, "text": by_hand, "do": "write"}).text
    assert "name: serving" in over
    ran = client.post(
        "/compare", data={**form, "text": by_hand.replace("\n", "\r\n"), "do": "text"}, follow_redirects=False
    )
    assert ran.status_code == 303
    address = ran.headers["location"]
    assert "name: by hand\n" in client.get(f"{address}.yaml").text
    assert "\r" not in client.get(f"{address}.yaml").text
    assert "no fields say the same" in client.get(address).text
    told = client.post(
        "/compare", data={**form, "do": "write", "pue": "x"}, headers={"accept": "application/json"}
    ).json()
    assert (told["at"], told["problem"]) == ("pue", "PUE: 'x' is no number")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (r"tariff: [^}]*", "tariff: {csv: /etc/passwd}", "no file of this machine is opened"),
        (r"model: meta.*", "model: {config: ../../data/tokens.json}", "no file of this machine is opened"),
        (r"name: .*", "name: !!python/object/apply:os.system [id]", "not YAML"),
        (r"name: .*", "name: &a x\nb: [*a, *a]", "anchors and aliases"),
        (r"pue: 1.3", "pue: 0.2", "greater than or equal to 1"),
    ],
)
def test_hostile_text_is_refused_in_one_line(client: Client, old: str, new: str, told: str) -> None:
    form = filled(client, "plan")
    text = re.sub(old, new, form["text"], count=1)
    answer = client.post("/plan", data={**form, "text": text, "do": "text"})
    assert answer.status_code == 422
    problem = re.findall(r'id="problem">(?:<a href="#text">)?(.*?)(?:</a>)?</p>', answer.text)
    assert len(problem) == 1
    assert told in problem[0]
    assert new.splitlines()[0].partition(":")[0] in unescape(answer.text)
    assert "root:" not in answer.text


def test_too_much_is_refused_before_it_is_read(client: Client) -> None:
    form = filled(client, "plan")
    assert client.post("/plan", data={**form, "text": "x" * 10_000_000, "do": "text"}).status_code == 413
    assert client.post("/plan", data={**form, "text": "x" * 70_000, "do": "text"}).status_code == 422
    # More fields than a form has are no reason for more than an answer.
    assert (
        client.post("/plan", data={**form, **{f"gpu-{n}": "x" for n in range(500)}, "do": "run"}).status_code
        == 422
    )


def test_a_line_that_is_full_asks_to_come_back_and_keeps_the_form(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_runs, "Bounds", lambda: Bounds(waiting=0))
    form = filled(client, "plan")
    answer = client.post("/plan", data={**form, "name": "later", "do": "run"}, follow_redirects=False)
    assert answer.status_code == 429
    assert "busy" in answer.text
    assert 'value="later"' in answer.text
    # What was asked is kept: its address works as soon as there is room, and until then says so.
    [asked] = (client.app.state.service.books.folder / "runs").glob("*.json")  # type: ignore[attr-defined]
    again = client.get(f"/plan/{asked.stem}")
    assert again.status_code == 429
    assert "busy" in again.text
    assert client.post(f"/plan/{asked.stem}/again").status_code == 429


def test_a_link_reproduces_the_run_after_a_restart(client_of: Callable[..., Client], tmp_path: Path) -> None:
    first = client_of()
    address = started(first, "compare", name="linked")
    before = first.get(f"{address}.yaml").text
    ended(first, address)
    whole = first.get(f"{address}.json").json()
    first.__exit__(None, None, None)
    assert first.app.state.runs._over  # type: ignore[attr-defined]
    later = client_of()
    assert later.get(f"{address}.json").status_code == 404
    page = ended(later, address)
    assert 'value="linked"' in page
    assert later.get(f"{address}.yaml").text == before
    assert later.get(f"{address}.json").json() == whole
    for nobody in ("/plan/" + address.rpartition("/")[2], "/compare/" + "0" * 64, "/compare/..%2ftokens"):
        assert later.get(nobody).status_code == 404


def test_a_plan_starts_from_what_runs(client: Client) -> None:
    text = client.get("/plan", params={"start": "fleet"}).text
    assert "the running fleet: h100, api" in text
    area = re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", text, re.DOTALL)
    assert area
    scenario = parse(unescape(area[1]))
    assert set(scenario.pools) == {"h100", "api"}
    assert scenario.pools["h100"].have
    assert scenario.horizon.timezone == "UTC"
    assert client.get("/plan", params={"start": "nowhere"}).status_code == 400


def test_an_impossible_plan_says_what_would_free_it(client: Client) -> None:
    page = ended(client, started(client, "plan", budget_usd="0.01"))
    assert '<p class="problem" role="alert">' in page
    assert "To fix" in page
    assert "what would free it" in page
    assert "Run it again" in page
    assert 'name="budget_usd" type="text" value="0.01"' in page


def test_an_admin_keeps_a_plan_and_it_can_be_held_against_what_happens(client: Client) -> None:
    address = started(client, "plan", name="week")
    ended(client, address)
    kept = client.post(f"{address}/keep", data={"name": "spring"})
    assert kept.status_code == 200
    assert "Kept as plan:spring" in kept.text
    cost = client.get("/v1/cost", params={"book": "plan:spring"}).json()["rows"]
    want = client.get(f"{address}.json").json()["cost_usd"]
    assert sum(float(r["cost_usd"]) for r in cost) == pytest.approx(want, abs=0.005)
    for name in ("actual", "", "../x", "<b>"):
        assert client.post(f"{address}/keep", data={"name": name}).status_code == 400, name
    assert client.post(f"/plan/{'0' * 64}/keep", data={"name": "x"}).status_code == 400


def test_who_may_do_what(client_of: Callable[..., Client], tmp_path: Path) -> None:
    client = client_of(require_tokens=True)
    tokens = Tokens(tmp_path / "data")
    boss, reads = (bearer(tokens.add(n, (s,))) for n, s in (("boss", "admin"), ("eye", "read")))
    other = bearer(tokens.add("other", ("read",)))
    shop = bearer(tokens.add("shop", ("read",), tenant="a"))
    writes = bearer(tokens.add("w", ("write",)))
    sent = {
        **filled(client, "plan", **reads),
        "do": "run",
        "gap_percent": "0",
        "days": "14",
        "time_limit_s": "300",
    }
    made = client.post("/plan", data=sent, headers=reads, follow_redirects=False)
    address = str(made.headers["location"])
    doors: list[tuple[str, str]] = [("GET", "/planning.json")]
    for verb in VERBS:
        run = f"/{verb}/{address.rpartition('/')[2]}"
        doors += [("GET", f"/{verb}"), ("POST", f"/{verb}"), ("GET", run), ("GET", f"{run}/progress")]
        doors += [("GET", f"{run}{end}") for end in (".json", ".csv", ".ics", ".changes.csv", ".yaml")]
        doors += [("GET", f"{run}/figure/0.{end}") for end in ("png", "vl.json")]
        doors += [("POST", f"{run}/{end}") for end in ("cancel", "again")]
    doors.append(("POST", f"{address}/keep"))
    for method, path in doors:
        assert client.request(method, path).status_code == 401, path
        for who in (shop, writes):
            answer = client.request(method, path, headers=who)
            assert answer.status_code == 403, path
            assert "groq" not in answer.text
    assert client.post(f"{address}/cancel", headers=other).status_code == 403
    assert client.post(f"{address}/keep", data={"name": "x"}, headers=reads).status_code == 403
    assert client.post(f"{address}/cancel", headers=boss, follow_redirects=False).status_code == 303
    seen = ended_for(client, address, reads)
    assert "keep this plan" not in seen
    assert "Hold what really happens" not in seen
    # A tenant's token is not even shown the way.
    looking = client.get("/figure/cost_usd", headers={**shop, "accept": "text/html"})
    assert 'href="/plan"' not in looking.text


def ended_for(client: Client, address: str, who: dict[str, str]) -> str:
    until = time.monotonic() + PATIENCE_S
    while client.get(f"{address}/progress", headers=who).json()["state"] in ("waiting", "running"):
        assert time.monotonic() < until
        time.sleep(0.1)
    return client.get(address, headers=who).text


@pytest.mark.parametrize("path", ["/plan", "/compare", f"/plan/{'0' * 64}/again", f"/plan/{'0' * 64}/keep"])
def test_another_sites_page_cannot_use_a_browsers_cookie(
    client_of: Callable[..., Client], tmp_path: Path, path: str
) -> None:
    client = client_of(require_tokens=True)
    token = Tokens(tmp_path / "data").add("boss", ("admin",))
    client.cookies.set("pertoken", token)
    for foreign in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert client.post(path, data={"do": "run"}, headers=foreign).status_code == 403
    own = client.post(path, data={"do": "run"}, headers={"origin": "http://127.0.0.1:8700"})
    assert own.status_code != 403


# --- in a browser ---


@pytest.fixture
def served(client: Client) -> Iterator[str]:
    with serving(client) as found:
        yield found


def accessible(page: Page) -> None:
    page.wait_for_function("document.querySelectorAll('.figure:not([hidden] *):not(:has(svg))').length === 0")
    found = Axe().run(page).response
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]] == []


@pytest.mark.parametrize("looks", [LIGHT, DARK_PHONE], ids=["light", "dark phone"])
def test_from_the_form_to_the_schedule(served: str, browser: Browser, looks: dict[str, Any]) -> None:
    with watched(browser, served, **looks) as page:
        page.goto(f"{served}/plan")
        accessible(page)
        page.get_by_label("days", exact=False).and_(page.locator("#days")).fill("3")
        page.locator("#against").select_option("")
        # The text follows the fields.
        page.locator("#name").fill("browser week")
        page.locator("#name").blur()
        expect(page.locator("#text")).to_have_value(re.compile("name: browser week"))
        expect(page.locator("#text")).to_have_value(re.compile("days: 3"))
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_url("**/plan/*")
        expect(page.locator("h1")).to_have_text("The plan: browser week", timeout=PATIENCE_S * 1000)
        expect(page.locator("#progress")).to_have_count(0, timeout=PATIENCE_S * 1000)
        expect(page.get_by_label("What runs when", exact=False).locator("svg")).to_be_visible()
        expect(page.get_by_role("table").filter(has_text="best single option")).to_be_visible()
        accessible(page)
        data = page.evaluate("fetch(location.pathname + '.json').then((answer) => answer.json())")
        assert data["cost_usd"] > 0


def test_rows_are_added_and_fit_what_is_bought(served: str, browser: Browser) -> None:
    with watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/compare")
        expect(page.locator("#zones option").first).to_be_attached()
        rows = page.locator("#rows .row")
        expect(rows).to_have_count(4)
        page.get_by_role("button", name="Add hardware or an API").click()
        expect(rows).to_have_count(5)
        page.locator("#term-5").select_option("reserved")
        page.locator("#gpu-5").fill("B200")
        page.locator("#gpu-5").blur()
        expect(page.locator("#api-5")).to_be_hidden()
        expect(page.locator("#have-5")).to_be_visible()
        assert page.locator("#price-5 option").count() > 0
        page.locator("#usd-5").fill("3.5")
        page.locator("#count-5").fill("8")
        page.locator("#count-5").blur()
        expect(page.locator("#text")).to_have_value(re.compile("b200-reserved"))
        page.locator("#tariff").select_option("")
        expect(page.locator("#usd_per_kwh")).to_be_enabled()
        expect(page.locator("#problem")).to_contain_text("choose a tariff, or give USD per kWh")
        expect(page.locator("#usd_per_kwh")).to_have_attribute("aria-invalid", "true")
        for _ in range(7):
            page.get_by_role("button", name="Add hardware or an API").click()
        expect(rows).to_have_count(12)
        expect(page.locator("#add-row")).to_be_hidden()


def test_wrong_input_in_a_browser_keeps_the_form(served: str, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False, **LIGHT)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{served}/compare")
    page.locator("#serve_model").fill("Llama of mine")
    page.locator("#budget_usd").fill("1234")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#problem")).to_contain_text("unknown model 'Llama of mine'")
    expect(page.locator("#serve_model")).to_have_value("Llama of mine")
    expect(page.locator("#budget_usd")).to_have_value("1234")
    expect(page.locator("#serve_model")).to_be_focused()
    page.locator("#serve_model").fill("Qwen/Qwen3-8B")
    page.get_by_role("button", name="Run", exact=True).click()
    # Without a script the page asks again by itself until there is something to look at.
    expect(page.locator(".tiles")).to_be_visible(timeout=PATIENCE_S * 1000)
    context.close()


def test_stopping_keeps_the_best_plan_so_far(served: str, browser: Browser) -> None:
    with watched(browser, served, **LIGHT) as page:
        page.goto(f"{served}/plan")
        for name, value in (("days", "20"), ("gap_percent", "0"), ("time_limit_s", "300")):
            page.locator(f"#{name}").fill(value)
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_url("**/plan/*")
        expect(page.locator("#progress-text")).to_contain_text("best ", timeout=PATIENCE_S * 1000)
        expect(page.locator("#gap svg")).to_be_visible()
        accessible(page)
        page.get_by_role("button", name="Stop: keep the best plan so far").click()
        expect(page.locator(".problem[role=alert]").first).to_have_text(
            "stopped by hand", timeout=PATIENCE_S * 1000
        )
        expect(page.locator(".tiles")).to_be_visible()
        expect(page.locator("main")).to_contain_text("stopped by hand")
        page.get_by_role("button", name="Keep").click()
        expect(page.get_by_role("status")).to_contain_text("Kept as plan:both")


def test_the_pages_lists_are_the_catalogues(client: Client) -> None:
    found = json.loads(client.get("/planning.json").text)
    assert "Europe/Berlin" in found["zones"]
    assert "groq/llama-3.3-70b-versatile" in found["apis"]
    assert found["offers"]["H100-SXM"]["on_demand"]
