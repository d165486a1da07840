"""Runs: every row of every task with every seed, from the same warm start, judged on the same test prompts."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from agents import SL, EvaluationResult, Policy, evaluate
from agents.algorithm import Algorithm
from agents.checkpoint import TRAINING
from agents.evaluation import make_env
from agents.policy import LanguageModelPolicy
from agents.policy.language_model import POLICY_FILE
from agents.rollout import Rollout
from benchmarks.profiles import Profile, Row, TaskProfile, accepted, algorithm_class
from benchmarks.results import Record, read_results, write_text
from benchmarks.warm_start import Report, WarmStart, load_policy, warm_start
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides.base import Author
from textgym.guides.local import LocalGuide
from textgym.tokenization import Context, decode_by_author

PACKAGES = ("textgym", "torch", "transformers", "tokenizers", "gymnasium", "datasets", "numpy")
SAMPLES = 4  # texts of a run that the report shows


class Run(NamedTuple):
    """One row of a task's tables with one seed; `algo` is the row's name in the profile."""

    task: str
    algo: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.algo} seed {self.seed}"


class Benchmark:
    """The runs of a profile, and the folder where their results go.

    Args:
        profile: What to run.
        source: "mini", "hub" or a folder; None takes the profile's.
        base: Hub id or folder of the start model; None trains one from scratch on each task's text.
        out: The results folder. A run that finished there is not run again.
        dtype: What policies and guides compute products of matrices in, "float32" or "auto".
        compile: Whether policies are compiled.
        track: Names of Accelerate's trackers that runs report to.
        encoder: Hub id or folder of the encoder of BERTScore, for tasks that have it among their metrics.

    Attributes:
        finished: The runs that have a record.

    Raises:
        ValueError: A row of the profile names an algorithm that there is not, or has arguments that a record cannot
            tell; or `out` holds runs with another profile, source, base or hyperparameters.
    """

    def __init__(
        self,
        profile: Profile,
        source: str | None,
        base: str | None,
        out: Path,
        dtype: Literal["float32", "auto"] = "float32",
        compile: bool = False,
        track: Sequence[str] = (),
        encoder: str | None = None,
    ) -> None:
        self.dtype, self.compile, self.track = dtype, compile, list(track) or None
        self.encoder = encoder
        self.profile, self.source, self.base, self.out = profile, source or profile.source, base, out
        self._warm_starts: dict[str, WarmStart] = {}
        for algorithm in dict.fromkeys(row.algorithm for task in profile.tasks.values() for row in task.rows.values()):
            algorithm_class(algorithm)
        for run in (Run(task, algo, 0) for task in profile.tasks for algo in profile.rows):
            self.settings(run)
        self.finished: set[Run] = set()
        self._fingerprints: dict[
            str, dict[str, str | None]
        ] = {}  # what finished runs of a task began with and were judged by
        self.read_finished()

    def read_finished(self) -> None:
        """Read which runs have a record.

        Raises:
            ValueError: One was made with another profile, source, base or hyperparameters.
        """
        for record in read_results(self.out):
            run = Run(record["task"], record["algo"], record["seed"])
            self.finished.add(run)
            self._fingerprints[run.task] = record["fingerprints"]
            if run.task in self.profile.tasks and run.algo in self.profile.rows:
                for key, value in self.settings(run).items():
                    if record.get(key) != value:
                        raise ValueError(
                            f"out must be a new folder, or one with runs of the same settings: in {self.out}, {run} "
                            f"has {key} {record.get(key)!r}, now it is {value!r}"
                        )

    def settings(self, run: Run) -> dict[str, Any]:
        """What was chosen for a run, as it stands in its record."""
        task, row = self.profile.tasks[run.task], self.row(run)
        test_decoding = task.decoding if task.test_decoding is None else task.test_decoding
        hyperparameters = {
            "algorithm": row.algorithm,
            "best_of": row.best_of,
            "env": {**task.env, **row.env},
            "decoding": task.decoding,
            "test_decoding": task.guide_decoding if row.as_guide else test_decoding,
            "guide_decoding": task.guide_decoding,
            "test_prompts": task.test_prompts,
            "start_model": self.base_of(task) or (task.language_model and asdict(task.language_model)),
            "supervised": task.supervised,
        }
        if row.algorithm != SL.name:
            hyperparameters |= {"policy": row.policy, "episodes": task.episodes, **self.arguments(run)}
            if row.start != "supervised":
                hyperparameters["start"] = row.start
        settings = {
            "profile": self.profile.name,
            "source": self.source,
            "base": self.base,
            "dtype": self.dtype,
            "compile": self.compile,
            "encoder": self.encoder,
            "hyperparameters": hyperparameters,
        }
        try:
            return json.loads(json.dumps(settings, default=described))  # as it will be read: tuples become lists
        except TypeError as error:
            raise ValueError(f"{run.task}, {run.algo}: what a profile gives must be JSON values, {error}") from error

    def base_of(self, task: TaskProfile) -> str | None:
        """Hub id or folder of a task's start model; None where one is trained from scratch."""
        return self.base or task.base

    def arguments(self, run: Run) -> dict[str, Any]:
        """Arguments of a run's algorithm: those that all of the task share, and its own."""
        task, row = self.profile.tasks[run.task], self.row(run)
        shared: Mapping[str, Any] = task.rl
        if ":" in row.algorithm:  # one from outside need not have all the options of ours
            shared = accepted(algorithm_class(row.algorithm), shared)
        return {**shared, **row.arguments}

    def row(self, run: Run) -> Row:
        """What a run is of."""
        return self.profile.tasks[run.task].rows[run.algo]

    def folder(self, run: Run) -> Path:
        """Where a run's checkpoints go."""
        return self.out / f"{run.task}-{run.algo}-{run.seed}"

    def forget_training(self, run: Run) -> None:
        """Keep of a finished run's checkpoints the policies, not what it would need to go on."""
        for checkpoint in ("last", "best"):
            shutil.rmtree(self.folder(run) / checkpoint / TRAINING, ignore_errors=True)

    def run(self, run: Run, report: Report) -> Record:
        """Train, evaluate, and say everything about it."""
        task, row = self.profile.tasks[run.task], self.row(run)
        start = self.warm_start(run.task, report)
        training_seed, evaluation_seed = spread(run.seed)
        decoding = Decoding(**self.settings(run)["hyperparameters"]["test_decoding"])
        algorithm = self.train(run, start, training_seed, report)
        policy = self.policy(start.supervised, decoding) if algorithm is None else algorithm.policy

        # A sequence-to-sequence model cannot say how probable a prompt and its continuation are as one text.
        judged_by_start = not AutoConfig.from_pretrained(start.start_model).is_encoder_decoder
        # Everyone writes alone, but for a policy that has learned when to ask the guide.
        env = self.guided_env(task, row, start) if policy.can_hand_off else task.env

        def judge(policy: Policy, metrics: tuple[()] | None = None) -> EvaluationResult:
            return evaluate(
                policy,
                task.env_id,
                split="test",
                source=self.source,
                num_prompts=task.test_prompts,
                decoding=decoding,
                seed=evaluation_seed,
                best_of=row.best_of,
                metrics=metrics,
                start_model=start.start_model if judged_by_start else None,
                encoder=self.encoder,
                **env,
            )

        report("evaluation", 0)
        result = judge(policy)
        judged_by = {"test": result.fingerprint, "reward": result.reward_fingerprint}
        self._check_same(run.task, judged_by)
        best = self.folder(run) / "best"
        best_reward = result.reward
        if best.is_dir():
            reads = isinstance(policy, LanguageModelPolicy)
            best_reward = judge(self.policy(best, decoding) if reads else type(policy).from_pretrained(best), ()).reward
        history = start.history if algorithm is None else algorithm.history
        usage = getattr({**task.env, **row.env}.get("guide"), "usage", None)
        return {
            **run._asdict(),
            "place": self.profile.rows.index(run.algo),
            **self.settings(run),
            "final_reward": result.reward,
            "best_reward": best_reward,
            "reward_parts": result.reward_parts,
            "metrics": result.metrics,
            "metric_signatures": result.metric_signatures,
            "metrics_left_out": result.metrics_left_out,
            "episodes": history[-1]["num_episodes"],
            "policy_tokens": 0 if algorithm is None else algorithm.num_timesteps,
            "guide_tokens": 0 if algorithm is None else algorithm.num_guide_tokens,
            "guide_usage": None if usage is None else asdict(usage),
            "seconds": sum(record["seconds"] for record in history),
            "history": history,
            "evaluation": {
                "split": "test",
                "seed": evaluation_seed,
                "prompts": len(result.rewards),
                "policy_tokens": result.policy_tokens,
                "guide_tokens": result.guide_tokens,
                "handoff_fraction": result.handoff_fraction,
                "seconds": result.seconds,
                "reward_accuracy": result.reward_accuracy,
                "sample_ids": result.sample_ids,
                "rewards": result.rewards,
            },
            "fingerprints": start.fingerprints | judged_by,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "threads": torch.get_num_threads(),
            "device": str(policy.device),
            "training_seed": training_seed,
            "samples": samples(result, policy.tokenizer),
            "rollouts": rollouts(getattr(algorithm, "last_rollout", None), policy.tokenizer),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def policy(self, path: str | Path, decoding: Decoding, **arguments: Any) -> LanguageModelPolicy:
        """Load a policy to compute as the runs do."""
        return load_policy(path, self.dtype, decoding=decoding, compile=self.compile, **arguments)

    def guided_env(self, task: TaskProfile, row: Row, start: WarmStart) -> dict[str, Any]:
        """Arguments of the environment that a row learns in; by default the guide is the supervised policy, frozen."""
        dtype: Any = None if self.dtype == "float32" else "auto"
        quantization = task.policy.get("quantization")
        decoding = Decoding(**task.guide_decoding)
        guide = LocalGuide(str(start.supervised), decoding=decoding, dtype=dtype, quantization=quantization)
        return {"guide": guide, **task.env, **row.env}

    def warm_start(self, task: str, report: Report) -> WarmStart:
        """The models of a task, made once.

        Raises:
            ValueError: Finished runs began with other models.
        """
        if task not in self._warm_starts:
            # The same for every row and seed: runs differ in what they do with it.
            profile = self.profile.tasks[task]
            start = warm_start(profile, self.source, self.base_of(profile), 0, report, self.dtype)
            self._check_same(task, start.fingerprints)
            self._warm_starts[task] = start
        return self._warm_starts[task]

    def _check_same(self, task: str, fingerprints: Mapping[str, str | None]) -> None:
        before = self._fingerprints.get(task, {})
        if wrong := [name for name, value in fingerprints.items() if before.get(name, value) != value]:
            raise ValueError(
                f"out must be a new folder, or one with runs of the same data and models: in {self.out}, runs on "
                f"{task} have other {wrong}"
            )

    def train(self, run: Run, start: WarmStart, seed: int, report: Report) -> Algorithm | None:
        """Train the supervised policy further; None for supervised learning itself, which the warm start has done."""
        task, row = self.profile.tasks[run.task], self.row(run)
        if row.algorithm == SL.name:
            return None
        env = make_env(
            task.env_id,
            num_envs=task.rl["episodes_per_iteration"],
            source=self.source,
            tokenizer=start.supervised,
            **self.guided_env(task, row, start),
        )
        algorithm = self.begin(run, start, env, seed)

        def callback(_locals: dict[str, Any], _globals: dict[str, Any]) -> None:
            report(f"reward {algorithm.history[-1]['reward']:.3f}", algorithm.num_episodes / task.episodes)

        report("training", algorithm.num_episodes / task.episodes)
        if algorithm.num_episodes < task.episodes:
            algorithm.learn(total_episodes=task.episodes - algorithm.num_episodes, callback=callback)
        return algorithm

    def begin(self, run: Run, start: WarmStart, env: TextVectorEnv, seed: int) -> Algorithm:
        """Make a run's algorithm, or go on from its last checkpoint.

        Raises:
            ValueError: The checkpoint was made with other settings, or from another warm start.
        """
        task, row, folder = self.profile.tasks[run.task], self.row(run), self.folder(run)
        algorithm: Any = algorithm_class(row.algorithm)
        settings = {**self.settings(run), "fingerprints": start.fingerprints}
        last = folder / "last"
        # The policies of Stable-Baselines3's algorithms with a replay buffer, which cannot go on, are of another kind.
        if issubclass(algorithm, Algorithm) and (last / TRAINING).is_dir() and (last / POLICY_FILE).is_file():
            begun = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            if begun != settings:
                wrong = [name for name in settings if begun.get(name) != settings[name]]
                raise ValueError(f"out must be a new folder, or one with runs of the same {wrong}: see {folder}")
            return algorithm.load(last, env, output_dir=folder, track=self.track)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that had no checkpoint yet, or cannot go on
        folder.mkdir(parents=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=2))
        weights = start.start_model if row.start == "start_model" else start.supervised
        policy = self.policy(weights, Decoding(**task.decoding), **row.policy)
        given = accepted(algorithm, {"seed": seed, "output_dir": folder, "track": self.track})
        return algorithm(policy, env, **given, **self.arguments(run))


def described(value: Any) -> str:
    """How settings tell an object, such as a guide: its class, and what tells it from others of that class.

    Raises:
        TypeError: It has no fingerprint.
    """
    fingerprint = getattr(value, "fingerprint", None)
    if not isinstance(fingerprint, str):
        raise TypeError(f"or objects with a fingerprint, got {value!r}")
    return f"{type(value).__name__} {fingerprint}"


def spread(seed: int) -> tuple[int, int]:
    """Seeds of a run's training and of its evaluation, far from those of every other seed.

    Row i of a vector environment takes seed + i, so that neighbouring seeds would share rows. The evaluation's does not
    depend on the row: rows are compared on the same prompts with the same random numbers.
    """
    training, evaluation = np.random.SeedSequence(seed).generate_state(2)
    return int(training), int(evaluation)


def samples(result: EvaluationResult, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A few evaluated texts, at the same places for every row."""
    chosen = np.linspace(0, len(result.rewards) - 1, min(SAMPLES, len(result.rewards))).astype(int)
    return [
        {
            "sample_id": int(result.sample_ids[row]),
            "prompt": result.prompts[row],
            "reward": float(result.rewards[row]),
            "segments": segments(result.prompts[row], result.token_ids[row], result.authors[row], tokenizer),
        }
        for row in chosen
    ]


def rollouts(rollout: Rollout | None, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A few of the last training episodes in which not all is the policy's; none where these are not known."""
    if rollout is None:
        return []
    written = rollout.authors != Author.NONE
    ids = rollout.input_ids[:, rollout.prompt_columns :]
    chosen = np.flatnonzero((written & ~rollout.body).any(1).cpu().numpy())[:SAMPLES]
    return [
        {
            "prompt": rollout.prompts[row],
            "prefix_length": int(rollout.prefix_length[row]),
            "reward": float(rollout.rewards[row]),
            "segments": segments(
                rollout.prompts[row],
                ids[row][written[row]].tolist(),
                rollout.authors[row][written[row]].tolist(),
                tokenizer,
            ),
        }
        for row in chosen
    ]


def segments(
    prompt: str, token_ids: Sequence[int], authors: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """A completion as stretches of one author each: (author, text)."""
    context = Context(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"], prompt)
    stretches = decode_by_author(tokenizer, context, token_ids, authors)
    return [(Author(author).name.lower(), text) for author, text in stretches]
