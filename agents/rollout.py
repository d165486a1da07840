"""Rollouts: whole episodes of a vector environment as one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.environments import agreeing
from textgym.checks import check
from textgym.engine import NO_SAMPLE
from textgym.guides.base import Author

if TYPE_CHECKING:
    from torch import Tensor

    from agents.policy import Actor
    from textgym.decoding import Decoding
    from textgym.engine import TextVectorEnv
    from textgym.sampling import Sample, TokenSampler


@dataclass
class Rollout:
    """N finished episodes: P prompt columns (left-padded), then T token columns (right-padded).

    Tensors live on the policy's device; a *body* is what the policy wrote, a *decision* is a body token or the policy's
    choice to hand off, which stands in the column where the guide's first token does.

    Attributes:
        input_ids: int64 (N, P+T).
        attention_mask: int64 (N, P+T).
        authors: int8 (N, T), who wrote each token (`textgym.guides.base.Author`).
        handoffs: bool (N, T), where the policy chose to hand off.
        log_probs: float32 (N, T), of decisions as they were sampled, under the untruncated softmax at temperature 1
            (whatever the decoding was); zero elsewhere.
        values: float32 (N, T), of the state before each decision if the policy continues; zero elsewhere, and where
            they were not recorded.
        entropies: float32 (N, T), of the policy's distribution of each token that it wrote, in nats; zero elsewhere,
            and where no guidance depends on them.
        rewards: float32 (N,), the task's reward of each whole text.
        prefix_length: int64 (N,), number of tokens before the policy's first.
        policy_tokens: int64 (N,).
        guide_tokens: int64 (N,), also those that a guide wrote once for several episodes.
        reward_parts: float arrays (N,) by name of the part.
        finish_reason: object array (N,), "stop", "length" or "handoff".
        texts: object array (N,) of str, what was written after the prompt, without special tokens.
        prompts: object array (N,) of str.
        references: object array (N,) of tuples of str.
        sample_ids: int64 array (N,), -1 for a user's own prompt.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    authors: torch.Tensor
    handoffs: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor
    rewards: torch.Tensor
    prefix_length: torch.Tensor
    policy_tokens: torch.Tensor
    guide_tokens: torch.Tensor
    reward_parts: dict[str, np.ndarray]
    finish_reason: np.ndarray
    texts: np.ndarray
    prompts: np.ndarray
    references: np.ndarray
    sample_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: torch.Tensor) -> Rollout:
        """Some of the episodes; `rows` is int64 (n,), or bool (N,)."""
        host = rows.cpu().numpy()
        chosen: dict[str, Any] = {}
        for name, value in ((part.name, getattr(self, part.name)) for part in fields(self)):
            if isinstance(value, dict):
                chosen[name] = {key: part[host] for key, part in value.items()}
            else:
                chosen[name] = value[rows if isinstance(value, torch.Tensor) else host]
        return type(self)(**chosen)

    def with_rows(self, rows: torch.Tensor, others: Rollout) -> Rollout:
        """The same episodes, with others in the place of some; `rows` is int64 (n,), n the number of others."""
        order = torch.arange(len(self), device=rows.device)
        order[rows] = len(self) + torch.arange(len(others), device=rows.device)
        return Rollout.concatenate([self, others])[order]

    @property
    def body(self) -> torch.Tensor:
        """Bool (N, T): the tokens the policy wrote."""
        return self.authors == int(Author.POLICY)

    @property
    def completion(self) -> torch.Tensor:
        """Bool (N, T): the tokens the guide wrote after the prefix."""
        columns = torch.arange(self.authors.shape[1], device=self.authors.device)
        return (self.authors != int(Author.NONE)) & ~self.body & (columns >= self.prefix_length[:, None])

    @property
    def guided(self) -> torch.Tensor:
        """Bool (N, T): the tokens the guide wrote, in prefixes and completions."""
        return (self.authors == int(Author.GUIDE)) | (self.authors == int(Author.REFERENCE))

    @property
    def decisions(self) -> torch.Tensor:
        """Bool (N, T): the policy's actions, the tokens it wrote and its hand-offs."""
        return self.body | self.handoffs

    def log_ratio(self, reference_log_probs: torch.Tensor) -> torch.Tensor:
        """Float (N, T): ``log pi - log pi_ref`` of the decisions when they were sampled, zero elsewhere."""
        return (self.log_probs - reference_log_probs).masked_fill(~self.decisions, 0)

    @property
    def prompt_columns(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.authors.shape[1]

    def columns(self, mask: torch.Tensor) -> torch.Tensor:
        """int64 (N, T): columns of `input_ids` where `mask` is True, else -1, for `Policy.evaluate_actions`."""
        return torch.where(mask, torch.arange(mask.shape[1], device=mask.device) + self.prompt_columns, -1)

    def to(self, device: torch.device | str) -> Rollout:
        """The same episodes with their tensors on another device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return type(self)(**values | moved)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str) -> Rollout:
        """The episodes of a checkpoint, in which all numbers are tensors, and object arrays and tuples lists."""
        values: dict[str, Any] = {}
        for name, kind in ((part.name, part.type) for part in fields(cls)):
            value = state[name]
            if kind == "torch.Tensor":
                values[name] = value.to(device)
            elif isinstance(value, Mapping):
                values[name] = {part: np.asarray(numbers) for part, numbers in value.items()}
            elif isinstance(value, list):
                entries = (tuple(entry) if isinstance(entry, list) else entry for entry in value)
                values[name] = np.fromiter(entries, object, len(value))
            else:
                values[name] = np.asarray(value)
        return cls(**values)

    @classmethod
    def concatenate(cls, rollouts: list[Rollout]) -> Rollout:
        """Join rollouts of one environment, row after row."""
        if len(rollouts) == 1:
            return rollouts[0]
        joined: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            parts = [getattr(rollout, name) for rollout in rollouts]
            if isinstance(parts[0], torch.Tensor):
                joined[name] = torch.cat(parts)
            elif isinstance(parts[0], dict):
                joined[name] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            else:
                joined[name] = np.concatenate(parts)
        return cls(**joined)


def collect(
    env: TextVectorEnv,
    policy: Actor,
    *,
    seeds: np.ndarray,
    decoding: Decoding | None = None,
    values: bool = True,
    reset_seed: int | Sequence[int | None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rollout:
    """Play one episode in every row that has a sample.

    Rows that are parked from reset on (no policy token) have no body. A row leaves the policy's batch as soon as the
    environment parks it.

    Args:
        env: N rows, made with ``parking=True``.
        policy: The actor that writes.
        seeds: uint64 (N,), the seed of each row's tokens. A row's episode depends only on its own seed, not on
            other rows.
        decoding: How tokens are drawn; None for the actor's own decoding.
        values: Whether to record values.
        reset_seed: Seed for the environment's own randomness, or one per row (None: it continues).
        options: Reset options: "guidance", "group_size", "index", "prompt", "references", "prefix".

    Raises:
        ValueError: The environment does not park, or resets itself within the last step; only one of environment and
            policy has the hand-off; the number of seeds is not N.
    """
    if not env.parking:
        raise ValueError("env must be made with parking=True: rows wait for each other, and end on the same step")
    if env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
        raise ValueError("env must not be made with autoreset_mode=SAME_STEP: the last step must show the whole texts")
    if len(seeds) != env.num_envs:
        raise ValueError(f"seeds must have one entry for each of the {env.num_envs} rows, got {len(seeds)}")

    with agreeing(env, policy):
        observation, info = env.reset(seed=reset_seed, options=dict(options or {}))
        prompts, references, sample_ids = info["prompt"], info["references"], info["sample_id"]
        # The last reset of a sequential pass can leave rows without a sample.
        live = np.flatnonzero(sample_ids != NO_SAMPLE)
        sampler, lengths = _sampler(env, policy, observation, info["parked"], seeds, decoding, values)
        actions, entropies = np.zeros(env.num_envs, np.int64), None
        if env.watches_entropy:
            entropies = np.zeros(env.num_envs)
        # Only tokens are copied from the device at every step.
        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        samples: list[Sample] = []
        while True:
            if len(sampler.rows):
                samples.append(sampler.sample())
                rows.append(sampler.rows)
                columns.append(lengths[sampler.rows])
                lengths[sampler.rows] += 1
                actions[sampler.rows] = samples[-1].tokens.cpu().numpy()
                if entropies is not None:
                    entropies[sampler.rows] = cast("Tensor", samples[-1].entropies).cpu().numpy()
            observation, rewards, terminations, _, info = env.step(actions, entropies)
            if terminations[live].all():
                break
            if "handed_back" not in info:
                sampler.keep(~info["parked"][sampler.rows])
            else:  # all rows waited for the guide, which wrote what the sampler has not read
                sampler, lengths = _sampler(env, policy, observation, info["parked"], seeds, decoding, values)

    shape = (env.num_envs, env.max_new_tokens)
    log_probs, state_values, token_entropies = torch.zeros(3, *shape, device=policy.device)
    handoffs = torch.zeros(shape, dtype=torch.bool, device=policy.device)
    if samples:
        where = tuple(torch.from_numpy(np.concatenate(part)).to(policy.device) for part in (rows, columns))
        log_probs[where] = torch.cat([sample.log_probs for sample in samples]).float()
        handoffs[where] = torch.cat([sample.tokens for sample in samples]) == env.vocab_size
        if values:
            state_values[where] = torch.cat([cast("Tensor", sample.values) for sample in samples]).float()

        if entropies is not None:
            token_entropies[where] = torch.cat([cast("Tensor", sample.entropies) for sample in samples]).float()
            # Where the guide wrote instead, the policy's token was dropped.
            dropped = ~handoffs & (torch.from_numpy(info["authors"]).to(policy.device) != int(Author.POLICY))
            for recorded in (log_probs, state_values, token_entropies):
                recorded.masked_fill_(dropped, 0)

    def tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array[live]).to(policy.device, dtype)

    parts = info["reward_parts"]
    return Rollout(
        input_ids=tensor(observation["input_ids"], torch.int64),
        attention_mask=tensor(observation["attention_mask"], torch.int64),
        authors=tensor(info["authors"], torch.int8),
        handoffs=handoffs[live],
        log_probs=log_probs[live],
        values=state_values[live],
        entropies=token_entropies[live],
        rewards=tensor(rewards, torch.float32),
        prefix_length=tensor(info["prefix_length"], torch.int64),
        policy_tokens=tensor(info["policy_tokens"], torch.int64),
        guide_tokens=tensor(info["guide_tokens"], torch.int64),
        reward_parts={name: part[live] for name, part in parts.items() if not name.startswith("_")},
        finish_reason=info["finish_reason"][live],
        texts=info["text"][live],
        prompts=prompts[live],
        references=references[live],
        sample_ids=sample_ids[live],
    )


def _sampler(
    env: TextVectorEnv,
    policy: Actor,
    observation: Mapping[str, np.ndarray],
    parked: np.ndarray,
    seeds: np.ndarray,
    decoding: Decoding | None,
    values: bool,
) -> tuple[TokenSampler, np.ndarray]:
    """A sampler of the rows that are not parked, and the number of new tokens of every row, int64 (N,)."""
    lengths = observation["attention_mask"][:, env.max_prompt_tokens :].sum(1, dtype=np.int64)
    sampler = policy.sampler(
        observation,
        seeds=seeds,
        decoding=decoding,
        values=values,
        max_new_tokens=env.max_new_tokens,
        prefix_lengths=lengths,
        **({"entropies": True} if env.watches_entropy else {}),
    )
    sampler.keep(~parked[sampler.rows])
    return sampler, lengths.copy()  # the sampler keeps its own


def replay(
    env: TextVectorEnv,
    policy: Actor,
    *,
    seeds: np.ndarray,
    options: Mapping[str, Sequence[Any]],
    group_size: int = 1,
    decoding: Decoding | None = None,
    values: bool = True,
) -> Rollout:
    """Play any number of episodes from given starts; the environment then goes on as if they had not been played.

    Args:
        env: As for `collect`.
        policy: The actor that writes.
        seeds: uint64 (n,), the seed of each episode: of its tokens, and of the environment's randomness.
        options: Reset options, each with an entry per episode: "index", "prefix", "guidance".
        group_size: Neighbouring episodes that share a sample and a prefix; n and the rows of `env` are multiples.
        decoding: As for `collect`.
        values: As for `collect`.

    Raises:
        ValueError: As for `collect`, or there are no episodes.
    """
    check("seeds", seeds, len(seeds) > 0, "not empty")
    state, rollouts = env.get_state(), []
    try:
        for start in range(0, len(seeds), env.num_envs):
            part = seeds[start : start + env.num_envs]
            rest = [None] * (env.num_envs - len(part))
            entries = {name: [*given[start : start + len(part)], *rest] for name, given in options.items()}
            rollouts.append(
                collect(
                    env,
                    policy,
                    seeds=np.pad(part, (0, len(rest))),
                    decoding=decoding,
                    values=values,
                    reset_seed=[*map(int, part), *rest],
                    options={**entries, "idle": np.arange(env.num_envs) >= len(part), "group_size": group_size},
                )
            )
    finally:
        env.set_state(state)
    return Rollout.concatenate(rollouts)
