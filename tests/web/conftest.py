"""One server and one browser for all tests of the page."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import FOLDERS, LIMITS, running_site

from latentdiff.web.jobs.models import Models
from latentdiff.web.serve import Site

# Without a sandbox, which containers do not allow, and without the browser's own calls to its maker
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 90_000  # milliseconds; other programs may want the processors too


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory) -> Path:
    """The folder of runs that the server shows. Tests put runs into it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def models() -> Models:
    """The two models of the repository, as the process that computes has them."""
    return Models(FOLDERS)


@pytest.fixture(scope="session")
def site(tmp_path_factory, runs_folder) -> Iterator[Site]:
    """The server: the two models of the repository, a folder of runs, and low limits."""
    with running_site(FOLDERS, runs_folder, LIMITS, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium. Without one the tests fail: a page that nobody has opened is not tested."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no chromium: install it (apt-get install chromium)"
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        running.close()


@dataclass
class Visit:
    """A visitor's tab of the browser: its page, what the console said, and every address that was asked for."""

    page: Page
    console: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def visit(site, browser) -> Iterator[Visit]:
    """The page, open and ready. After the test: no error on the console, and nothing was asked of another server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visitor = Visit(context.new_page())
    visitor.page.set_default_timeout(PATIENCE)
    visitor.page.on("console", lambda message: visitor.console.append(message.text) if message.type == "error" else None)
    visitor.page.on("pageerror", lambda error: visitor.console.append(str(error)))
    visitor.page.on("request", lambda request: visitor.asked.append(request.url))
    visitor.page.goto(site.url)
    visitor.page.get_by_role("tab", name="Generate").wait_for()
    yield visitor
    context.close()
    assert visitor.console == []
    elsewhere = [url for url in visitor.asked if not url.startswith((site.url, "data:", "blob:"))]
    assert elsewhere == []
