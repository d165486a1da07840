"""Whether the packages that textgym needs are installed, and whether they are the right ones."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def require(extra: str, purpose: str, *modules: str) -> None:
    """Refuse to go on without the packages of an extra.

    Args:
        extra: The extra of textgym that installs them.
        purpose: What needs them.
        modules: Their top-level modules.

    Raises:
        ImportError: One is not installed.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f'{purpose} needs {" and ".join(missing)}: pip install "textgym[{extra}]"')


def foreign_package(name: str) -> str | None:
    """Say what is found in the place of one of our top-level packages, None if it is ours or there is nothing.

    pip lets two distributions install packages of the same name and overwrite each other's files; a folder of that name
    on the path hides ours too. Every `__init__.py` of ours names textgym.
    """
    spec = find_spec(name)
    if spec is None or (spec.origin and "textgym" in Path(spec.origin).read_text(encoding="utf-8", errors="replace")):
        return None
    place = spec.origin or list(spec.submodule_search_locations or ())
    owners = " and ".join(other_owners(name)) or "no installed distribution"
    return (
        f"the package {name!r} at {place} belongs to {owners}, not to textgym, and hides ours: install textgym in an "
        f"environment without it, and run where no other file or folder is called {name}"
    )


def other_owners(name: str) -> list[str]:
    """Names of the installed distributions, other than textgym, that have a top-level package of this name."""
    from importlib.metadata import packages_distributions  # takes a tenth of a second

    return sorted(set(packages_distributions().get(name, [])) - {"textgym"})
