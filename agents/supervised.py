"""Supervised learning on reference texts, the usual start of reinforcement learning, or on texts of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch

from agents.algorithm import Algorithm, Callback
from agents.environments import agree, sibling_env
from agents.policy import Policy
from agents.processes import join_shares, reduce, reduce_gradients, share, share_of_loss
from agents.sharding import clip_gradients
from textgym import seeding
from textgym.checks import check
from textgym.guides import Author
from textgym.rewards import split_parts
from textgym.task import Split
from textgym.tokenization import encode_continuations

if TYPE_CHECKING:
    from accelerate import Accelerator

    from textgym.engine import TextVectorEnv

# A row of a split, and a text to imitate there: a reference, or token ids that the guide wrote.
Pair = tuple[int, str | list[int]]


class Example(NamedTuple):
    """A text to imitate: token ids of the context, then token ids to learn."""

    context: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.target)


def encode_examples(
    env: TextVectorEnv, prompts: Sequence[tuple[str, list[int]]], texts: Sequence[str]
) -> list[Example]:
    """Encode reference texts after their prompts, with an end token, cut at the horizon.

    Args:
        env: The environment.
        prompts: N prompts without the template, and their token ids with it.
        texts: N texts.
    """
    continuations = encode_continuations(env.tokenizer, [env.in_template(prompt) for prompt, _ in prompts], texts)
    return [
        Example(prompt_ids, [*ids, env.end_token_id][: env.max_new_tokens])
        for (_, prompt_ids), ids in zip(prompts, continuations, strict=True)
    ]


def encode_written(env: TextVectorEnv, split: Split, pairs: Sequence[tuple[int, list[int]]]) -> list[Example]:
    """Texts that a guide wrote, as it wrote them, after the prompts of a split's rows."""
    prompts = env.encode_prompts([env.task.prompt_of(split.rows[index]) for index, _ in pairs])
    return [Example(prompt_ids, ids) for (_, prompt_ids), (_, ids) in zip(prompts, pairs, strict=True)]


def collate(
    examples: Sequence[Example], pad_token_id: int, prompt_columns: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch examples as an environment does: contexts end, and targets begin, in the same column.

    Args:
        examples: B examples.
        pad_token_id: Token id of padding.
        prompt_columns: Columns for the contexts; None for those of the longest.

    Returns:
        Input ids (B, S), attention mask (B, S) and the columns (B, A) of the targets (-1: none), int64 each.
    """
    longest = max(len(example.target) for example in examples)
    before = max(len(example.context) for example in examples) if prompt_columns is None else prompt_columns
    input_ids = np.full((len(examples), before + longest), pad_token_id)
    attention_mask = np.zeros((len(examples), before + longest), np.int64)
    columns = np.full((len(examples), longest), -1)
    for row, (context, target) in enumerate(examples):
        where = slice(before - len(context), before + len(target))
        input_ids[row, where] = context + target
        attention_mask[row, where] = 1
        columns[row, : len(target)] = np.arange(before, before + len(target))
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(columns)


def num_targets(examples: Sequence[Example]) -> int:
    """The number of target tokens."""
    return sum(len(example.target) for example in examples)


def supervised_loss(policy: Policy, examples: Sequence[Example], pad_token_id: int) -> torch.Tensor:
    """Negative log-likelihood in nats, averaged over the target tokens of all examples."""
    batch = collate(examples, pad_token_id, policy.prompt_columns)
    input_ids, attention_mask, columns = (tensor.to(policy.device) for tensor in batch)
    log_probs = policy.evaluate_actions(input_ids, attention_mask, columns, values_of=None).log_probs
    return -log_probs.sum() / (columns >= 0).sum()


def supervised_step(
    algorithm: Algorithm,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    max_grad_norm: float,
    texts_at_once: int | None = None,
) -> torch.Tensor:
    """Take a gradient step on texts, divided among processes, and return the loss before it.

    Args:
        algorithm: Whose policy learns, inside its `learning`.
        optimizer: Takes the step, of `algorithm.trainable`.
        examples: The texts.
        max_grad_norm: Maximum norm of the gradient, which is scaled down to it.
        texts_at_once: Texts of a pass, to save memory; None for all. The gradient is the same.
    """
    accelerator, total = algorithm.accelerator, torch.zeros((), device=algorithm.policy.device)
    size, targets = texts_at_once or len(examples), num_targets(examples)
    optimizer.zero_grad()
    for part in (examples[at : at + size] for at in range(0, len(examples), size)):
        texts, weight = share_of_loss(accelerator, part)
        weight *= num_targets(texts) / targets
        loss = weight * supervised_loss(algorithm.learner, texts, algorithm.env.pad_token_id)
        loss.backward()
        total = total + loss.detach()
    total = reduce(accelerator, total)
    algorithm.check_finite("loss", total)
    reduce_gradients(accelerator, algorithm.trainable)
    algorithm.check_finite("gradient norm", clip_gradients(algorithm.trainable, max_grad_norm))
    optimizer.step()
    return total


def rewards_of(env: TextVectorEnv, pairs: Sequence[tuple[int, list[int]]]) -> list[float]:
    """The environment's rewards of whole texts, given as sample and token ids."""
    if not pairs:
        return []
    rows = [env.data.rows[sample] for sample, _ in pairs]
    prompts = [prompt for prompt, _ in env.encode_prompts([env.task.prompt_of(row) for row in rows])]
    values = env.reward_function(
        prompts=prompts,
        completions=env.texts([ids for _, ids in pairs], prompts),
        references=[env.task.references_of(row) for row in rows],
    )
    return split_parts(values, len(pairs))[0].tolist()


def written_by_guide(
    accelerator: Accelerator,
    env: TextVectorEnv,
    samples: Sequence[int],
    text_seeds: Sequence[int],
    min_reward: float | None,
) -> tuple[list[tuple[int, list[int]]], list[float], list[tuple[int, list[int]]]]:
    """Let the guide of an environment write for samples, each process for its share.

    Args:
        accelerator: The processes, which all get all texts.
        env: The environment, whose split the samples are of.
        samples: Rows of the split.
        text_seeds: Seeds of the texts of a sample (see `TextVectorEnv.guide_texts`).
        min_reward: The least reward of a text that is learned; None: all are.

    Returns:
        Samples with the token ids of their texts, the rewards of these (0 where no least one is asked for), and what of
        them is learned.
    """
    # Rewards are shared, too: a reward that rounds differently in another process must not keep other texts there.
    own = share(accelerator, samples)
    texts = zip(*(env.guide_texts(own, seed) for seed in text_seeds), strict=True)
    pairs = [(sample, ids) for sample, written in zip(own, texts, strict=True) for ids in written]
    rewards = [0.0] * len(pairs) if min_reward is None else rewards_of(env, pairs)
    pairs, rewards = join_shares(accelerator, pairs), join_shares(accelerator, rewards)
    least = -np.inf if min_reward is None else min_reward
    # A guide may have nothing to say.
    return pairs, rewards, [pair for pair, reward in zip(pairs, rewards, strict=True) if pair[1] and reward >= least]


class SL(Algorithm):
    """Supervised learning by maximum likelihood, on the references of an environment's split or on texts of its guide.

    Training follows a schedule of `n_epochs` passes, in iterations of `episodes_per_iteration` texts; after each the
    loss on validation texts of the same kind is measured. When the schedule is over, or the validation loss has not
    improved for `patience` iterations, `learn` restores the weights with the best validation loss. An episode here is
    one learned text, a timestep one learned token.

    ``targets="guide"`` is distillation at the level of sequences (Kim and Rush 2016, arXiv 1606.07947); with
    `min_reward` it is rejection sampling fine-tuning on distinct texts (Yuan et al. 2023, arXiv 2308.01825). When the
    algorithm is made, the guide writes for every prompt of the split and for `eval_prompts` validation prompts, each
    process its share. All these tokens, of rejected texts too, are in `num_guide_tokens`; records have them as
    ``guide_tokens`` of the first iteration, and the number of texts for training prompts (``guide_texts``) with the
    share of them that is learned (``kept_fraction``). `load` asks the guide for the same texts and does not count them
    again.

    Raises:
        ValueError: An argument is wrong, or there is no text to learn from.
    """

    name = "sl"
    plays_episodes = False

    targets: Literal["references", "guide"] = "references"
    """"references" learns those of the data; "guide" learns texts that the environment's guide writes from the prompts
    of all rows, as the token ids that it wrote, and no references."""
    samples_per_prompt: int = 1
    """Number of texts that the guide writes for each prompt, with other random choices for another `seed`; equal ones
    of a prompt are learned once."""
    min_reward: float | None = None
    """The least reward of a text of the guide that is learned; None: all are."""
    loss_on: Literal["completion", "text"] = "completion"
    """"completion" learns texts given their prompts, references of the rows that the task says to imitate; "text"
    learns prompts and texts, references of all rows, as a causal language model does."""
    n_epochs: float = 3.0
    """Number of passes over the texts in the schedule, not necessarily whole."""
    episodes_per_iteration: int = 512
    """Number of texts between two measurements of the validation loss."""
    minibatch_size: int = 16
    """Number of texts per gradient step, over all processes."""
    learning_rate: float = 5e-4
    """Peak step size of AdamW; it rises linearly, then decays linearly to zero."""
    warmup: float = 0.05
    """Fraction of the schedule in which the step size rises."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices only."""
    patience: int = 5
    """Iterations without a better validation loss after which training stops."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient, which is scaled down to it."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        check("targets", self.targets, self.targets in ("references", "guide"), '"references" or "guide"')
        check("samples_per_prompt", self.samples_per_prompt, self.samples_per_prompt >= 1, "at least 1")
        if self.targets == "references" and (self.samples_per_prompt > 1 or self.min_reward is not None):
            raise ValueError(
                'samples_per_prompt and min_reward need targets="guide", '
                f"got samples_per_prompt={self.samples_per_prompt}, min_reward={self.min_reward}"
            )
        check("loss_on", self.loss_on, self.loss_on in ("completion", "text"), '"completion" or "text"')
        check("n_epochs", self.n_epochs, self.n_epochs > 0, "above 0")
        check("minibatch_size", self.minibatch_size, self.minibatch_size >= 1, "at least 1")
        check("learning_rate", self.learning_rate, 0 < self.learning_rate < np.inf, "finite and above 0")
        check("warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)")
        check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        check("patience", self.patience, self.patience >= 1, "at least 1")
        check("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on == "text" and getattr(self.policy, "encodes_prompts", False):
            raise ValueError(
                'loss_on must be "completion" for a sequence-to-sequence policy, which reads prompts and writes none'
            )
        groups = [
            {"params": [p for p in self.trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in self.trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)

        validation = self.env.task.split("validation", self.env.source)
        make_pairs = self.guide_pairs if self.targets == "guide" else self.reference_pairs
        self.train_pairs, validation_pairs = make_pairs(validation)
        self.validation_examples = self.encode(validation, validation_pairs)
        self.total_texts = max(1, round(self.n_epochs * len(self.train_pairs)))
        self.best_state: dict[str, torch.Tensor] | None = None
        self.iterations_since_best = 0

    @property
    def uses_reward(self) -> bool:
        """Whether the reward chooses texts."""
        return self.min_reward is not None

    @property
    def finished(self) -> bool:
        """Whether the schedule is over or the validation loss has stopped falling."""
        return self.num_episodes >= self.total_texts or self.iterations_since_best >= self.patience

    def score(self, record: Mapping[str, Any]) -> float:
        """The validation loss, negated."""
        return -record["validation_loss"]

    def status(self, record: Mapping[str, Any]) -> str:
        """The losses."""
        return f"loss {record['loss']:.3f} validation {record['validation_loss']:.3f}"

    def learn(
        self,
        total_timesteps: int | None = None,
        total_episodes: int | None = None,
        callback: Callback | None = None,
        progress_bar: bool = False,
        verbose: int = 0,
    ) -> Self:
        """Follow the schedule: to its end, or for a number of further timesteps or episodes (see `Algorithm.learn`).

        Raises:
            ValueError: Both totals are given, or one that is not positive.
            FloatingPointError: A loss or gradient is not finite.
        """
        if total_timesteps is None and total_episodes is None:
            total_episodes = max(1, self.total_texts - self.num_episodes)
        return super().learn(total_timesteps, total_episodes, callback, progress_bar, verbose)

    def _learn(
        self, done: Callable[[], float], callback: Callback | None, progress_bar: bool, verbose: int = 0
    ) -> Self:
        super()._learn(done, callback, progress_bar, verbose)
        if self.finished and self.best_state is not None:
            self.policy.load_state_dict(self.best_state, strict=False)
        return self

    def iterate(self) -> dict[str, Any]:
        """Train on the next texts of the schedule, then measure the validation loss."""
        start, end = self.num_episodes, min(self.num_episodes + self.episodes_per_iteration, self.total_texts)
        examples = self.encode(self.env.data, [self.train_pairs[index] for index in self.order(start, end)])
        batches = self.batches(examples)
        losses, tokens = [], 0
        with self.learning():
            for step in np.random.default_rng([self.seed, self.iteration]).permutation(len(batches)):
                rate = self.learning_rate * self.schedule(self.num_episodes / self.total_texts)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                losses.append(self.update(batches[step]))
                self.num_episodes += len(batches[step])
                tokens += num_targets(batches[step])
        self.num_timesteps += tokens

        validation_loss = self.validation_loss()
        if -validation_loss > self.best_score:
            self.best_state = {
                name: weight.detach().clone()
                for name, weight in self.policy.named_parameters()
                if weight.requires_grad  # what is frozen never changes
            }
            self.iterations_since_best = 0
        else:
            self.iterations_since_best += 1
        guide: dict[str, Any] = {}
        if self.targets == "guide":
            guide_texts = len(self.env.data) * self.samples_per_prompt
            guide = {
                "guide_tokens": 0 if self.iteration else self.num_guide_tokens,
                "guide_texts": guide_texts,
                "kept_fraction": len(self.train_pairs) / guide_texts,
            }
        return {
            "loss": float(torch.stack(losses).mean()),
            "validation_loss": validation_loss,
            "validation_perplexity": float(np.exp(validation_loss)),
            "learning_rate": rate,
            "epoch": self.num_episodes / len(self.train_pairs),
            "policy_tokens": tokens,
            **guide,
        }

    def update(self, batch: list[Example]) -> torch.Tensor:
        """Take a gradient step, divided among processes, and return the loss before it."""
        return supervised_step(self, self.optimizer, batch, self.max_grad_norm)

    def schedule(self, progress: float) -> float:
        """The step size, as a fraction of its peak, at a fraction of the schedule: linear rise, then linear decay."""
        first = 1 / self.total_texts  # so that the first step is not zero
        return min((progress + first) / (self.warmup + first), (1 - progress) / (1 - self.warmup))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats per token on the validation texts."""
        total = 0.0
        for batch in share(self.accelerator, self.batches(self.validation_examples)):
            total += num_targets(batch) * float(supervised_loss(self.policy, batch, self.env.pad_token_id))
        total = float(reduce(self.accelerator, torch.tensor(total, dtype=torch.float64)))
        return total / num_targets(self.validation_examples)

    def order(self, start: int, end: int) -> np.ndarray:
        """Indices of the texts at positions start..end-1 of the schedule; every pass is shuffled independently."""
        count = len(self.train_pairs)
        passes = [
            np.random.default_rng([self.seed, epoch]).permutation(count)
            for epoch in range(start // count, (end - 1) // count + 1)
        ]
        return np.concatenate(passes)[start - start // count * count :][: end - start]

    def reference_pairs(self, validation: Split) -> tuple[list[Pair], list[Pair]]:
        """The references to learn, and `eval_prompts` of the validation split."""
        env, task = self.env, self.env.task
        train, others = (
            [
                (index, reference)
                for index, row in enumerate(split.rows)
                if self.loss_on == "text" or task.imitates(row)
                for reference in task.references_of(row)
            ]
            for split in (env.data, validation)
        )
        if not train or not others:
            raise ValueError(
                f"env must have references to learn from: task {task.name!r}, source {env.source!r} has {len(train)} "
                f"in split {env.split!r} and {len(others)} in validation"
            )
        return train, [others[index] for index in self.chosen(len(others))]

    def guide_pairs(self, validation: Split) -> tuple[list[Pair], list[Pair]]:
        """The guide's texts to learn, and those for `eval_prompts` prompts of the validation split."""
        env, guide = self.env, self.env.guide
        if guide is None or guide.author == Author.REFERENCE:
            raise ValueError(
                f'env must have a guide that writes for targets="guide": make_vec(..., guide=...), got {guide!r}; '
                'references are learned with targets="references"'
            )
        sibling = sibling_env(env, num_envs=1, split="validation", guided=True)
        agree(sibling, self.policy)
        train = self.ask_guide(env, range(len(env.data)), stream=0)
        return train, self.ask_guide(sibling, self.chosen(len(validation)), stream=1)

    def chosen(self, count: int) -> list[int]:
        """Which of the validation split are measured, the same for every seed."""
        return np.random.default_rng(0).permutation(count)[: self.eval_prompts].tolist()

    def ask_guide(self, env: TextVectorEnv, samples: Sequence[int], stream: int) -> list[Pair]:
        """Let the guide of an environment write for samples, count its tokens, and return the texts that are learned.

        Args:
            env: The environment, whose split the samples are of.
            samples: Rows of the split.
            stream: With another number the guide writes other texts, also for equal prompts.

        Raises:
            ValueError: No text has the least reward.
        """
        seeds = seeding.hash64(self.seed, stream, np.arange(self.samples_per_prompt)) >> np.uint64(1)
        pairs, rewards, kept = written_by_guide(self.accelerator, env, samples, seeds.tolist(), self.min_reward)
        self.num_guide_tokens += sum(len(ids) for _, ids in pairs)
        if not kept:
            why = "all are empty" if self.min_reward is None else f"the highest reward is {max(rewards)}"
            raise ValueError(
                f"min_reward={self.min_reward} keeps none of the {len(pairs)} texts of the guide for split "
                f"{env.split!r}; {why}"
            )
        return [(sample, list(ids)) for sample, ids in dict.fromkeys((sample, tuple(ids)) for sample, ids in kept)]

    def encode(self, split: Split, pairs: Sequence[Pair]) -> list[Example]:
        """Encode pairs of a split."""
        if self.targets == "guide":
            examples = encode_written(self.env, split, cast("Sequence[tuple[int, list[int]]]", pairs))
        else:
            prompts = self.env.encode_prompts([self.env.task.prompt_of(split.rows[index]) for index, _ in pairs])
            examples = encode_examples(self.env, prompts, [cast(str, text) for _, text in pairs])
        if self.loss_on == "text":  # nothing predicts the first token
            examples = [Example(context[:1], context[1:] + target) for context, target in examples]
        return examples

    def batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Minibatches of texts of similar length, which reduces padding."""
        ordered = sorted(examples, key=len)
        return [ordered[at : at + self.minibatch_size] for at in range(0, len(ordered), self.minibatch_size)]

    def training_state(self) -> dict[str, Any]:
        """Add the best weights and how long ago they were found."""
        best = {"best_state": self.best_state, "iterations_since_best": self.iterations_since_best}
        return {**super().training_state(), **best}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.best_state, self.iterations_since_best = state["best_state"], state["iterations_since_best"]
