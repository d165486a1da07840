"""The report in a browser: no error, tables that sort, one filter for all, texts shown as text."""

from __future__ import annotations

import os
import shutil
import time

import fake_results
import pytest
from fake_results import ROWS, TASKS, record

from benchmarks.comparison.results import append_result
from benchmarks.report.write import write_report

pytestmark = pytest.mark.browser

SCRIPT = "<script>window.attacked = true</script>"
ATTACK = f'{SCRIPT}<img src=x onerror="window.attacked = true"></script>'
CHROMIUM = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
    *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A browser, whose console is empty at the end of every test."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(chromedriver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report as large as they come."""
    folder = tmp_path_factory.mktemp("report")
    fake_results.write(folder, prompts=50)
    return write_report(folder).page


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A report of runs in which everything that can be text is an attack."""
    folder = tmp_path_factory.mktemp("attacked")
    for place, algo in enumerate(("sl", "best-of-4", "ppo", "ppo++")):
        for seed in range(2):
            made = record(algo, seed, name=ATTACK, text=ATTACK, prompts=20)
            append_result(folder, made | {"algo": f"{algo} {SCRIPT}", "place": place, "profile": ATTACK})
    return write_report(folder).page


@pytest.fixture
def page(driver):
    """Open a report and get functions to look at it; the browser has nothing to complain of afterwards."""

    class Page:
        def open(self, path):
            driver.get(path.as_uri())
            begun = time.monotonic()
            while not self.run("return 'ready' in document.body.dataset"):
                assert time.monotonic() - begun < 60
                time.sleep(0.01)
            return self

        def run(self, script, *arguments):
            return driver.execute_script(script, *arguments)

        def click(self, selector):
            self.run("document.querySelector(arguments[0]).click()", selector)

        def choose(self, select, value):
            script = "const [id, value] = arguments, select = document.getElementById(id); select.value = value;"
            self.run(f"{script} select.dispatchEvent(new Event('change'))", select, value)

        def visible(self, selector):
            """Texts of the elements that are not hidden."""
            script = "return [...document.querySelectorAll(arguments[0])].filter(e => !e.closest('[hidden]'))"
            return self.run(f"{script}.map(e => e.textContent)", selector)

        def curves(self):
            """For each visible panel, the names of its lines over seeds."""
            return self.run("""
                const panels = [...document.querySelectorAll(".panels > div")].filter(e => !e.hidden);
                return panels.map(e => e.data.filter(line => line.line.width === 2).map(line => line.name))
            """)

    yield Page()
    assert driver.get_log("browser") == []


def test_a_large_report_loads_and_draws_everything(page, report):
    assert report.stat().st_size < 4e6
    page.open(report)
    trained = [algo for algo in ROWS if algo not in ("sl", "best-of-4")]
    assert page.curves() == [trained] * 3
    assert page.run("return document.querySelectorAll('.panels .main-svg').length") >= 3
    assert page.run("return document.querySelector('#profile .plot').data.length") == 2 * len(ROWS)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_what_no_run_has_is_not_shown(page, tmp_path):
    for algo in ("sl", "ppo"):
        append_result(tmp_path, record(algo, 0, prompts=20))
    page.open(write_report(tmp_path).page)
    headings = page.visible("h2")
    assert "Training episodes with a guide" not in headings
    assert page.visible("#profile") == page.visible(".matrix") == page.visible("#tasks button") == []
    assert page.curves() == [["ppo"]]
    sl = record("sl", 0, prompts=20)
    (tmp_path / "results.jsonl").unlink()
    append_result(tmp_path, sl)
    page.open(write_report(tmp_path).page)
    assert "Learning curves" not in page.visible("h2")
    assert len(page.visible("#answers h4")) == 1


def test_headers_sort_numbers_as_numbers_and_back(page, report):
    page.open(report)
    rows = "section:first-of-type tbody[data-task=imdb] tr:not(.task) th"
    profile = page.visible(rows)
    assert profile == [*ROWS]
    column = 2  # test reward

    def numbers(body="imdb"):
        cells = page.visible(f"section:first-of-type tbody[data-task={body}] td:nth-child({column})")
        return [float(cell.split()[0]) for cell in cells]

    header = f"section:first-of-type thead th:nth-child({column})"
    for order, direction in (("ascending", 1), ("descending", -1)):
        page.click(f"{header} button")
        assert page.run("return document.querySelector(arguments[0]).ariaSort", header) == order
        for task in TASKS:  # each task for itself
            assert numbers(task) == sorted(numbers(task), key=lambda value: direction * value)
        assert page.visible(rows) != profile
    page.click(f"{header} button")
    assert page.run("return document.querySelector(arguments[0]).ariaSort", header) == "none"
    assert page.visible(rows) == profile
    page.click("section:first-of-type thead th:first-child button")
    assert page.visible(rows) == sorted(ROWS, key=lambda name: name.replace("++", ""))
    # Rows without a number stay last: KL of rows that train nothing
    for _ in range(2):
        page.click("section:first-of-type thead th:nth-child(7) button")
        assert set(page.visible(rows)[-2:]) == {"sl", "best-of-4"}
    # Thousands are no thousandths
    costs = "section:nth-last-of-type(2)"
    page.click(f"{costs} thead th:nth-child(3) button")
    tokens = [int(cell.replace(",", "")) for cell in page.visible(f"{costs} tbody[data-task=tldr] td:nth-child(3)")]
    assert tokens == sorted(tokens)
    assert tokens[-1] > 10_000


def test_one_filter_holds_for_the_whole_page(page, report):
    page.open(report)
    page.click("#algos .plain:last-child")
    for algo in ("sl", "ppo", "ppo++"):
        page.click(f"#algos [data-name='{algo}']")
    page.click("#tasks [data-name=tldr]")
    for table in ("section:first-of-type", "section:nth-last-of-type(3)"):
        assert page.visible(f"{table} tbody th[scope=row]") == ["sl", "ppo", "ppo++"] * 2
    assert page.visible(".matrix tbody th") == ["sl", "ppo", "ppo++"]
    assert len(page.visible(".matrix td")) == 9
    assert page.visible(".matrix thead th") == ["algorithm", "sl", "ppo", "ppo++"]
    assert page.curves() == [["ppo", "ppo++"]] * 2
    assert page.run("return document.querySelector('#profile .plot').data.length") == 6
    assert page.visible("#task option") == ["imdb", "commongen"]
    assert [name.split()[0] for name in page.visible("#answers h4")] == ["sl", "ppo", "ppo++"]
    assert {name.split()[1] for name in page.visible("section:last-of-type summary")} == {"sl,", "ppo,", "ppo++,"}
    assert page.run("return document.querySelector('#algos [data-name=gail]').ariaPressed") == "false"
    page.click("#algos .plain")
    assert len(page.visible("#answers h4")) == len(ROWS)


def test_comparisons_are_against_the_baseline_that_is_chosen(page, report):
    page.open(report)
    cells = "section:nth-of-type(3) td.name"
    assert set(page.visible(cells)) == {"ppo"}
    page.choose("baseline", "guided-rloo")
    assert set(page.visible(cells)) == {"guided-rloo"}
    assert len(page.visible(cells)) == 3 * (len(ROWS) - 1)


def test_curves_are_drawn_against_what_is_chosen(page, report):
    page.open(report)
    title = "return document.querySelector('.panels > div').layout.xaxis.title.text"
    for axis, label in (("tokens", "all tokens"), ("seconds", "seconds of training")):
        page.choose("axis", axis)
        assert page.run(title) == label
        assert len(page.curves()[0]) == len(ROWS) - 2
    page.choose("axis", "num_guide_tokens")
    guided = [algo for algo in ROWS if algo in fake_results.GUIDED or algo.startswith("handoff")]
    assert page.curves() == [guided] * 3
    page.choose("curve", "kl")
    assert page.run("return document.querySelector('.panels > div').layout.yaxis.title.text").startswith("KL")
    lines = "return document.querySelector('.panels > div').data.length"
    before = page.run(lines)
    page.click("#seeds")
    assert page.run(lines) == before + 5 * len(guided)


def test_texts_of_one_prompt_stand_side_by_side(page, report):
    page.open(report)
    assert not page.run("return document.querySelector('#samples details').open")  # unfiltered speech is folded
    page.click("#samples summary")
    page.choose("task", "tldr")
    page.choose("prompt", "100")
    page.choose("seed", "3")
    expected = {algo: record(algo, 3, "tldr", prompts=50)["samples"][2] for algo in ROWS}
    assert page.visible("#asked") == [expected["sl"]["prompt"]]
    assert page.visible("#answers h4") == [f"{algo} {text['reward']:.3f}" for algo, text in expected.items()]
    written = ["".join(part for _, part in text["segments"]) for text in expected.values()]
    assert page.visible("#answers p") == written
    colours = page.run("""
        const shown = [...document.querySelectorAll("#answers span")];
        return Object.fromEntries(shown.map(e => [e.className, getComputedStyle(e).backgroundColor]))
    """)
    assert set(colours) == {"policy", "guide"}
    assert len(set(colours.values())) == 2
    page.click("#by-reward")
    rewards = [float(name.split()[-1]) for name in page.visible("#answers h4")]
    assert rewards == sorted(rewards, reverse=True)


def test_texts_that_are_scripts_are_shown_as_text(page, attacked):
    page.open(attacked)
    page.click("#samples summary")
    page.click("#episodes summary")
    for axis in ("num_guide_tokens", "tokens"):
        page.choose("axis", axis)
    page.click("#seeds")
    assert page.visible("#asked")[0].startswith(f"Prompt 0:{ATTACK}")
    assert page.visible("#answers p") == [ATTACK] * 4
    assert any(SCRIPT in text for text in page.visible("#episodes article p"))
    assert page.visible("section:first-of-type tr.task") == [ATTACK]
    assert page.visible(".matrix tbody th") == [f"{algo} {SCRIPT}" for algo in ("sl", "best-of-4", "ppo", "ppo++")]
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return document.scripts.length") == 3
    assert page.run("return document.querySelector('.panels .gtitle').textContent") == ATTACK
    assert page.run("return window.attacked === undefined")
