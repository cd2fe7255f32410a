"""A real browser before the page, and an endpoint behind it whose answers are made up."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.stand_in import StandIn, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; tests of the page are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install it")
    if CHROMIUM is None:
        pytest.skip("the page is tested in chromium, which is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def endpoint() -> Iterator[StandIn]:
    with serving(StandIn()) as stand_in:
        yield stand_in


@pytest.fixture
def context(browser: Any, endpoint: StandIn) -> Iterator[Any]:
    """A browser window of its own, that asks nobody but the endpoint and finds nothing to complain about."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=endpoint.url)
    context.set_default_timeout(20_000)
    complaints: list[str] = []

    def listen(page: Any) -> None:
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not is_ours(request.url) else None)
        page.on("response", lambda answer: complaints.append(answer.url) if is_missing(answer) else None)

    def is_ours(url: str) -> bool:
        return url.startswith((endpoint.url + "/", "blob:" + endpoint.url))

    def is_missing(answer: Any) -> bool:
        return answer.status >= 400 and "/v1/" not in answer.url

    context.on("page", listen)
    yield context
    context.close()
    # The browser's own line about an answer of the API that a test made fail.
    assert [line for line in complaints if not line.startswith("Failed to load resource")] == []


@pytest.fixture
def page(context: Any) -> Any:
    """The page, open and acquainted with its endpoint."""
    page = context.new_page()
    page.goto("/")
    return page
