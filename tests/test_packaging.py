"""What is installed is complete, says its version once, and is told apart from packages of other projects."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import textgym
from textgym.packages import require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_of_the_packages_is_installed():
    settings = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("textgym", "agents", "benchmarks"):
        folder = ROOT / package
        installed = {path for pattern in settings[package] for path in folder.glob(pattern)} | {*folder.rglob("*.py")}
        kept = ("results", "__pycache__")  # evidence stays in the repository
        files = {path for path in folder.rglob("*") if path.is_file() and not {*kept} & {*path.parts}}
        assert files <= installed
        for path in files:
            if path.suffix == ".py":
                assert (path.parent / "__init__.py").exists()
        assert "textgym" in (folder / "__init__.py").read_text()  # by which `foreign_package` knows it


def test_the_citation_names_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == textgym.__version__
    assert citation["references"][0]["url"] == PROJECT["project"]["urls"]["Paper"]


def test_a_missing_package_is_named_with_its_extra():
    require("report", "a report", "json")
    with pytest.raises(ImportError, match=r'a report needs no_such_module: pip install "textgym\[report\]"'):
        require("report", "a report", "json", "no_such_module")


def python(site: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program where `site` comes before everything else on the path."""
    command = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]; {program}"
    return subprocess.run([sys.executable, "-c", command], cwd=site, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages with a distribution that has a package `agents` too."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("class Agent: ...\n")
    info = tmp_path / "other_agents-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-agents\nVersion: 1.0\n")
    (info / "RECORD").write_text("agents/__init__.py,,\nother_agents-1.0.dist-info/METADATA,,\n")
    return tmp_path


def test_agents_of_another_distribution_are_told_apart(site):
    done = python(site, "import benchmarks.profiles")
    assert "ImportError: the package 'agents' at" in done.stderr
    assert "belongs to other-agents, not to textgym" in done.stderr
    # Environments work without our agents; whoever goes on to import them has been told.
    done = python(site, "import textgym; print('made')")
    assert done.stdout == "made\n"
    assert "UserWarning: the package 'agents' at" in done.stderr
    assert "belongs to other-agents" in done.stderr


def test_a_folder_of_the_users_is_told_apart_where_ours_is_needed(site):
    (site / "other_agents-1.0.dist-info" / "RECORD").unlink()
    assert python(site, "import textgym").stderr == ""
    assert "belongs to no installed distribution" in python(site, "import benchmarks.profiles").stderr


def test_a_name_that_other_agents_have_is_explained(site):
    (site / "agents" / "__init__.py").unlink()  # ours was installed last, so that theirs is the broken one
    (site / "agents").rmdir()
    done = python(site, "import benchmarks; from agents import PPO; import agents; agents.Agent")
    assert "module 'agents' has no attribute 'Agent'; it is textgym's, and other-agents has one too" in done.stderr
