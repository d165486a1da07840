"""The report in a browser: no error, tables that sort, one filter for all, texts shown as text."""

from __future__ import annotations

import os
import re
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
OPEN = "#prompts details[open]"
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
                const panels = [...document.querySelectorAll(".panels > figure")].filter(e => !e.hidden);
                return panels.map(e => [...e.querySelectorAll(".line")].map(line => line.dataset.line))
            """)

        def count(self, selector):
            return self.run("return document.querySelectorAll(arguments[0]).length", selector)

        def screen(self, width, scheme="light"):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            preferred = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})

    yield Page()
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert driver.get_log("browser") == []


def test_a_large_report_loads_and_draws_everything(page, report):
    assert report.stat().st_size < 1.5e6
    page.open(report)
    trained = [algo for algo in ROWS if algo not in ("sl", "best-of-4")]
    assert page.curves() == [trained] * 3
    assert page.count("#profile .line") == page.count("#profile .band") == len(ROWS)


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
    assert len(page.visible(f"{OPEN} h4")) == 1


def test_headers_sort_numbers_as_numbers_and_back(page, report):
    page.open(report)
    rows = "#results tbody[data-task=imdb] tr:not(.task) th"
    profile = page.visible(rows)
    assert profile == [*ROWS]
    column = 2  # test reward

    def numbers(body="imdb"):
        cells = page.visible(f"#results tbody[data-task={body}] td:nth-child({column})")
        return [float(cell.split()[0]) for cell in cells]

    header = f"#results thead th:nth-child({column})"
    for order, direction in (("ascending", 1), ("descending", -1)):
        page.click(f"{header} button")
        assert page.run("return document.querySelector(arguments[0]).ariaSort", header) == order
        for task in TASKS:  # each task for itself
            assert numbers(task) == sorted(numbers(task), key=lambda value: direction * value)
        assert page.visible(rows) != profile
    page.click(f"{header} button")
    assert page.run("return document.querySelector(arguments[0]).ariaSort", header) == "none"
    assert page.visible(rows) == profile
    page.click("#results thead th:first-child button")
    assert page.visible(rows) == sorted(ROWS, key=lambda name: name.replace("++", ""))
    # Rows without a number stay last: KL of rows that train nothing
    for _ in range(2):
        page.click("#results thead th:nth-child(7) button")
        assert set(page.visible(rows)[-2:]) == {"sl", "best-of-4"}
    # Thousands are no thousandths
    costs = "#costs"
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
    for table in ("#results", "#metrics"):
        assert page.visible(f"{table} tbody th[scope=row]") == ["sl", "ppo", "ppo++"] * 2
    assert page.visible(".matrix tbody th") == ["sl", "ppo", "ppo++"]
    assert len(page.visible(".matrix td")) == 9
    assert page.visible(".matrix thead th") == ["algorithm", "sl", "ppo", "ppo++"]
    assert page.curves() == [["ppo", "ppo++"]] * 2
    assert page.count("#profile .line") == page.count("#profile .band") == 3
    assert page.visible("#task option") == ["imdb", "commongen"]
    assert [name.split()[0] for name in page.visible(f"{OPEN} h4")] == ["sl", "ppo", "ppo++"]
    assert {name.split()[1] for name in page.visible("#details summary")} == {"sl,", "ppo,", "ppo++,"}
    assert page.run("return document.querySelector('#algos [data-name=gail]').ariaPressed") == "false"
    page.click("#algos .plain")
    assert len(page.visible(f"{OPEN} h4")) == len(ROWS)


def test_comparisons_are_against_the_baseline_that_is_chosen(page, report):
    page.open(report)
    assert page.visible("#comparisons tbody th[scope=row]") == [algo for algo in ROWS if algo != "ppo"] * 3
    page.choose("baseline", "guided-rloo")
    assert page.visible("#comparisons tbody th[scope=row]") == [algo for algo in ROWS if algo != "guided-rloo"] * 3
    assert page.count("#comparisons tr[data-baseline]:not([hidden])") == 3 * (len(ROWS) - 1)
    assert page.count("#comparisons tr[data-baseline=guided-rloo]:not([hidden])") == 3 * (len(ROWS) - 1)


def test_curves_are_drawn_against_what_is_chosen(page, report):
    page.open(report)
    for axis, label in (("tokens", "all tokens"), ("seconds", "seconds of training")):
        page.choose("axis", axis)
        assert page.visible(".panels .label")[:2] == [label, "validation reward"]
        assert len(page.curves()[0]) == len(ROWS) - 2
    page.choose("axis", "num_guide_tokens")
    guided = [algo for algo in ROWS if algo in fake_results.GUIDED or algo.startswith("handoff")]
    assert page.curves() == [guided] * 3
    page.choose("curve", "kl")
    assert page.visible(".panels .label")[1].startswith("KL")
    assert page.count(".panels .thin") == 0
    page.click("#seeds")
    assert page.count(".panels .thin") == 3 * 5 * len(guided)


def test_texts_of_one_prompt_stand_side_by_side_and_other_prompts_are_folded(page, report):
    page.open(report)
    page.choose("task", "tldr")
    page.choose("seed", "3")
    assert page.run("return [...document.querySelectorAll('#prompts details')].map(e => e.open)") == [
        True,
        *[False] * 3,
    ]
    expected = {algo: record(algo, 3, "tldr", prompts=50)["samples"] for algo in ROWS}
    for number in (0, 2):
        prompt, texts = f"#prompts details:nth-child({number + 1})", {a: texts[number] for a, texts in expected.items()}
        assert page.visible(f"{prompt} summary") == [texts["sl"]["prompt"]]
        assert page.visible(f"{prompt} h4") == [f"{algo} {text['reward']:.3f}" for algo, text in texts.items()]
        written = ["".join(part for _, part in text["segments"]) for text in texts.values()]
        assert page.visible(f"{prompt} p") == written
    colours = page.run("""
        const shown = [...document.querySelectorAll("#prompts p span")];
        return Object.fromEntries(shown.map(e => [e.className, getComputedStyle(e).backgroundColor]))
    """)
    assert set(colours) == {"policy", "guide"}
    assert len(set(colours.values())) == 2
    page.click("#by-reward")
    rewards = [float(name.split()[-1]) for name in page.visible(f"{OPEN} h4")]
    assert rewards == sorted(rewards, reverse=True)


def test_texts_that_are_scripts_are_shown_as_text(page, attacked):
    page.open(attacked)
    page.click("#episodes summary")
    for axis in ("num_guide_tokens", "tokens"):
        page.choose("axis", axis)
    page.click("#seeds")
    assert page.visible("#prompts summary")[0].startswith(f"Prompt 0:{ATTACK}")
    assert page.visible(f"{OPEN} p") == [ATTACK] * 4
    assert any(SCRIPT in text for text in page.visible("#episodes article p"))
    assert page.visible("#results tr.task") == [ATTACK]
    assert page.visible(".matrix tbody th") == [f"{algo} {SCRIPT}" for algo in ("sl", "best-of-4", "ppo", "ppo++")]
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return document.scripts.length") == 2
    assert page.visible(".panels h4") == [ATTACK]
    assert page.run("return window.attacked === undefined")


@pytest.mark.parametrize("width", [1366, 390])
def test_nothing_is_cut_off_on_a_desk_or_a_phone(page, report, attacked, width):
    page.screen(width)
    for path in (report, attacked):
        page.open(path)
        assert page.run("return document.documentElement.scrollWidth") <= width
    page.open(report)
    for dots in (".scroll .bar b", ".plot circle:not(.dot)"):
        outside = """
            return [...document.querySelectorAll(arguments[0])].filter(dot => {
              const inner = dot.getBoundingClientRect(), outer = dot.closest(arguments[1]).getBoundingClientRect();
              return inner.width && (inner.left < outer.left || inner.right > outer.right);
            }).length
        """
        assert page.count(dots) > 40
        assert page.run(outside, dots, "table, svg") == 0
    named = page.run("""
        return [...document.querySelectorAll(".panels figure")].map(figure => {
          const {bottom, top} = figure.querySelector(".legend").getBoundingClientRect();
          return bottom <= figure.querySelector("svg").getBoundingClientRect().top + 1 && bottom - top < 450;
        })
    """)
    assert named == [True] * 3  # a legend beside every chart, which leaves it in sight


def test_dark_pages_are_dark_and_charts_too(page, report):
    page.screen(1366, "dark")
    page.open(report)

    def light(property, selector):
        colour = page.run(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, property
        )
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)

    for text, ground in (("body", "body"), (".panels h4", ".panels figure"), ("#prompts p span", "#prompts p span")):
        assert light("backgroundColor", ground) < 0.3 < 0.8 < light("color", text)
    before = light("stroke", ".panels .line")
    assert light("fill", ".panels text") > 0.5
    page.screen(1366, "light")  # also while it is open
    assert light("backgroundColor", ".panels figure") > 0.9
    assert light("fill", ".panels text") < 0.5
    assert light("stroke", ".panels .line") < before


def test_curves_begin_with_the_start_policy_and_rows_without_are_named(page, tmp_path):
    unseen, untold = record("reinforce", 0, prompts=20), record("gail", 0, prompts=20)
    for entry in (*unseen["history"], *untold["history"]):
        entry.pop("eval/reward", None)
    for entry in untold["history"]:
        del entry["reward"]
    for made in (*(record(algo, 0, prompts=20) for algo in ("sl", "best-of-4", "ppo")), unseen, untold):
        append_result(tmp_path, made)
    path = write_report(tmp_path).page
    assert path.stat().st_size < 1e5
    page.open(path)
    assert page.curves() == [["ppo", "reinforce (training)"]]
    assert page.visible(".panels .legend span span + span, .panels .legend > span") == [
        "sl",
        "ppo",
        "reinforce (training)",
    ]
    assert page.visible(".panels .without") == ["no curve here: best-of-4, gail"]
    left, right, level = (
        f"document.querySelector('.panels .level').getAttribute('{name}')" for name in ("x1", "x2", "y1")
    )
    first = "document.querySelector('.panels .line[data-line=ppo]').getAttribute('d').slice(1).split(/[ L]/)"
    x, y, x1, y1, x2 = map(float, page.run(f"return [...{first}.slice(0, 2), {left}, {level}, {right}]"))
    assert (x, y) == pytest.approx((x1, y1), abs=0.1)  # at zero, on the level of the start policy
    assert x2 - x1 > 200
    assert page.count("#seeds") == 0  # one seed
    for word in ("over seeds", "95% bootstrap intervals for each point"):
        assert word not in page.run("return document.body.innerText")


def test_a_pointer_reads_the_nearest_point(page, report):
    page.open(report)
    page.run("""
        const circle = document.querySelector(".panels .line[data-line=ppo] + circle"), svg = circle.closest("svg");
        const {left, top, width} = circle.getBoundingClientRect();
        const at = {clientX: left + width / 2, clientY: top + width / 2};
        svg.dispatchEvent(new PointerEvent("pointermove", at));
    """)
    assert re.fullmatch(r"ppo: 0\.\d+ \[0\.\d+, 0\.\d+\] at 0", page.visible(".told:not([hidden])")[0])
    page.run("document.querySelector('.panels svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.visible(".told:not([hidden])") == []
