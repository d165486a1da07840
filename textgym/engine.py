"""The engine: text generation, a token a step, for many rows at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textgym import seeding
from textgym.data.sources import resolve_source
from textgym.guidance import Guidance
from textgym.guides import Author, Completion, Guide, GuideRequest, load_guide
from textgym.rewards import check_reward, load_reward, split_parts
from textgym.rewards.base import RewardFunction
from textgym.spec import WithSpec
from textgym.task import SPLITS, Split, SplitName, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textgym.tokenization import Context

ORDERS = ("random", "sequential")
FINISH_REASONS = np.array(["stop", "length", "handoff"], dtype=object)
STOP, LENGTH, HANDOFF = range(3)
USER_SAMPLE, NO_SAMPLE = -1, -2

# What a random number of an episode is for; it is drawn from (row seed, episode, purpose).
SAMPLE, RESTART, RESTART_LENGTH, RESTART_REDRAW, SCHEDULE = range(5)
HANDOFF_LENGTH, RESTART_SEED, HANDOFF_SEED, NO_BODY = range(5, 9)

RESET_OPTIONS = ("index", "prompt", "references", "prefix", "guidance", "reset_mask", "group_size")


class TextVectorEnv(WithSpec, VectorEnv):  # type: ignore[misc]
    """Token-level text generation for N rows, as arrays.

    Every row is an episode ``prompt | prefix (guide) | body (policy) | completion (guide)`` with one reward at its end.
    All rows take a step together, and the guide and the reward are called once for all rows that wait for them. The
    single environment (`textgym.env.TextEnv`) is this engine with one row; it has the reference page.

    Row i of an environment reset with seed s equals the single environment reset with seed s + i, whatever the number
    of rows, in every autoreset mode.

    Args:
        task: The task. Subclasses set it as a class attribute.
        num_envs: N, the number of rows.
        split: "train", "validation" or "test".
        source: "mini", "hub" or a folder; None reads ``TEXTGYM_SOURCE``, else "mini".
        tokenizer: A tokenizer, its hub id or path, or None for the task's own (see
            `textgym.tokenization.load_tokenizer`).
        max_prompt_tokens: P, columns for the prompt, template included; None for the task's own and those of the
            template.
        max_new_tokens: T, the horizon, EOS counted; None for the task's own.
        truncation_side: Which end of a long prompt's body is dropped, "left" or "right"; None for the task's own.
        template: What the policy reads in the place of a prompt, with ``{prompt}`` for it: an instruction, or examples
            before it. It is never truncated. Rewards, guides and infos see the prompt alone.
        chat: Whether that is what a user says to a chat model, by the chat template of the tokenizer; the text is then
            the answer.
        stop: Strings that end an episode as EOS does: the reward reads the text before the first of them. The name of
            a special token, such as "<|im_end|>", means that token. Without being named, the tokens that the generation
            config beside the tokenizer lists, and with `chat` the token that closes an answer, end an episode too.
        reward: None for the task's own, the name of one of the task's rewards, the hub id or path of a
            sequence-classification model, or a callable (see `textgym.rewards.base.RewardFunction`).
        guide: "references" (which restarts only, from references that the task says to imitate), the hub id or path of
            a language model, a `textgym.guides.Guide` or a function on a list of `GuideRequest`.
        guidance: When the guide takes part: a `Guidance` or a mapping of its fields.
        handoff: Whether there is an extra action, the last one, by which the policy asks the guide to finish.
        handoff_cost: Subtracted from the reward for every token of a guide's completion.
        min_new_tokens: Tokens, prefix counted, before which `action_masks` leaves out the tokens that end a text.
        banned_tokens: Token ids that `action_masks` leaves out.
        order: "random" draws samples uniformly, "sequential" visits every sample of the split once over all rows.
        render_mode: "ansi", "human" or None.
        parking: Whether a row that finished or waits for the guide is parked (it neither terminates nor reads actions)
            until every live row waits, so that guide and reward see one batch. All parked rows then terminate on the
            same step.
        autoreset_mode: A `gymnasium.vector.AutoresetMode` or its value.
        copy: Whether observations are fresh arrays; False hands out views that the next step changes.

    Raises:
        ValueError: An argument outside of what is allowed; the message names it.

    Attributes:
        initial_guidance: The guidance that the environment was made with.
        end_token_id: What ends references that are imitated, and texts of guides: with `chat` the token that closes an
            answer, else the first that `stop` names, else EOS.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012
    task: Task

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Task | None = None,
        split: SplitName = "train",
        source: str | os.PathLike | None = None,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        truncation_side: Literal["left", "right"] | None = None,
        template: str = "{prompt}",
        chat: bool = False,
        stop: Sequence[str] = (),
        reward: str | RewardFunction | None = None,
        guide: str | Guide | Callable | None = None,
        guidance: Guidance | Mapping[str, Any] | None = None,
        handoff: bool = False,
        handoff_cost: float = 0.0,
        min_new_tokens: int = 0,
        banned_tokens: Sequence[int] = (),
        order: Literal["random", "sequential"] = "random",
        render_mode: str | None = None,
        parking: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        copy: bool = True,
    ) -> None:
        if task is not None:
            self.task = task
        task = self.task
        self.num_envs = _positive("num_envs", num_envs)
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens, task.max_new_tokens)
        self.split: SplitName = _one_of("split", split, SPLITS)
        self.order = _one_of("order", order, ORDERS)
        self.truncation_side: Any = _one_of(
            "truncation_side", truncation_side or task.truncation_side, ("left", "right")
        )
        self.chat = _one_of("chat", chat, (False, True))
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {stop!r}")
        self.stop = tuple(stop)
        self.render_mode = _one_of("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.handoff = _one_of("handoff", handoff, (False, True))
        self.parking = _one_of("parking", parking, (False, True))
        self.copy = _one_of("copy", copy, (False, True))
        if (
            isinstance(handoff_cost, bool)
            or not isinstance(handoff_cost, int | float)
            or not 0 <= handoff_cost < np.inf
        ):
            raise ValueError(f"handoff_cost must be a finite number >= 0, got {handoff_cost!r}")
        self.handoff_cost = float(handoff_cost)
        horizon = self.max_new_tokens
        if not (_is_int(min_new_tokens) and 0 <= min_new_tokens <= horizon):
            raise ValueError(f"min_new_tokens must be an int in [0, {horizon}], got {min_new_tokens!r}")
        self.min_new_tokens = int(min_new_tokens)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            allowed = [mode.value for mode in AutoresetMode]
            raise ValueError(f"autoreset_mode must be one of {allowed}, got {autoreset_mode!r}") from error
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.guide = load_guide(guide)
        check_reward(reward, task.rewards)
        self._reward = task.reward if reward is None else reward
        self._reward_function: RewardFunction | None = None

        from textgym.tokenization import (
            Ends,
            end_of_turn,
            ends_beside,
            load_tokenizer,
            template_parts,
            unused_ids,
            vocabulary_size,
        )

        self.source = resolve_source(source)
        self.data: Split = task.split(self.split, self.source)
        if not len(self.data):
            raise ValueError(f"split {self.split!r} of task {task.name!r} has no samples")
        self.tokenizer = load_tokenizer(tokenizer, task, self.source)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self._unused_ids = list(unused_ids(self.tokenizer))
        self.eos_token_id: int = self.tokenizer.eos_token_id
        turn = end_of_turn(self.tokenizer) if self.chat else None
        self._ends = Ends(self.tokenizer, self.stop, [*ends_beside(self.tokenizer), *([] if turn is None else [turn])])
        # What closes an answer, and what a user says that ends one, comes before an EOS that no model may know.
        self.end_token_id: int = next(
            (token for token in (turn, *self._ends.named) if token is not None), self.eos_token_id
        )
        self.template = template
        self._template_parts = template_parts(self.tokenizer, template, self.chat)
        own = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in self._template_parts if part]
        self.max_prompt_tokens = _positive(
            "max_prompt_tokens", max_prompt_tokens, task.max_prompt_tokens + sum(map(len, own))
        )
        pad = self.tokenizer.pad_token_id
        # Without a padding token EOS fills the gaps; what is padding is told by the mask, never by the id.
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.banned_tokens = tuple(banned_tokens)
        if not all(_is_int(token) and 0 <= token < self.vocab_size for token in self.banned_tokens):
            raise ValueError(f"banned_tokens must be token ids in [0, {self.vocab_size}), got {banned_tokens!r}")
        if self.handoff and not (self.guide and self.guide.can_hand_off):
            raise ValueError(f"handoff=True needs a guide that can complete a text, got guide={guide!r}")

        width = self.max_prompt_tokens + self.max_new_tokens
        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocab_size - 1, (width,), np.int64),
                "attention_mask": spaces.Box(0, 1, (width,), np.int8),
            }
        )
        self.single_action_space = spaces.Discrete(self.vocab_size + int(self.handoff))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        n, horizon = self.num_envs, self.max_new_tokens
        self._input_ids = np.full((n, width), self.pad_token_id, np.int64)
        self._attention_mask = np.zeros((n, width), np.int8)
        self._authors = np.full((n, horizon), Author.NONE, np.int8)
        self._length = np.zeros(n, np.int64)
        self._prefix_length = np.zeros(n, np.int64)
        self._policy_tokens = np.zeros(n, np.int64)
        self._completion_tokens = np.zeros(n, np.int64)
        self._handoff_at = np.full(n, -1, np.int64)
        self._finish = np.full(n, -1, np.int8)
        self._sample = np.full(n, NO_SAMPLE, np.int64)
        # A row is active (reads actions), waiting (for the guide or the reward), or done (to be reset); idle if none.
        self._active = np.zeros(n, bool)
        self._waiting = np.zeros(n, bool)
        self._done = np.zeros(n, bool)
        self._wants_guide = np.zeros(n, bool)
        self._prompts = np.full(n, None, object)
        self._prompt_ids = np.full(n, None, object)
        self._references = np.full(n, None, object)
        self._row_keys: np.ndarray | None = None
        self._episode = np.zeros(n, np.int64)
        self._origin = np.arange(n)  # the row whose draws a row's episode shares: itself, or its group's first
        self._drawn = np.zeros((n, 2), np.uint64)  # (row key, episode) that an episode's draws hang on
        self._cursor = 0
        self._encoded: dict[int, tuple[str, tuple[int, ...], tuple[str, ...]]] = {}
        self._guidance = [Guidance()] * n
        self._set_guidance(np.arange(n), guidance)
        self.initial_guidance = self.guidance

    @property
    def guidance(self) -> Guidance | tuple[Guidance, ...]:
        """The guidance in force: one value where all rows share it, else one a row."""
        return self._guidance[0] if len(set(self._guidance)) == 1 else tuple(self._guidance)

    @property
    def reward_function(self) -> RewardFunction:
        """The reward; loaded, and trained where the task says so, on first use."""
        if self._reward_function is None:
            self._reward_function = load_reward(self._reward, self.task.rewards, self.source)
        return self._reward_function

    @property
    def exhausted(self) -> bool:
        """Whether a sequential pass is over: no sample is left and no episode is running."""
        return (
            self.order == "sequential"
            and self._cursor >= len(self.data)
            and not bool((self._active | self._waiting).any())
        )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an episode, EOS first."""
        return self._ends.token_ids

    def add_end_tokens(self, token_ids: Sequence[int]) -> None:
        """Let further tokens end an episode, as algorithms do with those that end a text of their policy.

        Args:
            token_ids: Ids of the environment's vocabulary.
        """
        from textgym.tokenization import Ends

        if not set(token_ids) <= set(self.end_token_ids):
            self._ends = Ends(self.tokenizer, self.stop, [*self.end_token_ids, *token_ids])

    def imitates(self, sample: int) -> bool:
        """Whether the task says to imitate the references of a sample; those of a user's own prompt (-1) always."""
        return sample == USER_SAMPLE or self.task.imitates(self.data.rows[sample])

    # Reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: Row i is seeded with ``seed + i``; a sequence gives each row its own (None goes on from before). In
                sequential order, a seed for all rows starts the pass again; without one an unfinished pass goes on, and
                a finished one starts again.
            options: Any of the following; each but the last two also as a sequence with one entry a row (None: not for
                this row).

                - ``index`` (int): the sample.
                - ``prompt`` (str) and ``references`` (a sequence of str): a user's own.
                - ``prefix`` (str or token ids): what already stands after the prompt.
                - ``guidance`` (`Guidance` or mapping): in force until replaced, autoresets included.
                - ``reset_mask`` (bool array (N,)): only these rows are reset.
                - ``group_size`` (int k): rows jk..jk+k-1 share one sample, one prefix and one draw of guidance, until
                  their next reset.

        Returns:
            Observations, and infos (with a ``_key`` mask for each key): ``prompt``, ``references``, ``sample_id`` (-1
            for a user's prompt, -2 for a row that a finished sequential pass left idle), ``prefix_length``,
            ``authors`` (int8 (N, T), codes of `Author`), and ``parked`` where parking is on.

        Raises:
            ValueError: An unknown option, or a value outside of what is allowed.
        """
        options = dict(options or {})
        unknown = sorted(set(options) - set(RESET_OPTIONS))
        if unknown:
            raise ValueError(f"options has unknown keys {unknown}; allowed are {list(RESET_OPTIONS)}")
        mask = self._reset_mask(options.get("reset_mask"))
        rows = np.flatnonzero(mask)
        group_size = options.get("group_size", 1)
        self._check_group(group_size, mask)
        if "guidance" in options:
            self._set_guidance(rows, options["guidance"])

        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
        self._seed_rows(seed, rows)
        seeded = seed is not None and (isinstance(seed, int | np.integer) or None not in seed)
        if mask.all() and (seeded or self._cursor >= len(self.data)):
            self._cursor = 0
        self._origin[rows] = rows - rows % group_size
        self._begin(
            rows,
            index=_per_row(options.get("index"), self.num_envs, "index", int | np.integer),
            prompt=_per_row(options.get("prompt"), self.num_envs, "prompt", str),
            references=_references_per_row(options.get("references"), options.get("prompt"), self.num_envs),
            prefix=_prefix_per_row(options.get("prefix"), self.num_envs),
        )
        infos = self._reset_info(mask)
        if self.parking:
            self._add_parked(infos)
        if self.render_mode == "human":
            self.render()
        return self._observation(), infos

    def _reset_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, bool)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with at least one True, "
                f"got {mask.dtype} {mask.shape}: {mask}"
            )
        return mask

    def _check_group(self, group_size: Any, mask: np.ndarray) -> None:
        if not _is_int(group_size) or group_size < 1:
            raise ValueError(f"options['group_size'] must be an int >= 1, got {group_size!r}")
        if self.num_envs % group_size:
            raise ValueError(f"options['group_size'] must divide num_envs={self.num_envs}, got {group_size}")
        groups = mask.reshape(-1, group_size)
        if (groups.any(1) != groups.all(1)).any():
            raise ValueError(
                f"options['reset_mask'] must take whole groups of group_size={group_size} rows, got {mask}"
            )

    def _set_guidance(self, rows: np.ndarray, value: Any) -> None:
        """Put guidance in force for rows; `value` is one guidance or a sequence with one entry a row."""
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != self.num_envs:
                raise ValueError(f"guidance must have one entry a row ({self.num_envs}), got {len(value)}")
            values = [None if entry is None else Guidance.of(entry) for entry in value]
        else:
            values = [Guidance.of(value)] * self.num_envs
        in_force = list(self._guidance)
        for row in rows:
            guidance = values[row]
            if guidance is None:
                continue
            if guidance.needs_guide and self.guide is None:
                raise ValueError(f"guidance {guidance} needs a guide, and the environment was made with guide=None")
            if guidance.handoff_prob and not (self.guide and self.guide.can_hand_off):
                raise ValueError(f"guidance {guidance} hands off, which this guide cannot: {self.guide!r}")
            if guidance.can_skip_body and not self.parking:
                raise ValueError(
                    "Guidance.handoff_length=0 and no_body_prob leave no action to an episode, and a reset cannot "
                    f"return a finished one: make a vector environment with parking=True (got {guidance})"
                )
            in_force[row] = guidance
        self._guidance = in_force
        self._restart_prob = np.array([g.restart_prob for g in self._guidance])
        self._handoff_prob = np.array([g.handoff_prob for g in self._guidance])
        self._no_body_prob = np.array([g.no_body_prob for g in self._guidance])
        self._restart_bounds = np.array([g.restart_bounds(self.max_new_tokens) for g in self._guidance])
        self._handoff_bounds = np.array([g.handoff_bounds(self.max_new_tokens) for g in self._guidance])

    def _seed_rows(self, seed: int | Sequence[int | None] | None, rows: np.ndarray) -> None:
        if self._row_keys is None:
            self._row_keys = self.np_random.integers(2**64, size=self.num_envs, dtype=np.uint64)
        if seed is None:
            return
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + row for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must be an int or have one entry a row ({self.num_envs}), got {len(seed)} entries")
        for row in rows:
            if seed[row] is not None:
                self._row_keys[row] = seeding.hash64(seed[row])
                self._episode[row] = 0

    def _draw(self, rows: np.ndarray, purpose: int) -> np.ndarray:
        """One uniform draw a row for a purpose, a function of the row's seed and episode alone."""
        return seeding.uniform(self._drawn[rows, 0], self._drawn[rows, 1], purpose)

    def _request_seeds(self, rows: np.ndarray, purpose: int) -> list[int]:
        # A group shares its prefix, yet each of its rows gets a completion of its own.
        member = rows - self._origin[rows] if purpose == HANDOFF_SEED else 0
        hashes = seeding.hash64(self._drawn[rows, 0], self._drawn[rows, 1], purpose, member)
        return (hashes >> np.uint64(1)).tolist()

    def _begin(
        self,
        rows: np.ndarray,
        index: list | None = None,
        prompt: list | None = None,
        references: list | None = None,
        prefix: list | None = None,
    ) -> None:
        """Write prompt and prefix of new episodes into `rows`."""
        assert self._row_keys is not None
        origin = self._origin[rows]
        self._drawn[rows, 0] = self._row_keys[origin]
        self._drawn[rows, 1] = self._episode[origin].astype(np.uint64)
        self._episode[rows] += 1

        self._choose_samples(rows, index, prompt, references)
        live = rows[self._sample[rows] != NO_SAMPLE]
        self._input_ids[rows] = self.pad_token_id
        self._attention_mask[rows] = 0
        self._authors[rows] = Author.NONE
        for array in (self._length, self._prefix_length, self._policy_tokens, self._completion_tokens):
            array[rows] = 0
        self._finish[rows] = -1
        self._done[rows] = self._waiting[rows] = self._wants_guide[rows] = self._active[rows] = False
        self._active[live] = True
        for row in live:
            ids = self._prompt_ids[row]
            self._input_ids[row, self.max_prompt_tokens - len(ids) : self.max_prompt_tokens] = ids
            self._attention_mask[row, self.max_prompt_tokens - len(ids) : self.max_prompt_tokens] = 1

        given = np.zeros(self.num_envs, bool)
        if prefix is not None:
            for row in live.tolist():
                own_prefix = prefix[self._origin[row]]
                if own_prefix is not None:
                    given[row] = True
                    self._append(row, self._user_prefix(row, own_prefix), Author.USER)
        if self._restart_prob.any():
            restart_prob = self._restart_prob[self._origin[live]]
            self._restart(live[(self._draw(live, RESTART) < restart_prob) & ~given[live]])
        self._prefix_length[live] = self._length[live]

        self._handoff_at[rows] = -1
        if self._handoff_prob.any():
            scheduled = live[self._draw(live, SCHEDULE) < self._handoff_prob[self._origin[live]]]
            low, high = self._handoff_bounds[self._origin[scheduled]].T
            self._handoff_at[scheduled] = seeding.integer(low, high, self._draw(scheduled, HANDOFF_LENGTH))
            skipped = self._draw(scheduled, NO_BODY) < self._no_body_prob[self._origin[scheduled]]
            self._handoff_at[scheduled[skipped]] = 0
            without_body = scheduled[self._handoff_at[scheduled] == 0]
            self._active[without_body] = False
            self._waiting[without_body] = self._wants_guide[without_body] = True

    def _choose_samples(
        self, rows: np.ndarray, index: list | None, prompt: list | None, references: list | None
    ) -> None:
        """Fill sample ids, prompts, prompt ids and references of `rows`; a group follows its first row."""
        drawn = self._draw(rows, SAMPLE)
        for row, draw, leader in zip(rows.tolist(), drawn.tolist(), self._origin[rows].tolist(), strict=True):
            own_prompt = prompt[leader] if prompt else None
            own_index = index[leader] if index else None
            if own_prompt is not None:
                if own_index is not None:
                    raise ValueError("options['prompt'] and options['index'] exclude each other")
                sample, ((text, encoded),) = USER_SAMPLE, self.encode_prompts([("", own_prompt, "")])
                ids = tuple(encoded)
                refs = (references[leader] if references else None) or ()
            else:
                if references and references[leader] is not None:
                    raise ValueError("options['references'] belongs to options['prompt'], which is missing")
                if own_index is not None:
                    if not 0 <= own_index < len(self.data):
                        raise ValueError(f"options['index'] must be in [0, {len(self.data)}), got {own_index}")
                    sample = int(own_index)
                elif self.order == "random":
                    sample = int(draw * len(self.data))
                elif leader != row:
                    sample = int(self._sample[leader])
                elif self._cursor < len(self.data):
                    sample = self._cursor
                    self._cursor += 1
                else:
                    sample = NO_SAMPLE
                text, ids, refs = self._encoded_sample(sample) if sample != NO_SAMPLE else ("", (), ())
            self._sample[row], self._prompts[row], self._prompt_ids[row], self._references[row] = (
                sample,
                text,
                ids,
                refs,
            )

    def encode_prompts(self, prompts: Sequence[tuple[str, str, str]]) -> list[tuple[str, list[int]]]:
        """Encode prompts as the policy reads them: truncated, and in the template.

        Args:
            prompts: Triples (before, body, after) of which only the body may be truncated (see `Task.prompt_of`).

        Returns:
            For each what is left of its text, without the template, and the token ids, with it.

        Raises:
            ValueError: A prompt that is too long without its body, or that has no tokens at all.
        """
        from textgym.tokenization import encode_prompts

        start, end = self._template_parts
        encoded = encode_prompts(
            self.tokenizer,
            [(start + before, body, after + end) for before, body, after in prompts],
            self.max_prompt_tokens,
            self.truncation_side,
            add_special_tokens=not self.chat,
        )
        return [(text[len(start) : len(text) - len(end)], ids) for text, ids in encoded]

    def in_template(self, prompt: str) -> str:
        """What the policy reads in the place of a prompt, as text."""
        start, end = self._template_parts
        return start + prompt + end

    def _encoded_sample(self, sample: int) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
        if sample not in self._encoded:
            row = self.data.rows[sample]
            ((text, ids),) = self.encode_prompts([self.task.prompt_of(row)])
            self._encoded[sample] = text, tuple(ids), self.task.references_of(row)
        return self._encoded[sample]

    def _user_prefix(self, row: int, prefix: str | Sequence[int]) -> list[int]:
        from textgym.tokenization import encode_continuation

        ids = (
            encode_continuation(self.tokenizer, self.in_template(self._prompts[row]), [prefix])[0]
            if isinstance(prefix, str)
            else prefix
        )
        ids = [int(token) for token in ids]
        if len(ids) >= self.max_new_tokens:
            raise ValueError(
                f"options['prefix'] must leave a token to write: at most {self.max_new_tokens - 1} tokens, "
                f"got {len(ids)}"
            )
        if (
            any(not 0 <= token < self.vocab_size for token in ids)
            or self._ends.cut(ids, context=self._context(row)) is not None
        ):
            raise ValueError(
                f"options['prefix'] must hold token ids in [0, {self.vocab_size}), no EOS ({self.eos_token_id}) and "
                f"nothing of stop={self.stop}, got {ids}"
            )
        return ids

    def _append(self, row: int, ids: Sequence[int], author: Author) -> None:
        start, end = int(self._length[row]), int(self._length[row]) + len(ids)
        self._input_ids[row, self.max_prompt_tokens + start : self.max_prompt_tokens + end] = ids
        self._attention_mask[row, self.max_prompt_tokens + start : self.max_prompt_tokens + end] = 1
        self._authors[row, start:end] = author
        self._length[row] = end

    def _restart(self, rows: np.ndarray) -> None:
        """Let the guide write prefixes.

        The published rule draws t on {0..L-1} after the guide wrote all L tokens. Drawing t on {0..T-1} first, asking
        for t tokens only, and drawing again on {0..L-1} where the guide ended within them, has the same distribution.
        """
        assert self.guide is not None
        if self.guide.author == Author.REFERENCE:
            # What nobody should imitate is no place to start from either.
            rows = rows[np.array([self.imitates(sample) for sample in self._sample[rows].tolist()], bool)]
        if not len(rows):
            return
        low, high = self._restart_bounds[self._origin[rows]].T
        length = seeding.integer(low, high, self._draw(rows, RESTART_LENGTH))
        rows, low, length = rows[length > 0], low[length > 0], length[length > 0]
        seeds, redraw = self._request_seeds(rows, RESTART_SEED), self._draw(rows, RESTART_REDRAW)
        # Rows of a group make the same request, which the guide then serves once.
        leaders = self._origin[rows]
        _, first, inverse = np.unique(leaders, return_index=True, return_inverse=True)
        written = self._ask(rows[first], length[first].tolist(), [seeds[i] for i in first])
        for i, row in enumerate(rows):
            ids, finished = written[inverse[i]]
            if finished:
                keep = int(seeding.integer(min(low[i], len(ids) - 1), len(ids) - 1, redraw[i]))
                ids = ids[:keep]
            self._append(row, ids, self.guide.author)

    def _ask(self, rows: np.ndarray, limits: list[int], seeds: list[int]) -> list[tuple[list[int], bool]]:
        """Ask the guide to continue `rows`; token ids, and whether the last of them ends the text."""
        from textgym.tokenization import decode_continuations, encode_continuation

        if not len(rows):
            return []
        prefixes, contexts = [self._tokens(row) for row in rows], [self._context(row) for row in rows]
        requests = [
            GuideRequest(
                prompt=self._prompts[row],
                prompt_ids=self._prompt_ids[row],
                prefix=text,
                prefix_ids=tuple(ids),
                max_new_tokens=limit,
                seed=seed,
                references=self._references[row],
            )
            for row, ids, text, limit, seed in zip(
                rows, prefixes, decode_continuations(self.tokenizer, contexts, prefixes), limits, seeds, strict=True
            )
        ]
        assert self.guide is not None
        completions = self.guide.complete(requests, self.tokenizer)
        if len(completions) != len(requests):
            raise ValueError(
                f"guide must return one completion a request ({len(requests)}), "
                f"{type(self.guide).__name__} returned {len(completions)}"
            )
        result = []
        for context, request, completion in zip(contexts, requests, completions, strict=True):
            if isinstance(completion, str):
                completion = Completion(text=completion)
            elif not isinstance(completion, Completion):
                completion = Completion(token_ids=completion, finished=False)
            if completion.token_ids is not None:
                ids = [int(token) for token in completion.token_ids]
                if any(not 0 <= token < self.vocab_size for token in ids):
                    raise ValueError(f"guide must return token ids in [0, {self.vocab_size}), got {ids}")
            elif completion.text is not None:
                ids = encode_continuation(self.tokenizer, context.text + request.prefix, [completion.text])[0]
            else:
                raise ValueError(f"guide must return text or token ids, {type(self.guide).__name__} returned neither")
            ended = self._ends.cut(ids, request.prefix_ids, context)
            if ended is None and completion.finished:
                ended = [*ids, self.end_token_id]
            ids = (ids if ended is None else ended)[: request.max_new_tokens]
            result.append((ids, ids == ended))
        return result

    def _tokens(self, row: int) -> list[int]:
        """What stands after the prompt of a row."""
        return self._input_ids[row, self.max_prompt_tokens : self.max_prompt_tokens + self._length[row]].tolist()

    def _context(self, row: int) -> Context:
        """The prompt of a row, as the policy reads it."""
        from textgym.tokenization import Context

        return Context(self._prompt_ids[row], self.in_template(self._prompts[row]))

    def written_texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of what stands after the prompts of `rows` so far."""
        from textgym.tokenization import decode_continuations

        return decode_continuations(
            self.tokenizer, [self._context(row) for row in rows], [self._tokens(row) for row in rows]
        )

    # Step

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Write one token in every active row.

        Args:
            actions: int (N,), a token id a row, or ``vocab_size`` for a hand-off where the environment has that action.
                Rows that are parked, idle or about to be reset ignore theirs.

        Returns:
            Observations, rewards (float64 (N,)), terminations (bool (N,)), truncations (bool (N,), never True) and
            infos. Where an episode ended, infos hold ``text``, ``authors`` (int8 (T,)), ``finish_reason`` ("stop",
            "length" or "handoff"), ``reward_parts``, ``prefix_length``, ``policy_tokens`` and ``guide_tokens`` (prefix
            and completion); with `AutoresetMode.SAME_STEP` they stand in ``final_info``.

        Raises:
            ValueError: Actions of another shape, type or range.
            gymnasium.error.ResetNeeded: An episode is over and autoreset is disabled, or reset was never called.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be integers of shape ({self.num_envs},), got {actions.dtype} of shape {actions.shape}"
            )
        if self._row_keys is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        rows = np.flatnonzero(self._active)
        chosen = actions[rows]
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.vocab_size + self.handoff):
            raise ValueError(
                f"actions must be in [0, {self.vocab_size + self.handoff}), got {chosen.min()} to {chosen.max()}"
            )
        resetting = self._done.copy()
        any_reset = bool(resetting.any())
        if any_reset:
            if self.autoreset_mode == AutoresetMode.DISABLED:
                raise gym.error.ResetNeeded(
                    "an episode is over and autoreset is disabled: call reset(), with options={'reset_mask': ...} for "
                    f"rows {np.flatnonzero(resetting).tolist()}"
                )
            restarted = np.flatnonzero(resetting)
            self._origin[restarted] = restarted
            self._begin(restarted)
        self._write(rows, chosen)

        infos: dict[str, Any] = {}
        rewards = np.zeros(self.num_envs, np.float64)
        terminations = np.zeros(self.num_envs, bool)
        # A row that was just reset must not end in the same step, so a batch with one is served in the next.
        if self._waiting.any() and (not self.parking or not (any_reset or self._active.any())):
            terminations = self._waiting.copy()
            final = self._serve(terminations, rewards)
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                ended = np.flatnonzero(terminations)
                final_obs = np.full(self.num_envs, None, object)
                for row in ended:
                    final_obs[row] = {
                        "input_ids": self._input_ids[row].copy(),
                        "attention_mask": self._attention_mask[row].copy(),
                    }
                infos = {"final_obs": final_obs, "_final_obs": terminations.copy()}
                infos |= {"final_info": final, "_final_info": terminations.copy()}
                self._done[ended] = False
                self._origin[ended] = ended
                self._begin(ended)
                infos |= self._reset_info(terminations)
            else:
                infos = final
        if any_reset:
            _merge(infos, self._reset_info(resetting))
        if self.parking:
            self._add_parked(infos)
        if self.render_mode == "human":
            self.render()
        return self._observation(), rewards, terminations, np.zeros(self.num_envs, bool), infos

    def _write(self, rows: np.ndarray, actions: np.ndarray) -> None:
        """Append the policy's tokens and find out which rows wait now."""
        if self.handoff:
            asks = actions == self.vocab_size
            asking, rows, actions = rows[asks], rows[~asks], actions[~asks]
            self._active[asking] = False
            self._waiting[asking] = self._wants_guide[asking] = True
        position = self._length[rows]
        self._input_ids[rows, self.max_prompt_tokens + position] = actions
        self._attention_mask[rows, self.max_prompt_tokens + position] = 1
        self._authors[rows, position] = Author.POLICY
        self._length[rows] = position + 1
        self._policy_tokens[rows] += 1
        stopped = self._ends.reached(actions, lambda i: self._tokens(rows[i]), lambda i: self._context(rows[i]))
        ended = stopped | (position + 1 == self.max_new_tokens)
        handed = ~ended & (self._policy_tokens[rows] == self._handoff_at[rows])
        waiting = ended | handed
        if waiting.any():
            self._finish[rows[ended]] = np.where(stopped[ended], STOP, LENGTH)
            self._active[rows[waiting]] = False
            self._waiting[rows[waiting]] = True
            self._wants_guide[rows[handed]] = True

    def _serve(self, mask: np.ndarray, rewards: np.ndarray) -> dict[str, Any]:
        """End the episodes of all waiting rows: one call of the guide, one of the reward. Fills `rewards`."""
        handed = np.flatnonzero(self._wants_guide)
        if len(handed):
            limits = (self.max_new_tokens - self._length[handed]).tolist()
            assert self.guide is not None
            for row, (ids, _) in zip(
                handed.tolist(), self._ask(handed, limits, self._request_seeds(handed, HANDOFF_SEED)), strict=True
            ):
                self._append(row, ids, self.guide.author)
                self._completion_tokens[row] = len(ids)
            self._finish[handed] = HANDOFF
            # Should the reward fail now, a step that is tried again must not write a second completion.
            self._wants_guide[handed] = False
        rows = np.flatnonzero(mask)
        texts = self._ends.texts(
            [self._tokens(row) for row in rows.tolist()], [self._context(row) for row in rows.tolist()]
        )
        value = self.reward_function(
            prompts=self._prompts[rows].tolist(), completions=texts, references=self._references[rows].tolist()
        )
        total, parts = split_parts(value, len(rows))
        if self.handoff_cost:
            parts["handoff_cost"] = -self.handoff_cost * self._completion_tokens[rows]
            total = total + parts["handoff_cost"]
        rewards[rows] = total
        self._waiting[rows] = False
        self._done[rows] = True

        part_infos: dict[str, Any] = {}
        for name, values in parts.items():
            self._add(part_infos, name, mask, values)
        infos: dict[str, Any] = {}
        self._add(infos, "text", mask, np.array(texts, object))
        self._add(infos, "authors", mask, self._authors[rows])
        self._add(infos, "finish_reason", mask, FINISH_REASONS[self._finish[rows]])
        infos |= {"reward_parts": part_infos, "_reward_parts": mask.copy()}
        self._add(infos, "prefix_length", mask, self._prefix_length[rows])
        self._add(infos, "policy_tokens", mask, self._policy_tokens[rows])
        self._add(infos, "guide_tokens", mask, (self._authors[rows] == Author.GUIDE).sum(1))
        return infos

    def texts(self, token_ids: Sequence[Sequence[int]], prompts: Sequence[str]) -> list[str]:
        """What the reward reads of token ids: the text up to where an episode of them would have ended.

        Args:
            token_ids: For each text what follows the prompt, prefix included.
            prompts: For each text its prompt, without the template.
        """
        from textgym.tokenization import Context

        encoded = self.encode_prompts([("", prompt, "") for prompt in prompts])
        contexts = [Context(ids, self.in_template(text)) for text, ids in encoded]
        texts = [list(ids)[: self.max_new_tokens] for ids in token_ids]
        cut = [self._ends.cut(ids, context=context) or ids for context, ids in zip(contexts, texts, strict=True)]
        return self._ends.texts(cut, contexts)

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now, for libraries that mask those that are not; `step` takes every action.

        Left out are ids that are no token, the tokens that end a text while it has fewer than `min_new_tokens` (but not
        what can complete a string of `stop`), the `banned_tokens`, and what the reward's `allowed_tokens` leaves out,
        where it has that method (see `textgym.rewards.base.RewardFunction`). A row that reads no action is allowed all.

        Returns:
            bool (N, actions).

        Raises:
            ValueError: Nothing would be left to a row.
        """
        masks = np.ones((self.num_envs, self.vocab_size + self.handoff), bool)
        rows = np.flatnonzero(self._active)
        masks[rows[:, None], [*self.banned_tokens, *self._unused_ids]] = False
        masks[np.ix_(rows[self._length[rows] < self.min_new_tokens], np.flatnonzero(self._ends.tokens))] = False
        allowed_tokens = getattr(self.reward_function, "allowed_tokens", None)
        if allowed_tokens is not None and len(rows):
            masks[rows, : self.vocab_size] &= allowed_tokens(
                prompts=self._prompts[rows].tolist(),
                completions=self.written_texts(rows.tolist()),
                references=self._references[rows].tolist(),
                tokenizer=self.tokenizer,
            )
        if not masks.any(1).all():
            raise ValueError(
                f"action_masks has no action for rows {np.flatnonzero(~masks.any(1)).tolist()}: min_new_tokens="
                f"{self.min_new_tokens}, banned_tokens and the reward's allowed_tokens leave out all"
            )
        return masks

    # What the outside sees

    def _observation(self) -> dict[str, np.ndarray]:
        if self.copy:
            return {"input_ids": self._input_ids.copy(), "attention_mask": self._attention_mask.copy()}
        return {"input_ids": self._input_ids, "attention_mask": self._attention_mask}

    def _add(self, infos: dict[str, Any], key: str, mask: np.ndarray, values: np.ndarray) -> None:
        """Put values of the rows in `mask` into infos as Gymnasium's vector environments do."""
        array: np.ndarray
        if values.dtype == object:
            array = np.full(self.num_envs, None, object)
        else:
            array = np.zeros((self.num_envs, *values.shape[1:]), values.dtype)
        array[mask] = values
        infos[key], infos[f"_{key}"] = array, mask.copy()

    def _reset_info(self, mask: np.ndarray) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        self._add(infos, "prompt", mask, self._prompts[mask])
        self._add(infos, "references", mask, self._references[mask])
        self._add(infos, "sample_id", mask, self._sample[mask])
        self._add(infos, "prefix_length", mask, self._prefix_length[mask])
        self._add(infos, "authors", mask, self._authors[mask])
        return infos

    def _add_parked(self, infos: dict[str, Any]) -> None:
        self._add(infos, "parked", np.ones(self.num_envs, bool), ~self._active)

    def render(self) -> tuple[str, ...] | None:
        """Show every row: the prompt dim, and each author's tokens in a colour of their own.

        Returns:
            One string a row in mode "ansi", nothing in mode "human", which prints them.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='ansi' or 'human', given when the environment is made")
            return None
        frames = tuple(self._frame(row) for row in range(self.num_envs))
        if self.render_mode == "ansi":
            return frames
        print(*frames, sep="\n", flush=True)
        return None

    def _frame(self, row: int) -> str:
        from textgym.tokenization import Context, decode_continuations

        colours = {Author.POLICY: "32", Author.GUIDE: "35", Author.REFERENCE: "34", Author.USER: "33"}
        tokens, authors = self._tokens(row), self._authors[row, : self._length[row]]
        starts = np.flatnonzero(np.diff(authors, prepend=-2)).tolist()
        # A stretch of one author is what it adds to all before it.
        before = [
            Context([*self._prompt_ids[row], *tokens[:start]], "") if start else self._context(row) for start in starts
        ]
        runs = [tokens[start:end] for start, end in zip(starts, [*starts, len(tokens)][1:], strict=True)]
        parts = [f"\x1b[2m{self._prompts[row] or ''}\x1b[0m"]
        for start, text in zip(starts, decode_continuations(self.tokenizer, before, runs), strict=True):
            parts.append(f"\x1b[{colours[Author(authors[start])]}m{text}\x1b[0m")
        return "".join(parts)

    # Resuming

    def get_state(self) -> dict[str, Any]:
        """What the next reset depends on: seeds, episode counters, the position in a pass, guidance.

        Running episodes are not part of it. The value is plain data that pickles.
        """
        return {
            "row_keys": None if self._row_keys is None else self._row_keys.copy(),
            "episode": self._episode.copy(),
            "cursor": self._cursor,
            "guidance": list(self._guidance),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`: the next reset is the one that would have followed there.

        Raises:
            ValueError: The state is of an environment with another number of rows.
        """
        if len(state["episode"]) != self.num_envs:
            raise ValueError(f"state is of num_envs={len(state['episode'])}, this environment has {self.num_envs}")
        self._row_keys = None if state["row_keys"] is None else state["row_keys"].copy()
        self._episode = state["episode"].copy()
        self._cursor = state["cursor"]
        self._set_guidance(np.arange(self.num_envs), state["guidance"])


def _positive(name: str, value: Any, default: int | None = None) -> int:
    value = default if value is None else value
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    return value


def _per_row(value: Any, num_envs: int, name: str, kind: Any) -> list | None:
    """An option as one entry a row (None where a row has none)."""
    if value is None:
        return None
    if isinstance(value, kind):
        return [value] * num_envs
    entries = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else None
    if entries is None or any(entry is not None and not isinstance(entry, kind) for entry in entries):
        raise ValueError(
            f"options[{name!r}] must be {getattr(kind, '__name__', kind)} or a sequence with one (or None) a row, "
            f"got {value!r}"
        )
    if len(entries) != num_envs:
        raise ValueError(f"options[{name!r}] must have one entry a row ({num_envs}), got {len(entries)}")
    return entries


def _references_per_row(value: Any, prompt: Any, num_envs: int) -> list | None:
    """References are texts already, so one prompt for all rows takes one sequence of texts, many take many."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(
            f"options['references'] must be a sequence of texts, or one such sequence a row, got {value!r}"
        )
    if all(isinstance(entry, str) for entry in value) and (prompt is None or isinstance(prompt, str)):
        return [tuple(value)] * num_envs
    if len(value) != num_envs:
        raise ValueError(f"options['references'] must have one entry a row ({num_envs}), got {len(value)}")
    if any(isinstance(entry, str) for entry in value):
        raise ValueError(f"options['references'] must be a sequence of texts for each row, got {value!r}")
    return [None if entry is None else tuple(entry) for entry in value]


def _prefix_per_row(value: Any, num_envs: int) -> list | None:
    if value is None:
        return None
    if isinstance(value, str) or (len(value) and all(isinstance(entry, int | np.integer) for entry in value)):
        return [value] * num_envs
    if len(value) != num_envs:
        raise ValueError(
            "options['prefix'] must be a text, token ids, or a sequence with one of these (or None) a row "
            f"({num_envs}), got {len(value)} entries"
        )
    return list(value)


def _merge(infos: dict[str, Any], other: dict[str, Any]) -> None:
    """Merge infos of disjoint sets of rows."""
    for key, value in other.items():
        if key.startswith("_"):
            continue
        mask = other[f"_{key}"]
        if key not in infos:
            infos[key], infos[f"_{key}"] = value, mask
        else:
            infos[key][mask] = value[mask]
            infos[f"_{key}"] |= mask
