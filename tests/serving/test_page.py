"""The page, used as a person does, in Chromium against a server."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, Response, Route, expect, sync_playwright

from serving.app import Online
from serving.export import export
from serving.history import Event
from serving.index import IndexSettings
from serving.items import update
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
    """The page as one person has it open; what its browser asked for and complained of is kept."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.responses: list[Response] = []
        page.set_default_timeout(20_000)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("response", lambda found: self.responses.append(found) if found.url.endswith("/v1/recommend") else None)
        page.goto(address)

    def settle(self) -> None:
        """Wait until the lists are those of what is chosen."""
        expect(self.page.locator("#lists")).to_have_attribute("aria-busy", "false")

    def add(self, words: str) -> None:
        """Search by the keyboard, and take what is found first."""
        self.page.get_by_role("combobox", name="Search items").fill(words)
        self.page.get_by_role("option", selected=True).filter(has_text=words).wait_for()
        self.page.keyboard.press("Enter")
        self.settle()

    def press(self, name: str, place: int = 0) -> None:
        """Click the button of this name, of several the one at `place`."""
        self.page.get_by_role("button", name=name).nth(place).click()
        self.settle()

    @property
    def answer(self) -> dict[str, Any]:
        """What the API told last."""
        found: dict[str, Any] = self.responses[-1].json()
        return found

    @property
    def question(self) -> dict[str, Any]:
        """What the API was asked last."""
        asked: dict[str, Any] = self.responses[-1].request.post_data_json
        return asked

    @property
    def history(self) -> list[str]:
        """Ids of the events, in order."""
        return self.page.locator("#history .title small").all_inner_texts()

    @property
    def listed(self) -> list[str]:
        """Ids of the list, or of both lists one after the other."""
        return [row.get_attribute("data-item") or "" for row in self.page.locator(".list > li").all()]

    @property
    def text(self) -> str:
        return self.page.locator("body").inner_text()


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page; at the end, no request has left the host, and the browser complained of nothing that is not expected."""
    opened: list[tuple[Visit, BrowserContext, str, tuple[str, ...]]] = []

    def visited(at: str = address, complaints: tuple[str, ...] = (), **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        found = Visit(context.new_page(), at)
        opened.append((found, context, at, complaints))
        return found

    yield visited
    for found, context, at, complaints in opened:
        assert [url for url in found.asked if not url.startswith(f"{at}/")] == []
        assert [said for said in found.complaints if not any(part in said for part in complaints)] == []
        context.close()


def ids(answer: dict[str, Any]) -> list[str]:
    return [str(item["item_id"]) for item in answer["items"]]


def test_an_event_more_changes_the_list_and_without_it_the_list_is_as_before(visit: Open) -> None:
    person = visit()
    person.settle()
    assert person.answer["source"] == "popularity"
    popular = person.listed
    assert popular == ids(person.answer)
    assert "for anyone" in person.text
    person.add(TEXTS["lamp"])
    of_lamp = person.listed
    assert of_lamp == ids(person.answer) != popular
    person.add(TEXTS["tent"])
    assert len(person.history) == 2
    assert person.listed == ids(person.answer) != of_lamp
    person.press("Remove: ", 1)
    assert person.listed == of_lamp
    person.press("Clear")
    assert person.history == []
    assert person.listed == popular


def test_a_listed_item_joins_the_history_and_events_change_places(visit: Open) -> None:
    person = visit()
    person.settle()
    first = person.listed[0]
    person.press("Add to the history", 0)
    second = person.listed[2]
    person.press("Add to the history", 2)
    assert person.history == [first, second] == [str(each) for each in person.question["history"]]
    person.press("Move up", 1)
    assert person.history == [second, first] == [str(each) for each in person.question["history"]]
    person.press("Move down", 0)
    assert person.history == [first, second] == [str(each) for each in person.question["history"]]
    times = person.question["times"]
    assert times[1] - times[0] == 3600
    assert "an hour ago" in person.text


def test_the_keyboard_alone_is_enough(visit: Open) -> None:
    person = visit()
    person.settle()
    box, keyboard = person.page.get_by_role("combobox", name="Search items"), person.page.keyboard
    box.focus()
    found = person.page.get_by_role("listbox", name="Items found").get_by_role("option")
    found.nth(2).wait_for()
    assert found.and_(person.page.get_by_role("option", selected=True)).count() == 0
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        keyboard.press(key)
    chosen = found.nth(1)
    expect(chosen).to_have_attribute("aria-selected", "true")
    expect(box).to_have_attribute("aria-activedescendant", chosen.get_attribute("id") or "")
    wanted = chosen.locator("small").inner_text()
    keyboard.press("Enter")
    person.settle()
    assert person.history == [wanted]
    box.fill("lamp")
    found.filter(has_text="lamp").first.wait_for()
    keyboard.press("Escape")
    expect(found).to_have_count(0)
    person.page.get_by_role("button", name="Remove: ").press("Enter")
    person.settle()
    assert person.history == []


def test_an_answer_that_is_late_is_dropped(visit: Open) -> None:
    person = visit()
    person.settle()
    held: list[Route] = []
    person.page.route("**/v1/recommend", lambda route: held.append(route) if not held else route.continue_())
    person.page.get_by_role("button", name="Add to the history").nth(0).click()
    person.page.wait_for_timeout(300)
    person.page.get_by_role("button", name="Add to the history").nth(1).click()
    person.page.wait_for_timeout(300)
    assert len(held) == 1
    held[0].continue_()
    person.settle()
    assert len(person.question["history"]) == 2
    assert person.listed == ids(person.answer)


def test_a_filter_leaves_only_items_that_meet_it(visit: Open) -> None:
    person = visit()
    person.settle()
    page = person.page
    page.get_by_text("categories", exact=True).click()
    page.get_by_label("Find a value of categories").fill("LAM")
    expect(page.locator(".filter .options label:visible")).to_have_text(["lamp"])
    page.get_by_label("lamp", exact=True).check()
    person.settle()
    assert {int(item) % 7 for item in person.listed} == {KINDS.index("lamp")}
    expect(page.locator(".list .tags").first).to_have_text("lamp")
    page.get_by_label("in_stock").select_option("yes")
    person.settle()
    assert {int(item) % 3 for item in person.listed} == {0}
    page.get_by_text("brand", exact=True).click()
    page.get_by_label("Find a value of brand").fill("brand 2")
    page.keyboard.press("Enter")
    person.settle()
    assert person.question["where"] == {"categories": ["lamp"], "in_stock": True, "brand": ["brand 2"]}
    assert {int(item) % 5 for item in person.listed} == {2}
    person.press("Reset")
    assert person.question["where"] == {}
    page.get_by_label("price, min").fill("2")
    page.get_by_label("price, max").fill("3")
    person.settle()
    assert {int(item) % 7 for item in person.listed} <= {2, 3}


def test_a_mistake_is_told_in_one_line_and_goes_when_it_is_mended(visit: Open) -> None:
    person = visit(complaints=("422",))
    person.settle()
    person.page.get_by_label("price, min").fill("5")
    person.page.get_by_label("price, max").fill("3")
    line = person.page.get_by_role("alert")
    expect(line).to_have_text("where: 'price' has min 5 above max 3; swap them")
    person.page.get_by_label("price, max").fill("6")
    expect(line).to_be_hidden()
    person.settle()
    assert {int(item) % 7 for item in person.listed} <= {5, 6}


def test_every_option_reaches_the_api(visit: Open) -> None:
    person = visit()
    person.add(TEXTS["lamp"])
    assert not {"diversity", "popularity"} & set(person.question)
    assert person.history[0] not in person.listed
    person.page.get_by_label("Hide what stands in the history").uncheck()
    person.page.get_by_label("Items", exact=True).fill("17")
    person.page.get_by_label("Diversity").fill("0.35")
    person.page.get_by_label("Against popularity").fill("-1.5")
    person.settle()
    wanted = {"filter_seen": False, "k": 17, "diversity": 0.35, "popularity": -1.5, "explain": True}
    assert {name: person.question[name] for name in wanted} == wanted
    assert len(person.listed) == 17
    person.press("Reset")
    assert not {"diversity", "popularity"} & set(person.question)


def test_reasons_and_attention_are_those_of_the_api(visit: Open) -> None:
    person = visit()
    for kind in ("lamp", "tent", "scarf"):
        person.add(TEXTS[kind])
    answer, page = person.answer, person.page
    columns = page.locator(".scroll [data-event]")
    assert columns.count() == len(answer["attention"]) == 3
    for event, column in zip(answer["attention"], columns.all(), strict=True):
        said = [words.rpartition(" · ") for words in column.locator("rect title").all_text_contents()]
        shares = [event["share"], *(share for heads in event["layers"] for share in heads)]
        assert [share for _, _, share in said] == [f"{100 * share:.1f} %" for share in shares]
        assert said[0][0] == f"{event['title']} · all heads"
        assert said[-1][0].endswith(f"layer {len(event['layers'])}, head {len(event['layers'][-1])}")
    label = page.get_by_role("img", name="Attention: ").get_attribute("aria-label") or ""
    assert all(f"{event['title']} {100 * event['share']:.1f} %" in label for event in answer["attention"])
    assert any(item["reasons"] for item in answer["items"])
    for item, row in zip(answer["items"], page.locator(".list > li").all(), strict=True):
        told = row.locator(".reason").all()
        assert [reason["title"] for reason in item["reasons"]] == [each.inner_text().rpartition(" ")[0] for each in told]
        for reason, each in zip(item["reasons"], told, strict=True):
            drop = float(each.locator("small").inner_text().removeprefix("\u2212"))
            assert drop == pytest.approx(reason["drop"], rel=0.05, abs=0.005)


def test_an_item_under_the_pointer_or_in_focus_shows_the_events_that_carried_it(visit: Open) -> None:
    person = visit()
    for kind in KINDS[:5]:
        person.add(TEXTS[kind])
    items, page = person.answer["items"], person.page
    place = next(place for place, item in enumerate(items) if item["reasons"])  # at most 3 of the 5 events
    wanted = sorted(str(reason["event"]) for reason in items[place]["reasons"])

    def lit() -> list[str]:
        return sorted(column.get_attribute("data-event") or "" for column in page.locator(".scroll .lit").all())

    assert lit() == []
    page.locator(".list > li").nth(place).hover()
    assert lit() == wanted
    rows = page.locator("#history li").all()
    assert [str(number) for number, row in enumerate(rows, 1) if "lit" in (row.get_attribute("class") or "")] == wanted
    page.locator("h1").hover()
    assert lit() == []
    page.locator(".list > li").nth(place).get_by_role("button").focus()
    assert lit() == wanted


def test_a_kept_history_is_loaded_with_its_times(visit: Open, online: Online) -> None:
    online.service.store.append("u/1", [Event(5, 1000), Event("of another shop", 1500), Event(11, 1700)])
    person = visit()
    person.page.get_by_label("or load a user’s history").fill("u/1")
    person.page.get_by_role("button", name="Load").click()
    expect(person.page.locator("#history li")).to_have_count(3)
    person.settle()
    assert person.history == ["5", "of another shop", "11"]
    assert person.question["times"] == [1000, 1500, 1700]
    assert "user u/1, with the times that are kept" in person.text
    assert "1 of no known item left out" in person.text
    assert person.listed == ids(person.answer)
    person.page.get_by_label("or load a user’s history").fill("nobody")
    person.page.keyboard.press("Enter")
    expect(person.page.get_by_text("Nothing is kept of user nobody.")).to_be_visible()
    person.settle()
    assert person.answer["source"] == "popularity"


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the stocked shop, by another model."""
    folder = tmp_path_factory.mktemp("other")
    dataset = write_shop(folder / "shop", ATTRIBUTES)
    run = write_run(folder / "run", dataset, seed=5, scale=3, text="both", similarity="cosine", temperature=0.1)
    export(run, folder / "bundle", IndexSettings())
    return folder / "bundle"


def test_two_bundles_stand_side_by_side_and_say_what_moved(
    visit: Open, stocked_bundles: dict[str, Path], other_bundle: Path
) -> None:
    with running(made(stocked_bundles["exact"], challenger=other_bundle)) as address:
        person = visit(address)
        person.add(TEXTS["lamp"])
        person.add(TEXTS["tent"])
        page = person.page
        sides = [found.json() for found in person.responses[-2:]]
        assert [side["arm"] for side in sides] == ["champion", "challenger"]
        first, second = (ids(side) for side in sides)
        assert first != second
        assert person.listed == first + second
        both = set(first) & set(second)
        assert f"{len(both)} of 10 in both lists" in person.text
        for side, name in zip(sides, ("champion", "challenger"), strict=True):
            card = page.get_by_role("region", name=f"List of the {name}")
            expect(card).to_contain_text(side["bundle"])
            expect(card).to_contain_text(side["source"])
            assert card.locator(".scroll svg").count() == 1
        rows = page.get_by_role("region", name="List of the challenger").locator(".list > li").all()
        marks = ["".join(row.locator(".mark").all_inner_texts()) for row in rows]
        assert marks == [moved(first, item, place) for place, item in enumerate(second)]
        left = page.get_by_role("region", name="List of the champion").locator(".list > li").all()
        assert ["gone" in row.inner_text() for row in left] == [item not in both for item in first]
        page.get_by_text("Challenger", exact=True).click()
        person.settle()
        assert person.listed == second


def moved(before: list[str], item: str, place: int) -> str:
    if item not in before:
        return "new"
    by = before.index(item) - place
    return f"{'▲' if by > 0 else '▼'}{abs(by)}" if by else ""


def test_a_key_is_asked_for_and_kept_for_the_session_alone(
    visit: Open, stocked_bundles: dict[str, Path], tmp_path: Path
) -> None:
    key = add(tmp_path / "keys.json", "page")
    with running(made(stocked_bundles["exact"], keys=tmp_path / "keys.json")) as address:
        person = visit(address, complaints=("401",))
        field = person.page.get_by_label("API key")
        expect(person.page.get_by_role("alert")).to_contain_text("no key that is known")
        field.fill("of another house")
        person.page.keyboard.press("Enter")
        expect(field).to_have_value("")
        expect(field).to_be_visible()
        field.fill(key)
        person.page.keyboard.press("Enter")
        person.settle()
        expect(field).to_be_hidden()
        expect(person.page.get_by_role("alert")).to_be_hidden()
        assert len(person.listed) == 10
        kept = person.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
        assert kept == [1, 0, ""]
        assert not any(key in url for url in person.asked)


def test_a_title_is_text_and_never_runs(visit: Open, stocked_bundles: dict[str, Path], tmp_path: Path) -> None:
    words = {name: pl.lit(HOSTILE) for name in ("title", "kind", "brand")}
    update(stocked_bundles["exact"], stocked([5], **words).lazy(), tmp_path / "bundle")
    with running(made(tmp_path / "bundle")) as address:
        person = visit(address)
        person.add("<img src=x")
        assert person.history == ["5"]
        person.page.get_by_label("Hide what stands in the history").uncheck()
        person.page.get_by_text("brand", exact=True).click()
        person.page.get_by_label("Find a value of brand").fill("<img")
        person.page.locator(".options label:visible").click()
        person.settle()
        assert person.listed == ["5"]
        expect(person.page.locator(".list .tags")).to_have_text(HOSTILE)
        for place in ("#history .title", ".list .title"):
            assert HOSTILE in person.page.locator(place).inner_text()
        person.page.get_by_label("or load a user’s history").fill(HOSTILE)
        person.page.keyboard.press("Enter")
        expect(person.page.locator("#times")).to_contain_text(f"user {HOSTILE}")
        person.settle()
        assert person.page.locator("body img, body script").count() == 1  # the sign at the top
        assert person.page.title() == "Recommendations"


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_no_width_scrolls_sideways_and_a_finger_finds_every_button(visit: Open, width: int) -> None:
    person = visit(viewport={"width": width, "height": 844}, has_touch=width < 500, is_mobile=width < 500)
    for kind in KINDS:
        person.add(TEXTS[kind])
    page = person.page
    if width < 900:
        page.get_by_text("Options and filters").click()
    for name in ("categories", "brand", "tags"):
        page.get_by_text(name, exact=True).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("window.innerWidth") == width
    assert page.locator("button:visible").count() > 30
    low = "[...document.querySelectorAll('button, select, summary, input:not([type=checkbox], [type=radio]), .options label')]"
    low += ".filter((node) => node.checkVisibility()).map((node) => node.getBoundingClientRect().height)"
    assert min(page.evaluate(low)) >= (40 if width < 500 else 24)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(visit: Open, scheme: str) -> None:
    person = visit(color_scheme=scheme)
    person.settle()
    style = "getComputedStyle(document.documentElement)"
    quiet = [("quiet", back) for back in ("card", "ground", "sunk", "wash")]
    told = [("bad", "bad-wash"), ("warn", "warn-wash"), ("up", "sunk"), ("down", "sunk")]
    pairs = [("ink", "card"), ("accent", "card"), ("accent", "wash"), ("on-accent", "accent"), *quiet, *told]
    for front, back in pairs:
        colours = [person.page.evaluate(f"{style}.getPropertyValue('--{name}')") for name in (front, back)]
        light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)  # WCAG 2.2, level AA


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(part, 16) / 255 for part in re.findall("..", colour.strip().removeprefix("#"))]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
