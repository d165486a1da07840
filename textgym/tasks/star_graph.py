"""Star graph: a path from the centre of a star to a leaf, whose first step is the only hard one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textgym import seeding
from textgym.checks import check, check_int
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.task import SPLITS
from textgym.tasks.procedural import Difficulty, Puzzle, WithPuzzle, choose


@dataclass(frozen=True)
class StarGraph(Puzzle):
    """Settings of star graphs (see `StarGraphEnv`).

    Attributes:
        degree: d, arms of the star, at least 2.
        path_length: l, nodes of a path, the centre included, at least 2.
        train_degree: The same for the training split; None for `degree`.
        train_path_length: The same for the training split; None for `path_length`.
        nodes: N, labels of which a graph has some; at least 1 + d (l - 1) for every d and l.
    """

    degree: Difficulty = 2
    path_length: Difficulty = 5
    train_degree: Difficulty | None = None
    train_path_length: Difficulty | None = None
    nodes: int = 50

    name = "star_graph"
    difficulties = {"degree": 2, "path_length": 2}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("nodes", self.nodes)
        least = max(1 + arms * (length - 1) for split in SPLITS for arms, length in self.levels(split))
        check("nodes", self.nodes, self.nodes >= least, f">= {least}, the nodes of the largest graph")

    @property
    def words(self) -> Sequence[str]:
        """The labels, and what separates edges, graph, and question."""
        return (*map(str, range(self.nodes)), "|", "/", "=")

    def lengths(self, *level: int) -> tuple[int, int]:
        """Words of a prompt and of a reference."""
        degree, path_length = level
        return 3 * degree * (path_length - 1) + 3, path_length

    def problem(self, seed: int, *level: int) -> tuple[str, str]:
        """A star with labels and an order of edges of the seed's choice; the goal is the leaf of its first arm."""
        degree, steps = level[0], level[1] - 1
        labels = seeding.uniform(seed, 0, np.arange(self.nodes)).argsort().tolist()
        centre, arms = labels[0], [labels[1 + arm * steps :][:steps] for arm in range(degree)]
        edges = [edge for arm in arms for edge in zip([centre, *arm], arm, strict=False)]
        order = seeding.uniform(seed, 1, np.arange(len(edges))).argsort().tolist()
        graph = " | ".join(f"{edges[i][0]} {edges[i][1]}" for i in order)
        return f"{graph} / {centre} {arms[0][-1]} =", " ".join(map(str, [centre, *arms[0]]))

    def worth(self, prompt: Sequence[str], text: Sequence[str]) -> float:
        """1 for the path from the centre to the goal, else 0."""
        path, _ = _read(prompt)
        return float(bool(path) and [*text] == path)

    def proceed(self, prompt: Sequence[str], text: list[str], draws: Sequence[float]) -> None:
        """Go along the path, or where the text has left it along its arm; each step is right with `guide_accuracy`."""
        path, successors = _read(prompt)
        labels = list(dict.fromkeys(label for label, following in successors.items() for label in (label, *following)))
        while len(text) < min(len(path), len(draws)):
            if not text:
                text.append(path[0])
                continue
            following = successors.get(text[-1], [])
            right = [label for label in following if label in path] or following
            others = following if len(following) > 1 else labels
            text.append(
                choose(right, [label for label in others if label not in right], self.guide_accuracy, draws[len(text)])
            )


def _read(prompt: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The path to the goal of a prompt, empty where there is none, and the nodes after each."""
    graph, _, question = " ".join(prompt).partition(" / ")
    edges = [edge.split() for edge in graph.split(" | ")]
    asked = question.split()
    if len(asked) != 3 or asked[-1] != "=" or any(len(edge) != 2 for edge in edges):
        return [], {}
    successors: dict[str, list[str]] = {}
    for label, following in edges:
        successors.setdefault(label, []).append(following)
    before = {following: label for label, following in edges}
    path = [asked[1]]
    while path[-1] != asked[0]:
        if path[-1] not in before or len(path) > len(edges):
            return [], {}
        path.append(before[path[-1]])
    return path[::-1], successors


class StarGraphEnv(WithPuzzle, TextEnv, puzzle=StarGraph):
    """Find the path from the centre of a star to a leaf.

    Description
        A star has d arms, on each of which l - 1 nodes follow the centre. The prompt is its edges, from the centre
        outward and in a random order, and the question: "3 8 | 41 7 | ... / 3 12 =", with the centre and the leaf that
        is the goal. The text is the path, centre and goal included. Its second node is the only hard one: one of d,
        told by the far end of its arm alone. After it every node is the only one that follows. Whoever is given a
        prefix of the path is given the answer: a control for methods that restart from prefixes, which should not help.

        By Bachmann and Nagarajan (2024, arXiv 2403.06963), whose graphs and order of the text these are (their code
        has d = 2, l = 5, N = 50; it also separates the numbers by commas). That plain reinforcement sees no reward on
        d = l = 10, and that easier graphs in the training mix change it, is from arXiv 2510.03971.

    Rewards
        Zero until the episode ends; then 1 if the text is exactly the path, else 0.

        Every token of a guide's completion costs ``handoff_cost``.

    Arguments
        ``degree``: d, by default 2. ``path_length``: l, nodes of the path, by default 5. Each is an int or several, of
        which then all combinations take turns.
        ``train_degree``, ``train_path_length``: the same for the training split, such as ``(2, 3)``; by default those
        of ``degree`` and ``path_length``.
        ``nodes``: N, labels that a graph takes its own from, by default 50; the vocabulary depends on it alone.

        A step of the scripted guide is a node after the centre: it earns 1 with probability
        ``guide_accuracy ** (path_length - 1)``. Its errors at the centre are other arms, which it then follows.
    """


class StarGraphVectorEnv(WithPuzzle, TextVectorEnv, puzzle=StarGraph):
    """`StarGraphEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""
