"""METEOR and SPICE, Java programs of the `pycocoevalcap` package.

They run without the wrappers of that package, which download files, write into the folder of the package, and take the
end of a program for an answer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from textgym.metrics import MissingRequirement
from textgym.metrics.base import TextMetric

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Meteor(TextMetric):
    """METEOR 1.5 by its authors' program, which normalises texts (``-l en -norm``).

    The score is that of the whole set, from the sums of all matches, and not a mean over texts. Punctuation is kept, as
    in CommonGen's evaluation; coco-caption removes it. The program needs Java and about 1.5 GiB of memory. It starts
    with the first computation of a process and runs until that process ends.

    Returns:
        ``meteor`` in [0, 1].

    Raises:
        MissingRequirement: Java or `pycocoevalcap` is missing.
    """

    inputs = ("predictions", "references")
    paper = "Denkowski, Lavie. Meteor Universal: Language Specific Translation Evaluation. WMT 2014."
    signature = "METEOR 1.5 -l en -norm"

    def __init__(self) -> None:
        super().__init__()
        _java()
        _package()

    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"meteor": _meteor(os.getpid()).score(predictions, references)}


class Spice(TextMetric):
    """SPICE 1.0 by its authors' program: F1 of the scene graphs of a text and of its references together.

    The program needs Java, up to 8 GiB of memory, and Stanford CoreNLP 3.6.0, which is in no package: ``python -m
    pycocoevalcap.spice.get_stanford_models`` downloads it (400 MB) to the right folder. The score is read from the
    output of the program, with three decimals: to write it to a file, the program needs the JavaScript that Java
    removed in version 15.

    The tests of this project run the program without its parser, for want of CoreNLP.

    Returns:
        ``spice``, the mean, in [0, 1].

    Raises:
        MissingRequirement: Java, `pycocoevalcap` or CoreNLP is missing.
    """

    inputs = ("predictions", "references")
    paper = "Anderson, Fernando, Johnson, Gould. SPICE: Semantic Propositional Image Caption Evaluation. ECCV 2016."
    signature = "SPICE 1.0, CoreNLP 3.6.0"

    def __init__(self) -> None:
        super().__init__()
        _java()
        folder = _package() / "spice"
        missing = [name for name in CORENLP if not (folder / "lib" / name).is_file()]
        if missing:
            raise MissingRequirement(
                f"SPICE needs Stanford CoreNLP: {', '.join(missing)} must be in {folder / 'lib'}, where python -m "
                "pycocoevalcap.spice.get_stanford_models puts them"
            )

    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        texts = [
            {"image_id": row, "test": text, "refs": targets}
            for row, (text, targets) in enumerate(zip(predictions, references, strict=True))
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "texts.json"
            path.write_text(json.dumps(texts), encoding="ascii")
            # In other languages the program writes the score with a comma.
            options = ["-Xmx8G", "-Duser.language=en", "-jar", str(_package() / "spice" / "spice-1.0.jar")]
            done = subprocess.run(
                [_java(), *options, str(path)], cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
            )
        score = re.search(r"f-score:\s*([\d.]+) \(SPICE metric\)", done.stdout)
        if score is None:
            raise RuntimeError(f"SPICE failed with exit code {done.returncode}: {done.stderr[-2000:].strip()}")
        return {"spice": float(score[1])}


class _MeteorProcess:
    """A METEOR program that reads requests from its standard input, one per line, and ends with this process."""

    def __init__(self) -> None:
        jar = _package() / "meteor" / "meteor-1.5.jar"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [_java(), "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
        )
        self.requests: Any = self.process.stdin
        self.answers: Any = self.process.stdout
        self.lock = Lock()

    def score(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the score of a set of texts, each with its references."""
        with self.lock:
            try:
                statistics = []
                for text, targets in zip(texts, references, strict=True):
                    self._write("SCORE", [_line(text) for text in (*targets, text)])
                    statistics.append(self._read())
                self._write("EVAL", statistics)
                return [float(self._read()) for _ in (*texts, "all")][-1]
            except (OSError, EOFError, ValueError) as error:
                _meteor.cache_clear()
                self.process.kill()
                self.errors.seek(0)
                reason = self.errors.read().decode(errors="replace")[-2000:].strip()
                raise RuntimeError(f"METEOR failed with exit code {self.process.wait()}: {reason}") from error

    def _write(self, command: str, fields: Sequence[str]) -> None:
        self.requests.write(" ||| ".join([command, *fields]) + "\n")
        self.requests.flush()

    def _read(self) -> str:
        line = self.answers.readline()
        if not line:
            raise EOFError
        return line.strip()


@cache
def _meteor(process_id: int) -> _MeteorProcess:
    """Return the METEOR of this process: a forked process must not use that of its parent."""
    return _MeteorProcess()


def _line(text: str) -> str:
    """Return a text without line ends and without the separator of METEOR's protocol."""
    return " ".join(text.replace("|||", " ").split())


def _package() -> Path:
    """Return the folder of `pycocoevalcap`."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingRequirement('METEOR and SPICE need pycocoevalcap: pip install "textgym[metrics]"')
    return Path(spec.submodule_search_locations[0])


def _java() -> str:
    java = shutil.which("java")
    # macOS has a `java` that only says that Java is not installed.
    if java is None or subprocess.run([java, "-version"], capture_output=True).returncode:
        raise MissingRequirement(
            "METEOR and SPICE need Java, version 8 or later: there is no `java` on the PATH that runs"
        )
    return java
