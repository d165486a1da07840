"""The site builds, is complete and loads nothing from a network; the tutorials run. As a command: run them anew."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

# ruff: noqa: E402  (what follows needs the extra)
for package in (
    "mkdocs",
    "material",
    "mkdocstrings_handlers.python",
    "markdown_exec",
    "nbclient",
    "nbconvert",
    "ipykernel",
):
    pytest.importorskip(package, reason='needs pip install "textgym[docs]"')

import nbformat
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
# What a browser fetches by itself.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        address = attributes.get(FETCHED.get(tag, ""))
        if address and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; with `strict` of mkdocs.yml a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        config.plugins.on_shutdown()
        os.chdir(before)
    return folder


def named(nav):
    """The pages of a navigation."""
    for entry in nav:
        for part in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [part] if isinstance(part, str) else named(part)


@pytest.mark.slow
def test_every_page_is_in_the_navigation_and_there(site):
    nav = list(named(load_config(str(ROOT / "mkdocs.yml")).nav))
    for name in nav:
        assert (site / name).with_suffix(".html").is_file()
    written = {path.relative_to(ROOT / "docs").with_suffix(".md").as_posix() for path in TUTORIALS}
    written |= {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written <= {*nav}
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_pages_load_nothing_from_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        loaded = Page(path).loaded
        assert loaded
        for address in loaded:
            if not address.startswith("data:"):
                assert not re.match(r"\w+:|//", address), (path, address)
                assert path.name == "404.html" or (path.parent / address.split("#")[0].split("?")[0]).exists()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""(@import|url\()\s*["']?(https?:)?//""", sheet.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_links_between_pages_lead_somewhere(site):
    for path in set(site.rglob("*.html")) - {site / "404.html"}:
        for address in Page(path).links:
            target = address.split("#")[0]
            if target and not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), (path, address)


@pytest.mark.slow
def test_an_environment_has_its_reference_and_an_episode_in_colours(site):
    for path in (site / "environments").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'title="policy" style="color:' in text
        if path.name != "index.html":
            assert 'title="guide" style' in text or 'title="reference" style' in text
            assert {"Description", "Arguments", "Rewards", "Version History"} <= {
                *re.findall(r"<h\d[^>]*>([^<]+)", text)
            }
    # The docstrings of puzzles are completed when they are imported.
    assert "problem_seed" in (site / "environments" / "countdown.html").read_text()


def test_every_public_name_of_agents_is_in_its_reference():
    import agents

    page = (ROOT / "docs" / "api" / "agents.md").read_text()
    documented = re.findall(r"^::: (agents\S*)", page, re.MULTILINE)
    for name in set(agents.__all__) - {"ALGORITHMS", "register"}:
        module = getattr(agents, name).__module__
        assert {module, f"{module}.{name}"} & {*documented}, name


def execute(path, folder):
    """Run a notebook in a folder, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = execute(path, tmp_path)  # raises where a cell does
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_committed_as_it_ran(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        for content in output.get("data", {}).values():
            assert len(content) * 3 / 4 < 100_000  # pictures in base64
    for place in (str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()):
        assert f"{place}/" not in text


if __name__ == "__main__":
    # tqdm says in stderr, with a path of this machine, that there are no widgets.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    os.environ["PYTHONPATH"] = str(ROOT)
    for tutorial in [Path(name) for name in sys.argv[1:]] or TUTORIALS:
        with tempfile.TemporaryDirectory() as scratch:
            nbformat.write(execute(tutorial, scratch), tutorial)
