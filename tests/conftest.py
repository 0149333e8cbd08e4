"""Settings of all tests, and the browser of those that look."""

import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

# The machine is shared: how long an example takes says nothing, so no test may fail by the clock.
settings.register_profile("pertoken", deadline=None, print_blob=True)
settings.load_profile("pertoken")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. Playwright keeps the thread's event loop, so it lives no longer than a module."""
    path = shutil.which("chromium")
    assert path, "make test installs Chromium; without make: apt-get install chromium"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=quiet)
        yield found
        found.close()
