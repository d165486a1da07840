"""Curricula: which problems an iteration plays, and how much of the guide's text each one starts from."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from agents.arguments import by_name
from textgym.checks import check, is_int, is_number
from textgym.guidance import Guidance

if TYPE_CHECKING:
    from agents.rollout import Rollout

# A failure so near to the upper bound of an interval counts as one at the bound.
NARROW = 0.02


@dataclass
class Plan:
    """What the N episodes of an iteration start from, in groups of k.

    Attributes:
        samples: int64 (N/k,), the row of the split that a group plays.
        fractions: float64 (N/k, k), the part of the guide's text that each episode reveals; 0 for no prefix.
        prefixes: For each group token ids that start its episodes, in place of the guide's text; None for none.
    """

    samples: np.ndarray
    fractions: np.ndarray
    prefixes: list[list[int] | None]

    def options(self, episodes: np.ndarray, guidance: list[Guidance], text_seed: int) -> dict[str, Any]:
        """Reset options of some episodes.

        Args:
            episodes: int (n,), numbers of the episodes.
            guidance: n times the guidance that says whether they are handed off; its restarts are replaced.
            text_seed: Seed of the guide's texts.
        """
        groups, fractions = episodes // self.fractions.shape[1], self.fractions.ravel()[episodes]
        return {
            "index": self.samples[groups].tolist(),
            "prefix": [self.prefixes[group] for group in groups],
            "guidance": [
                given.with_prefix(fraction, text_seed) for given, fraction in zip(guidance, fractions, strict=True)
            ],
        }


@dataclass
class Curriculum:
    """A rule for the prefixes of episodes, which can depend on what happened before.

    A rule is a dataclass: its fields are settings, all its other attributes are its state, which checkpoints hold.
    Prefixes are beginnings of the guide's text of a sample (`Guidance.restart_fraction`): the guide writes it once.
    Subclasses define `fractions`, and `record` if they learn from rewards.

    Attributes:
        name: What the curriculum is called in arguments and checkpoints.
        needs_guide: Whether prefixes are the guide's.
        num_samples: Rows of the split, from `start` on.
    """

    name: str = field(init=False)
    needs_guide: ClassVar[bool] = True

    @classmethod
    def of(cls, value: Curriculum | Mapping[str, Any] | str) -> Curriculum:
        """A new curriculum without state, given one, its name, or a mapping of its name and settings.

        Raises:
            TypeError: A setting that it does not have.
            ValueError: There is none of this name, or a setting is wrong.
        """
        return by_name("curriculum", value, cls)

    def start(self, num_samples: int) -> None:
        """Begin without experience of any of the samples 0 to num_samples - 1."""
        self.num_samples = num_samples

    def plan(self, iteration: int, groups: int, group_size: int, random: np.random.Generator) -> Plan:
        """Decide what the episodes of an iteration start from: by default, samples drawn uniformly.

        Args:
            iteration: Number of iterations before this one.
            groups: Number of groups.
            group_size: k, episodes of a group; 1 for algorithms without groups.
            random: The source of all random choices.
        """
        samples = random.integers(self.num_samples, size=groups)
        fractions = np.broadcast_to(self.fractions(samples, iteration, random)[:, None], (groups, group_size))
        return Plan(samples, fractions, [None] * groups)

    def fractions(self, samples: np.ndarray, iteration: int, random: np.random.Generator) -> np.ndarray:
        """The part of the guide's text that each sample reveals, float64 like `samples`."""
        raise NotImplementedError(f"{type(self).__name__} must define fractions, or plan")

    def record(self, plan: Plan, rewards: np.ndarray, rollout: Rollout) -> None:
        """Learn from the episodes of an iteration.

        Args:
            plan: What they started from.
            rewards: float (N/k, k), the task's rewards.
            rollout: The episodes.
        """

    def get_state(self) -> dict[str, Any]:
        """Everything that the rule has learned."""
        settings = {part.name for part in fields(self)}
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in settings})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `get_state`."""
        vars(self).update(state)


@dataclass
class Uniform(Curriculum):
    """Prefixes of all lengths, equally often (R3, Xi et al. 2024, arXiv 2402.05808; PPO++ with beta).

    Attributes:
        beta: Probability that a group starts from a prefix.
    """

    name: str = field(default="uniform", init=False)
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self, "beta")

    def fractions(self, samples: np.ndarray, iteration: int, random: np.random.Generator) -> np.ndarray:
        """Uniform in [0, 1) with probability beta, else 0."""
        guided, fractions = random.random((2, len(samples)))
        return np.where(guided < self.beta, fractions, 0)


@dataclass
class Cosine(Curriculum):
    """Ever shorter prefixes, then none (UFT, Liu et al. 2025, arXiv 2505.16984).

    A text is cut into slices, of which Binomial(slices, p) are revealed; p falls on a cosine from `high` to `low` over
    `iterations`. Differs from the paper: the prefix carries no supervised loss, which `agents.uft` adds.

    Attributes:
        slices: Number of slices.
        high: p in the first iteration.
        low: p at the end.
        iterations: Iterations with prefixes.
    """

    name: str = field(default="cosine", init=False)
    slices: int = 5
    high: float = 0.95
    low: float = 0.05
    iterations: int = 300

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)
        check("slices", self.slices, is_int(self.slices) and self.slices >= 1, "an int of at least 1")
        _check_shares(self, "high", "low")

    def fractions(self, samples: np.ndarray, iteration: int, random: np.random.Generator) -> np.ndarray:
        """Whole slices."""
        if iteration >= self.iterations:
            return np.zeros(len(samples))
        probability = cosine(self.high, self.low, iteration / self.iterations)
        return random.binomial(self.slices, probability, len(samples)) / self.slices


@dataclass
class Stages(Curriculum):
    """Prefixes of fixed lengths, stage by stage (QuestA, Li et al. 2025, arXiv 2507.13266: a half, then a quarter).

    Differs from the paper: the text is a prefix of the answer, not a hint in the question; a last stage without any.

    Attributes:
        stages: The revealed fraction in each stage; the last stage never ends.
        iterations: Iterations of each stage.
    """

    name: str = field(default="stages", init=False)
    stages: tuple[float, ...] = (0.5, 0.25, 0.0)
    iterations: int = 100

    def __post_init__(self) -> None:
        self.stages = tuple(self.stages)
        valid = len(self.stages) > 0 and all(is_number(stage) and 0 <= stage <= 1 for stage in self.stages)
        check("stages", self.stages, valid, "numbers in [0, 1]")
        _check_iterations(self.iterations)

    def fractions(self, samples: np.ndarray, iteration: int, random: np.random.Generator) -> np.ndarray:
        """The same for all."""
        stage = min(iteration // self.iterations, len(self.stages) - 1)
        return np.full(len(samples), self.stages[stage])


@dataclass
class AdaBack(Curriculum):
    """An interval of fractions per sample, which backs off where a group fails (arXiv 2506.18110).

    A fraction r is drawn uniformly in the sample's interval [low, high], at first [0, 1]. If the group's mean reward is
    below the threshold, more is needed: low = r. Else less may do: high = r and low = 0. A sample that is played for
    the first time starts from running averages of all bounds. Written from a description of the paper, not from its
    code: `zero_prob` and `averaging` are our values, and so is that high = 1 again after a failure at the upper bound,
    without which a success by chance would deprive a sample of longer prefixes for good.

    Attributes:
        threshold: Mean reward of a group that counts as success.
        zero_prob: Probability that a group has no prefix whatever its interval.
        averaging: Weight of the past in the running averages, per iteration.
    """

    name: str = field(default="adaback", init=False)
    threshold: float = 0.5
    zero_prob: float = 0.1
    averaging: float = 0.9

    def __post_init__(self) -> None:
        check("threshold", self.threshold, is_number(self.threshold), "a number")
        _check_shares(self, "zero_prob", "averaging")

    def start(self, num_samples: int) -> None:
        """Unknown intervals, and [0, 1] as their averages."""
        super().start(num_samples)
        self.intervals = np.full((num_samples, 2), np.nan)
        self.average = np.array([0.0, 1.0])

    def fractions(self, samples: np.ndarray, iteration: int, random: np.random.Generator) -> np.ndarray:
        """Uniform in each sample's interval; 0 with probability `zero_prob`."""
        low, high = np.where(np.isnan(self.intervals[samples]), self.average, self.intervals[samples]).T
        draws, zero = random.random((2, len(samples)))
        return np.where(zero < self.zero_prob, 0, low + (high - low) * draws)

    def record(self, plan: Plan, rewards: np.ndarray, rollout: Rollout) -> None:
        """Narrow or reset the interval of every sample that was played."""
        unknown = np.isnan(self.intervals)
        self.intervals[plan.samples] = np.where(unknown, self.average, self.intervals)[plan.samples]
        for sample, fraction, reward in zip(plan.samples, plan.fractions[:, 0], rewards.mean(1), strict=True):
            low, high = self.intervals[sample]
            if reward >= self.threshold:
                low, high = 0.0, min(high, fraction)
            else:
                low, high = max(low, fraction), 1.0 if fraction >= high - NARROW else high
            self.intervals[sample] = low, high
        played = self.intervals[np.unique(plan.samples)].mean(0)
        self.average = self.averaging * self.average + (1 - self.averaging) * played


@dataclass
class AccuracyTrend(Curriculum):
    """A few guided episodes per group, whose prefix follows the trend of the accuracy (G2RPO-A, arXiv 2508.13023).

    In every third iteration the mean reward is compared with that of the two before: the fraction is multiplied by
    their ratio, so that it grows when rewards fall; while one of the two is zero it stays as it is. As in the authors'
    code (`_compute_new_guidance_length`), which has 2 of 12 texts guided. Differs from it: the length is a fraction of
    the text, not a number of tokens.

    Attributes:
        initial: The first fraction.
        guided: Part of each group's episodes that have the prefix, at least one; without groups, the probability of a
            prefix.
    """

    name: str = field(default="trend", init=False)
    initial: float = 0.5
    guided: float = 2 / 12

    def __post_init__(self) -> None:
        for name in ("initial", "guided"):
            value = getattr(self, name)
            check(name, value, is_number(value) and 0 < value <= 1, "a number in (0, 1]")

    def start(self, num_samples: int) -> None:
        """The initial fraction, and no rewards yet."""
        super().start(num_samples)
        self.fraction = self.initial
        self.recent: list[float] = []

    def plan(self, iteration: int, groups: int, group_size: int, random: np.random.Generator) -> Plan:
        """The first episodes of each group are guided."""
        samples = random.integers(self.num_samples, size=groups)
        return Plan(samples, _some(self.guided, self.fraction, groups, group_size, random), [None] * groups)

    def record(self, plan: Plan, rewards: np.ndarray, rollout: Rollout) -> None:
        """Adapt the fraction in every third iteration."""
        self.recent.append(float(rewards.mean()))
        if len(self.recent) == 3:
            before, now = (self.recent[0] + self.recent[1]) / 2, self.recent[2]
            if before > 0 and now > 0:
                self.fraction = min(self.fraction * before / now, 1.0)
            self.recent = []


@dataclass
class Mixed(Curriculum):
    """Some texts of each group start from the guide's text, the others from nothing.

    By default that is the guide's whole text up to its last token, for one text of eight (LUFFY, Yan et al. 2025, arXiv
    2504.14945). With `high` and `low` the revealed fraction falls on a cosine over `iterations` (Prefix-RFT, Huang et
    al. 2025, arXiv 2507.01679: from 0.95 to 0.05).

    Attributes:
        guided: Part of each group's episodes that have the prefix, at least one; without groups, the probability of a
            prefix.
        high: The fraction in the first iteration.
        low: The fraction at the end.
        iterations: Iterations until then.
    """

    name: str = field(default="mixed", init=False)
    guided: float = 1 / 8
    high: float = 1.0
    low: float = 1.0
    iterations: int = 300

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)
        _check_shares(self, "guided", "high", "low")

    def plan(self, iteration: int, groups: int, group_size: int, random: np.random.Generator) -> Plan:
        """The first episodes of each group are guided."""
        samples = random.integers(self.num_samples, size=groups)
        fraction = cosine(self.high, self.low, iteration / self.iterations)
        return Plan(samples, _some(self.guided, fraction, groups, group_size, random), [None] * groups)


@dataclass
class POPE(Curriculum):
    """Unsolved problems are played twice, with and without a prefix (Qu et al. 2026, arXiv 2601.18779).

    A sample is hard once `tries` episodes without a prefix have failed and none has succeeded; a hard sample that is
    drawn fills two groups, the second of which starts from the guide's text (that of an iteration's last
    group may be missing). Differs from the paper: tries are counted during training, not before it, and no instruction
    to build on the prefix is added to the prompt.

    Attributes:
        tries: Failures that make a sample hard.
        fraction: The part of the guide's text that a hard sample reveals.
        success: Reward from which an episode counts as a success.
    """

    name: str = field(default="pope", init=False)
    tries: int = 16
    fraction: float = 0.5
    success: float = 1.0

    def __post_init__(self) -> None:
        check("tries", self.tries, is_int(self.tries) and self.tries >= 0, "an int of at least 0")
        check("fraction", self.fraction, is_number(self.fraction) and 0 < self.fraction <= 1, "a number in (0, 1]")
        check("success", self.success, is_number(self.success), "a number")

    def start(self, num_samples: int) -> None:
        """No tries yet."""
        super().start(num_samples)
        self.failures = np.zeros(num_samples, np.int64)
        self.solved = np.zeros(num_samples, bool)

    def plan(self, iteration: int, groups: int, group_size: int, random: np.random.Generator) -> Plan:
        """Samples drawn uniformly, hard ones twice."""
        drawn = random.integers(self.num_samples, size=groups)
        hard = ~self.solved[drawn] & (self.failures[drawn] >= self.tries)
        draw = np.repeat(np.arange(groups), 1 + hard)
        samples, second = drawn[draw], np.diff(draw, prepend=-1) == 0
        fractions = np.broadcast_to((second * self.fraction)[:groups, None], (groups, group_size))
        return Plan(samples[:groups], fractions, [None] * groups)

    def record(self, plan: Plan, rewards: np.ndarray, rollout: Rollout) -> None:
        """Count failures and successes of episodes without a prefix."""
        alone, success = plan.fractions == 0, rewards >= self.success
        np.add.at(self.failures, plan.samples, (alone & ~success).sum(1))
        np.logical_or.at(self.solved, plan.samples, (alone & success).any(1))


@dataclass
class PrefixRL(Curriculum):
    """Prefixes of the policy's own earlier successes, cut where its accuracy is middling (arXiv 2601.18795).

    For each sample the latest successful text is kept. Once there is one, a group starts from its first part with
    probability `beta`; the cut is the one of `cuts` equal parts from which the success rate so far is nearest to one
    half. It needs no guide. Differs from the paper: successes come
    from training itself, not from rejection sampling before it.

    Attributes:
        beta: Probability that a group of a sample with a success starts from a prefix.
        cuts: Number of places where a text can be cut.
        averaging: Weight of the past in a cut's success rate, per group that is played from it.
        success: Reward from which an episode counts as a success.
    """

    name: str = field(default="prefix-rl", init=False)
    needs_guide: ClassVar[bool] = False
    beta: float = 0.5
    cuts: int = 8
    averaging: float = 0.8
    success: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self, "beta", "averaging")
        check("cuts", self.cuts, is_int(self.cuts) and self.cuts >= 2, "an int of at least 2")
        check("success", self.success, is_number(self.success), "a number")

    def start(self, num_samples: int) -> None:
        """No successes; success is assumed to be the more likely, the longer the prefix is."""
        super().start(num_samples)
        self.texts: dict[int, list[int]] = {}
        self.rates = np.tile(np.arange(self.cuts) / self.cuts, (num_samples, 1))

    def plan(self, iteration: int, groups: int, group_size: int, random: np.random.Generator) -> Plan:
        """Cut the kept texts."""
        samples = random.integers(self.num_samples, size=groups)
        prefixes: list[list[int] | None] = [None] * groups
        for group in np.flatnonzero(random.random(groups) < self.beta):
            if text := self.texts.get(int(samples[group])):
                cut = int(np.abs(self.rates[samples[group]] - 0.5).argmin())
                prefixes[group] = text[: self._lengths(text)[cut]] or None
        return Plan(samples, np.zeros((groups, group_size)), prefixes)

    def record(self, plan: Plan, rewards: np.ndarray, rollout: Rollout) -> None:
        """Update the success rates of cuts, then the kept texts."""
        success = rewards >= self.success
        for sample, prefix, rate in zip(plan.samples.tolist(), plan.prefixes, success.mean(1), strict=True):
            if prefix is not None:
                same = self._lengths(self.texts[sample]) == len(prefix)
                self.rates[sample, same] += (1 - self.averaging) * (rate - self.rates[sample, same])
        tokens, lengths = (
            rollout.input_ids[:, rollout.prompt_columns :].tolist(),
            (rollout.authors >= 0).sum(1).tolist(),
        )
        for row in np.flatnonzero(success):
            self.texts[int(plan.samples[row // success.shape[1]])] = tokens[row][: lengths[row]]

    def _lengths(self, text: list[int]) -> np.ndarray:
        """Tokens before each cut of a text, all less than its number of tokens."""
        return np.arange(self.cuts) * len(text) // self.cuts


def cosine(high: float, low: float, progress: float) -> float:
    """A number that falls from `high` to `low` as progress goes from 0 to 1."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _some(share: float, fraction: float, groups: int, group_size: int, random: np.random.Generator) -> np.ndarray:
    """Fractions (groups, k): one and the same for the first texts of each group, or for single texts at random."""
    fractions = np.zeros((groups, group_size))
    if group_size == 1:
        fractions[random.random(groups) < share] = fraction
    else:
        fractions[:, : max(1, round(share * group_size))] = fraction
    return fractions


def _check_shares(rule: Curriculum, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        check(name, value, is_number(value) and 0 <= value <= 1, "a number in [0, 1]")


def _check_iterations(value: Any) -> None:
    check("iterations", value, is_int(value) and value >= 1, "an int of at least 1")
