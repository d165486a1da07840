"""The base class of algorithms: the loop of iterations, evaluation, tracking, checkpoints."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import torch
from huggingface_hub import HfApi
from torch import nn

from agents.arguments import document_arguments
from agents.card import model_card
from agents.checkpoint import TRAINING, read_checkpoint, write_checkpoint
from agents.display import Display
from agents.environments import agree, description, learning_env, sibling_env
from agents.evaluation import EvaluationResult, evaluate
from agents.policy import Actor, LanguageModelPolicy, Policy
from agents.processes import gather_state, gather_texts, make_accelerator, own_state, reduce, start_equal
from agents.sharding import assemble, load_optimizer, scatter, shard, whole
from textgym.checks import check, check_arguments, is_int, is_number
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides import ScoringGuide
from textgym.hub import local_folder
from textgym.models import resolve_device
from textgym.storage import new_file

if TYPE_CHECKING:
    import pandas
    from accelerate.tracking import GeneralTracker
    from matplotlib.figure import Figure

# How arguments that are annotated as numbers are checked, and what they must be.
NUMBERS = {"int": (is_int, "an int"), "float": (is_number, "a number")}
COUNTERS = ("iteration", "num_timesteps", "num_guide_tokens", "num_episodes")
Callback = Callable[[dict[str, Any], dict[str, Any]], bool | None]


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
@dataclass(kw_only=True, eq=False, repr=False)
class Algorithm(ABC):
    """A policy, an environment, and a loop of iterations that improve the policy on the environment.

    Algorithms are dataclasses (subclasses need no decorator): an annotated attribute of the class is a keyword
    argument, with its default, and its documentation below. `check_hyperparameters` checks the arguments,
    `__post_init__` prepares training, `iterate` runs one iteration.

    Several processes (``torchrun``, ``accelerate launch``) train one policy together; all of them make the same calls.
    Numbers of episodes are those of all processes, the rows of `env` are those of each (docs/processes.md).

    Attributes:
        hyperparameters: The arguments, except the objects `policy`, `env`, `eval_env` and `track`.
        history: One record per iteration: metric name to number.
        num_timesteps: Policy tokens so far.
        num_guide_tokens: Tokens that the guide has written so far, in all processes; parts of kept texts that are read
            again do not count again.
        num_episodes: Episodes so far.
        iteration: Iterations so far: 0 during the first one.
        optimizer: The optimiser, whose state a checkpoint holds.

    Raises:
        TypeError: An unknown argument.
        ValueError: An argument has a value that is not allowed; the message names it.
    """

    name: ClassVar[str]
    plays_episodes: ClassVar[bool] = True

    # `Any`, because names are accepted too; `__post_init__` loads them.
    policy: Policy | Any = field(kw_only=False)
    """A `Policy`, or the hub id or path of a language model, causal or sequence-to-sequence."""
    env: TextVectorEnv | Any = field(kw_only=False)
    """The id of an environment; one that ``gymnasium.make`` or ``make_vec`` made, which is made again for batches; or a
    `TextVectorEnv` made with ``parking=True``."""
    episodes_per_iteration: int = 64
    """Number of episodes per iteration, a multiple of the rows of `env` in all processes."""
    seed: int = 0
    """Seed of all randomness, including the environment's."""
    device: str | torch.device = "auto"
    """"auto" (an accelerator if there is one, a different one for each process) or a torch device."""
    eval_every: int = 0
    """Iterations between two evaluations on validation prompts; 0 never evaluates."""
    eval_prompts: int = 256
    """Number of validation prompts per evaluation, always the same ones."""
    eval_env: TextVectorEnv | None = None
    """Environment of evaluations; None: the validation split of `env`, with a guide only for hand-offs."""
    output_dir: str | os.PathLike | None = None
    """Folder of the checkpoints ``last`` and ``best`` (by `score`), from which `load` continues, and ``history.csv``;
    written at every evaluation and, but for ``best``, when `learn` returns."""
    track: str | GeneralTracker | Sequence[str | GeneralTracker] | None = None
    """Names of Accelerate's trackers ("tensorboard", "wandb", ...), or tracker objects."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if inspect.get_annotations(cls):
            dataclass(kw_only=True, eq=False, repr=False)(cls)  # keeps an `__init__` that the class defines itself
        document_arguments(cls)

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Refuse unknown arguments, and suggest the nearest name."""
        parameters = inspect.signature(cls.__init__).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            check_arguments(cls.__name__, options, list(parameters)[1:])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for part in fields(self):
            kind, *others = str(getattr(part.type, "__name__", part.type)).split(" | ")
            value = getattr(self, part.name)
            if kind in NUMBERS and not (value is None and "None" in others):
                is_kind, what = NUMBERS[kind]
                check(part.name, value, is_kind(value), " or ".join([what, *others]))
        self.check_hyperparameters()
        objects = ("policy", "env", "eval_env", "track")
        self.hyperparameters = {
            part.name: getattr(self, part.name) for part in fields(self) if part.name not in objects
        }
        self.accelerator = make_accelerator(self.name, self.track, self.output_dir)
        processes = self.accelerator.num_processes
        device = self.accelerator.device if self.device == "auto" else resolve_device(self.device)
        check("device", device, processes == 1 or device == self.accelerator.device, '"auto" in several processes')
        if isinstance(self.policy, Actor) and not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a Policy for {self.name}, got an Actor, which only writes: {self.policy}")
        named = isinstance(self.policy, str | os.PathLike)
        check("policy", self.policy, named or isinstance(self.policy, Policy), "a Policy, or a hub id or folder")
        if named:
            self.policy = LanguageModelPolicy.from_pretrained(self.policy, device=device)
        self.policy.to(device)
        given, rows = self.env, max(1, self.episodes_per_iteration // processes)
        self.env = learning_env(given, rows, self.policy.tokenizer)
        if self.env is not given:
            self.check_hyperparameters()  # what is asked of an environment could not be checked of its id
        self._check_environment()
        agree(self.env, self.policy)
        start_equal(self.accelerator, self.policy)
        self.policy.prompt_columns = self.env.max_prompt_tokens
        self.policy.context_length = self.env.max_prompt_tokens + self.env.max_new_tokens
        self._twins: list[tuple[Policy, Policy]] = []
        self.learner = self.twin_of(self.policy)
        self.trainable = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        if self.eval_every and self.eval_env is None:
            rows = min(self.eval_prompts, self.env.num_envs)
            self.eval_env = sibling_env(self.env, num_envs=rows, split="validation")

        self.optimizer: torch.optim.Optimizer
        self.history: list[dict[str, Any]] = []
        self.iteration = self.num_timesteps = self.num_guide_tokens = self.num_episodes = 0
        self.best_score = -math.inf
        # An iteration that is over, whose evaluation failed: its record, and the counters after it.
        self._unevaluated: tuple[dict[str, Any], dict[str, int]] | None = None

    def check_hyperparameters(self) -> None:
        """Check the arguments, before anything is loaded; subclasses extend this method.

        Raises:
            ValueError: An argument has a value that is not allowed.
        """
        check("episodes_per_iteration", self.episodes_per_iteration, self.episodes_per_iteration >= 1, "at least 1")
        check("eval_every", self.eval_every, self.eval_every >= 0, "at least 0")
        check("eval_prompts", self.eval_prompts, self.eval_prompts >= 1, "at least 1")
        check("seed", self.seed, self.seed >= 0, "at least 0")

    def _check_environment(self) -> None:
        env, processes = self.env, self.accelerator.num_processes
        if not isinstance(env, TextVectorEnv) or not env.parking:
            raise ValueError(
                "env must be an environment's id, one that gymnasium.make or make_vec made, or a TextVectorEnv made "
                f"with parking=True, got {env!r}"
            )
        if self.plays_episodes and self.episodes_per_iteration % (env.num_envs * processes):
            rows_of_all = f"{env.num_envs} rows" + (f" in each of {processes} processes" if processes > 1 else "")
            raise ValueError(
                f"episodes_per_iteration must be a multiple of the environment's {rows_of_all}, "
                f"got {self.episodes_per_iteration}"
            )
        if self.plays_episodes and processes > 1 and env.order != "random":
            raise ValueError(f"env must have order='random' in several processes, got {env.order!r}")
        if env.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise ValueError("env must be made with the policy's tokenizer: make_vec(..., tokenizer=policy.tokenizer)")

    def twin_of(self, policy: Policy) -> Policy:
        """The module on which gradient steps are taken: `policy` itself, or with FSDP a twin with sharded weights."""
        twin = shard(self.accelerator, policy)
        if twin is not policy:
            self._twins.append((policy, twin))
        return twin

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Copy the policies' weights to their twins, and back after the gradient steps in this block.

        If a step fails, the policies keep their weights.
        """
        for policy, twin in self._twins:
            scatter(policy, twin)
        yield
        for policy, twin in self._twins:
            assemble(policy, twin)

    @abstractmethod
    def iterate(self) -> dict[str, Any]:
        """Run one iteration, advance the counters of policy tokens and episodes, and return its record.

        The guide's tokens are counted from those that the environment's guide has written meanwhile.
        """

    def score(self, record: Mapping[str, Any]) -> float | None:
        """The policy's score in an iteration's record, higher is better; None if it was not evaluated."""
        return record.get("eval/reward")

    @property
    def finished(self) -> bool:
        """Whether training is complete, so that `learn` stops early."""
        return False

    @property
    def uses_reward(self) -> bool:
        """Whether the environment's reward has had a say in training; an unused one may not be loaded."""
        return self.plays_episodes and self.num_episodes > 0

    def learn(
        self,
        total_timesteps: int | None = None,
        total_episodes: int | None = None,
        callback: Callback | None = None,
        progress_bar: bool = False,
        verbose: int = 0,
    ) -> Self:
        """Run iterations until a number of further timesteps or episodes is reached.

        Where a guide or a reward fails, the iteration that it interrupts is not counted, and a further call begins it
        again: the numbers are then those of a training that was never interrupted. (Algorithms of Stable-Baselines3
        learn while they play, and go on where they were.)

        Args:
            total_timesteps: Policy tokens, counted from now.
            total_episodes: Episodes, counted from now. Exactly one of the two totals is given.
            callback: Called after each iteration as ``callback(locals(), globals())``, as in Stable-Baselines3;
                ``locals["self"]`` is the algorithm, ``locals["record"]`` the iteration's record. Returning False stops
                training. Every process calls its callback, and one that returns False stops all.
            progress_bar: Whether to draw a progress bar; without a terminal, and outside of a notebook, it is a line
                every half minute.
            verbose: 1 prints a line for each iteration: reward, KL, entropy, tokens a second, the time that is left.

        Raises:
            ValueError: Not exactly one total is given, or it is not positive.
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
        check(f"total_{counter[4:]}", total, is_number(total) and total >= 1, "a number >= 1")  # type: ignore[operator]
        check("callback", callback, callback is None or callable(callback), "None or a function")
        start = getattr(self, counter)
        return self._learn(lambda: (getattr(self, counter) - start) / total, callback, progress_bar, verbose)

    def _learn(
        self, done: Callable[[], float], callback: Callback | None, progress_bar: bool, verbose: int = 0
    ) -> Self:
        """Iterate until `done`, the share of the work that is finished, reaches 1."""
        if self.track is not None:
            config = {key: value for key, value in self.hyperparameters.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("textgym", config={"algorithm": self.name, **config})
        first = self.accelerator.is_main_process
        with Display(self.name, lines=first and verbose > 0, bar=first and progress_bar) as display:
            while done() < 1 and not self.finished:
                try:
                    record = self._run_iteration()
                except Exception as error:
                    error.add_note(
                        f"in iteration {self.iteration + 1} of {self.name}; no checkpoint was written for it"
                    )
                    raise
                display.update(record, done(), self.status(record))
                if callback is not None:
                    stop = torch.tensor(float(callback(locals(), globals()) is False), device=self.policy.device)
                    if reduce(self.accelerator, stop) > 0:
                        break
        if self.output_dir is not None:
            self.save(Path(self.output_dir) / "last")
            self.write_history()
        while self.accelerator.trackers:  # `end_training` would also destroy the process group
            self.accelerator.trackers.pop().finish()
        return self

    @contextmanager
    def _keeping_counters(self) -> Iterator[None]:
        before = self._counters()
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _counters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTERS}

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back what is counted and played in a block that fails, as where a guide or a reward does.

        Gradient steps are not taken back; `iterate` takes them last.
        """
        with self._keeping_counters(), self.env.all_or_nothing():
            yield

    def _iterate(self) -> dict[str, Any]:
        """Run one iteration with `iterate`, and return its record with counters."""
        started = time.perf_counter()
        with self.all_or_nothing():
            before = self.env.guide_tokens_written
            record = {"iteration": self.iteration + 1, **self.iterate()}
            written = int(reduce(self.accelerator, torch.tensor(self.env.guide_tokens_written - before)))
            self.num_guide_tokens += written
            record.setdefault("guide_tokens", written)
            record |= {
                "num_timesteps": self.num_timesteps,
                "num_guide_tokens": self.num_guide_tokens,
                "num_episodes": self.num_episodes,
                "seconds": time.perf_counter() - started,
            }
            if (usage := getattr(self.env.guide, "usage", None)) is not None:  # of a server, in this process
                record |= {f"guide_{name}": getattr(usage, name) for name in ("calls", "cache_hits", "cost")}
            self.iteration += 1
        return record

    def _run_iteration(self) -> dict[str, Any]:
        with self._keeping_counters():
            if self._unevaluated is None:
                self._unevaluated = self._iterate(), self._counters()
            record, counters = self._unevaluated
            vars(self).update(counters)
            if self.eval_every and self.iteration % self.eval_every == 0:
                result = self.evaluate()
                record |= {"eval/reward": result.reward, "eval/length": result.length, "eval/seconds": result.seconds}
                parts = {name: value for name, value in result.reward_parts.items() if name != "reward"}
                record |= {f"eval/reward/{name}": value for name, value in parts.items()}
        self._unevaluated = None
        self.history.append(record)
        score = self.score(record)
        if score is not None:
            better, self.best_score = score > self.best_score, max(score, self.best_score)
            if self.output_dir is not None:
                # Best first: if the run ends between the two, resuming from the older "last" repeats this iteration.
                for folder in ("best", "last") if better else ("last",):
                    self.save(Path(self.output_dir) / folder)
                self.write_history()
        if self.track is not None:
            self.accelerator.log(record, step=self.num_timesteps)
        return record

    def to_pandas(self) -> pandas.DataFrame:
        """The history as a `pandas.DataFrame`, one row per iteration; NaN where an iteration has no such number."""
        import pandas

        return pandas.DataFrame(self.history)

    def write_history(self) -> None:
        """Write the history to ``history.csv`` in `output_dir`."""
        assert self.output_dir is not None
        if self.accelerator.is_main_process:
            with new_file(Path(self.output_dir) / "history.csv") as file:
                self.to_pandas().to_csv(file, index=False)

    def plot(self) -> Figure:
        """Draw reward, KL, lengths and the guide's share of the tokens by episodes (extra ``plots``).

        Returns:
            A `matplotlib.figure.Figure`, which `savefig` writes and a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There is no iteration yet.
        """
        from agents.plots import plot_history

        return plot_history(self.history, self.name)

    def __repr__(self) -> str:
        weights = sum(parameter.numel() for parameter in self.policy.parameters())
        reward = [f"reward {self.history[-1]['reward']:.3f}"] if self.history and "reward" in self.history[-1] else []
        seen = [f"{self.iteration} iterations", f"{self.num_episodes:,} episodes", *reward]
        return (
            f"{type(self).__name__}({type(self.policy).__name__} of {weights:,} parameters in {self.env}: "
            f"{', '.join(seen)})"
        )

    def status(self, record: Mapping[str, Any]) -> str:
        """A few words about an iteration for the progress bar."""
        return " ".join(f"{key} {record[key]:.3f}" for key in ("reward", "kl", "eval/reward") if key in record)

    def evaluate(self) -> EvaluationResult:
        """Evaluate the policy on the fixed validation prompts, with its own decoding and a fixed seed."""
        assert self.eval_env is not None
        return evaluate(
            self.policy, self.eval_env, num_prompts=self.eval_prompts, metrics=(), accelerator=self.accelerator
        )

    def check_finite(self, what: str, values: torch.Tensor) -> None:
        """Check that numbers are finite.

        Raises:
            FloatingPointError: Some are not; the message names the iteration and `what`.
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
        """Choose actions, as in Stable-Baselines3 (see `Actor.predict`)."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    def generate(self, prompts: list[str], **arguments: Any) -> list[str]:
        """Continue texts (see `Actor.generate`); by default at most the environment's new tokens."""
        return self.policy.generate(prompts, **{"max_new_tokens": self.env.max_new_tokens, **arguments})

    def training_state(self) -> dict[str, Any]:
        """The state of the training, except models: nested dicts and lists of arrays, tensors and numbers."""
        record, counters = self._unevaluated or ({}, self._counters())
        state = {
            "counters": {**counters, "best_score": self.best_score},
            "history": [*self.history, record] if record else self.history,
            "optimizer": whole(self.optimizer.state_dict()),
            "env": gather_state(self.accelerator, self.env.get_state()),
        }
        if self.plays_episodes:  # others ask for texts before they have a state
            state["guide_texts"] = gather_texts(self.accelerator, self.env.kept_texts())
        return state

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.history = state["history"]
        load_optimizer(self.optimizer, state["optimizer"])
        self.env.set_state(own_state(self.accelerator, state["env"]))
        if "guide_texts" in state:  # not in those of older versions either
            self.env.keep_texts(state["guide_texts"])

    def models(self) -> dict[str, nn.Module]:
        """The models of a checkpoint other than the policy, by file name without suffix."""
        return {}

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint: the policy as a model folder, its card, and in ``training`` whatever else `load` needs.

        It is written under a temporary name and then renamed, so that a folder of this name is always complete. All
        processes call this; the first one writes, and the others wait for it.
        """
        self._save(path, self.hyperparameters, description(self.env))

    def _save(
        self, path: str | os.PathLike, hyperparameters: Mapping[str, Any], environment: Mapping[str, Any] | None
    ) -> None:
        state = self.training_state()
        if self.accelerator.is_main_process:
            guide = self.env.guide if self.num_guide_tokens else None
            card = model_card(
                self.policy,
                self.env,
                algorithm=self.name,
                load=f"{type(self).__name__}.load",
                training=f"{self.num_episodes:,} episodes, {self.num_timesteps:,} tokens of the policy, "
                f"{self.num_guide_tokens:,} of a guide, seed {self.seed}",
                parts={"Guide": guide, "Reward": self.env.reward_function if self.uses_reward else None},
                history=self.history,
            )
            write_checkpoint(
                path,
                self.policy,
                algorithm=self.name,
                hyperparameters=hyperparameters,
                environment=environment,
                models=self.models(),
                state=state,
                card=card,
            )
        self.accelerator.wait_for_everyone()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, training: bool = False
    ) -> str:
        """Upload the policy and its card to the Hugging Face hub, as `from_pretrained` and `agents.load` read them.

        Args:
            repo_id: "user/name"; the repository is made where there is none.
            private: Whether a new repository is private; None for the account's default.
            token: An access token; None for the one that is logged in.
            training: Whether the state of the training is uploaded, too, from which `load` continues; the prompts and
                texts of the last iteration are part of it.

        Returns:
            The address of the commit.
        """
        address = ""
        environment = description(self.env)
        # Where files are on this machine is nobody's business.
        if environment and any(isinstance(value, str) and Path(value).exists() for value in environment.values()):
            environment = None
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder) / "checkpoint", {**self.hyperparameters, "output_dir": None}, environment)
            if self.accelerator.is_main_process:
                hub = HfApi(token=token)
                hub.create_repo(repo_id, private=private, exist_ok=True)
                commit = hub.upload_folder(
                    repo_id=repo_id,
                    folder_path=Path(folder) / "checkpoint",
                    commit_message=f"{self.name} after {self.num_episodes:,} episodes",
                    ignore_patterns=None if training else f"{TRAINING}/*",
                )
                address = commit.commit_url
        self.accelerator.wait_for_everyone()
        return address

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

        The number of processes may change if the total number of rows stays the same; results are then the same up to
        rounding.

        Args:
            path: A folder that `save` wrote, or a repository of the hub that `push_to_hub` filled with ``training``.
            env: An environment made like the one that was used.
            policy_class: The class of the policy.
            policy_arguments: Further arguments of its `from_pretrained`, such as ``{"states": ...}`` for a
                `TabularPolicy`.
            **arguments: Replace the saved arguments of the constructor ("device", "output_dir", "track", ...).

        Raises:
            ValueError: `path` is no checkpoint of this algorithm.
        """
        folder = local_folder(path)
        checkpoint = read_checkpoint(folder, cls.name, f"{cls.__name__}.save")
        hyperparameters = {**checkpoint.description.hyperparameters, **arguments}
        if folder != Path(path).expanduser() and "output_dir" not in arguments:
            hyperparameters["output_dir"] = None  # a stranger does not say where to write
        device = hyperparameters.get("device", "auto")
        policy = policy_class.from_pretrained(folder, device=device, **policy_arguments or {})
        for name in checkpoint.description.frozen:
            policy.get_parameter(name).requires_grad_(False)
        algorithm = cls(policy, env, **hyperparameters)
        checkpoint.load_models(algorithm.models(), algorithm.policy)
        algorithm.load_training_state(checkpoint.state)
        return algorithm


document_arguments(Algorithm)


def check_draws(decoding: Decoding) -> None:
    """Refuse a decoding of training episodes that searches.

    Raises:
        ValueError: It searches with beams.
    """
    if decoding.num_beams > 1:
        raise ValueError(
            "decoding must have num_beams=1 for training, which learns from texts that were drawn; search with beams "
            "in evaluate(..., decoding=...) and generate"
        )


def check_guide(env: Any, name: str, *, completes: bool = False, scores: bool = False) -> None:
    """Refuse an environment whose guide cannot do what an algorithm needs.

    Args:
        env: The environment; nothing else is checked.
        name: The algorithm's name.
        completes: Whether the guide must be able to complete the policy's texts at any point.
        scores: Whether it must only be able to score the policy's tokens.

    Raises:
        ValueError: It has no guide, or one that can only start texts; or the policy decides when to hand off; or it
            cannot score the tokens of the environment.
    """
    if not isinstance(env, TextVectorEnv):
        return  # an id, of which an environment is yet to be made
    guide = env.guide
    if scores:
        if not isinstance(guide, ScoringGuide):
            raise ValueError(
                f"env must have a guide that can score tokens for {name}, a LocalGuide or HTTPGuide of the "
                f"environment's vocabulary: make_vec(..., guide=...), got {guide!r}"
            )
        guide.score([], [], env.tokenizer)
        if env.handoff:
            raise ValueError(f"env must be made without handoff=True for {name}: guides do not score hand-offs")
        return
    if guide is None or (completes and not guide.can_hand_off):
        task = "complete texts" if completes else "start texts"
        raise ValueError(f"env must have a guide that can {task} for {name}: make_vec(..., guide=...), got {guide!r}")
    if completes and env.handoff:
        raise ValueError(f"env must be made without handoff=True for {name}: here the schedule hands off")
