"""The page, used as a person does, in Chromium against a server."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from serving.app import Online
from serving.export import export
from serving.history import Event
from serving.index import IndexSettings
from serving.keys import add
from tests.serving.conftest import ATTRIBUTES, KINDS, TEXTS, stocked, write_run, write_shop
from tests.serving.online import made
from tests.serving.servers import free_port

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def running(online: Online) -> Iterator[str]:
    """The address of the application, served in a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(online, "127.0.0.1", port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        online.service.store.close()


@pytest.fixture(scope="module")
def online(stocked_bundles: dict[str, Path]) -> Online:
    return made(stocked_bundles["exact"])


@pytest.fixture(scope="module")
def address(online: Online) -> Iterator[str]:
    with running(online) as address:
        yield address


class Visit:
    """The page as one person has it open; what its browser was asked for, complained of and got from the API is kept."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.address, self.page = address, context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.answers: list[dict[str, Any]] = []
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def settle(self) -> None:
        """Wait until the lists are those of what is chosen."""
        expect(self.page.locator("#lists")).to_have_attribute("aria-busy", "false")

    def add(self, words: str) -> None:
        """Search and take what is found first."""
        self.page.get_by_role("combobox", name="Search items").fill(words)
        self.page.get_by_role("option").first.filter(has_text=words).wait_for()
        self.page.keyboard.press("Enter")
        self.settle()

    def answer(self) -> dict[str, Any]:
        """What the API told last."""
        return self.answers[-1]

    @property
    def history(self) -> list[str]:
        return self.page.locator("#history .title").all_inner_texts()

    @property
    def places(self) -> Locator:
        return self.page.locator(".list [data-item]")

    @property
    def ids(self) -> list[str]:
        return [row.get_attribute("data-item") or "" for row in self.places.all()]
