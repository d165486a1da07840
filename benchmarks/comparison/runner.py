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
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig

from agents import SL, EvaluationResult, Policy, evaluate
from agents.algorithm import Algorithm
from agents.checkpoint import TRAINING, read_checkpoint
from agents.evaluation import make_env
from agents.policy import LanguageModelPolicy
from agents.policy.language_model import POLICY_FILE
from benchmarks.comparison.about import about
from benchmarks.comparison.jobs import Job, Run, resolve
from benchmarks.comparison.results import Record, read_results, write_text
from benchmarks.comparison.samples import rollouts, samples
from benchmarks.comparison.warm_start import Report, WarmStart, load_policy, warm_start
from benchmarks.profiles import Profile, accepted, algorithm_class
from textgym.checks import check
from textgym.data.sources import resolve_source
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides.local import LocalGuide
from textgym.hub import load_pretrained
from textgym.storage import readable, restore

COUNTERS = ("iteration", "num_episodes", "num_timesteps", "num_guide_tokens")
PACKAGES = ("textgym", "torch", "transformers", "tokenizers", "gymnasium", "datasets", "numpy")


class Benchmark:
    """The runs of a profile, and the folder of their results.

    Args:
        profile: What to run.
        source: "mini", "hub" or a folder; None takes the profile's.
        base: Hub id or folder of the start model; None takes the profile's, or trains one from scratch on each task's
            text.
        out: The results folder. A run that finished there is not run again.
        dtype: What policies and guides compute products of matrices in, "float32" or "auto".
        compile: Whether policies are compiled.
        track: Names of Accelerate's trackers that runs report to.
        encoder: Hub id or folder of the encoder of BERTScore, for tasks that have it among their metrics.

    Attributes:
        jobs: What is run, by task and row.
        warm_starts: The models of tasks that are known to be made.
        finished: The runs that have a record.

    Raises:
        ValueError: A row's algorithm does not exist or has arguments that a record cannot hold; there is no such
            source; or `out` is no folder, or holds runs with another profile, source, base or hyperparameters.
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
        self.profile, self.source, self.out = profile, source or profile.source, out
        self.dtype, self.compile, self.track, self.encoder = dtype, compile, list(track) or None, encoder
        resolve_source(self.source)
        nearest = next(part for part in (out, *out.absolute().parents) if part.exists())
        check("out", str(out), nearest.is_dir(), "a folder, or one that can be made")
        settings = {
            "profile": profile.name,
            "source": self.source,
            "base": base,
            "dtype": dtype,
            "compile": compile,
            "encoder": encoder,
        }
        self.jobs = resolve(profile, base, settings)
        self.warm_starts: dict[str, WarmStart] = {}
        # What the finished runs of a task started from and were judged by.
        self._fingerprints: dict[str, dict[str, str | None]] = {}
        self.finished: set[Run] = set()
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
            if job := self.jobs.get((run.task, run.algo)):
                for key, value in job.settings.items():
                    if record.get(key) != value:
                        raise ValueError(
                            f"out must be a new folder, or one with runs of the same settings: in {self.out}, {run} "
                            f"has {key} {record.get(key)!r}, now it is {value!r}"
                        )

    def job(self, run: Run) -> Job:
        """What a run is of."""
        return self.jobs[run.task, run.algo]

    def folder(self, run: Run) -> Path:
        """Where a run's checkpoints go."""
        return self.out / f"{run.task}-{run.algo}-{run.seed}"

    def folder_before(self, run: Run) -> Path:
        """Where the checkpoints of the supervised learning go that comes first, if the row has one."""
        return self.folder(run).with_name(f"{self.folder(run).name}-before")

    def forget_training(self, run: Run) -> None:
        """Delete from a finished run's checkpoints what it would need to continue; the policies stay."""
        for folder in (self.folder(run), self.folder_before(run)):
            for checkpoint in ("last", "best"):
                shutil.rmtree(folder / checkpoint / TRAINING, ignore_errors=True)

    def run(self, run: Run, report: Report) -> Record:
        """Train, evaluate, and return the record."""
        job, start = self.job(run), self.warm_start(run.task, report)
        task = job.task
        training_seed, evaluation_seed = spread(run.seed)
        decoding = Decoding(**job.settings["hyperparameters"]["test_decoding"])
        algorithm: Algorithm | None = None
        if job.row.trains:
            algorithm, history = self.train(run, start, training_seed, report)
            policy = algorithm.policy
        else:  # a policy of the warm start
            history = start.history if job.row.start == "supervised" else []
            policy = self.policy(start.weights(job.row.start), decoding)

        # A sequence-to-sequence model has no probability of a prompt and its continuation as one text.
        judged_by_start = not load_pretrained(AutoConfig, start.start_model).is_encoder_decoder
        # Policies are tested in an environment that has no guide, whatever its default is, and so neither restarts nor
        # hands off; except those that have learned when to hand off to it, and rows that say otherwise.
        guided = policy.can_hand_off or bool(job.row.guidance)
        env = self.guided_env(job, start) if guided else {**task.env, "guide": None}
        env["guidance"] = job.row.guidance or None

        def judge(policy: Policy, samples: int, metrics: tuple[()] | None = None) -> EvaluationResult:
            return evaluate(
                policy,
                task.env_id,
                split="test",
                source=self.source,
                num_prompts=task.test_prompts,
                decoding=decoding,
                seed=evaluation_seed,
                best_of=job.row.best_of,
                samples_per_prompt=samples,
                metrics=metrics,
                start_model=start.start_model if judged_by_start else None,
                encoder=self.encoder,
                **env,
            )

        report("evaluation", 0)
        result = judge(policy, task.samples(job.row))
        judged_by = {"test": result.fingerprint, "reward": result.reward_fingerprint}
        self._check_same(run.task, judged_by)
        best = self.folder(run) / "best"
        best_reward = result.reward
        if best.is_dir():
            reads = isinstance(policy, LanguageModelPolicy)
            saved = self.policy(best, decoding) if reads else type(policy).from_pretrained(best)
            best_reward = judge(saved, 1, ()).reward
        validated = {}
        if not (job.row.trains or guided or job.row.as_guide or job.row.best_of > 1) and task.rl.get("eval_every"):
            # What rows that start from this policy have at zero episodes, measured as they measure it.
            prompts = task.rl.get("eval_prompts", Algorithm.eval_prompts)
            how: Any = {"num_prompts": prompts, "decoding": Decoding(**task.decoding), "metrics": ()}
            at_start = evaluate(policy, task.env_id, split="validation", source=self.source, **how, **env)
            validated = {"validation_reward": at_start.reward}
        counts = history[-1] if history else dict.fromkeys(COUNTERS, 0)
        usage = getattr({**task.env, **job.row.env}.get("guide"), "usage", None)
        texts = result.all_rewards.shape[1]
        pass_at = {str(4**i): result.pass_at(4**i) for i in range(texts.bit_length()) if 4**i <= texts}
        several = task.test_samples > 1
        return {
            **run._asdict(),
            "about": about(task.env_id),
            "place": self.profile.rows.index(run.algo),
            **job.settings,
            "final_reward": result.reward,
            "best_reward": best_reward,
            **validated,
            "reward_parts": result.reward_parts,
            **({"pass_at": pass_at} if several else {}),
            "metrics": result.metrics,
            "metric_signatures": result.metric_signatures,
            "metrics_left_out": result.metrics_left_out,
            "episodes": counts["num_episodes"],
            "policy_tokens": 0 if algorithm is None else counts["num_timesteps"],
            "guide_tokens": 0 if algorithm is None else counts["num_guide_tokens"],
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
                **({"texts_per_prompt": texts, "successes": result.successes()} if several else {}),
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
        """Load a policy with the precision and compilation of this benchmark."""
        return load_policy(path, self.dtype, decoding=decoding, compile=self.compile, **arguments)

    def guided_env(self, job: Job, start: WarmStart) -> dict[str, Any]:
        """Arguments of the environment that a job learns in.

        The guide is that of the row, of the task or of the environment's defaults; without one, the supervised policy,
        frozen.
        """
        arguments = {**job.task.env, **job.row.env}
        if "guide" in arguments or start.guided:
            return arguments
        dtype: Any = None if self.dtype == "float32" else "auto"
        quantization = job.task.policy.get("quantization")
        decoding = Decoding(**job.task.guide_decoding)
        guide = LocalGuide(str(start.supervised), decoding=decoding, dtype=dtype, quantization=quantization)
        return {"guide": guide, **arguments}

    def warm_start(self, task: str, report: Report) -> WarmStart:
        """The models of a task, made once.

        Raises:
            ValueError: Finished runs started from other models.
        """
        if task not in self.warm_starts:
            job = self.jobs[task, self.profile.rows[0]]
            # Every row and seed has the same: runs differ in what they do with it.
            start = warm_start(job.task, self.source, job.base, 0, report, self.out, self.dtype)
            self._check_same(task, start.fingerprints)
            self.warm_starts[task] = start
        return self.warm_starts[task]

    def _check_same(self, task: str, fingerprints: Mapping[str, str | None]) -> None:
        before = self._fingerprints.get(task, {})
        if wrong := [name for name, value in fingerprints.items() if before.get(name, value) != value]:
            raise ValueError(
                f"out must be a new folder, or one with runs of the same data and models: in {self.out}, runs on "
                f"{task} have other {wrong}"
            )

    def train(self, run: Run, start: WarmStart, seed: int, report: Report) -> tuple[Algorithm, list[dict[str, Any]]]:
        """Train the run's policy, from its last checkpoint if it has one.

        Returns:
            The row's algorithm, and the history of the run. If supervised learning comes first, entries of the history
            have the number of their ``stage``, 1 or 2, and their counters go on from one to the other.

        Raises:
            ValueError: What comes first has used up the run's tokens.
        """
        job, folder, first = self.job(run), self.folder(run), self.folder_before(run)
        for checkpoint in ("last", "best"):
            restore(folder / checkpoint)
            restore(first / checkpoint)
        if job.before is None:
            algorithm = self.train_stage(job, folder, start, seed, report)
            return algorithm, written(algorithm, algorithm.history)
        if (folder / "last" / TRAINING).is_dir():  # then it is over, and need not ask the guide again
            history = read_checkpoint(first / "last", SL.name, "SL.save").state["history"]
        else:
            history = self.train_stage(job.before, first, start, seed, report).history
        before = [{**entry, "num_timesteps": 0, "stage": 1} for entry in history]
        counts = before[-1]
        algorithm = self.train_stage(job, folder, start, seed, report, first / "best", counts["num_guide_tokens"])
        return algorithm, before + [
            {**entry, **{name: counts[name] + entry[name] for name in COUNTERS}, "stage": 2}
            for entry in written(algorithm, algorithm.history)
        ]

    def train_stage(
        self,
        job: Job,
        folder: Path,
        start: WarmStart,
        seed: int,
        report: Report,
        weights: Path | None = None,
        spent: int = 0,
    ) -> Algorithm:
        """Train with a job's algorithm until its own schedule, or the budget of the run, is over.

        Args:
            job: The job.
            folder: Its checkpoints; training continues from the last one.
            start: The task's models.
            seed: The seed.
            report: Called with what is happening.
            weights: The policy that it starts from; None for the job's start.
            spent: Tokens that the run has written before.

        Raises:
            ValueError: No tokens are left to begin with.
        """
        task = job.task
        if task.tokens is not None and spent >= task.tokens:
            raise ValueError(f"tokens must be more than the {spent} written before {job.row.algorithm}: {task.tokens}")
        env = make_env(
            task.env_id,
            num_envs=task.rl["episodes_per_iteration"],
            source=self.source,
            tokenizer=start.supervised,
            **self.guided_env(job, start),
        )
        algorithm = self.begin(job, folder, start, env, seed, weights)

        by_tokens, budget = task.tokens is not None, task.tokens or task.episodes or 0

        def used() -> int:
            if by_tokens:
                return spent + algorithm.num_timesteps + algorithm.num_guide_tokens
            return algorithm.num_episodes

        def share() -> float:
            if isinstance(algorithm, SL):
                return min(algorithm.num_episodes / algorithm.total_texts, 1.0)
            return min(used() / budget, 1.0)

        def callback(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
            shown = "loss" if isinstance(algorithm, SL) else "reward"
            report(f"{shown} {algorithm.history[-1][shown]:.3f}", share())
            return share() < 1

        report("training", share())
        if isinstance(algorithm, SL):
            algorithm.learn(callback=callback)  # also when it is over, for the best weights
        elif share() < 1:
            total: Any = {"total_timesteps" if by_tokens else "total_episodes": budget - used()}
            algorithm.learn(**total, callback=callback)
        return algorithm

    def begin(
        self,
        job: Job,
        folder: Path,
        start: WarmStart,
        env: TextVectorEnv,
        seed: int,
        weights: Path | None = None,
    ) -> Algorithm:
        """Make a job's algorithm (see `train_stage`), or load its last checkpoint.

        Raises:
            ValueError: The checkpoint was made with other settings, or from another warm start.
        """
        algorithm: Any = algorithm_class(job.row.algorithm)
        settings = {**job.settings, "fingerprints": start.fingerprints}
        last = folder / "last"
        # Algorithms of Stable-Baselines3 with a replay buffer cannot continue; their policies are of another kind.
        if issubclass(algorithm, Algorithm) and (last / TRAINING).is_dir() and (last / POLICY_FILE).is_file():
            with readable(folder / "settings.json"):
                begun = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
                wrong = [name for name in settings if begun.get(name) != settings[name]]
            if begun != settings:
                raise ValueError(f"out must be a new folder, or one with runs of the same {wrong}: see {folder}")
            return algorithm.load(last, env, output_dir=folder, track=self.track)
        shutil.rmtree(folder, ignore_errors=True)  # an attempt that had no checkpoint yet, or cannot continue
        write_text(folder / "settings.json", json.dumps(settings, indent=2))
        policy = self.policy(weights or start.weights(job.row.start), Decoding(**job.task.decoding), **job.row.policy)
        given = accepted(algorithm, {"seed": seed, "output_dir": folder, "track": self.track})
        return algorithm(policy, env, **given, **job.arguments)


def written(algorithm: Algorithm, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An algorithm's history with the timesteps that the policy wrote: those of `SL` are learned, none is written."""
    return [{**entry, "num_timesteps": 0} for entry in history] if isinstance(algorithm, SL) else history


def spread(seed: int) -> tuple[int, int]:
    """Seeds of a run's training and of its evaluation, far from those of every other seed.

    Row i of a vector environment takes seed + i, so that neighbouring seeds would share rows. The evaluation's does not
    depend on the row: rows are compared on the same prompts with the same random numbers.
    """
    training, evaluation = np.random.SeedSequence(seed).generate_state(2)
    return int(training), int(evaluation)
