"""The page in a real browser: nothing is complained of, asked for, cut off or run that is not its own."""

import asyncio
import io

import matplotlib.image
import numpy as np
import pytest
from browser import find_browser, opened, running_browser
from report_support import toy_run, toy_sweep

from speechbrain_mifuse.report.page import write_report

PHONE, DESK = 375, 1280
HOSTILE = "<script>window.ran=1</script><img src=x onerror=window.ran=1>"
OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true; })"
COLUMN = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map((row) => row.cells[{}].textContent)"


@pytest.fixture(scope="module")
def address():
    find_browser()
    with running_browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    long = "a_method_with_quite_a_long_name_of_its_own"
    methods = {"source_only": 0.5, "lalm_zero_shot": 0.6, "mi_fuse": 0.75, long: 0.7, "oracle": 0.95}
    return {
        "run": write_report(toy_run(folder / "run", methods=methods)),
        "sweep": write_report(toy_sweep(folder / "sweep", methods=methods)),
        "hostile": write_report(toy_run(folder / "hostile", labels=(HOSTILE, "happy", "sad"), source=HOSTILE)),
    }


def look(address, path, width, view, **options):
    """What a coroutine finds on an opened page."""

    async def go():
        async with opened(address, path, width, **options) as page:
            return await view(page), page

    return asyncio.run(go())


@pytest.mark.parametrize("name", ["run", "sweep", "hostile"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_complained_of_and_nothing_but_the_file_is_asked_for(address, pages, name, width):
    ran, page = look(address, pages[name], width, lambda page: page.value("String(window.ran)"))
    assert ran == "undefined" and page.complaints == []
    assert page.requests == [pages[name].resolve().as_uri()]


@pytest.mark.parametrize("name", ["run", "sweep", "hostile"])
def test_on_a_phone_the_page_does_not_scroll_sideways_but_wide_tables_do_in_their_box(address, pages, name):
    async def widths(page):
        await page.value(OPEN_ALL)
        boxes = "[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
        beyond = "[...document.querySelectorAll('svg, figure, p, h1, h2, h3, dd')].filter((part) => "
        beyond += "!part.closest('.scroll') && part.getBoundingClientRect().right > innerWidth + 1).length"
        sizes = "[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
        return [await page.value(script) for script in (sizes, boxes, beyond)]

    (sizes, boxes, beyond), _ = look(address, pages[name], PHONE, widths)
    assert sizes[0] == PHONE and max(sizes) == PHONE and boxes and beyond == 0


def test_a_click_on_a_head_sorts_numbers_and_another_turns_them_round(address, pages):
    async def clicks(page):
        found = [await page.value(COLUMN.format(1))]
        for _ in range(2):
            await page.click("table.sortable th:nth-child(2) button")
            found.append(await page.value(COLUMN.format(1)))
        state = await page.value("document.querySelector('table.sortable th:nth-child(2)').ariaSort")
        await page.click("table.sortable th:first-child button")
        return found, state, await page.value(COLUMN.format(0))

    (found, state, names), page = look(address, pages["run"], DESK, clicks)
    scores = [[float(value) for value in column] for column in found]
    assert scores[1] == sorted(scores[0], reverse=True) and scores[2] == sorted(scores[0]) and state == "ascending"
    assert names == sorted(names) and page.complaints == []


def test_a_script_that_someone_writes_into_the_page_does_not_run(address, pages, tmp_path):
    path = tmp_path / "changed.html"
    path.write_text(pages["run"].read_text().replace("<main>", "<main><script>window.ran=1</script>"))
    ran, page = look(address, path, DESK, lambda page: page.value("String(window.ran)"))
    assert ran == "undefined" and "Content Security Policy" in "".join(page.complaints)


async def page_drawn(page):
    await page.value("document.querySelector('#s1').scrollIntoView()")
    return await page.screenshot()


def brightness(png):
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    colours = (255 * pixels).astype(np.int64) @ [65536, 256, 1]
    return float(np.median(pixels)), float(pixels.std()), len(np.unique(colours))


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn_and_follows_the_colours_of_the_system(address, pages, width, dark):
    png, _ = look(address, pages["run"], width, page_drawn, dark=dark)
    middle, spread, colours = brightness(png)
    assert (middle < 0.2) if dark else (middle > 0.9)
    assert spread > 0.05 and colours > 100


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(address, pages, dark):
    script = """(() => {
        const parts = (colour) => [...colour.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
        const light = (colour) => {
            const linear = colour.slice(0, 3).map((part) => part / 255)
                .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const behind = (part) => {
            if (!part) return [255, 255, 255];
            const [r, g, b, a] = parts(getComputedStyle(part).backgroundColor);
            const below = a < 1 ? behind(part.parentElement) : [0, 0, 0];
            return [r, g, b].map((value, place) => a * value + (1 - a) * below[place]);
        };
        const ratio = (part) => {
            const colour = parts(getComputedStyle(part).color);
            const [a, b] = [light(colour), light(behind(part))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        };
        return Math.min(...[...document.querySelectorAll("p, a, dt, dd, h1, h2, th, caption, td")].map(ratio));
    })()"""
    for name in ("run", "sweep"):
        least, _ = look(address, pages[name], DESK, lambda page: page.value(script), dark=dark)
        assert least >= 4.5, name
