"""The page in a real Chromium: nothing is fetched, nothing that a model wrote is run, every part can be used."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_evaluations import write_evaluation
from made_records import HOSTILE, candidate, record, write_arm, write_correct, write_probe, write_results, write_study

from topd.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra topd[dev]")

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=30_000)  # a busy machine draws a frame in seconds
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections; its last rollout is hostile."""
    run = write_results(tmp_path_factory.mktemp("run") / "demo")
    write_arm(run / "opd", [], logged=5, near_future=False)
    alarm = candidate(2, distance=0.05, fork=False, token="+", student_window=["only", "here"])
    spoken = {"tokens": HOSTILE, "token_loss": [3.0] * len(HOSTILE)}
    hostile = candidate(0, token=HOSTILE[0], student_window=HOSTILE, teacher_window=HOSTILE[::-1],
                        plan=[[i, i, 0.07] for i in range(len(HOSTILE))])  # fmt: skip
    records = [record(step, candidates=[candidate(), alarm]) for step in (1, 3)]
    write_arm(run / "topd", [*records, record(9, prompt=HOSTILE[1], rollout=spoken, candidates=[hostile])], logged=5)
    write_probe(run / "probe", tokens=HOSTILE)
    write_correct(run / "correct", tokens=HOSTILE)
    write_study(run, ["topd", HOSTILE[0]])
    compared = [write_evaluation(tmp_path_factory.mktemp("eval") / label, HOSTILE[0].replace("/", ""), answers)
                for label, answers in (("one", [[1, 0]] * 8), ("two", [[1, 1]] * 8))]  # fmt: skip
    return write_report(run, compare=compared)


class Opened:
    """A page, and everything it should not have done."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(viewport=DESKTOP, **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def card(self, text: str) -> Any:
        return self.page.locator("details.card", has_text=text).first


@pytest.fixture
def opened(browser: Any, everything: Path) -> Iterator[Opened]:
    found = Opened(browser, everything)
    yield found
    assert found.errors == []
    assert found.requests == [everything.as_uri()]
    found.context.close()


def test_a_click_on_a_mark_opens_both_futures_with_the_plan_between(opened: Opened) -> None:
    page = opened.page
    mark = page.locator("article", has_text="Step 3").locator("a.mark").first
    mark.click()
    card = page.locator(f"details{mark.get_attribute('href')}")
    sync_api.expect(card).to_have_attribute("open", "")
    sync_api.expect(card.locator("summary")).to_be_focused()
    assert card.locator(".ladder .student b").all_text_contents() == ["5", "+", "2"]
    assert card.locator(".ladder .teacher b").all_text_contents() == ["2", "×", "5", "+"]
    drawn = {path.get_attribute("d"): path.get_attribute("class") for path in card.locator("path").all()}
    assert drawn == {
        "M0 1C5 1 5 5 10 5": "same", "M0 3C5 3 5 7 10 7": "same",
        "M0 5C5 5 5 1 10 1": "same", "M0 5C5 5 5 3 10 3": "moved weak",
    }  # fmt: skip
    assert card.locator(".ladder svg").get_attribute("aria-label").endswith("1 to 3, 2 to 4, 3 to 1")
    rows = [item.bounding_box()["y"] for item in card.locator(".ladder .student li").all()]
    assert rows == sorted(set(rows)), "one row per token"


def test_the_link_of_a_candidate_opens_it(browser: Any, everything: Path) -> None:
    opened = Opened(browser, Path(str(everything)))
    opened.page.goto(f"{everything.as_uri()}#c1")
    sync_api.expect(opened.page.locator("details#c1")).to_have_attribute("open", "")
    opened.context.close()


def test_the_keyboard_alone_reaches_and_opens_a_candidate(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#filter input[type=radio]").first.focus()
    page.keyboard.press("ArrowRight")  # forks only
    assert page.evaluate("new FormData(document.getElementById('filter')).get('kind')") == "fork"
    page.locator("a.mark").first.focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("details.card[open] .ladder svg")).to_have_count(1)


def test_what_a_model_wrote_runs_nothing_when_everything_is_opened(opened: Opened) -> None:
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait_for_function("document.querySelectorAll('.ladder:empty').length === 0")
    page.wait_for_timeout(200)
    shown = page.locator(".ladder .student b").all_text_contents()
    assert HOSTILE[0] in shown
    assert HOSTILE[2] in shown
    assert page.locator("img, iframe, [onerror], [onmouseover], [onfocus]").count() == 0
    assert page.locator("script").count() == 2


def test_filters_by_kind_token_and_text(opened: Opened) -> None:
    page = opened.page
    visible = page.locator("details.card:not([hidden])")
    everything = page.locator("details.card").count()
    page.locator("#filter label", has_text="False alarms").click()
    assert set(visible.evaluate_all("cards => cards.map(card => card.dataset.kind)")) == {"alarm"}
    page.locator("#filter select[name=token]").select_option("+")
    assert visible.count() == 2
    page.locator("#filter select[name=source]").select_option(index=1)
    assert len(set(visible.evaluate_all("cards => cards.map(card => card.dataset.source)"))) == 1
    page.locator("#filter select[name=source]").select_option(index=0)
    page.locator("#filter input[type=search]").fill("ONLYhere")
    assert visible.count() == 2
    assert page.locator("#more-candidates output").text_content() == f"2 of 2 shown ({everything} without the filter)"
    page.locator("#filter input[type=search]").fill("nowhere")
    sync_api.expect(page.locator("#nothing")).to_be_visible()
    page.goto(f"{page.url.partition('#')[0]}#c1")  # a link to what is filtered away shows it again
    sync_api.expect(page.locator("details#c1")).to_be_visible()
    opened.requests = opened.requests[:1]


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["desktop", "phone"])
def test_anyone_can_use_it_on_any_screen(browser: Any, everything: Path, scheme: str, size: dict[str, int]) -> None:
    """axe-core finds nothing serious, and nothing sticks out sideways."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    opened = Opened(browser, everything, color_scheme=scheme, bypass_csp=True)  # axe is injected as a script
    opened.page.set_viewport_size(size)
    opened.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = axe.Axe().run(opened.page).response["violations"]
    told = [(each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")]
    assert told == []
    assert opened.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    opened.context.close()


def test_ten_candidates_are_shown_and_more_on_demand_by_keyboard(opened: Opened) -> None:
    page = opened.page
    visible, everything = page.locator("details.card:not([hidden])"), page.locator("details.card").count()
    report, (ten, everyone) = page.locator("#more-candidates output"), page.locator("#more-candidates button").all()
    assert everything > 10
    assert visible.count() == 10
    assert report.text_content() == f"10 of {everything} shown"
    distances = page.locator("details.card .distance").all_text_contents()
    known = [float(text.split()[-1]) for text in distances]
    assert known == sorted(known, reverse=True)
    ten.focus()
    page.keyboard.press("Enter")
    assert visible.count() == min(20, everything)
    assert page.evaluate("document.activeElement.closest('details').id") == "c11", "the focus is on what was added"
    if everything > 20:
        everyone.focus()
        page.keyboard.press("Space")
    assert visible.count() == everything
    assert not ten.is_visible()


def test_a_link_to_a_candidate_beyond_the_tenth_shows_it(opened: Opened) -> None:
    page = opened.page
    assert not page.locator("#c12").is_visible()
    page.evaluate("location.hash = '#c12'")
    sync_api.expect(page.locator("#c12 .ladder svg")).to_be_visible()
    page.locator("#c12 a", has_text="Whole rollout").click()
    assert page.locator("article:not([hidden]) a.mark[href='#c12']").count() == 1


def test_the_navigation_stays_at_the_top(opened: Opened) -> None:
    page = opened.page
    assert page.locator("nav").bounding_box()["y"] > 100
    page.locator("nav a", has_text="Rollouts").click()
    sync_api.expect(page.locator("#rollouts h2")).to_be_in_viewport()
    page.wait_for_timeout(1000)  # the jump is animated
    nav, heading = (page.locator(name).bounding_box() for name in ("nav", "#rollouts h2"))
    assert nav["y"] == 0
    assert heading["y"] >= nav["height"], "the heading is not under the navigation"


def test_wide_tables_say_that_they_scroll(opened: Opened) -> None:
    page = opened.page
    hint = "region => getComputedStyle(region, '::before').content"
    regions, wider = page.locator("[id^=study] .scroll"), page.locator("[id^=study] .scroll.wider")
    page.set_viewport_size({"width": 400, "height": 800})
    sync_api.expect(wider).to_have_count(regions.count())
    assert "Scroll sideways" in regions.first.evaluate(hint)
    page.set_viewport_size({"width": 1400, "height": 900})
    sync_api.expect(wider).to_have_count(0)
    assert regions.first.evaluate(hint) == "none"


def test_it_prints(browser: Any, everything: Path, tmp_path: Path) -> None:
    """Print says how many candidates are not shown."""
    opened = Opened(browser, everything)
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#more-candidates output").is_visible()
    assert not opened.page.locator("#more-candidates button").first.is_visible()
    assert not opened.page.locator("nav").is_visible()
    opened.page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
    opened.context.close()


def test_two_thousand_candidates_stay_fluid(browser: Any, tmp_path: Path) -> None:
    """Loaded, filtered and opened in times that a reader does not wait for (bounds with room for a slow machine)."""
    tokens = [f" word{index % 97}" for index in range(300)]
    plan = [[i, (7 * i) % 50, 0.02] for i in range(50)]
    many = [candidate(at, student_window=tokens[:50], teacher_window=tokens[25:75], plan=plan, token=tokens[at])
            for at in range(0, 300, 15)]  # fmt: skip
    spoken = {"tokens": tokens, "token_loss": [0.3] * len(tokens)}
    run = write_arm(tmp_path / "topd", [record(step, rollout=spoken, candidates=many) for step in range(100)])
    started = time.perf_counter()
    opened = Opened(browser, write_report(run))
    page = opened.page
    assert page.locator("details.card").count() == 2000
    loaded = time.perf_counter() - started
    search = """query => {
        const start = performance.now();
        const input = document.querySelector("#filter input[type=search]");
        input.value = query;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        document.body.getBoundingClientRect();
        return performance.now() - start;
    }"""
    times = {query: page.evaluate(search, query) for query in ("word3", "word30", "no such", "")}
    opening = page.evaluate("""async () => {
        const start = performance.now();
        location.hash = "#c2000";
        while (!document.querySelector("#c2000 .ladder svg")) await new Promise(requestAnimationFrame);
        return performance.now() - start;
    }""")
    print(json.dumps({"written and loaded, s": round(loaded, 2), "search, ms": times, "opening, ms": opening}))
    assert loaded < 30
    assert max(times.values()) < 3000
    assert opening < 3000
    opened.context.close()
