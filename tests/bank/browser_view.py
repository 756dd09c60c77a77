"""The page of a bank in a browser: it loads, asks for nothing, and a click or a search changes the pictures. `make test-view`."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from metamask_ext.bench.bank import make_bank
from playwright.sync_api import sync_playwright
from torch import nn

from metamask_ext import MaskBank
from metamask_ext.bank.page import page
from metamask_ext.nn import MaskedLinear


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "set CHROMIUM to the browser's path"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Shown:
    def __init__(self, browser, folder, text):
        path = folder / "view.html"
        path.write_text(text)
        self.wrong = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or self.wrong.append(asked.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)

    def title(self):
        return self.page.text_content("#masks-title")

    def masks(self):
        return self.page.evaluate("JSON.stringify(['mask-a', 'mask-b'].map((id) => document.getElementById(id).data[0].z))")

    def click(self, name):
        box = self.page.locator(f"#{name} .nsewdrag").first.bounding_box()
        self.page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.3 * box["height"])
        self.page.wait_for_timeout(500)


def test_a_click_and_a_search_change_the_pictures(browser, tmp_path):
    bank = MaskBank(nn.Sequential(MaskedLinear(20, 10), MaskedLinear(10, 4)))
    for name in ["digits", "letters", "<b>bold</b> & more", "faces", "signs"]:
        bank.add_task(name)
        bank.record(name, accuracy=0.9)
        bank.pack(name)
        bank.record(name, accuracy=0.8)
    bank.save(tmp_path / "bank")
    shown = Shown(browser, tmp_path, page(tmp_path / "bank"))
    for picture in ("mask-a", "mask-b", "mask-difference", "overlap", "density", "used", "layers", "accuracy"):
        assert shown.page.locator(f"#{picture} .main-svg").count() > 0, picture
    for click in ("overlap", "density"):
        before = shown.title(), shown.masks()
        shown.click(click)
        assert shown.title() != before[0] and shown.masks() != before[1], click
    shown.page.fill("#a", "bold")
    shown.page.keyboard.press("Tab")
    assert "<b>bold</b> & more beside" in shown.title()
    shown.page.fill("#a", "nothing")
    shown.page.keyboard.press("Tab")
    assert "no task has" in shown.page.text_content("#found") and "bold" in shown.title()
    before = shown.masks()
    shown.page.select_option("#layer", "1")
    assert shown.masks() != before
    assert shown.wrong == []


def test_2000_tasks(browser, tmp_path):
    make_bank(2000).save(tmp_path / "bank")
    begin = time.perf_counter()
    text = page(tmp_path / "bank")
    took = time.perf_counter() - begin
    print(f"2,000 tasks: {took:.1f} s, {len(text) / 1e6:.1f} MB")
    assert took < 10 and len(text) < 20e6
    shown = Shown(browser, tmp_path, text)
    before = shown.title()
    shown.click("overlap")
    assert shown.title() != before and shown.wrong == []
