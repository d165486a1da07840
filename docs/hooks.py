"""What MkDocs does not do alone: pages from outside of docs/, links that also work on a code host, and notebooks."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
# Pages of the repository's top folder, and where the site has them.
TOP = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
CODE = {".py": "python", ".sh": "bash"}
# Targets of links to other files, without the part after "#".
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages made of notebooks, of the top folder, and of every file outside of docs/ that a page has a link to."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        for name, content in _converted(ROOT / "docs" / notebook.src_uri).items():
            files.append(
                File.generated(config, posixpath.join(posixpath.dirname(notebook.src_uri), name), content=content)
            )
    for path, uri in TOP.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:  # which grows while it is read
        for path in _linked(page.content_string, page.src_uri):
            uri = _uri(path)
            if files.get_file_from_path(uri) is None:
                file = _outside(path, uri, config)
                files.append(file)
                if file.is_documentation_page():
                    pages.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has what they name, and leave comments out, which would split paragraphs."""
    markdown = re.sub(r"<!-- .*? -->", "", markdown)
    here = posixpath.dirname(page.file.src_uri)
    for target, path in _targets(markdown, page.file.src_uri).items():
        there = posixpath.relpath(_uri(path), here or ".")
        markdown = re.sub(rf"(?<=\]\(){re.escape(target)}(?=[)#])", there, markdown)
    # A folder is no page.
    return re.sub(r"\[([^\]]*)\]\((?:benchmarks|examples)/[\w/]+\)", r"\1", markdown)


def _targets(markdown: str, uri: str) -> dict[str, str]:
    """The targets of a page's links to files of the repository, and the paths of these files there."""
    folder = posixpath.dirname(_path(uri))
    paths = {target: posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(markdown)}
    return {target: path for target, path in paths.items() if (ROOT / path).is_file()}


def _linked(markdown: str, uri: str) -> list[str]:
    return [*_targets(markdown, uri).values()]


def _path(uri: str) -> str:
    """The path in the repository of what has this path on the site."""
    for path, top in TOP.items():
        if uri == top:
            return path
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """The path on the site of a file of the repository."""
    if path in TOP:
        return TOP[path]
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"repository/{path}" + ".md" * (Path(path).suffix in CODE)


def _outside(path: str, uri: str, config: MkDocsConfig) -> File:
    """A file from outside of docs/: code as a page, other files as they are."""
    if language := CODE.get(Path(path).suffix):
        code = (ROOT / path).read_text(encoding="utf-8")
        content = f"# {path}\n\n````{language}\n{code}````\n"
        return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
    return File.generated(config, uri, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)


def _converted(notebook: Path) -> dict[str, str | bytes]:
    """The page of a notebook and its pictures, by file name."""
    page, resources = MarkdownExporter().from_filename(str(notebook), {"unique_key": notebook.stem})
    return {f"{notebook.stem}.md": page, **resources["outputs"]}
