"""The page of runs, evaluations and papers in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fasttrain.report.runs import SETTINGS
from tests.browser import Browser, chromium
from tests.reported import NAMES, make_everything, make_run, page_of


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return make_everything(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser():
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium here (Debian's package is chromium)")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(everything))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_loads_without_an_error_or_a_request_and_fits(browser, page, width, scheme):
    browser.show(width, scheme)
    browser.open(page)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    assert browser.run("document.documentElement.lang") == "en"


def test_pictures_are_there_and_say_what_they_show(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    found = browser.run("[...document.images].map(one => [one.naturalWidth, one.alt])")
    assert len(found) == 2 + len(NAMES) and all(width == 300 and len(alt) > 10 for width, alt in found)
    assert any("nearest neighbours" in alt and "simclr_1" in alt and "top1 45.67 %" in alt for _, alt in found)
    ids = browser.run("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    assert any(alt.startswith("figure2: ") and "column0 column1" in alt for _, alt in found)


def column(browser, label: str) -> list[str]:
    """The cells of a column of the runs, from above."""
    return browser.run(f"""(() => {{
        const table = document.getElementById('runs-table');
        const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === {json.dumps(label)});
        return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
    }})()""")


def header(label: str) -> str:
    return f"[...document.querySelectorAll('#runs-table button')].find(one => one.textContent === {json.dumps(label)})"


def test_a_click_sorts_and_a_key_too(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    browser.run(f"{header('kNN %')}.click()")
    upward = ["5.0", "10.0", "15.0", "25.0", "30.0", "35.0", "–"]  # 5 before 10: numbers; without one: last
    assert column(browser, "kNN %") == upward
    state = f"{header('kNN %')}.closest('th').getAttribute('aria-sort')"
    assert browser.run(state) == "ascending"
    browser.run(f"{header('kNN %')}.focus()")
    browser.press("Enter")
    assert column(browser, "kNN %") == [*upward[:-1][::-1], "–"] and browser.run(state) == "descending"
    browser.run(f"{header('run')}.click()")
    names = [name.removeprefix("runs/") for name in column(browser, "run")]
    assert names.index("simclr_2") < names.index("simclr_10") and browser.run(state) is None


def test_the_filter_keeps_rows_with_all_words(browser, page):
    browser.show(375, "light")
    browser.open(page)
    browser.run("filter.value = 'SIMCLR_1 done'; filter.dispatchEvent(new Event('input'))")
    shown = "[...document.querySelectorAll('#runs-table tbody tr')].filter(one => one.offsetHeight).length"
    assert browser.run(shown) == 1 and browser.run("document.getElementById('filtered').textContent") == "1 of 7"


def test_curves_are_drawn_and_follow_what_is_chosen(browser, page):
    browser.show(375, "dark")
    browser.open(page)
    strong = "[...document.querySelectorAll('#chart path.curve:not(.raw)')].map(one => one.getAttribute('d'))"
    losses = browser.run(strong)
    assert len(losses) == len(NAMES) and all(path.startswith("M") for path in losses)
    assert browser.run("document.querySelectorAll('#chart .raw').length") == len(NAMES)
    assert browser.run("document.querySelectorAll('#chart .lost').length") == len(NAMES) - 1  # a loss was not finite
    styles = browser.run(
        "[...document.querySelectorAll('#chart path.curve:not(.raw)')].map(one => "
        "getComputedStyle(one).stroke + one.getAttribute('stroke-dasharray'))"
    )
    assert len(set(styles)) == len(NAMES)
    browser.run("metric.value = 'lr'; metric.dispatchEvent(new Event('change'))")
    rates = browser.run(strong)
    assert rates != losses and len(rates) == len(NAMES) - 1  # one reports none
    label = browser.run("document.querySelector('#chart svg').getAttribute('aria-label')")
    assert label.startswith("learning rate against the step, of 6 runs") and "runs/simclr_2 0.1" in label
    browser.run("document.querySelector('#choices input').click()")
    assert len(browser.run(strong)) < len(rates) + 1
    browser.run("document.getElementById('no-runs').click()")
    assert browser.run(strong) == [] and browser.complaints() == []
    browser.run("document.getElementById('first-runs').click()")
    assert len(browser.run(strong)) == len(rates)


def test_values_at_a_step_are_read_by_a_slider(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    row = "[...document.querySelectorAll('#legend tbody tr')].find(one => one.textContent.includes('simclr_2')).cells"
    assert browser.run(f"{row}[1].textContent === {row}[2].textContent")
    browser.run("at.value = 0; at.dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('at-step').textContent") == "10"
    assert browser.run(f"{row}[1].textContent") == "8.75"  # the mean of 11 and 6.5


def test_many_settings_are_shown_by_a_click(browser, tmp_path):
    for number in range(2):
        run = make_run(tmp_path / f"run_{number}", number, reports=4)
        settings = {"model": {f"setting{i}": number + i for i in range(SETTINGS + 20)}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    path = tmp_path / "page.html"
    path.write_text(page_of(tmp_path))
    browser.show(375, "light")
    browser.open(path)
    shown = "[...document.querySelectorAll('#runs-table thead th')].filter(one => one.offsetWidth).length"
    before = browser.run(shown)
    browser.run("document.getElementById('all-settings').click()")
    assert browser.run(shown) == before + 20 and browser.run("document.scrollingElement.scrollWidth") <= 375


def test_a_command_can_be_copied(browser, page):
    browser.show(1280, "light")
    browser.open(page)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("document.querySelector('header p.command button').click()")
    browser.run("new Promise(done => setTimeout(done, 200))")
    said = browser.run("document.querySelector('header p.command button').textContent")
    assert said in ("copied", "selected")


def test_two_hundred_runs_are_a_page_too(browser, tmp_path):
    for number in range(200):
        make_run(tmp_path / "runs" / f"run_{number}", number, reports=8)
    path = tmp_path / "page.html"
    path.write_text(page_of(tmp_path))
    browser.show(375, "dark")
    browser.open(path)
    assert browser.complaints() == [] and browser.run("document.scrollingElement.scrollWidth") <= 375
    assert browser.run("document.querySelectorAll('#runs-table tbody tr').length") == 200
    assert browser.run("document.querySelectorAll('#choices input:checked').length") == 8
