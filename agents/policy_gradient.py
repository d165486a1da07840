"""The base class of policy gradients: an iteration from episodes to gradient steps, and the reference policy."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch

from agents.advantages import kl_estimate, masked_mean
from agents.algorithm import Algorithm, check_draws, check_guide
from agents.curriculum import Curriculum, Plan
from agents.guide_loss import GuideLoss
from agents.phase import Phase
from agents.policy import Evaluation, Policy
from agents.processes import gather, in_parts, in_shares, reduce_gradients, reduce_terms, share_of_loss
from agents.rollout import Rollout, collect
from agents.sharding import clip_gradients
from agents.supervised import Example, encode_examples, num_targets, supervised_loss
from textgym.checks import check
from textgym.decoding import Decoding
from textgym.seeding import hash64

if TYPE_CHECKING:
    from torch import Tensor, nn

    from textgym.guidance import Guidance

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class Credit:
    """Advantages of the decisions of N episodes, and the other inputs of a loss.

    Attributes:
        decisions: bool (N, T), the policy's actions; other entries of the next three are never read.
        log_probs: float (N, T), log-probabilities when they were sampled.
        reference_log_probs: float (N, T), log-probabilities under the reference policy.
        advantages: float (N, T).
        states: bool (N, T), the states whose value is learned; nowhere True without a value function.
        values: float (N, T), their values before the update.
        returns: float (N, T), the targets of their values.
        guided: bool (N, T), the guide's tokens that are learned; nowhere True without a guide loss. There `log_probs`
            and `advantages` are read if the guide loss does.
    """

    decisions: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor
    states: Tensor
    values: Tensor
    returns: Tensor
    guided: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.guided is None:
            self.guided = torch.zeros_like(self.decisions)

    @classmethod
    def without_critic(cls, rollout: Rollout, reference_log_probs: Tensor, advantages: Tensor) -> Self:
        """Credit without a value function; `advantages` is float (N, T), or (N,) for all decisions of an episode."""
        nothing = torch.zeros_like(rollout.log_probs)
        return cls(
            decisions=rollout.decisions,
            log_probs=rollout.log_probs,
            reference_log_probs=reference_log_probs,
            advantages=(advantages if advantages.ndim == 2 else advantages[:, None]).expand_as(nothing),
            states=torch.zeros_like(rollout.decisions),
            values=nothing,
            returns=nothing,
        )

    def __getitem__(self, rows: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))


class PolicyGradient(Algorithm):
    """Base class of the algorithms that maximise ``E[r(x, y)] - kl_coef KL(pi || pi_ref)`` by gradient steps.

    Every iteration plays `episodes_per_iteration` episodes as its `phase` says (`play`), credits the policy's decisions
    (`credit`), and follows the gradient of `loss`, minibatch by minibatch, `n_epochs` times (`update`). The reference
    policy is a frozen copy of the starting policy, and shares the weights that are not trained (with adapters: all
    others). The objective is the same with and without a guide: a guide's tokens carry no penalty and no gradient.

    Log-probabilities are those of the untruncated softmax at temperature 1, in sampling, in updates and for the
    reference, whatever the decoding is. With top-k or top-p sampling ratios are therefore not importance weights of
    the truncated distribution; but every sampled token has a finite log-probability under every later policy, whereas
    a new top-k set could exclude it.

    Attributes:
        reference: The reference policy.
        kl_coef: The current weight of the KL penalty, which `kl_target` adapts.
        rule: The algorithm's own copy of the curriculum, with what it has learned; None without one.
        imitation: The guide loss; None without one.
        last_rollout: The episodes of the last iteration, for callbacks.
        episodes_before: Number of episodes before the last iteration.
        play_record: What `play` adds to the iteration's record.
    """

    # Neighbouring episodes with one sample and, without a curriculum, one prefix; a field of algorithms with groups.
    group_size = 1
    # Whether a text's advantage is that of all its tokens, the guide's too.
    credits_texts = False

    minibatch_size: int = 16
    """Number of episodes per gradient step, over all processes."""
    gradient_accumulation_steps: int = 1
    """Number of passes per gradient step, to save memory; the gradient is the same."""
    n_epochs: int = 2
    """Passes over an iteration's episodes."""
    learning_rate: float = 1e-4
    """Initial step size of Adam."""
    lr_schedule: Schedule = "constant"
    """Schedule of the step size over `schedule_episodes`: "constant", or "linear" or "cosine" to zero."""
    schedule_episodes: int | None = None
    """Length of the schedules in episodes; must be given if one is not constant."""
    kl_coef: float = 0.02
    """Weight of the KL penalty (initial, with `kl_target`)."""
    kl_penalty: Literal["reward", "loss"] = "reward"
    """"reward" subtracts ``kl_coef (log pi - log pi_ref)`` from every decision's reward; "loss" adds ``kl_coef`` times
    the estimate ``pi_ref / pi - 1 - log(pi_ref / pi)`` to every decision's loss
    (http://joschu.net/blog/kl-approx.html, k3). With normalised advantages (all but RLOO) the same weight has less
    effect as a loss than as a reward, since the standard deviation of rewards is small."""
    kl_target: float | None = None
    """Hold the KL of a text (nats, summed over its decisions) near this value by changing `kl_coef` after every
    iteration (Ziegler et al. 2019, arXiv 1909.08593, section 2.2); None keeps `kl_coef`."""
    target_coef: float = 0.0
    """Weight of a supervised loss on references of the iteration's prompts, where the task says to imitate them."""
    target_kl: float | None = None
    """Stop an iteration's updates when the KL to the policy that sampled exceeds 1.5 times this (nats per decision);
    None never stops."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient, which is scaled down to it."""
    decoding: Decoding | None = None
    """How training episodes are sampled; None for the policy's own decoding."""
    curriculum: Curriculum | Mapping[str, Any] | str | None = None
    """Which samples are played, and the prefix of each: a `agents.curriculum.Curriculum`, its name ("adaback"), or a
    mapping of its name and settings. It replaces the restarts of the algorithm and of the environment; hand-offs
    stay. None leaves both to them."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = None
    """What is learned from the guide's tokens: a `agents.guide_loss.GuideLoss`, its name ("likelihood"), or a mapping
    of its name and settings; None: nothing. The token that a hand-off begins with is left out, because the policy's
    decision stands there."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        check("minibatch_size", self.minibatch_size, self.minibatch_size >= 1, "at least 1")
        check(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            1 <= self.gradient_accumulation_steps <= self.minibatch_size,
            f"in {{1..minibatch_size={self.minibatch_size}}}",
        )
        check("n_epochs", self.n_epochs, self.n_epochs >= 1, "at least 1")
        check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "finite and above 0")
        check("lr_schedule", self.lr_schedule, self.lr_schedule in SCHEDULES, f"one of {SCHEDULES}")
        check(
            "schedule_episodes",
            self.schedule_episodes,
            self.lr_schedule == "constant" if self.schedule_episodes is None else self.schedule_episodes >= 1,
            "at least 1, and given where a schedule is not constant",
        )
        check("kl_penalty", self.kl_penalty, self.kl_penalty in ("reward", "loss"), '"reward" or "loss"')
        check(
            "kl_target",
            self.kl_target,
            self.kl_target is None or (self.kl_target > 0 and self.kl_coef > 0),
            "above 0 (as kl_coef), or None",
        )
        check("target_kl", self.target_kl, self.target_kl is None or self.target_kl > 0, "None or above 0")
        check("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")
        for name in ("kl_coef", "target_coef"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")

    def __post_init__(self) -> None:
        check("decoding", self.decoding, isinstance(self.decoding, Decoding | None), "None or a Decoding")
        self.rule = None if self.curriculum is None else Curriculum.of(self.curriculum)
        self.imitation = None if self.guide_loss is None else GuideLoss.of(self.guide_loss)
        super().__post_init__()
        if self.imitation is not None:
            check_guide(self.env, f"guide_loss {self.imitation.name!r}")
            if self.imitation.credited and not self.credits_texts:
                raise ValueError(
                    f"guide_loss {self.imitation.name!r} needs an algorithm with groups, which gives a text one "
                    f"advantage, got {self.name}"
                )
        if self.rule is not None:
            if self.rule.needs_guide:
                check_guide(self.env, f"curriculum {self.rule.name!r}")
            self.rule.start(len(self.env.data))
        check_draws(self.decoding or self.policy.decoding)
        self.reference = self.policy.copy().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.trainable, lr=self.learning_rate, eps=1e-5, fused=True)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Also take back what the curriculum has learned (see `Algorithm.all_or_nothing`)."""
        learned = None if self.rule is None else self.rule.get_state()
        try:
            with super().all_or_nothing():
                yield
        except BaseException:
            if self.rule is not None and learned is not None:
                self.rule.set_state(learned)
            raise

    @property
    def phase(self) -> Phase:
        """Who writes the episodes of this iteration, and how their decisions are credited."""
        return Phase()

    @abstractmethod
    def credit(self, rollout: Rollout, reference_log_probs: Tensor) -> Credit:
        """Credit the decisions of an iteration's episodes.

        Args:
            rollout: N episodes; `rewards` returns their rewards.
            reference_log_probs: float (N, T), of the decisions.
        """

    @abstractmethod
    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, Tensor]:
        """The loss of some episodes of a minibatch.

        Args:
            now: The current policy's evaluation of their decisions and states.
            old: Their credit.
            minibatch: The credit of the whole minibatch. Means are over it, so that the losses of its parts add up to
                its loss.

        Returns:
            Scalars by name: "loss", which is minimised, "approx_kl" (nats per decision, to the policy that sampled),
            and diagnostics; each adds up over the parts of a minibatch.
        """

    def rewards(self, rollout: Rollout) -> Tensor:
        """The rewards (N,) to maximise: by default the task's."""
        return rollout.rewards

    def with_kl_loss(
        self, terms: dict[str, Tensor], now: Evaluation, old: Credit, mean: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Add the KL penalty to the terms of a loss, if `kl_penalty` is "loss".

        Args:
            terms: Scalars by name, "loss" among them.
            now: The current policy's evaluation of the decisions.
            old: Their credit.
            mean: The mean of this loss: takes a float (B, A) that is zero outside of the decisions, returns a scalar.
        """
        if self.kl_penalty == "loss":
            terms["kl_loss"] = mean(kl_estimate(now.log_probs, old.reference_log_probs, old.decisions))
            terms["loss"] = terms["loss"] + self.kl_coef * terms["kl_loss"]
        return terms

    def actions(self, credit: Credit) -> Tensor:
        """Bool (N, T): the tokens that carry an advantage: decisions and, if the guide loss reads it, the guide's."""
        credited = self.imitation is not None and self.imitation.credited
        return credit.decisions | credit.guided if credited else credit.decisions

    def token_weights(self, old: Credit, minibatch: Credit) -> Tensor:
        """The weight of the `actions` of a minibatch's loss, broadcastable to (B, T).

        Args:
            old: As for `loss`.
            minibatch: As for `loss`.
        """
        return 1 / self.actions(minibatch).sum().clamp(min=1)

    def with_guide_loss(
        self, terms: dict[str, Tensor], now: Evaluation, old: Credit, minibatch: Credit, guide_loss: GuideLoss
    ) -> dict[str, Tensor]:
        """Add the loss on the guide's tokens to the terms of a loss (arguments as for `loss`)."""
        mean = 1 / minibatch.guided.sum().clamp(min=1)
        log_probs = now.log_probs.masked_fill(~old.guided, 0)
        losses = guide_loss(log_probs, old.log_probs, old.advantages).masked_fill(~old.guided, 0)
        terms["guide_loss"] = (losses * (self.token_weights(old, minibatch) if guide_loss.credited else mean)).sum()
        terms["guide_probability"] = (log_probs.detach().exp() * old.guided).sum() * mean
        terms["loss"] = terms["loss"] + guide_loss.coef * terms["guide_loss"]
        return terms

    def iterate(self) -> dict[str, Any]:
        """Play episodes, credit their decisions, and take gradient steps."""
        policy_tokens = self.num_timesteps
        rollout = self.play()
        reference_log_probs = self.reference_log_probs(rollout)
        credit = self.credit(rollout, reference_log_probs)
        if self.imitation is not None:
            self.credit_guide(rollout, credit, self.imitation)
        with self.learning():
            losses = self.update(rollout, credit)

        decisions, states = rollout.decisions, credit.states
        log_ratio = rollout.log_ratio(reference_log_probs)
        kl = float(log_ratio.sum() / decisions.any(1).sum().clamp(min=1))
        record = {
            "reward": float(rollout.rewards.mean()),
            "kl": kl,
            "kl_per_token": float(masked_mean(log_ratio, decisions)),
            "kl_penalty": self.kl_coef * kl,
            "kl_coef": self.kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **losses,
            "length": float((rollout.authors >= 0).sum(1).float().mean()),
            **self.play_record,
            "stop_fraction": float(np.mean(rollout.finish_reason == "stop")),
            "handoff_fraction": float(np.mean(rollout.finish_reason == "handoff")),
            "policy_tokens": self.num_timesteps - policy_tokens,
            **{f"reward/{name}": float(part.mean()) for name, part in rollout.reward_parts.items() if name != "reward"},
        }
        if states.any():
            error, returns = (credit.returns - credit.values)[states], credit.returns[states]
            variance = returns.var(correction=0).clamp(min=1e-12)
            record["explained_variance"] = float(1 - error.var(correction=0) / variance)
            record["value"] = float(credit.values[states].mean())
        if self.kl_target is not None:
            excess = np.clip(kl / self.kl_target - 1, -0.2, 0.2)
            self.kl_coef = float(self.kl_coef * (1 + 0.1 * excess))
        return record

    def play(self) -> Rollout:
        """Play `episodes_per_iteration` episodes, each process its share, and count them.

        Returns:
            The episodes of all processes.
        """
        self.episodes_before = self.num_episodes
        plan, rollouts, rows = self.plan(), [], self.env.num_envs
        # The rows of all processes are those of one environment; this many come before this process's.
        before, all_rows = rows * self.accelerator.process_index, rows * self.accelerator.num_processes
        for part in range(self.episodes_per_iteration // all_rows):
            options = {"guidance": self.guidance, "group_size": self.group_size}
            if plan is not None:
                episodes = part * all_rows + before + np.arange(rows)
                options = plan.options(episodes, self.guidance_of(episodes), text_seed=self.seed)
            rollouts.append(
                collect(
                    self.env,
                    self.policy,
                    seeds=hash64(self.seed, self.iteration, part, before + np.arange(rows)),
                    decoding=self.decoding,
                    # Hashed, because the rows of an environment seeded s are seeded s, s + 1, ...
                    reset_seed=(int(hash64(self.seed)) >> 33) + before if self.iteration == part == 0 else None,
                    options=options,
                )
            )
        rollout = Rollout.concatenate(gather(self.accelerator, rollouts))
        self.last_rollout = rollout
        self.check_finite("reward", rollout.rewards)
        self.count(rollout)
        self.play_record = {}
        if plan is not None and self.rule is not None:
            self.play_record = {"prefix_fraction": float(plan.fractions.mean())}
            self.rule.record(plan, rollout.rewards.view(-1, self.group_size).cpu().numpy(), rollout)
        alone = rollout.prefix_length == 0
        if alone.any() and not alone.all():
            self.play_record["reward_without_prefix"] = float(rollout.rewards[alone].mean())
        return rollout

    @property
    def guidance(self) -> Guidance | tuple[Guidance, ...]:
        """The guidance of this iteration's episodes: the phase's, else the environment's; without a curriculum."""
        return self.env.initial_guidance if self.phase.guidance is None else self.phase.guidance

    def guidance_of(self, episodes: np.ndarray) -> list[Guidance]:
        """The guidance of some of this iteration's episodes, by number; without a curriculum."""
        given = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)
        return [given[episode % len(given)] for episode in episodes.tolist()]

    def plan(self) -> Plan | None:
        """What the curriculum lets the episodes of this iteration start from; None without a curriculum."""
        if self.rule is None:
            return None
        random = np.random.default_rng([self.seed, self.iteration, 3])
        groups = self.episodes_per_iteration // self.group_size
        return self.rule.plan(self.iteration, groups, self.group_size, random)

    def count(self, rollout: Rollout) -> None:
        """Count the episodes of a rollout, and the policy's tokens."""
        self.num_episodes += len(rollout)
        self.num_timesteps += int(rollout.policy_tokens.sum())

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities (N, T) of the decisions under the reference policy, zero elsewhere."""
        decisions = rollout.decisions
        rows = torch.nonzero(decisions.any(1)).flatten()

        def log_probs(part: Tensor) -> Tensor:
            return _evaluate(self.reference, rollout, decisions, part).log_probs

        return in_shares(self.accelerator, torch.zeros_like(rollout.log_probs), rows, self.minibatch_size, log_probs)

    def guide_tokens(self, rollout: Rollout) -> Tensor:
        """Bool (N, T): the guide's tokens that the guide loss may learn."""
        return rollout.guided & ~rollout.handoffs

    @torch.no_grad()
    def credit_guide(self, rollout: Rollout, credit: Credit, guide_loss: GuideLoss) -> None:
        """Choose the guide's tokens that are learned, and add to the credit what their loss reads."""
        tokens = self.guide_tokens(rollout)
        judged = torch.zeros_like(rollout.log_probs)[..., None].repeat(1, 1, 2)
        if guide_loss.compares:
            rows = torch.nonzero(tokens.any(1)).flatten()

            def judge(part: Tensor) -> Tensor:
                now = _evaluate(self.policy, rollout, tokens, part)
                return torch.stack([now.log_probs, now.entropy], dim=-1)

            judged = in_shares(self.accelerator, judged, rows, self.minibatch_size, judge)
        log_probs, entropy = judged.unbind(-1)
        credit.guided = guide_loss.chosen(tokens, entropy)
        credit.log_probs = torch.where(tokens, log_probs, credit.log_probs)

    def learned_rows(self, rollout: Rollout, credit: Credit) -> Tensor:
        """The episodes that have a decision, a state or a guide's token to learn from, int64."""
        return torch.nonzero((credit.decisions | credit.states | credit.guided).any(1)).flatten()

    def update(self, rollout: Rollout, credit: Credit) -> dict[str, float]:
        """Take gradient steps over the episodes of `learned_rows`.

        Each process evaluates its share of a minibatch; gradients and losses are summed over processes.

        Returns:
            Losses and diagnostics, means over the gradient steps that were taken.
        """
        rows = self.learned_rows(rollout, credit)
        demonstrations = self.demonstrations(rollout) if self.target_coef else {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.scheduled(self.lr_schedule)
        steps: list[dict[str, Tensor]] = []
        stopped = False
        for minibatch in self.minibatches(rows):
            self.optimizer.zero_grad()
            step = self.backward(rollout, credit, minibatch, demonstrations)
            self.check_finite("loss", step["loss"])
            stopped = self.target_kl is not None and float(step["approx_kl"]) > 1.5 * self.target_kl
            if stopped:
                break
            reduce_gradients(self.accelerator, self.trainable)
            step["gradient_norm"] = clip_gradients(self.trainable, self.max_grad_norm)
            self.check_finite("gradient norm", step["gradient_norm"])
            self.optimizer.step()
            steps.append(step)
        means = {
            name: float(torch.stack([step[name] for step in steps if name in step]).mean())
            for name in {name for step in steps for name in step}
        }
        return {**dict(sorted(means.items())), "gradient_steps": len(steps), "stopped_early": float(stopped)}

    def backward(
        self, rollout: Rollout, credit: Credit, minibatch: Tensor, demonstrations: dict[int, Example]
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of a minibatch's loss, in `gradient_accumulation_steps` parts.

        Args:
            rollout: The iteration's episodes.
            credit: Their credit.
            minibatch: int64 (B,), rows of both.
            demonstrations: Reference texts of the supervised loss, by row.

        Returns:
            The terms of the loss, sums over parts and processes.
        """
        whole, targets = credit[minibatch], num_targets(_of_rows(demonstrations, minibatch))
        step: dict[str, Tensor] = {}
        for part in minibatch.split(math.ceil(len(minibatch) / self.gradient_accumulation_steps)):
            rows, weight = share_of_loss(self.accelerator, part)
            now, old = self.evaluate_actions(rollout, credit, rows), credit[rows]
            terms = self.loss(now, old, whole)
            if self.imitation is not None:
                terms = self.with_guide_loss(terms, now, old, whole, self.imitation)
            terms = {name: weight * term for name, term in terms.items()}
            if examples := _of_rows(demonstrations, part):
                texts, weight = share_of_loss(self.accelerator, examples)
                weight *= num_targets(texts) / targets
                terms["target_loss"] = weight * supervised_loss(self.learner, texts, self.env.pad_token_id)
                terms["loss"] = terms["loss"] + self.target_coef * terms["target_loss"]
            terms["loss"].backward()
            for name, term in terms.items():
                step[name] = step.get(name, 0) + term.detach()
        return reduce_terms(self.accelerator, step)

    def evaluate_actions(self, rollout: Rollout, credit: Credit, rows: Tensor) -> Evaluation:
        """Evaluate the decisions of some rows, and the guide's tokens, under the current policy."""
        return _evaluate(self.learner, rollout, credit.decisions | credit.guided, rows)

    def minibatches(self, rows: Tensor) -> Iterator[Tensor]:
        """Split rows at random, `n_epochs` times."""
        random = np.random.default_rng([self.seed, self.iteration])
        for _ in range(self.n_epochs):
            order = torch.from_numpy(random.permutation(len(rows))).to(rows.device)
            yield from in_parts(rows[order], self.minibatch_size)

    def scheduled(self, schedule: Schedule) -> float:
        """The factor of a schedule in this iteration, 1 in the first one."""
        if schedule == "constant":
            return 1.0
        assert self.schedule_episodes is not None
        progress = min(1.0, self.episodes_before / self.schedule_episodes)
        return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def demonstrations(self, rollout: Rollout) -> dict[int, Example]:
        """One random reference text for each row whose references the task says to imitate."""
        prompts, masks = (
            array[:, : rollout.prompt_columns].cpu().numpy() for array in (rollout.input_ids, rollout.attention_mask)
        )
        random = np.random.default_rng([self.seed, self.iteration, 1])
        chosen = {}
        for row, (sample, references) in enumerate(zip(rollout.sample_ids, rollout.references, strict=True)):
            if references and self.env.imitates(int(sample)):
                chosen[row] = references[random.integers(len(references))]
        read = [(rollout.prompts[row], prompts[row][masks[row] > 0].tolist()) for row in chosen]
        return dict(zip(chosen, encode_examples(self.env, read, list(chosen.values())), strict=True))

    def models(self) -> dict[str, nn.Module]:
        """Add the reference policy."""
        return {**super().models(), "reference": self.reference}

    def training_state(self) -> dict[str, Any]:
        """Add the KL coefficient, which `kl_target` changes, what the curriculum has learned and the last episodes."""
        state = {**super().training_state(), "kl_coef": self.kl_coef}
        if self.rule is not None:
            state["curriculum"] = self.rule.get_state()
        if (rollout := getattr(self, "last_rollout", None)) is not None:
            state["last_rollout"] = vars(rollout)
        return state

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.kl_coef = state["kl_coef"]
        if self.rule is not None:
            self.rule.set_state(state["curriculum"])
        saved = state.get("last_rollout", {})  # none before the first iteration
        if saved.keys() == {part.name for part in fields(Rollout)}:  # of another version it is left out
            self.last_rollout = Rollout.from_state(saved, self.policy.device)


def _evaluate(policy: Policy, rollout: Rollout, tokens: Tensor, rows: Tensor) -> Evaluation:
    """Evaluate some tokens, bool (N, T), of some rows under a policy, without values."""
    return policy.evaluate_actions(
        rollout.input_ids[rows],
        rollout.attention_mask[rows],
        rollout.columns(tokens[rows]),
        rollout.handoffs[rows],
        values_of=None,
    )


def _of_rows(demonstrations: dict[int, Example], rows: Tensor) -> list[Example]:
    """The demonstrations of some rows, in their order."""
    return [demonstrations[row] for row in rows.tolist() if row in demonstrations] if demonstrations else []
