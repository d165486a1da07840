"""The vector environment: text generation, a token per step, for many rows at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import IntEnum
from functools import cache, partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal, Never

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textgym import seeding
from textgym.checks import check, check_arguments, check_int, check_memory, check_one_of, check_texts, is_int, is_number
from textgym.completions import complete
from textgym.data.sources import resolve_source
from textgym.draws import EpisodeDraws, Purpose
from textgym.guidance import Guidance
from textgym.guides import Author, Guide, GuideRequest, load_guide
from textgym.options import ResetOptions
from textgym.prompts import PromptEncoder
from textgym.rendering import Html, coloured
from textgym.rewards import check_reward, load_reward, split_parts
from textgym.rewards.base import RewardFunction
from textgym.spec import WithSpec
from textgym.task import SPLITS, Split, SplitName, Task
from textgym.tokenization import (
    Context,
    StopCriteria,
    decode_by_author,
    decode_continuations,
    encode_continuations,
    ends_beside,
    load_tokenizer,
    unused_ids,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDERS = ("random", "sequential")
FINISH_REASONS = np.array(["stop", "length", "handoff"], dtype=object)
STOP, LENGTH, HANDOFF = range(3)
USER_SAMPLE, NO_SAMPLE = -1, -2


class Phase(IntEnum):
    """Where a row's episode is; phases from `NEEDS_GUIDE` on wait for the end of a step."""

    IDLE = 0  # without a sample: a sequential pass is over
    DONE = 1  # over, until the next reset
    ACTIVE = 2  # reads actions
    NEEDS_GUIDE = 3  # to be completed by the guide, and then rewarded
    NEEDS_REWARD = 4  # complete, to be rewarded


# Arrays are compared with plain ints, which takes NumPy a fifth of the time.
IDLE, DONE, ACTIVE, NEEDS_GUIDE, NEEDS_REWARD = map(int, Phase)

# What is known of the rows' episodes, in arrays: their texts, a line for each row, and the rest, an entry for each. Of
# these, a row that goes on changes but the first ones, and a reset all.
_TEXTS = ("_input_ids", "_attention_mask", "_authors")
_PROGRESS = ("_phase", "_length", "_finish", "_handoff_at", "_handoffs")
_EPISODES = (*_PROGRESS, "_prefix_length", "_sample", "_prompts", "_prompt_ids", "_references")
_COUNTERS = ("_cursor", "guide_tokens_written", "_np_random", "_np_random_seed")

# Of a column of a row: in the arrays, in an observation, and in the bounds of the spaces.
_BYTES = 40

# A sample's prompt, the prompt's token ids, and its references.
EncodedSample = tuple[str, tuple[int, ...], tuple[str, ...]]
_NOTHING: EncodedSample = ("", (), ())


class TextVectorEnv(WithSpec, VectorEnv):  # type: ignore[misc]
    """Token-level text generation for N rows, as arrays.

    Every row is an episode ``prompt | prefix (guide) | body (policy) | completion (guide)`` with one reward at its end.
    All rows take a step together, and the guide and the reward are called once for all rows that wait for them. The
    single environment (`textgym.env.TextEnv`) is this one with one row; it has the reference page.

    Row i of an environment reset with seed s equals the single environment reset with seed s + i, for any number of
    rows and in every autoreset mode.

    Args:
        task: The task. Subclasses set it as a class attribute.
        num_envs: N, the number of rows.
        split: "train", "validation" or "test".
        source: "mini", "hub" or a folder; None reads ``TEXTGYM_SOURCE``, else "mini".
        train_samples: Samples of the train split that are used, evenly spaced; None for all. Other splits are whole.
        tokenizer: A tokenizer, its hub id or path, or None for the task's own (see
            `textgym.tokenization.load_tokenizer`).
        max_prompt_tokens: P, columns for the prompt, template included; None for the task's own and those of the
            template.
        max_new_tokens: T, the horizon, EOS counted; None for the task's own.
        truncation_side: Which end of a long prompt's body is dropped, "left" or "right"; None for the task's own.
        template: The text that the policy reads, with ``{prompt}`` for the prompt: an instruction, or examples before
            it. It is never truncated. Rewards, guides and infos see the prompt alone.
        chat: Whether that text is a user's message to a chat model, by the chat template of the tokenizer; the policy
            then writes the answer.
        stop: Strings that end an episode as EOS does: the reward reads the text before the first of them. The name of
            a special token, such as "<|im_end|>", means that token. The tokens that end a text by the generation config
            in the tokenizer's folder, and with `chat` the token that closes an answer, always end an episode.
        reward: None for the task's own, the name of one of the task's rewards, the hub id or path of a
            sequence-classification model, or a callable (see `textgym.rewards.base.RewardFunction`).
        guide: "references" (which restarts only, from references that the task says to imitate), the hub id or path of
            a language model, a ".jsonl" file of completions (see `textgym.recording.record`), a
            `textgym.guides.Guide` or a function on a list of `GuideRequest`.
        guidance: When the guide takes part: a `Guidance` or a mapping of its fields.
        handoff: Whether there is an extra action, the last one, by which the policy asks the guide to complete the
            text.
        handoff_cost: Subtracted from the reward for every token of a guide's completion.
        min_new_tokens: Tokens, prefix counted, before which `action_masks` leaves out the tokens that end a text.
        banned_tokens: Token ids that `action_masks` leaves out.
        order: "random" draws samples uniformly, "sequential" visits every sample of the split once over all rows.
        render_mode: "ansi", "html", which notebooks show, "human" or None.
        parking: Whether a row whose text is complete or waits for the guide is parked (it neither terminates nor reads
            actions) until all rows are, so that guide and reward get one batch. All rows then terminate in the same
            step.
        autoreset_mode: A `gymnasium.vector.AutoresetMode` or its value.
        copy: Whether observations are fresh arrays; with False they are views that the next step changes.

    Raises:
        TypeError: An unknown argument; the message names the one that was probably meant.
        ValueError: An argument outside of what is allowed; the message names it.

    Attributes:
        initial_guidance: The guidance that the environment was made with.
        reward: The reward that was asked for, a name or path or a function; `reward_function` is what was loaded.
        end_token_id: The token that ends references that are imitated, and texts of guides: with `chat` the token that
            closes an answer, else the first that `stop` names, else EOS.
        guide_tokens_written: Tokens that the guide has written so far, in calls that did not fail. A text that is kept,
            or that a group shares, counts once; the ``guide_tokens`` of infos are those in each episode.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "html", "human"], "render_fps": 4}  # noqa: RUF012
    task: Task

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Task | None = None,
        split: SplitName = "train",
        source: str | os.PathLike | None = None,
        train_samples: int | None = None,
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
        **unknown: Never,
    ) -> None:
        check_arguments(type(self).__name__, unknown, argument_names(type(self)))
        if task is not None:
            self.task = task
        task = self.task
        self.num_envs = check_int("num_envs", num_envs)
        horizon = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.max_new_tokens = horizon = check_int("max_new_tokens", horizon)
        self.split: SplitName = check_one_of("split", split, SPLITS)
        self.order = check_one_of("order", order, ORDERS)
        side = truncation_side or task.truncation_side
        self.truncation_side: Literal["left", "right"] = check_one_of("truncation_side", side, ("left", "right"))
        self.chat = check_one_of("chat", chat, (False, True))
        self.stop = check_texts("stop", stop)
        self.render_mode = check_one_of("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.handoff = check_one_of("handoff", handoff, (False, True))
        self.parking = check_one_of("parking", parking, (False, True))
        self.copy = check_one_of("copy", copy, (False, True))
        finite = is_number(handoff_cost) and 0 <= handoff_cost < np.inf
        check("handoff_cost", handoff_cost, finite, "a finite number >= 0")
        self.handoff_cost = float(handoff_cost)
        possible = is_int(min_new_tokens) and 0 <= min_new_tokens <= horizon
        check("min_new_tokens", min_new_tokens, possible, f"an int in [0, {horizon}]")
        self.min_new_tokens = int(min_new_tokens)
        modes = [mode.value for mode in AutoresetMode]
        check("autoreset_mode", autoreset_mode, autoreset_mode in [*AutoresetMode, *modes], f"one of {modes}")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.guide = load_guide(guide)
        check_reward(reward, task.rewards)
        self.reward = task.reward if reward is None else reward
        self._reward_function: RewardFunction | None = None

        self.source = resolve_source(source)
        self.data: Split = task.split(self.split, self.source)
        if train_samples is not None:
            count = check_int("train_samples", train_samples)
            self.data = self.data.part(count) if self.split == "train" else self.data
        if not len(self.data):
            raise ValueError(f"split {self.split!r} of task {task.name!r} has no samples")
        # So that a missing column is an error here, not in some episode.
        task.prompt_of(self.data.rows[0])
        task.references_of(self.data.rows[0])
        self.tokenizer = load_tokenizer(tokenizer, task, self.source)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self._unused_ids = list(unused_ids(self.tokenizer))
        self.eos_token_id: int = self.tokenizer.eos_token_id
        self._stop_criteria = StopCriteria(self.tokenizer, self.stop, ends_beside(self.tokenizer), self.chat)
        self.end_token_id: int = self._stop_criteria.closing_token
        self.template = template
        self._prompt_encoder = PromptEncoder(self.tokenizer, template, self.chat, self.truncation_side)
        if max_prompt_tokens is None:
            max_prompt_tokens = task.max_prompt_tokens + self._prompt_encoder.template_tokens
        self.max_prompt_tokens = check_int("max_prompt_tokens", max_prompt_tokens)
        pad = self.tokenizer.pad_token_id
        # Without a padding token EOS fills the gaps; the mask says where padding is, never the id.
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.banned_tokens = tuple(banned_tokens)
        known = all(is_int(token) and 0 <= token < self.vocab_size for token in self.banned_tokens)
        check("banned_tokens", banned_tokens, known, f"token ids in [0, {self.vocab_size})")
        if self.handoff and not (self.guide and self.guide.can_hand_off):
            raise ValueError(f"handoff=True needs a guide that can complete a text, got guide={guide!r}")

        n, width = self.num_envs, self.max_prompt_tokens + horizon
        check_memory(
            f"num_envs={n} rows of max_prompt_tokens={self.max_prompt_tokens} and max_new_tokens={horizon}",
            _BYTES * n * width,
        )
        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocab_size - 1, (width,), np.int64),
                "attention_mask": spaces.Box(0, 1, (width,), np.int8),
            }
        )
        self.single_action_space = spaces.Discrete(self.vocab_size + int(self.handoff))
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)

        self._phase = np.full(n, IDLE, np.int8)
        self._input_ids = np.full((n, width), self.pad_token_id, np.int64)
        self._attention_mask = np.zeros((n, width), np.int8)
        self._authors = np.full((n, horizon), Author.NONE, np.int8)
        self._length = np.zeros(n, np.int64)
        self._prefix_length = np.zeros(n, np.int64)
        self._handoff_at = np.full(n, -1, np.int64)  # the length at which the guide takes over; -1 for never
        self._handoffs = np.zeros(n, np.int64)  # hand-offs in the episode so far
        self._finish = np.full(n, -1, np.int8)
        self._sample = np.full(n, NO_SAMPLE, np.int64)
        self._prompts = np.full(n, None, object)
        self._prompt_ids = np.full(n, None, object)
        self._references = np.full(n, None, object)
        self._draws = EpisodeDraws(n)
        self._cursor = 0
        self._encoded: dict[int, EncodedSample] = {}
        self._kept_texts: dict[int, tuple[list[int], bool]] = {}
        # What the guide wrote in calls that then failed, for the next attempt.
        self._answers: dict[GuideRequest, tuple[list[int], bool]] = {}
        self.guide_tokens_written = 0
        self._no_options = ResetOptions.read(None, n)
        self._guidance = [Guidance()] * n
        self._set_guidance(np.arange(n), guidance)
        self.initial_guidance = self.guidance

    @property
    def guidance(self) -> Guidance | tuple[Guidance, ...]:
        """The guidance in force: one value where all rows share it, else one per row."""
        return self._guidance[0] if len(set(self._guidance)) == 1 else tuple(self._guidance)

    @property
    def reward_function(self) -> RewardFunction:
        """The reward; loaded, and trained where the task says so, on first use."""
        if self._reward_function is None:
            self._reward_function = load_reward(self.reward, self.task.rewards, self.source)
        return self._reward_function

    @property
    def seeded(self) -> bool:
        """Whether rows have seeds, as they have from the first reset on."""
        return self._draws.row_keys is not None

    @property
    def exhausted(self) -> bool:
        """Whether a sequential pass is over: no sample is left and no episode is running."""
        running = bool((self._phase >= ACTIVE).any())
        return self.order == "sequential" and self._cursor >= len(self.data) and not running

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an episode, EOS first."""
        return self._stop_criteria.token_ids

    def add_end_tokens(self, token_ids: Sequence[int]) -> None:
        """Let further tokens end an episode, as algorithms do with those that end a text of their policy.

        Args:
            token_ids: Ids of the environment's vocabulary.
        """
        self._stop_criteria = self._stop_criteria.with_tokens(token_ids)

    @contextmanager
    def extra_end_tokens(self, token_ids: Sequence[int]) -> Iterator[None]:
        """Let further tokens end an episode while a block runs (see `add_end_tokens`)."""
        usual = self._stop_criteria
        self.add_end_tokens(token_ids)
        try:
            yield
        finally:
            self._stop_criteria = usual

    def imitates(self, sample: int) -> bool:
        """Whether references of a sample are to be imitated, by the task; those of a user's prompt (-1) always are."""
        return sample == USER_SAMPLE or self.task.imitates(self.data.rows[sample])

    def encode_prompts(self, prompts: Sequence[tuple[str, str, str]]) -> list[tuple[str, list[int]]]:
        """Encode prompts as the policy reads them: truncated, and in the template.

        Args:
            prompts: Triples (before, body, after) of which only the body may be truncated (see `Task.prompt_of`).

        Returns:
            For each the text that is left, without the template, and the token ids, with it.

        Raises:
            ValueError: A prompt that is too long without its body, or that has no tokens at all.
        """
        return self._prompt_encoder.encode(prompts, self.max_prompt_tokens)

    def in_template(self, prompt: str) -> str:
        """The text that the policy reads in the place of a prompt."""
        return self._prompt_encoder.in_template(prompt)

    # Reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: Row i is seeded with ``seed + i``; a sequence gives each row its own (None: not seeded again). In
                sequential order, a seed for all rows starts the pass again; without one an unfinished pass continues,
                and a finished one starts again.
            options: Any of the following; each but the last three also as a sequence with one entry per row (None: not
                for this row).

                - ``index`` (int): the sample.
                - ``prompt`` (str) and ``references`` (a sequence of str): a user's own.
                - ``prefix`` (str or token ids): the beginning of the text.
                - ``guidance`` (`Guidance` or mapping): in force until replaced, autoresets included.
                - ``reset_mask`` (bool array (N,)): only these rows are reset.
                - ``idle`` (bool array (N,)): these rows get no sample, and wait for the next reset.
                - ``group_size`` (int k): rows jk..jk+k-1 share one sample, one prefix and one draw of guidance, until
                  their next reset.

        Returns:
            Observations, and infos (with a ``_key`` mask for each key): ``prompt``, ``references``, ``sample_id`` (-1
            for a user's prompt, -2 for an idle row, as a finished sequential pass leaves rows too),
            ``prefix_length``, ``authors`` (int8 (N, T), codes of `Author`), and ``parked`` where parking is on.

        Raises:
            ValueError: An unknown option, or a value outside of what is allowed.
        """
        read = ResetOptions.read(options, self.num_envs)
        rows = np.flatnonzero(read.mask)
        with self.all_or_nothing(rows):
            if options and "guidance" in options:
                self._set_guidance(rows, options["guidance"])
            if seed is None or is_int(seed):
                super().reset(seed=None if seed is None else int(seed))  # type: ignore[arg-type]
                seeded = seed is not None
            else:
                listed = isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str | bytes)
                check("seed", seed, listed, "an int or a sequence with an int or None for each row")
                seeded = None not in seed  # type: ignore[operator]
            self._draws.seed(seed, rows, self.np_random)
            if read.mask.all() and (seeded or self._cursor >= len(self.data)):
                self._cursor = 0
            self._begin(rows, read)
            infos = self._reset_infos(read.mask)
            self._finish_infos(infos)
        self._answers.clear()
        return self._observation(), infos

    @contextmanager
    def all_or_nothing(self, rows: np.ndarray | None = None) -> Iterator[None]:
        """Put the environment back to where it was, if the block fails: the block can then be tried again.

        Args:
            rows: The only rows whose episodes the block changes; None for all.
        """
        saved = self._saved(np.arange(self.num_envs) if rows is None else rows)
        try:
            yield
        except BaseException:
            self._restore(saved)
            raise

    def _saved(self, rows: np.ndarray) -> dict[str, Any]:
        """Everything that `reset` and `step` change, with the texts of `rows` only."""
        own = vars(self)
        return {
            "texts": (rows, [own[name][rows] for name in _TEXTS]),
            "episodes": [own[name].copy() for name in _EPISODES],
            "draws": self._draws.copy(),
            "guidance": self._guidance,
            "kept_texts": len(self._kept_texts),
            "counters": {name: own.get(name) for name in _COUNTERS},
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go back to what was `_saved`."""
        rows, texts = saved["texts"]
        for name, values in zip(_TEXTS, texts, strict=True):
            vars(self)[name][rows] = values
        vars(self).update(zip(_EPISODES, saved["episodes"], strict=True))
        self._draws = saved["draws"]
        if self._guidance is not saved["guidance"]:
            self._set_guidance(np.arange(self.num_envs), saved["guidance"])
        while len(self._kept_texts) > saved["kept_texts"]:
            self._kept_texts.popitem()
        vars(self).update(saved["counters"])

    def _set_guidance(self, rows: np.ndarray, value: Any) -> None:
        """Put guidance in force for rows; `value` is one guidance or a sequence with one entry per row."""
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != self.num_envs:
                raise ValueError(f"guidance must have one entry per row ({self.num_envs}), got {len(value)}")
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
            completes = self.guide is None or self.guide.can_hand_off or guidance.writes_whole_texts
            if guidance.handoff_prob and not completes:
                raise ValueError(f"guidance {guidance} hands off, which this guide cannot: {self.guide!r}")
            if guidance.handoff_entropy and self.handoff:
                raise ValueError(
                    f"Guidance.handoff_entropy and handoff=True exclude each other: who decides that the guide writes? "
                    f"(got {guidance})"
                )
            if guidance.can_skip_body and not self.parking:
                raise ValueError(
                    "Guidance.handoff_length=0 and no_body_prob leave no action to an episode, and a reset cannot "
                    f"return a finished one: make a vector environment with parking=True (got {guidance})"
                )
            in_force[row] = guidance
        self._guidance = in_force
        self._restart_prob = np.array([g.restart_prob for g in in_force])
        self._handoff_prob = np.array([g.handoff_prob for g in in_force])
        self._no_body_prob = np.array([g.no_body_prob for g in in_force])
        self._restart_bounds = np.array([g.restart_bounds(self.max_new_tokens) for g in in_force])
        self._fraction_bounds = np.array([g.fraction_bounds() for g in in_force])
        self._handoff_bounds = np.array([g.handoff_bounds(self.max_new_tokens) for g in in_force])
        self._handoff_rate = np.array([g.handoff_rate or 0.0 for g in in_force])
        self._handoff_entropy = np.array([(g.handoff_prob and g.handoff_entropy) or 0.0 for g in in_force])
        self._handoff_tokens = np.array([g.handoff_tokens or 0 for g in in_force])  # 0: to the end of the text

    def _begin(self, rows: np.ndarray, options: ResetOptions) -> None:
        """Begin an episode in each of `rows`: choose its sample, write prompt and prefix, and schedule its hand-off."""
        self._draws.begin(rows, options.group_size)
        self._choose_samples(rows, options)
        self._phase[rows] = IDLE
        self._input_ids[rows] = self.pad_token_id
        self._attention_mask[rows] = 0
        self._authors[rows] = Author.NONE
        self._length[rows] = self._prefix_length[rows] = self._handoffs[rows] = 0
        self._finish[rows] = self._handoff_at[rows] = -1
        rows = rows[self._sample[rows] != NO_SAMPLE]
        self._phase[rows] = ACTIVE
        for row, ids in zip(rows.tolist(), self._prompt_ids[rows], strict=True):
            self._input_ids[row, self.max_prompt_tokens - len(ids) : self.max_prompt_tokens] = ids
            self._attention_mask[row, self.max_prompt_tokens - len(ids) : self.max_prompt_tokens] = 1
        self._write_prefixes(rows, options)
        self._schedule_handoffs(rows)

    def _choose_samples(self, rows: np.ndarray, options: ResetOptions) -> None:
        """Fill sample ids, prompts, prompt ids and references of `rows`; a group follows its first row."""
        draws, leaders = self._draws.uniform(rows, Purpose.SAMPLE).tolist(), self._draws.leader[rows].tolist()
        for row, draw, leader in zip(rows.tolist(), draws, leaders, strict=True):
            text, ids, references = _NOTHING
            if options.idle[leader]:
                sample = NO_SAMPLE
            elif (prompt := options.prompt[leader]) is not None:
                ((text, encoded),) = self.encode_prompts([("", prompt, "")])
                sample, ids, references = USER_SAMPLE, tuple(encoded), options.references[leader] or ()
            elif (index := options.index[leader]) is not None:
                check("options['index']", index, 0 <= index < len(self.data), f"in [0, {len(self.data)})")
                sample = int(index)
            elif self.order == "random":
                sample = int(draw * len(self.data))
            elif leader != row:
                sample = int(self._sample[leader])
            elif self._cursor < len(self.data):
                sample, self._cursor = self._cursor, self._cursor + 1
            else:
                sample = NO_SAMPLE
            if sample >= 0:
                text, ids, references = self._encoded_sample(sample)
            self._sample[row] = sample
            self._prompts[row], self._prompt_ids[row], self._references[row] = text, ids, references

    def _encoded_sample(self, sample: int) -> EncodedSample:
        """Encode a sample, once."""
        if sample not in self._encoded:
            row = self.data.rows[sample]
            ((text, ids),) = self.encode_prompts([self.task.prompt_of(row)])
            self._encoded[sample] = text, tuple(ids), self.task.references_of(row)
        return self._encoded[sample]

    def _write_prefixes(self, rows: np.ndarray, options: ResetOptions) -> None:
        """Write the prefixes of `rows`: those given by the user, and those of the guide where it is drawn."""
        leader = self._draws.leader[rows]
        given = np.array([options.prefix[row] is not None for row in leader.tolist()], bool)
        for row in rows[given].tolist():
            self._append(row, self._user_prefix(row, options.prefix[self._draws.leader[row]]), Author.USER)
        if self._restart_prob.any():
            drawn = self._draws.uniform(rows, Purpose.RESTART) < self._restart_prob[leader]
            self._restart(rows[drawn & ~given])
        self._prefix_length[rows] = self._length[rows]

    def _user_prefix(self, row: int, prefix: Any) -> list[int]:
        context, horizon = self._context(row), self.max_new_tokens
        if isinstance(prefix, str):
            (prefix,) = encode_continuations(self.tokenizer, [context.text], [prefix], "options['prefix']")
        ids = [int(token) for token in prefix]
        if len(ids) >= horizon:
            raise ValueError(
                f"options['prefix'] must leave a token to write: at most {horizon - 1} tokens, got {len(ids)}"
            )
        known = all(0 <= token < self.vocab_size for token in ids)
        check(
            "options['prefix']",
            ids,
            known and self._stop_criteria.cut(ids, context=context) is None,
            f"token ids in [0, {self.vocab_size}) with no EOS ({self.eos_token_id}) and nothing of stop={self.stop}",
        )
        return ids

    def _restart(self, rows: np.ndarray) -> None:
        """Let the guide write prefixes.

        The published rule draws t on {0..L-1} after the guide wrote all L tokens. Drawing t on {0..T-1} first, asking
        for t tokens only, and drawing again on {0..L-1} where the guide ended within them, has the same distribution.
        """
        assert self.guide is not None
        if self.guide.author == Author.REFERENCE:
            # References that nobody should imitate make no prefixes.
            rows = rows[np.array([self.imitates(sample) for sample in self._sample[rows].tolist()], bool)]
        by_fraction = np.isfinite(self._fraction_bounds[self._draws.leader[rows], 0])
        self._reveal(rows[by_fraction])
        rows = rows[~by_fraction]
        if not len(rows):
            return
        low, high = self._restart_bounds[self._draws.leader[rows]].T
        length = seeding.integer(low, high, self._draws.uniform(rows, Purpose.RESTART_LENGTH))
        rows, low, length = rows[length > 0], low[length > 0], length[length > 0]
        redraw = self._draws.uniform(rows, Purpose.RESTART_REDRAW)
        # Rows of a group make the same request, which the guide then serves once.
        _, first, inverse = np.unique(self._draws.leader[rows], return_index=True, return_inverse=True)
        written = self._ask_guide(rows[first], length[first], Purpose.RESTART_SEED)
        for i, row in enumerate(rows.tolist()):
            ids, finished = written[inverse[i]]
            if finished:
                ids = ids[: int(seeding.integer(min(low[i], len(ids) - 1), len(ids) - 1, redraw[i]))]
            self._append(row, ids, self.guide.author)

    def _reveal(self, rows: np.ndarray) -> None:
        """Write the beginnings of the guide's kept texts, by fraction."""
        assert self.guide is not None
        leader = self._draws.leader[rows]
        low, high = self._fraction_bounds[leader].T
        fractions = low + (high - low) * self._draws.uniform(rows, Purpose.RESTART_LENGTH)
        encoded = list(zip(self._prompts[rows], self._prompt_ids[rows], self._references[rows], strict=True))
        seeds = [self._guidance[row].text_seed for row in leader.tolist()]
        texts = self._whole_texts(self._sample[rows], encoded, seeds)
        for row, fraction, (ids, finished) in zip(rows.tolist(), fractions.tolist(), texts, strict=True):
            revealed = int(
                fraction * len(ids) + 1e-9
            )  # a fraction such as 0.29 of 100 tokens is 29 in spite of rounding
            self._append(row, ids[: min(revealed, len(ids) - finished, self.max_new_tokens - 1)], self.guide.author)

    def guide_texts(self, samples: Sequence[int], text_seed: int = 0) -> list[list[int]]:
        """The guide's whole texts for samples, from which restarts by fraction are cut.

        The guide writes each text once; it is kept.

        Args:
            samples: Rows of the split.
            text_seed: As in `Guidance`.

        Returns:
            For each sample its token ids, at most T; a text that the guide ended has its end token.

        Raises:
            ValueError: The environment has no guide.
        """
        if self.guide is None:
            raise ValueError("guide_texts needs a guide, and the environment was made with guide=None")
        encoded = list(map(self._encoded_sample, samples))
        texts = self._whole_texts(np.array(samples, np.int64), encoded, [text_seed] * len(encoded))
        return [list(ids) for ids, _ in texts]

    def _whole_texts(
        self, samples: np.ndarray, encoded: Sequence[EncodedSample], text_seeds: Sequence[int]
    ) -> list[tuple[list[int], bool]]:
        """The guide's texts of samples, and whether it ended them; each is asked for once, and kept."""
        assert self.guide is not None
        seeds = (seeding.hash64(np.array(text_seeds, np.int64), samples) >> np.uint64(1)).tolist()
        requests = [
            GuideRequest(prompt, prompt_ids, "", (), self.max_new_tokens, seed, references)
            for (prompt, prompt_ids, references), seed in zip(encoded, seeds, strict=True)
        ]
        # With the tokens that end a text, because these say where a guide's text is cut.
        guide = getattr(self.guide, "fingerprint", None) or (
            repr(self.guide) if is_dataclass(self.guide) else type(self.guide).__qualname__
        )
        keys = [_key(guide, request, self.end_token_ids) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._kept_texts}
        contexts = [Context(request.prompt_ids, self.in_template(request.prompt)) for request in new.values()]
        self._kept_texts |= zip(new, self._complete(list(new.values()), contexts), strict=True)
        return [self._kept_texts[key] for key in keys]

    def kept_texts(self) -> dict[str, np.ndarray]:
        """The guide's texts that are kept, for `keep_texts` of another environment.

        Returns:
            ``keys`` (uint64 (n,)), of their requests; ``ids`` (int32 (n, T)), followed by -1; ``finished`` (bool (n,)),
            whether the guide ended them.
        """
        ids = np.full((len(self._kept_texts), self.max_new_tokens), -1, np.int32)
        for row, (text, _) in zip(ids, self._kept_texts.values(), strict=True):
            row[: len(text)] = text
        finished = np.array([finished for _, finished in self._kept_texts.values()], bool)
        return {"keys": np.array(list(self._kept_texts), np.uint64), "ids": ids, "finished": finished}

    def keep_texts(self, texts: Mapping[str, np.ndarray]) -> None:
        """Keep these texts, which `kept_texts` returned, in the place of others.

        Those of another guide are not used, as far as guides can be told apart: by their fingerprint, the settings of a
        dataclass, or else their class.
        """
        rows = zip(texts["keys"].tolist(), texts["ids"], texts["finished"].tolist(), strict=True)
        self._kept_texts = {key: (ids[ids >= 0].tolist(), finished) for key, ids, finished in rows}

    def _schedule_handoffs(self, rows: np.ndarray) -> None:
        """Draw after how many policy tokens the guide completes the text, if it does."""
        if not self._handoff_prob.any():
            return
        draws, leader = self._draws, self._draws.leader
        rows = rows[draws.uniform(rows, Purpose.SCHEDULE) < self._handoff_prob[leader[rows]]]
        rows = rows[self._handoff_entropy[leader[rows]] == 0]  # others are handed off as the policy writes
        low, high = self._handoff_bounds[leader[rows]].T
        after = seeding.integer(low, high, draws.uniform(rows, Purpose.HANDOFF_LENGTH))
        by_rate = self._handoff_rate[leader[rows]] > 0
        after[by_rate] = self._tokens_until_handoff(rows[by_rate])
        after[draws.uniform(rows, Purpose.NO_BODY) < self._no_body_prob[leader[rows]]] = 0
        self._handoff_at[rows] = self._length[rows] + after
        self._phase[rows[after == 0]] = NEEDS_GUIDE

    def _tokens_until_handoff(self, rows: np.ndarray) -> np.ndarray:
        """The policy's tokens until the next hand-off of rows with a rate: geometric, at least 1."""
        rate = self._handoff_rate[self._draws.leader[rows]]
        draws = self._draws.uniform(rows, Purpose.HANDOFF_LENGTH, self._handoffs[rows])
        with np.errstate(divide="ignore"):  # a rate of 1: log(0) is -inf, and the quotient 0
            tokens = np.floor(np.log1p(-draws) / np.log1p(-rate))
        return 1 + np.minimum(tokens, self.max_new_tokens).astype(np.int64)

    def _ask_guide(
        self, rows: np.ndarray, limits: np.ndarray, purpose: Purpose, occasion: np.ndarray | int = 0
    ) -> list[tuple[list[int], bool]]:
        """Ask the guide to continue `rows` by at most `limits` tokens (see `completions.complete`)."""
        assert self.guide is not None
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
                rows,
                prefixes,
                decode_continuations(self.tokenizer, contexts, prefixes),
                limits.tolist(),
                self._draws.request_seeds(rows, purpose, occasion),
                strict=True,
            )
        ]
        return self._complete(requests, contexts)

    def _complete(self, requests: Sequence[GuideRequest], contexts: Sequence[Context]) -> list[tuple[list[int], bool]]:
        """Ask the guide (see `completions.complete`) for what it has not written yet, and count its tokens."""
        assert self.guide is not None
        new = [at for at, request in enumerate(requests) if request not in self._answers]
        asked = [requests[at] for at in new]
        answers = complete(self.guide, asked, [contexts[at] for at in new], self.tokenizer, self._stop_criteria)
        self._answers |= zip(asked, answers, strict=True)
        written = [self._answers[request] for request in requests]
        if self.guide.author == Author.GUIDE:
            self.guide_tokens_written += sum(len(ids) for ids, _ in written)
        return written

    def _append(self, row: int, ids: Sequence[int], author: Author) -> None:
        start, end = int(self._length[row]), int(self._length[row]) + len(ids)
        self._input_ids[row, self.max_prompt_tokens + start : self.max_prompt_tokens + end] = ids
        self._attention_mask[row, self.max_prompt_tokens + start : self.max_prompt_tokens + end] = 1
        self._authors[row, start:end] = author
        self._length[row] = end

    def _tokens(self, row: int) -> list[int]:
        """The token ids after the prompt of a row."""
        return self._input_ids[row, self.max_prompt_tokens : self.max_prompt_tokens + self._length[row]].tolist()

    def _context(self, row: int) -> Context:
        """The prompt of a row, as the policy reads it."""
        return Context(self._prompt_ids[row], self.in_template(self._prompts[row]))

    # Step

    def step(
        self, actions: Any, entropies: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Write one token in every active row.

        Args:
            actions: int (N,), a token id per row, or ``vocab_size`` for a hand-off where the environment has that
                action. Rows that are parked, idle or about to be reset ignore theirs.
            entropies: float (N,), the entropy in nats of the distribution from which each action was drawn, for rows
                whose guidance has a `handoff_entropy`: where the guide is asked instead, the action is dropped.

        Returns:
            Observations, rewards (float64 (N,)), terminations (bool (N,)), truncations (bool (N,), never True) and
            infos. Where an episode ended, infos hold ``text``, ``authors`` (int8 (T,)), ``finish_reason`` ("stop",
            "length" or "handoff"), ``reward_parts``, ``prefix_length``, ``policy_tokens`` and ``guide_tokens`` (prefix
            and completion); with `AutoresetMode.SAME_STEP` they stand in ``final_info``. In a step in which the guide
            wrote its part and the policy goes on, ``handed_back`` (bool (N,)) says where.

        Raises:
            ValueError: Actions of another shape, type or range, or entropies that are missing or wrong.
            gymnasium.error.ResetNeeded: An episode is over and autoreset is disabled, or reset was never called.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be integers of shape ({self.num_envs},), got {actions.dtype} of shape {actions.shape}"
            )
        if self._draws.row_keys is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        rows = np.flatnonzero(self._phase == ACTIVE)
        chosen = actions[rows].astype(np.int64, copy=False)
        count = self.vocab_size + self.handoff
        if np.count_nonzero(chosen.view(np.uint64) >= count):  # without a sign a negative number is a large one
            raise ValueError(f"actions must be in [0, {count}), got {actions[rows].min()} to {actions[rows].max()}")
        resetting = self._phase == DONE
        any_reset = np.count_nonzero(resetting) > 0  # for small arrays several times faster than any()
        if any_reset and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(
                "an episode is over and autoreset is disabled: call reset(), with options={'reset_mask': ...} for "
                f"rows {np.flatnonzero(resetting).tolist()}"
            )
        asks = chosen == self.vocab_size
        if self.watches_entropy:
            asks |= self._is_unsure(rows, entropies)
        infos: dict[str, Any] = {}
        handed_back: dict[str, Any] = {}
        rewards = np.zeros(self.num_envs, np.float64)
        terminations = np.zeros(self.num_envs, bool)
        # How to take back, last first, what was done when guide or reward fail: texts are copied only of rows that a
        # reset replaces.
        undo: list[Callable[[], None]] = []
        try:
            if any_reset:
                undo.append(partial(self._restore, self._saved(np.flatnonzero(resetting))))
                self._begin(np.flatnonzero(resetting), self._no_options)
            progress = [vars(self)[name].copy() for name in _PROGRESS]
            undo.append(partial(self._unwrite, progress, self.guide_tokens_written))
            self._write(rows, chosen, asks)
            # Parked rows wait for all others. A row that was just reset must not end in the same step, so a batch with
            # one ends in the next.
            if not (self.parking and (any_reset or (self._phase == ACTIVE).any())):
                handed_back = self._hand_off()
                if not (self.parking and handed_back):
                    terminations = self._phase == NEEDS_REWARD
            if np.count_nonzero(terminations):
                infos = self._end_episodes(terminations, rewards)
                if self.autoreset_mode == AutoresetMode.SAME_STEP:
                    undo.append(partial(self._restore, self._saved(np.flatnonzero(terminations))))
                    infos = self._reset_in_same_step(terminations, infos)
            if any_reset:
                _merge(infos, self._reset_infos(resetting))
            infos |= handed_back
            self._finish_infos(infos)
        except BaseException:
            for take_back in reversed(undo):
                take_back()
            raise
        self._answers.clear()
        return self._observation(), rewards, terminations, np.zeros(self.num_envs, bool), infos

    @property
    def watches_entropy(self) -> bool:
        """Whether the guidance of a row depends on the entropies that `step` is told."""
        return bool(np.count_nonzero(self._handoff_entropy))

    def _is_unsure(self, rows: np.ndarray, entropies: Any) -> np.ndarray:
        """Bool (n,): in which rows the guide writes instead of the policy, because of the policy's entropy."""
        threshold = self._handoff_entropy[self._draws.leader[rows]]
        watched = threshold > 0
        if not watched.any():
            return watched
        told = np.asarray(np.nan if entropies is None else entropies, np.float64)
        valid = told.shape == (self.num_envs,) and (told[rows[watched]] >= 0).all()  # not NaN
        if not valid:
            raise ValueError(
                f"entropies must be numbers of at least 0 of shape ({self.num_envs},) in nats, because guidance has a "
                "handoff_entropy: env.unwrapped.step takes them, which wrappers do not pass on, and "
                f"agents.rollout.collect gives them (got {entropies!r})"
            )
        draws, position = self._draws, self._length[rows]
        scheduled = draws.uniform(rows, Purpose.SCHEDULE) < self._handoff_prob[draws.leader[rows]]
        below = draws.uniform(rows, Purpose.HANDOFF_LENGTH, position) * threshold < told[rows]
        return watched & scheduled & below

    def _write(self, rows: np.ndarray, actions: np.ndarray, asks: np.ndarray) -> None:
        """Append the policy's tokens, and find the rows that are complete or handed to the guide."""
        if np.count_nonzero(asks):
            self._phase[rows[asks]] = NEEDS_GUIDE
            rows, actions = rows[~asks], actions[~asks]
        position = self._length[rows]
        self._input_ids[rows, self.max_prompt_tokens + position] = actions
        self._attention_mask[rows, self.max_prompt_tokens + position] = 1
        self._authors[rows, position] = Author.POLICY
        self._length[rows] = position + 1
        stopped = self._stop_criteria.reached(
            actions, lambda i: self._tokens(rows[i]), lambda i: self._context(rows[i])
        )
        ended = stopped | (position + 1 == self.max_new_tokens)
        handed = position + 1 == self._handoff_at[rows]
        if np.count_nonzero(ended | handed):
            self._phase[rows[handed]] = NEEDS_GUIDE
            self._phase[rows[ended]] = NEEDS_REWARD
            self._finish[rows[ended]] = np.where(stopped[ended], STOP, LENGTH)

    def _unwrite(self, progress: Sequence[np.ndarray], guide_tokens_written: int) -> None:
        """Take back what policy and guide wrote since the arrays of `_PROGRESS` were these."""
        vars(self).update(zip(_PROGRESS, progress, strict=True))
        self.guide_tokens_written = guide_tokens_written
        written = (self._authors != Author.NONE) & (np.arange(self.max_new_tokens) >= self._length[:, None])
        self._authors[written] = Author.NONE
        self._input_ids[:, self.max_prompt_tokens :][written] = self.pad_token_id
        self._attention_mask[:, self.max_prompt_tokens :][written] = 0

    def _hand_off(self) -> dict[str, Any]:
        """Let the guide continue the rows that wait for it, in one call; the policy goes on after bounded hand-offs.

        Returns:
            Infos, if there are rows in which the policy goes on.
        """
        rows = np.flatnonzero(self._phase == NEEDS_GUIDE)
        if not len(rows):
            return {}
        assert self.guide is not None
        most, bound = self.max_new_tokens - self._length[rows], self._handoff_tokens[self._draws.leader[rows]]
        limits = np.where(bound > 0, np.minimum(bound, most), most)
        written = self._ask_guide(rows, limits, Purpose.HANDOFF_SEED, self._handoffs[rows])
        for row, (ids, _) in zip(rows.tolist(), written, strict=True):
            self._append(row, ids, self.guide.author)
        self._handoffs[rows] += 1
        # A guide that has nothing to say ends the text, too: the policy could ask it for ever.
        ended = np.array([finished or not ids for ids, finished in written])
        ended |= (bound == 0) | (self._length[rows] == self.max_new_tokens)
        self._phase[rows] = np.where(ended, NEEDS_REWARD, ACTIVE)
        self._finish[rows[ended]] = HANDOFF
        again = rows[~ended & (self._handoff_at[rows] >= 0) & (self._handoff_rate[self._draws.leader[rows]] > 0)]
        self._handoff_at[again] = self._length[again] + self._tokens_until_handoff(again)
        handed_back = np.isin(np.arange(self.num_envs), rows[~ended])
        return self._infos(np.ones(self.num_envs, bool), {"handed_back": handed_back}) if handed_back.any() else {}

    # End of episodes

    def _end_episodes(self, mask: np.ndarray, rewards: np.ndarray) -> dict[str, Any]:
        """End the episodes of the rows in `mask`, with one call of the reward.

        Args:
            mask: bool (N,), all rows that wait.
            rewards: (N,), which is filled.

        Returns:
            The infos of these rows.
        """
        rows = np.flatnonzero(mask)
        contexts = [self._context(row) for row in rows.tolist()]
        texts = self._stop_criteria.texts([self._tokens(row) for row in rows.tolist()], contexts)
        value = self.reward_function(  # of lists that it may change
            prompts=self._prompts[rows].tolist(), completions=[*texts], references=self._references[rows].tolist()
        )
        total, parts = split_parts(value, len(rows))
        prefix_length, policy_tokens = self._prefix_length[rows], (self._authors[rows] == Author.POLICY).sum(1)
        if self.handoff_cost:
            parts["handoff_cost"] = -self.handoff_cost * (self._length[rows] - prefix_length - policy_tokens)
            total = total + parts["handoff_cost"]
        rewards[rows] = total
        self._phase[rows] = DONE
        infos = {
            "text": np.array(texts, object),
            "authors": self._authors[rows],
            "finish_reason": FINISH_REASONS[self._finish[rows]],
            "prefix_length": prefix_length,
            "policy_tokens": policy_tokens,
            "guide_tokens": (self._authors[rows] == Author.GUIDE).sum(1),
        }
        return self._infos(mask, infos) | {"reward_parts": self._infos(mask, parts), "_reward_parts": mask.copy()}

    def _reset_in_same_step(self, mask: np.ndarray, final_infos: dict[str, Any]) -> dict[str, Any]:
        """Replace the episodes that ended, and return the infos of the step."""
        rows, observation = np.flatnonzero(mask), self._observation()
        observations = np.full(self.num_envs, None, object)
        for row in rows:
            observations[row] = {name: array[row].copy() for name, array in observation.items()}
        self._begin(rows, self._no_options)
        return {
            "final_obs": observations,
            "_final_obs": mask.copy(),
            "final_info": final_infos,
            "_final_info": mask.copy(),
            **self._reset_infos(mask),
        }

    def texts(self, token_ids: Sequence[Sequence[int]], prompts: Sequence[str]) -> list[str]:
        """Decode token ids as the reward reads them: up to where an episode with these tokens would have ended.

        Args:
            token_ids: For each text the token ids after the prompt, prefix included.
            prompts: For each text its prompt, without the template.
        """
        encoded = self.encode_prompts([("", prompt, "") for prompt in prompts])
        contexts = [Context(ids, self.in_template(text)) for text, ids in encoded]
        texts = [list(ids)[: self.max_new_tokens] for ids in token_ids]
        criteria = self._stop_criteria
        cut = [criteria.cut(ids, context=context) or ids for context, ids in zip(contexts, texts, strict=True)]
        return criteria.texts(cut, contexts)

    def reward_arguments(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The keyword arguments of a reward function (see `RewardFunction`) for the unfinished texts of `rows`."""
        tokens, contexts = [self._tokens(row) for row in rows], [self._context(row) for row in rows]
        return {
            "prompts": self._prompts[rows].tolist(),
            "completions": decode_continuations(self.tokenizer, contexts, tokens),
            "references": self._references[rows].tolist(),
        }

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now, for algorithms that mask the others; `step` itself takes every action.

        Masked are ids that are no token, tokens that end a text while it has fewer than `min_new_tokens` (but not those
        that could complete a string of `stop`), the `banned_tokens`, and those not among the reward's `allowed_tokens`,
        where it has that method (see `textgym.rewards.base.RewardFunction`). A row that reads no action is allowed all.

        Returns:
            bool (N, actions).

        Raises:
            ValueError: A row has no allowed action.
        """
        masks = np.ones((self.num_envs, self.vocab_size + self.handoff), bool)
        rows = np.flatnonzero(self._phase == ACTIVE)
        masks[rows[:, None], [*self.banned_tokens, *self._unused_ids]] = False
        early = rows[self._length[rows] < self.min_new_tokens]
        masks[np.ix_(early, np.flatnonzero(self._stop_criteria.tokens))] = False
        allowed_tokens = getattr(self.reward_function, "allowed_tokens", None)
        if allowed_tokens is not None and len(rows):
            arguments = self.reward_arguments(rows.tolist())
            masks[rows, : self.vocab_size] &= allowed_tokens(**arguments, tokenizer=self.tokenizer)
        if not masks.any(1).all():
            raise ValueError(
                f"action_masks has no action for rows {np.flatnonzero(~masks.any(1)).tolist()}: min_new_tokens="
                f"{self.min_new_tokens}, banned_tokens and the reward's allowed_tokens leave out all"
            )
        return masks

    # Observations, infos and renderings

    def _observation(self) -> dict[str, np.ndarray]:
        if self.copy:
            return {"input_ids": self._input_ids.copy(), "attention_mask": self._attention_mask.copy()}
        return {"input_ids": self._input_ids, "attention_mask": self._attention_mask}

    def _infos(self, mask: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Values of the rows in `mask` as infos of Gymnasium's vector environments."""
        infos: dict[str, Any] = {}
        for key, own in values.items():
            array: np.ndarray = np.zeros((self.num_envs, *own.shape[1:]), own.dtype)
            if own.dtype == object:
                array.fill(None)
            array[mask] = own
            infos |= {key: array, f"_{key}": mask.copy()}
        return infos

    def _reset_infos(self, mask: np.ndarray) -> dict[str, Any]:
        values = {
            "prompt": self._prompts,
            "references": self._references,
            "sample_id": self._sample,
            "prefix_length": self._prefix_length,
            "authors": self._authors,
        }
        return self._infos(mask, {key: array[mask] for key, array in values.items()})

    def _finish_infos(self, infos: dict[str, Any]) -> None:
        """Add which rows are parked, and show the rows where that is wanted."""
        if self.parking:
            infos |= self._infos(np.ones(self.num_envs, bool), {"parked": self._phase != ACTIVE})
        if self.render_mode == "human":
            self.render()

    def render(self) -> tuple[str, ...] | None:
        """Show every row: the prompt dim, and each author's tokens in their own colour.

        Returns:
            One string per row in mode "ansi", one `textgym.rendering.Html` in mode "html"; None in mode "human", which
            prints them.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='ansi', 'html' or 'human', given when the environment is made")
            return None
        frames = tuple(map(self._frame, range(self.num_envs)))
        if self.render_mode in ("ansi", "html"):
            return frames
        print(*frames, sep="\n", flush=True)
        return None

    def _frame(self, row: int) -> str:
        tokens, authors = self._tokens(row), self._authors[row, : self._length[row]]
        stretches = decode_by_author(self.tokenizer, self._context(row), tokens, authors) if tokens else []
        show = Html.of if self.render_mode == "html" else coloured
        return show(self._prompts[row] or "", stretches)

    # State

    def get_state(self) -> dict[str, Any]:
        """The state that the next reset depends on: seeds, episode counters, the position in a pass, guidance.

        It holds no running episodes, and is plain data that pickles.
        """
        return {
            "row_keys": None if self._draws.row_keys is None else self._draws.row_keys.copy(),
            "episode": self._draws.episode.copy(),
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
        self._draws.row_keys = None if state["row_keys"] is None else state["row_keys"].copy()
        self._draws.episode = state["episode"].copy()
        self._cursor = state["cursor"]
        self._set_guidance(np.arange(self.num_envs), state["guidance"])


def _key(*parts: Any) -> int:
    """64 bits that name what can be told apart by its representation, in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])


_signature = cache(signature)  # it is read for every environment that is made


def argument_names(environment: type) -> list[str]:
    """The names of all keyword arguments of an environment's class and its bases."""
    constructors = [vars(base)["__init__"] for base in environment.__mro__ if "__init__" in vars(base)]
    parameters = [parameter for init in constructors for parameter in _signature(init).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY))


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
