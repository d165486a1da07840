"""Algorithms of Stable-Baselines3 with the interface of those in `agents`."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import is_json_serializable
from stable_baselines3.common.utils import obs_as_tensor, set_random_seed
from stable_baselines3.common.vec_env import VecMonitor
from torch import nn

from agents.algorithm import Algorithm, check_draws
from agents.environments import agree
from agents.policy import Actor, LanguageModelPolicy, Policy
from agents.sb3.policies import CausalLMActorCriticPolicy, MaskableCausalLMActorCriticPolicy, evaluate_transitions
from agents.sb3.vec_env import TextVecEnv
from textgym.checks import check
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.sampling import Sample, TokenSampler
from textgym.seeding import hash64
from textgym.storage import new_folder
from textgym.tokenization import pretrained_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from gymnasium import spaces
    from transformers import PreTrainedTokenizerBase

ZIP_FILE, CLASS_FILE = "model.zip", "sb3.json"
# Number of rows of a rollout per pass through the reference policy.
_ROWS_AT_ONCE = 16


class KLPenalty(BaseCallback):
    """Subtracts ``coef (log pi - log pi_ref)`` from every reward of a rollout, as the algorithms of `agents` do.

    For PPO, A2C, TRPO and MaskablePPO with a `CausalLMActorCriticPolicy`:
    ``model.learn(..., callback=KLPenalty(reference, 0.02))``.

    Args:
        reference: The reference policy; it must not change.
        coef: Weight of the penalty.

    Attributes:
        kl_per_token: Mean of ``log pi - log pi_ref`` over the last rollout.
    """

    def __init__(self, reference: Policy, coef: float) -> None:
        super().__init__()
        check("coef", coef, coef >= 0, "at least 0")
        self.reference, self.coef = reference, coef
        self.kl_per_token = 0.0

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _on_rollout_end(self) -> None:
        model = cast("OnPolicyAlgorithm", self.model)
        buffer, device = model.rollout_buffer, self.reference.device
        observations: Any = buffer.observations
        log_probs = np.empty_like(buffer.log_probs)
        # By rows, in which each text is a prefix of the next.
        for rows in np.array_split(np.arange(buffer.n_envs), -(-buffer.n_envs // _ROWS_AT_ONCE)):
            obs = {
                name: torch.as_tensor(array[:, rows], device=device).flatten(0, 1)
                for name, array in observations.items()
            }
            actions = torch.as_tensor(buffer.actions[:, rows], device=device).flatten()
            evaluated = evaluate_transitions(self.reference, obs, actions).log_probs
            log_probs[:, rows] = evaluated.view(-1, len(rows)).cpu()
        log_ratio = buffer.log_probs - log_probs
        self.kl_per_token = float(log_ratio.mean())
        buffer.rewards -= self.coef * log_ratio
        assert model._last_obs is not None
        assert model._last_episode_starts is not None
        last_values = model.policy.predict_values(obs_as_tensor(model._last_obs, model.device))  # type: ignore[arg-type]
        buffer.compute_returns_and_advantage(last_values=last_values, dones=model._last_episode_starts)


class _Episodes(BaseCallback):
    """Collects the infos of the episodes that ended."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.infos += [info for info in self.locals["infos"] if "episode" in info]
        return True


class SB3Algorithm(Algorithm):
    """An algorithm of Stable-Baselines3, run, evaluated and saved like those of `agents`.

    Subclasses name the algorithm; `of` makes one: ``SB3Algorithm.of(stable_baselines3.PPO)(policy, env, seed=0)``.

    An actor-critic algorithm (PPO, A2C, TRPO, MaskablePPO) trains `policy` itself, as a `CausalLMActorCriticPolicy`.
    Another one (DQN) trains the small networks of "MultiInputPolicy", which read token ids as magnitudes, and takes
    only the tokenizer from `policy`. Training episodes come from an environment like `env`, but without parking. An
    iteration is `episodes_per_iteration` times T steps, and so at least that many episodes.

    Args:
        policy: A `LanguageModelPolicy`, or the hub id or path of a language model.
        env: The id of an environment, or a `TextVectorEnv` made with ``parking=True`` by `gymnasium.make_vec`.
        minibatch_size: Episodes per gradient step, T steps each: the `batch_size` of an actor-critic algorithm that has
            one.
        n_epochs: Passes over a rollout, if the algorithm has this argument.
        learning_rate: Step size.
        kl_coef: Weight of the KL penalty to the starting policy, as a reward (see `KLPenalty`); no effect if no
            language model is trained.
        **arguments: Those of `Algorithm`, and the algorithm's own, which override those above (`batch_size`, `gamma`,
             `policy_kwargs`, ...). A rollout of an actor-critic algorithm is at most an iteration.

    Raises:
        ValueError: An argument is wrong, the algorithm takes no dictionaries as observations, or it was started as
            several processes.

    Attributes:
        model: The algorithm of Stable-Baselines3.
        last_rollout: Always None.
    """

    name = "sb3"
    sb3_class: ClassVar[type[BaseAlgorithm]]

    def __init__(
        self,
        policy: LanguageModelPolicy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        minibatch_size: int = 16,
        n_epochs: int = 2,
        learning_rate: float = 1e-4,
        kl_coef: float = 0.02,
        **arguments: Any,
    ) -> None:
        check("minibatch_size", minibatch_size, minibatch_size >= 1, "at least 1")
        check("n_epochs", n_epochs, n_epochs >= 1, "at least 1")
        check("kl_coef", kl_coef, kl_coef >= 0, "at least 0")
        own_policy = self.sb3_class.policy_aliases.get("MultiInputPolicy")
        if own_policy is None:
            raise ValueError(f"{self.name} must be an algorithm with a MultiInputPolicy, got {self.sb3_class}")
        shared = {field.name: arguments.pop(field.name) for field in fields(Algorithm) if field.name in arguments}
        super().__init__(policy, env, **shared)
        named = {"minibatch_size": minibatch_size, "n_epochs": n_epochs, "learning_rate": learning_rate}
        self.hyperparameters |= named | {"kl_coef": kl_coef} | arguments
        check_draws(self.policy.decoding)
        if self.accelerator.num_processes > 1:
            raise ValueError(f"{self.name} runs in one process, got {self.accelerator.num_processes}")
        self.env = _without_parking(self.env)
        agree(self.env, self.policy)
        self.steps = self.episodes_per_iteration * self.env.max_new_tokens
        sb3_policy: Any = "MultiInputPolicy"
        own: dict[str, Any] = {"learning_rate": learning_rate}
        defaults = _parameters(self.sb3_class)
        self._episodes = _Episodes()
        self._callbacks: list[BaseCallback] = [self._episodes]
        self._penalty: KLPenalty | None = None
        if issubclass(own_policy, ActorCriticPolicy | MaskableActorCriticPolicy):
            maskable = issubclass(own_policy, MaskableActorCriticPolicy)
            sb3_policy = MaskableCausalLMActorCriticPolicy if maskable else CausalLMActorCriticPolicy
            own |= {"n_epochs": n_epochs, "batch_size": minibatch_size * self.env.max_new_tokens}
            own["n_steps"] = min(self.steps // self.env.num_envs, defaults["n_steps"])
            if kl_coef:
                self._penalty = KLPenalty(copy.deepcopy(self.policy).requires_grad_(False), kl_coef)
                self._callbacks.append(self._penalty)
            given = {"model": self.policy, "prompt_columns": self.env.max_prompt_tokens}
            arguments["policy_kwargs"] = given | arguments.get("policy_kwargs", {})
        self.model = _with_external_progress(self.sb3_class)(
            sb3_policy,
            VecMonitor(TextVecEnv(self.env)),
            **{name: value for name, value in own.items() if name in defaults}
            | {"seed": int(hash64(self.seed)) >> 33, "device": self.policy.device}
            | arguments,
        )
        if sb3_policy == "MultiInputPolicy":
            self.policy = SB3Policy(self.model, self.policy.tokenizer)
        self.optimizer = self.model.policy.optimizer
        self._progress: Callable[[], float] = lambda: 0.0
        self.last_rollout = None  # its episodes begin and end anywhere

    @classmethod
    def of(cls, sb3_class: type[BaseAlgorithm]) -> type[SB3Algorithm]:
        """The subclass for an algorithm of Stable-Baselines3, or for one written like these.

        Raises:
            ValueError: `sb3_class` is no such class.
        """
        if not (isinstance(sb3_class, type) and issubclass(sb3_class, BaseAlgorithm)):
            raise ValueError(f"sb3_class must be an algorithm class of Stable-Baselines3, got {sb3_class!r}")
        name = f"{sb3_class.__module__.partition('.')[0]}:{sb3_class.__name__}"
        return type(sb3_class.__name__, (cls,), {"sb3_class": sb3_class, "name": name, "__doc__": cls.__doc__})

    def _learn(self, done: Callable[[], float], *arguments: Any) -> Self:
        self._progress = done
        return super()._learn(done, *arguments)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take nothing back: Stable-Baselines3 learns within an iteration, and goes on where it was interrupted."""
        yield

    def iterate(self) -> dict[str, Any]:
        """Run the algorithm for the steps of an iteration."""
        self._episodes.infos.clear()
        # Schedules run over all iterations, not over this call of `learn`.
        self.model._current_progress_remaining = max(0.0, 1 - self._progress())
        # In every iteration, because other code in the process draws from the same generators.
        set_random_seed(int(hash64(self.seed, self.iteration)) >> 33)
        self.model.learn(self.steps, callback=self._callbacks, reset_num_timesteps=False)
        infos = self._episodes.infos
        self.num_timesteps = self.model.num_timesteps
        self.num_episodes += len(infos)

        def mean(values: Iterable[Any]) -> float:
            return float(np.mean([float(value) for value in values]))

        record = {
            "reward": mean(info["episode"]["r"] for info in infos),
            **{
                f"reward/{part}": mean(info["reward_parts"][part] for info in infos)
                for part in infos[0]["reward_parts"]
                if part != "reward"
            },
            "length": mean((info["authors"] >= 0).sum() for info in infos),
            "stop_fraction": mean(info["finish_reason"] == "stop" for info in infos),
            "handoff_fraction": mean(info["finish_reason"] == "handoff" for info in infos),
            "policy_tokens": int(sum(info["policy_tokens"] for info in infos)),
        }
        if self._penalty is not None:
            record["kl_per_token"] = self._penalty.kl_per_token
            record["kl"] = record["kl_per_token"] * record["policy_tokens"] / len(infos)
        logged = self.model.logger.name_to_value
        # Some can be NaN, such as the explained variance of equal returns.
        return record | {
            name.removeprefix("train/"): float(logged[name])
            for name in sorted(logged)
            if name.startswith("train/") and np.isfinite(logged[name])
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint (see `Algorithm.save`); arguments that JSON cannot hold must be given to `load`."""
        complete = self.hyperparameters
        self.hyperparameters = {key: value for key, value in complete.items() if is_json_serializable(value)}
        try:
            super().save(path)
        finally:
            self.hyperparameters = complete

    def models(self) -> dict[str, nn.Module]:
        """Add the reference policy of the KL penalty."""
        return super().models() | ({} if self._penalty is None else {"reference": self._penalty.reference})

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`, with new episodes in place of unfinished ones.

        Raises:
            ValueError: The algorithm has a replay buffer, which checkpoints do not hold.
        """
        if not isinstance(self.policy, LanguageModelPolicy):
            raise ValueError(f"{self.name} cannot be resumed: its checkpoints do not hold the replay buffer")
        super().load_training_state(state)
        self.model.num_timesteps = self.num_timesteps
        envs = self.model.get_env()
        assert envs is not None
        envs.unwrapped._reset_seeds()  # the environment continues with its own


class SB3Policy(Actor):
    """An algorithm of Stable-Baselines3 as an actor that can be evaluated: it writes what `predict` chooses.

    Args:
        model: The algorithm.
        tokenizer: The tokenizer whose ids are its actions.
    """

    def __init__(self, model: BaseAlgorithm, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.network, self.tokenizer = model, model.policy, tokenizer
        self.decoding = Decoding(greedy=True)
        self.can_hand_off = bool(cast("spaces.Discrete", model.action_space).n > vocabulary_size(tokenizer))

    def sampler(self, observation: Mapping[str, Any], **arguments: Any) -> TokenSampler:
        """Return a sampler whose tokens `predict` chooses; decoding and seeds have no effect."""
        return _PredictSampler(self.model, observation)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write Stable-Baselines3's zip, the class of its algorithm, and the tokenizer into a folder."""
        sb3_class = next(cls for cls in type(self.model).__mro__ if not cls.__dict__.get("_has_external_progress"))
        with new_folder(folder) as new:
            self.tokenizer.save_pretrained(new)
            self.model.save(new / ZIP_FILE)
            description = {"module": sb3_class.__module__, "class": sb3_class.__qualname__}
            (new / CLASS_FILE).write_text(json.dumps(description, indent=2) + "\n")
            _WRITTEN.add(_digest(new))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, device: str | torch.device = "auto", trusted: bool = False
    ) -> SB3Policy:
        """Read what `save_pretrained` wrote.

        Args:
            path: The folder.
            device: "auto" or a torch device.
            trusted: Whether the folder may run code, which its pickles and the class that it names can do. What this
                process wrote itself opens without.

        Raises:
            ValueError: `path` is no such folder, or one that is not trusted.
        """
        folder = Path(path)
        if not (folder / CLASS_FILE).is_file():
            raise ValueError(f"path must be a folder written by SB3Policy.save_pretrained, got {str(path)!r}")
        if not trusted and _digest(folder) not in _WRITTEN:
            raise ValueError(
                f"trusted must be True to open {str(path)!r}, which this process did not write: it holds pickles of "
                "Stable-Baselines3 and names a class to import, and both can run any code. Give it only for files that "
                "you made, or whose makers you trust as you trust their programs"
            )
        description = json.loads((folder / CLASS_FILE).read_text())
        sb3_class = getattr(importlib.import_module(description["module"]), description["class"])
        return cls(sb3_class.load(folder / ZIP_FILE, device=device), pretrained_tokenizer(path))


# Digests of the files that this process wrote for algorithms of Stable-Baselines3.
_WRITTEN: set[str] = set()


def _digest(folder: Path) -> str:
    """Changes with the files of a folder that can run code."""
    return hashlib.sha256(
        b"".join(hashlib.sha256((folder / name).read_bytes()).digest() for name in (CLASS_FILE, ZIP_FILE))
    ).hexdigest()


class _PredictSampler:
    """A `textgym.sampling.TokenSampler` with the tokens that an algorithm of Stable-Baselines3 predicts."""

    def __init__(self, model: BaseAlgorithm, observation: Mapping[str, Any]) -> None:
        self.model = model
        self._ids, self._mask = (np.array(observation[name]) for name in ("input_ids", "attention_mask"))
        self.rows = np.flatnonzero(self._mask.any(1))

    def sample(self) -> Sample:
        """Choose the next token of every row in `rows`."""
        ids, mask = self._ids[self.rows], self._mask[self.rows]
        tokens, _ = self.model.predict({"input_ids": ids, "attention_mask": mask}, deterministic=True)
        ends = mask.shape[1] - mask[:, ::-1].argmax(1)
        self._ids[self.rows, ends], self._mask[self.rows, ends] = tokens, 1
        chosen = torch.as_tensor(tokens, device=self.model.device)
        return Sample(chosen, torch.zeros_like(chosen, dtype=torch.float32), None)

    def keep(self, mask: np.ndarray) -> None:
        """Remove rows from the batch."""
        self.rows = self.rows[mask]


def _with_external_progress(sb3_class: type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """A subclass whose training progress is set by `SB3Algorithm`, not by each call of `learn`."""
    members = {"_has_external_progress": True, "_update_current_progress_remaining": lambda self, *_: None}
    return type(sb3_class.__name__, (sb3_class,), members)


def _parameters(cls: type) -> dict[str, Any]:
    """Named parameters of the constructors of a class and its bases, with their defaults."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in base.__dict__:
            parameters = inspect.signature(base.__dict__["__init__"]).parameters
            found |= {name: value.default for name, value in parameters.items()}
    return found


def _without_parking(env: TextVectorEnv) -> TextVectorEnv:
    """Make the same environment without parking.

    Raises:
        ValueError: `env` was not made by `gymnasium.make_vec`, so its arguments are unknown.
    """
    if env.spec is None:
        raise ValueError("env must be made by gymnasium.make_vec: it is made again without parking")
    arguments = {key: value for key, value in env.spec.kwargs.items() if key not in ("num_envs", "vectorization_mode")}
    # Share what is already loaded.
    arguments |= {"guide": env.guide, "tokenizer": env.tokenizer, "reward": env.reward_function}
    arguments |= {"parking": False, "copy": True}
    return gym.make_vec(env.spec.id, num_envs=env.num_envs, **arguments).unwrapped  # type: ignore[return-value]
