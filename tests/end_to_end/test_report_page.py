"""The page in a real Chromium: it opens without a complaint, and does what it offers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lighten import report
from report_runs import HOSTILE, NETWORK_METRICS, look, make_run

WIDTHS = (1280, 390)
each_width = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests; skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no chromium here")
    with api.sync_playwright() as player:
        sandbox = [] if os.name == "nt" or os.geteuid() else ["--no-sandbox"]
        made = player.chromium.launch(executable_path=found, args=sandbox)
        yield made
        made.close()


class Tab:
    """An open page and what it complained of."""

    def __init__(self, browser: Any, path: Path, width: int, **how: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.fetched.append(r.url))
        self.page.goto(path.as_uri())
        if how.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-ready=charts]", state="attached")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def scroll_through(self) -> None:
        """So that every chart is drawn."""
        self.page.evaluate(
            """async () => { for (let y = 0; y < document.body.scrollHeight; y += 600) {
                 scrollTo({top: y, behavior: "instant"});
                 await new Promise((done) => setTimeout(done, 30)); } }"""
        )
        self.page.wait_for_function(
            """() => [...document.querySelectorAll('.chart[data-chart]')]
                       .every((el) => el.querySelector('.main-svg'))"""
        )

    def wait_for_focus(self, text: str) -> None:
        """Focus moves by the `close` event, a task after a dialog is shut."""
        self.page.wait_for_function("text => document.activeElement.textContent === text", arg=text)

    @property
    def overflow(self) -> int:
        found: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return found

    def shown(self) -> list[str]:
        """The names of the rows of layers that can be seen, in their order."""
        rows = self.page.locator("#layers tbody tr:not([hidden]) .open")
        names: list[str] = rows.all_inner_texts()
        return names


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that several tests open."""
    root = tmp_path_factory.mktemp("report")
    text = make_run(root / "text", "text", history=True)
    network = make_run(root / "network", "network", history=True)
    killed = make_run(root / "killed", "text", finished=False, shown={})
    return {
        "text": report.write(text, lang="en"),
        "network": report.write(network, lang="en"),
        "killed": report.write(killed, lang="en"),
        "compare": report.write([text, network, killed], lang="en"),
    }


@each_width
@pytest.mark.parametrize("name", ["text", "network", "killed", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_complaint(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with Tab(browser, pages[name], width, color_scheme=scheme) as tab:
        tab.scroll_through()
        assert tab.complaints == []
        assert tab.overflow <= 0, "nothing is wider than the window"
        outside = [u for u in tab.fetched if not u.startswith(("file:", "blob:", "data:"))]
        assert outside == []
        if name == "killed":
            assert "This run is not finished." in tab.page.inner_text("#glance")


def test_the_table_sorts(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        first = tab.shown()
        head = tab.page.locator("#layers th:has([data-sort=before])")
        assert head.get_attribute("aria-sort") is None
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending", "the largest first"
        assert tab.shown() == first[::-1]
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        assert tab.shown() == first
        tab.page.click("[data-sort=name]")
        assert tab.shown() == sorted(first)
        assert head.get_attribute("aria-sort") == "none"
        assert tab.page.locator("#layers th[aria-sort=ascending]").count() == 1


def test_the_table_is_searched(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        tab.page.fill("#search", "blocks.1 up")
        assert tab.shown() == ["blocks.1.up"]
        assert tab.page.inner_text("#found") == "1 of 12 layers"
        tab.page.fill("#search", "nothing like it")
        assert tab.shown() == []
        tab.page.fill("#search", "")
        assert len(tab.shown()) == 12


@each_width
def test_a_layer_opens_and_closes(browser: Any, pages: dict[str, Path], width: int) -> None:
    with Tab(browser, pages["network"], width) as tab:
        page = tab.page
        page.locator("#layers tbody tr").nth(2).click()
        assert page.inner_text("#panel-title") == "blocks.0.v.weight"
        page.wait_for_selector("#panel-charts .main-svg")
        charts = page.locator("#panel-charts .chart")
        assert charts.count() == 2
        facts = page.inner_text("#panel-facts")
        assert "−2.50 … 3.00, 8 bits, by mse" in facts
        assert tab.overflow <= 0
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#panel-title") == "blocks.0.o.weight"
        page.keyboard.press("Escape")
        tab.wait_for_focus("blocks.0.o")
        assert not page.evaluate("document.querySelector('#panel').open")
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('#panel').open")
        assert tab.complaints == []


def test_an_axis_leads_to_its_layers(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["network"], 1280) as tab:
        tab.page.click("button[data-layer='blocks.0.down.weight']")
        assert tab.page.inner_text("#panel-title") == "blocks.0.down.weight"
        assert "blocks.0.up.weight" in tab.page.inner_text("#panel-axes")


def test_the_language_changes_without_a_reload(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        page = tab.page
        tab.scroll_through()
        before = page.evaluate("performance.timeOrigin")
        page.click("[data-lang=zh]")
        assert page.get_attribute("html", "lang") == "zh"
        assert "文件大小" in page.inner_text("#glance")
        assert "缩小到 1/2.5" in page.inner_text("h1")
        assert page.get_attribute("#search", "placeholder") == "搜索：名称、格式、类型"
        assert "文件大小" in page.text_content("#curve .chart")
        page.locator("#layers tbody tr").first.click()
        assert "敏感度" in page.inner_text("#panel-facts")
        page.keyboard.press("Escape")
        page.click("[data-lang=en]")
        assert "File size".lower() in page.inner_text("#glance").lower()
        assert page.evaluate("performance.timeOrigin") == before
        assert tab.complaints == []


def test_light_and_dark(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280, color_scheme="light") as tab:
        colour = "getComputedStyle(document.body).backgroundColor"
        light = tab.page.evaluate(colour)
        tab.page.click("#theme")
        dark = tab.page.evaluate(colour)
        assert light == "rgb(255, 255, 255)"
        assert dark != light
        tab.page.click("#theme")
        assert tab.page.evaluate(colour) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_paper(
    browser: Any, pages: dict[str, Path], scheme: str
) -> None:
    """WCAG AA asks for 4.5 between text and what is behind it."""
    pairs = [
        ("ink", "paper"), ("soft", "paper"), ("soft", "raised"), ("ink", "raised"),
        ("after", "paper"), ("bad", "paper"), ("bad", "bad-paper"), ("warn", "warn-paper"),
        ("ink", "bad-paper"), ("ink", "warn-paper"), ("paper", "ink"),
    ]  # fmt: skip
    with Tab(browser, pages["text"], 1280, color_scheme=scheme) as tab:
        for text, paper in pairs:
            a, b = (
                _luminance(tab.page.evaluate(
                    f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
                ))
                for name in (text, paper)
            )  # fmt: skip
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (text, paper)


def _luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_terms_are_explained_to_pointer_and_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        page = tab.page
        page.hover("[data-term=mean_kld] >> nth=0")
        assert "Kullback-Leibler" in page.inner_text("#tip")
        page.mouse.move(0, 0)
        page.focus("[data-term=perplexity] >> nth=0")
        assert "unsure" in page.inner_text("#tip")
        page.keyboard.press("Escape")
        assert page.is_hidden("#tip")
        described = page.get_attribute("[data-term=mean_kld] >> nth=0", "aria-describedby")
        assert page.locator(f"#{described}").count() == 1


def test_tokens_show_their_number(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        page = tab.page
        page.hover(".tokens i >> nth=1")
        assert page.inner_text("#tip") == "cat · 1.7 nats"
        page.focus(".tokens >> nth=0")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#tip") == "cat · 1.7 nats"


def test_the_curve_is_chosen_by_buttons(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["text"], 1280) as tab:
        page = tab.page
        tab.scroll_through()
        chart = "document.querySelector('[data-chart^=curve]')"
        page.click("[data-cost=macs]")
        page.click("[data-quality=top1_agreement]")
        assert page.evaluate(f"{chart}.layout.xaxis.title.text") == "Multiply-adds, M"
        assert page.evaluate(f"{chart}.layout.yaxis.title.text") == "Same first choice, %"
        page.click("[data-log=xaxis]")
        assert page.evaluate(f"{chart}.layout.xaxis.type") == "log"
        page.click("[data-cost=bytes]")
        assert page.evaluate(f"{chart}.layout.xaxis.type") == "log", "it stays as chosen"
        page.click("[data-side=before]")
        tree = "document.querySelector('[data-chart=\"treemap:before\"]').data[0].values[0]"
        assert page.evaluate(tree) > 0
        assert tab.complaints == []


@each_width
def test_hostile_names_are_shown_and_not_run(browser: Any, tmp_path: Path, width: int) -> None:
    shown = look("network")
    for layer in shown["layers"]:
        layer["name"] += HOSTILE
        layer["block"] = layer["kind"] = layer["format"] = layer["error_kind"] = HOSTILE
    shown["axes"][0] |= {"name": HOSTILE, "writers": [HOSTILE], "readers": [HOSTILE]}
    shown["axes"][1]["locked"] = HOSTILE
    shown["curve"][1]["plan"] = HOSTILE
    shown["differences"]["classes"] = [HOSTILE, "dog"]
    metrics = {**NETWORK_METRICS, "notes": [HOSTILE], "problems": [HOSTILE], "data": HOSTILE}
    folder = make_run(tmp_path / "run", "network", metrics=metrics, shown=shown)
    with Tab(browser, report.write(folder, lang="en"), width) as tab:
        tab.scroll_through()
        tab.page.locator("#layers tbody tr").first.click()
        tab.page.wait_for_selector("#panel-charts .main-svg")
        tab.page.keyboard.press("Escape")
        tab.page.click("[data-lang=zh]")
        assert tab.page.evaluate("window.hacked === undefined")
        assert "<script>window.hacked=1</script>" in tab.page.inner_text("#layers")
        assert tab.overflow <= 0
        assert tab.complaints == []


@pytest.mark.parametrize("name", ["text", "network"])
def test_without_javascript_the_numbers_are_there(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    with Tab(browser, pages[name], 1280, java_script_enabled=False) as tab:
        assert "all numbers are in the tables" in tab.page.inner_text("body")
        assert tab.page.locator("#layers tbody tr").count() == 12


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["network"], 1280, color_scheme="dark") as tab:
        tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert tab.page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
        tab.page.emulate_media(media="print")
        assert tab.page.is_hidden(".bar")
        assert tab.page.evaluate("getComputedStyle(document.body).color") == "rgb(26, 29, 33)"
        assert tab.page.pdf()[:5] == b"%PDF-"
        assert tab.complaints == []
