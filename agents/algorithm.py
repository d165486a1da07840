"""What every algorithm shares: checks, the learn loop, evaluation, tracking, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

from agents.card import model_card
from agents.evaluation import EvaluationResult, evaluate, make_env, sibling_env
from agents.policy import LanguageModelPolicy, Policy, replaced_folder
from agents.processes import SUPPORTED, add, gather, gather_state, own_state, start_equal
from agents.rollout import Rollout, agree, collect
from agents.sharding import assemble, load_optimizer, scatter, shard, uses_fsdp, whole
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guidance import Guidance
from textgym.seeding import hash64

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRAINING = "training"  # the folder of a checkpoint that holds what only training needs
Callback = Callable[[dict[str, Any], dict[str, Any]], bool | None]


class Algorithm(ABC):
    """A policy, an environment, and a loop of iterations that improve the one on the other.

    Started as several processes (``torchrun``, ``accelerate launch``) they train one policy together; all of them make
    the same calls. Numbers of episodes are those of all processes, the rows of `env` those of each (docs/processes.md).

    Args:
        policy: A `Policy`, or the hub id or path of a language model, causal or sequence-to-sequence.
        env: The id of an environment, or a `TextVectorEnv` made with ``parking=True``.
        episodes_per_iteration: Episodes (for supervised learning: reference texts) an iteration; a multiple of the
            rows of `env` in all processes.
        decoding: How training episodes are sampled (None: as the policy does).
        seed: Seed of everything random here and in the environment.
        device: "auto" (an accelerator where there is one, in several processes each its own) or a torch device.
        eval_every: Iterations between two evaluations on validation prompts; 0 never evaluates.
        eval_prompts: Validation prompts of such an evaluation, always the same ones.
        eval_env: What to evaluate on (None: the validation split of the environment, with a guide only for hand-offs).
        output_dir: Where checkpoints go: ``last`` and, judged by `score`, ``best``; each is a model folder and can be
            resumed with `load`. They are written at every evaluation and when `learn` returns.
        track: Names of Accelerate's trackers ("tensorboard", "wandb", ...), or tracker objects.

    Attributes:
        history: One record an iteration: metric name to number.
        num_timesteps: Policy tokens so far.
        num_guide_tokens: Guide tokens so far.
        num_episodes: Episodes so far.
        iteration: Iterations so far.
        last_rollout: The episodes of the last iteration, for callbacks.
    """

    name: ClassVar[str]
    plays_episodes: ClassVar[bool] = True

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        episodes_per_iteration: int,
        decoding: Decoding | None,
        seed: int,
        device: str | torch.device,
        eval_every: int,
        eval_prompts: int,
        eval_env: TextVectorEnv | None,
        output_dir: str | os.PathLike | None,
        track: str | GeneralTracker | Sequence[str | GeneralTracker] | None,
        hyperparameters: dict[str, Any],
    ) -> None:
        check("episodes_per_iteration", episodes_per_iteration, episodes_per_iteration >= 1, "at least 1")
        check("eval_every", eval_every, eval_every >= 0, "at least 0")
        check("eval_prompts", eval_prompts, eval_prompts >= 1, "at least 1")
        check("seed", seed, seed >= 0, "at least 0")
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(
                f"{self.name} does not run under DeepSpeed; FSDP spreads the same over processes: accelerate launch "
                "--config_file examples/accelerate/fsdp.yaml"
            )
        uses_fsdp()  # refuses what is not supported, before weights are loaded
        self.accelerator = Accelerator(
            # Without this the processes of torchrun would each train a policy of its own where there is no accelerator.
            cpu=not torch.accelerator.is_available(),
            log_with=track,  # type: ignore[arg-type]
            project_dir=output_dir,
        )
        if (kind := self.accelerator.distributed_type) not in SUPPORTED:
            raise ValueError(f"distributed_type must be one of {[k.value for k in SUPPORTED]}, got {kind.value!r}")
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision must be 'no', got {self.accelerator.mixed_precision!r}: a policy has its own, "
                'from_pretrained(..., dtype="auto")'
            )
        processes = self.accelerator.num_processes
        if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1 == processes:
            raise ValueError(
                f"WORLD_SIZE={started} processes were started, but each runs alone: make no PartialState or "
                "Accelerator before the algorithm, or set ACCELERATE_USE_CPU=true where there is no GPU"
            )
        device = self.accelerator.device if device == "auto" else torch.device(device)
        check("device", device, processes == 1 or device == self.accelerator.device, '"auto" in several processes')
        if not isinstance(policy, Policy):
            policy = LanguageModelPolicy.from_pretrained(policy, device=device)
        self.policy = policy
        self.policy.to(device)
        if isinstance(env, str):
            rows = max(1, episodes_per_iteration // processes)
            env = make_env(env, num_envs=rows, tokenizer=self.policy.tokenizer)
        if not isinstance(env, TextVectorEnv) or not env.parking:
            raise ValueError(f"env must be an environment id or a TextVectorEnv made with parking=True, got {env!r}")
        if self.plays_episodes and episodes_per_iteration % (env.num_envs * processes):
            rows_of_all = f"{env.num_envs} rows" + (f" in each of {processes} processes" if processes > 1 else "")
            raise ValueError(
                f"episodes_per_iteration must be a multiple of the environment's {rows_of_all}, "
                f"got {episodes_per_iteration}"
            )
        if self.plays_episodes and processes > 1 and env.order != "random":
            raise ValueError(f"env must have order='random' in several processes, got {env.order!r}")
        if env.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise ValueError("env must be made with the policy's tokenizer: make_vec(..., tokenizer=policy.tokenizer)")
        agree(env, self.policy)
        if self.plays_episodes and (decoding or self.policy.decoding).num_beams > 1:
            raise ValueError(
                "decoding must have num_beams=1 for training, which learns from texts that were drawn; search with "
                "beams in evaluate(..., decoding=...) and generate"
            )
        start_equal(self.accelerator, self.policy)
        self.env = env
        self.policy.prompt_columns = env.max_prompt_tokens
        self.policy.context_length = env.max_prompt_tokens + env.max_new_tokens
        self._twins: list[tuple[Policy, Policy]] = []
        self.learner = self.twin_of(self.policy)
        self.trainable = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        self.episodes_per_iteration = episodes_per_iteration
        self.decoding = decoding
        self.seed = seed
        self.eval_every = eval_every
        self.eval_prompts = eval_prompts
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.hyperparameters = hyperparameters
        self._tracked = track is not None
        self._eval_env = eval_env
        if eval_every and eval_env is None:
            self._eval_env = sibling_env(env, num_envs=min(eval_prompts, env.num_envs), split="validation")

        self.history: list[dict[str, Any]] = []
        self.iteration = self.num_timesteps = self.num_guide_tokens = self.num_episodes = 0
        self.best_score = -math.inf

    def twin_of(self, policy: Policy) -> Policy:
        """What `policy`'s gradient steps are taken on: itself, or with FSDP a twin whose weights are in pieces."""
        twin = shard(self.accelerator, policy)
        if twin is not policy:
            self._twins.append((policy, twin))
        return twin

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Around gradient steps on twins: they start with the policies' weights, and the policies end with theirs.

        Where a step fails, the policies are as they were before all of them.
        """
        for policy, twin in self._twins:
            scatter(policy, twin)
        yield
        for policy, twin in self._twins:
            assemble(policy, twin)

    @abstractmethod
    def iterate(self) -> dict[str, Any]:
        """Run one iteration, move the counters of tokens and episodes, and return its record."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose state a checkpoint holds."""

    def score(self, record: Mapping[str, Any]) -> float | None:
        """How good the policy is by an iteration's record, higher is better; None where it was not judged."""
        return record.get("eval/reward")

    @property
    def finished(self) -> bool:
        """Whether further iterations would be pointless."""
        return False

    def guidance(self) -> Guidance | tuple[Guidance, ...]:
        """Who writes which part of the next iteration's episodes; by default what the environment was made with."""
        return self.env.initial_guidance

    def learn(
        self,
        total_timesteps: int | None = None,
        total_episodes: int | None = None,
        callback: Callback | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """Run iterations until so many more timesteps or episodes are done.

        Args:
            total_timesteps: Policy tokens, counted from now.
            total_episodes: Episodes, counted from now. Exactly one of the two totals is given.
            callback: Called after each iteration as ``callback(locals(), globals())``, as in Stable-Baselines3;
                ``locals["self"]`` is the algorithm, ``locals["record"]`` the iteration's record. Returning False stops;
                of several processes each calls its own, and one that returns False stops all.
            progress_bar: Whether to draw a progress bar.

        Raises:
            ValueError: None or both of the totals, or one that is not positive.
            FloatingPointError: A reward, loss or gradient is not finite. The policy is as it was before that update,
                and no checkpoint is written.
        """
        if (total_timesteps is None) == (total_episodes is None):
            raise ValueError(
                "exactly one of total_timesteps and total_episodes must be given, "
                f"got total_timesteps={total_timesteps}, total_episodes={total_episodes}"
            )
        counter = "num_episodes" if total_timesteps is None else "num_timesteps"
        total = total_episodes if total_timesteps is None else total_timesteps
        check(f"total_{counter[4:]}", total, total >= 1, "at least 1")  # type: ignore[operator]
        start = getattr(self, counter)
        return self._learn(lambda: (getattr(self, counter) - start) / total, callback, progress_bar)

    def _learn(self, done: Callable[[], float], callback: Callback | None, progress_bar: bool) -> Self:
        """Iterate until `done`, the share of the work that is finished, reaches 1."""
        if self._tracked:
            config = {key: value for key, value in self.hyperparameters.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("textgym", config={"algorithm": self.name, **config})
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        shown = progress_bar and self.accelerator.is_main_process
        with Progress(*columns, disable=not shown, transient=True) as progress:
            bar = progress.add_task(self.name, total=1.0, status="")
            while done() < 1 and not self.finished:
                try:
                    record = self._run_iteration()
                except Exception as error:
                    error.add_note(
                        f"in iteration {self.iteration + 1} of {self.name}; no checkpoint was written for it"
                    )
                    raise
                progress.update(bar, completed=min(done(), 1.0), status=self.status(record))
                if callback is not None:
                    stop = torch.tensor(float(callback(locals(), globals()) is False), device=self.policy.device)
                    if add(self.accelerator, stop) > 0:
                        break
        if self.output_dir is not None:
            self.save(self.output_dir / "last")
        while self.accelerator.trackers:  # `end_training` would take leave of the other processes too
            self.accelerator.trackers.pop().finish()
        return self

    def _run_iteration(self) -> dict[str, Any]:
        started = time.perf_counter()
        record = {"iteration": self.iteration + 1, **self.iterate()}
        record |= {
            "num_timesteps": self.num_timesteps,
            "num_guide_tokens": self.num_guide_tokens,
            "num_episodes": self.num_episodes,
            "seconds": time.perf_counter() - started,
        }
        self.iteration += 1
        if self.eval_every and self.iteration % self.eval_every == 0:
            result = self.evaluate()
            record |= {"eval/reward": result.reward, "eval/length": result.length, "eval/seconds": result.seconds}
            record |= {f"eval/reward/{name}": value for name, value in result.reward_parts.items() if name != "reward"}
        self.history.append(record)
        score = self.score(record)
        if score is not None:
            better, self.best_score = score > self.best_score, max(score, self.best_score)
            if self.output_dir is not None:
                # The best first: what goes on from "last" plays this iteration again if it ends between the two.
                for folder in ("best", "last") if better else ("last",):
                    self.save(self.output_dir / folder)
        if self._tracked:
            self.accelerator.log(record, step=self.num_timesteps)
        return record

    def status(self, record: Mapping[str, Any]) -> str:
        """A few words about an iteration for the progress bar."""
        return " ".join(f"{key} {record[key]:.3f}" for key in ("reward", "kl", "eval/reward") if key in record)

    def evaluate(self) -> EvaluationResult:
        """Evaluate the policy on the fixed validation prompts, with its own decoding and a fixed seed."""
        assert self._eval_env is not None
        return evaluate(
            self.policy, self._eval_env, num_prompts=self.eval_prompts, metrics=(), accelerator=self.accelerator
        )

    def collect(self, **options: Any) -> Rollout:
        """Play `episodes_per_iteration` episodes, each process its share, and count them.

        Args:
            **options: Reset options beside the guidance ("group_size", ...).

        Returns:
            The episodes of all processes.
        """
        rollouts, rows = [], self.env.num_envs
        # Rows of all processes are those of one environment; these are the ones before this process's.
        before = rows * self.accelerator.process_index
        for part in range(self.episodes_per_iteration // (rows * self.accelerator.num_processes)):
            rollouts.append(
                collect(
                    self.env,
                    self.policy,
                    seeds=hash64(self.seed, self.iteration, part, before + np.arange(rows)),
                    decoding=self.decoding,
                    # Spread, because rows of one environment seeded s are seeded s, s + 1, ...
                    reset_seed=(int(hash64(self.seed)) >> 33) + before if self.iteration == part == 0 else None,
                    options={"guidance": self.guidance(), **options},
                )
            )
        rollout = Rollout.concatenate(gather(self.accelerator, rollouts))
        self.last_rollout = rollout
        self.check_finite("reward", rollout.rewards)
        self.num_episodes += len(rollout)
        self.num_timesteps += int(rollout.policy_tokens.sum())
        self.num_guide_tokens += int(rollout.guide_tokens.sum())
        return rollout

    def check_finite(self, what: str, values: torch.Tensor) -> None:
        """Stop where a number is not finite.

        Raises:
            FloatingPointError: It names the iteration and what was not finite.
        """
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise FloatingPointError(
                f"{self.name}, iteration {self.iteration + 1}: {what} is not finite in {wrong} of {values.numel()} "
                "places; the policy is as it was before this update"
            )

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        """Choose actions, as in Stable-Baselines3 (see `Policy.predict`)."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    def generate(self, prompts: list[str], **arguments: Any) -> list[str]:
        """Continue texts (see `Policy.generate`); by default at most the environment's new tokens."""
        return self.policy.generate(prompts, **{"max_new_tokens": self.env.max_new_tokens, **arguments})

    def training_state(self) -> dict[str, Any]:
        """What an algorithm must remember beside the policy; nested dicts and lists of arrays, tensors and numbers."""
        counters = ("iteration", "num_timesteps", "num_guide_tokens", "num_episodes", "best_score")
        return {
            "counters": {name: getattr(self, name) for name in counters},
            "history": self.history,
            "optimizer": whole(self.optimizer.state_dict()),
            "env": gather_state(self.accelerator, self.env.get_state()),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.history = state["history"]
        load_optimizer(self.optimizer, state["optimizer"])
        self.env.set_state(own_state(self.accelerator, _to_arrays(state["env"])))

    def models(self) -> dict[str, nn.Module]:
        """Models beside the policy that a checkpoint holds, by the name of their file."""
        return {}

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint: the policy as a model folder, its card, and in ``training`` what else `load` needs.

        It is written under a temporary name and then renamed, so that a folder of this name is always whole. Of several
        processes, which all call this, the first one writes, and the others wait for it.
        """
        state = _plain(self.training_state())
        if self.accelerator.is_main_process:
            self._write(Path(path), state)
        self.accelerator.wait_for_everyone()

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        with replaced_folder(path) as folder:
            self.policy.save_pretrained(folder)
            training = folder / TRAINING
            training.mkdir()
            for name, model in self.models().items():
                save_file(self._own_weights(model), training / f"{name}.safetensors")
            torch.save(state, training / "state.pt")
            description = {
                "algorithm": self.name,
                "hyperparameters": _plain(self.hyperparameters),
                "frozen": [name for name, weight in self.policy.named_parameters() if not weight.requires_grad],
            }
            (training / "algorithm.json").write_text(json.dumps(description, indent=2))
            model_card(self).save(folder / "README.md")

    def _own_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of a model beside the policy, each once, without the frozen ones that are the policy's too."""
        seen = {weight.data_ptr() for weight in self.policy.parameters() if not weight.requires_grad}
        own = {}
        for name, weight in model.state_dict().items():
            if weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                own[name] = weight.contiguous()
        return own

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        policy_class: type[Policy] = LanguageModelPolicy,
        policy_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Self:
        """Continue from a checkpoint, exactly as if there had been no interruption.

        The number of processes can be another one, if the rows of all environments together are as many as they were;
        results are then the same up to rounding.

        Args:
            path: A folder that `save` wrote.
            env: An environment made like the one that was used.
            policy_class: The class of a policy of your own.
            policy_arguments: What its `from_pretrained` needs beside the folder and the device, such as
                ``{"states": ...}`` for a `TabularPolicy`.
            **arguments: Replace the saved arguments of the constructor ("device", "output_dir", "track", ...).

        Raises:
            ValueError: `path` is no checkpoint of this algorithm.
        """
        folder, training = Path(path), Path(path) / TRAINING
        try:
            description = json.loads((training / "algorithm.json").read_text())
        except FileNotFoundError as error:
            raise ValueError(f"path must be a folder written by {cls.__name__}.save, got {str(path)!r}") from error
        if description["algorithm"] != cls.name:
            raise ValueError(f"path must hold a checkpoint of {cls.name!r}, got one of {description['algorithm']!r}")
        hyperparameters = {**description["hyperparameters"], **arguments}
        if isinstance(hyperparameters.get("decoding"), dict):
            hyperparameters["decoding"] = Decoding(**hyperparameters["decoding"])
        device = hyperparameters.get("device", "auto")
        policy = policy_class.from_pretrained(folder, device=device, **policy_arguments or {})
        for name in description["frozen"]:
            policy.get_parameter(name).requires_grad_(False)
        algorithm = cls(policy, env, **hyperparameters)
        for name, model in algorithm.models().items():
            weights = load_file(training / f"{name}.safetensors", device=str(algorithm.policy.device))
            if weights.keys() != algorithm._own_weights(model).keys():
                raise ValueError(f"path holds another {name} than that of {str(path)!r} as it is loaded")
            model.load_state_dict(weights, strict=False)
        # Only tensors and plain values: nothing in the file can run code.
        algorithm.load_training_state(torch.load(training / "state.pt", map_location="cpu", weights_only=True))
        return algorithm


def check_guide(env: Any, name: str, *, hand_off: bool = False) -> None:
    """Refuse an environment whose guide cannot do what an algorithm asks of it.

    Args:
        env: The environment.
        name: The algorithm's.
        hand_off: Whether the guide must complete texts that the policy began.

    Raises:
        ValueError: It has no guide, or one that can only start texts.
    """
    guide = getattr(env, "guide", None)
    if guide is None or (hand_off and not guide.can_hand_off):
        asked = "complete texts" if hand_off else "start texts"
        raise ValueError(f"env must have a guide that can {asked} for {name}: make_vec(..., guide=...), got {guide!r}")


def check(name: str, value: Any, valid: bool, allowed: str) -> None:
    """Refuse a wrong argument.

    Raises:
        ValueError: It is not valid.
    """
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _plain(value: Any) -> Any:
    """Nested containers with arrays as tensors, and value objects and paths as plain data."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path | torch.device) else value


def _to_arrays(value: Any) -> Any:
    """Undo `_plain` where an environment stands on the other side."""
    if isinstance(value, dict):
        return {key: _to_arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_arrays(item) for item in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value
