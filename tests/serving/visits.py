"""Chromium, and what a user of the chat page does in it and sees."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 20_000  # milliseconds; what does not come by then never comes


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window. Skips the test where there is none."""
    path = os.environ.get("DUETVL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium: DUETVL_CHROMIUM is not set, and none of {', '.join(NAMES)} is on the path")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page at an address, in a browser profile of its own. As a context it is closed at the end, and what went wrong
    in the page meanwhile (errors, warnings, dialogs, requests to elsewhere) fails the test.
    """

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        self.address = address
        self.problems: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.tab()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert not self.problems, self.problems

    def tab(self) -> Any:
        """Another tab of the same browser profile."""
        page = self.context.new_page()
        page.on("console", self.logged)
        page.on("pageerror", lambda problem: self.problems.append(str(problem)))
        page.on("request", self.asked)
        page.on("dialog", lambda dialog: self.problems.append(f"a dialog: {dialog.message}"))
        page.goto(self.address)
        page.wait_for_selector("#welcome:not([hidden]), .turn")
        return page

    def logged(self, message: Any) -> None:
        # A status that is not 200 is one of the things that tests provoke.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)

    def asked(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:" + self.address, "data:")):
            self.problems.append(f"asked {request.url}")

    # What a user does and sees.

    def send(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def see(self, selector: str, text: str | re.Pattern[str], nth: int = -1) -> None:
        self.expect(self.page.locator(selector).nth(nth)).to_contain_text(text)

    def count(self, selector: str, number: int) -> None:
        self.expect(self.page.locator(selector)).to_have_count(number)

    def becomes(self, selector: str, condition: str) -> None:
        """Wait until a function of the element is true. (The page's policy refuses playwright's own way to wait.)"""
        for _ in range(PATIENCE // 20):
            if self.page.eval_on_selector(selector, condition):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"{selector} never became {condition}")

    def press(self, label: str, nth: int = -1) -> None:
        self.page.get_by_label(label, exact=True).nth(nth).click()

    def source(self) -> str:
        """The last answer of the newest chat as it was sent: what its copy button copies."""
        chats = self.page.evaluate(
            """() => new Promise((resolve) => {
              indexedDB.open("duetvl").onsuccess = ({ target }) => {
                const all = target.result.transaction("chats").objectStore("chats").getAll();
                all.onsuccess = () => resolve(all.result);
              };
            })"""
        )
        turn = max(chats, key=lambda chat: chat["changed"])["turns"][-1]
        return turn["versions"][turn["shown"]]["text"]

    def drop(self, event: str, name: str, kind: str, content: bytes) -> None:
        transfer = self.page.evaluate_handle(
            """([text, name, type]) => {
              const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], name, { type }));
              return transfer;
            }""",
            [base64.b64encode(content).decode(), name, kind],
        )
        if event == "paste":  # dispatch_event makes no ClipboardEvent with data
            self.page.evaluate(
                "(data) => document.querySelector('#message').dispatchEvent("
                "new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true }))",
                transfer,
            )
        else:
            self.page.dispatch_event("#scroller", event, {"dataTransfer": transfer})


def picture(width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (15, 118, 110)).save(file, kind)
    return file.getvalue()


def sent_picture(message: dict[str, Any], nth: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(message["content"][nth]["image_url"]["url"].partition(",")[2])))
