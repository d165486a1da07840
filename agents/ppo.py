"""Proximal policy optimisation for text, with a per-token KL penalty. Reads from top to bottom."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from agents.advantages import gae, last_of, masked_mean, whiten
from agents.algorithm import check
from agents.policy import Evaluation, Policy
from agents.policy_gradient import SCHEDULES, Credit, PolicyGradient, Schedule, in_parts
from agents.processes import add, share
from agents.rollout import Rollout

if TYPE_CHECKING:
    from torch import nn

    from textgym.engine import TextVectorEnv


class PPOLoss(NamedTuple):
    """Scalars; only `loss` carries a gradient that anyone uses."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    entropy: torch.Tensor
    approx_kl: torch.Tensor
    clip_fraction: torch.Tensor


def ppo_loss(
    *,
    log_probs: torch.Tensor,
    values: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    decisions: torch.Tensor,
    states: torch.Tensor,
    clip_range: float,
    clip_range_vf: float | None,
    vf_coef: float,
    ent_coef: float,
    num_decisions: torch.Tensor | None = None,
    num_states: torch.Tensor | None = None,
) -> PPOLoss:
    """The clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9).

    ``L = -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + vf_coef L_V - ent_coef H`` with ``rho = pi / pi_old`` and
    ``L_V = 1/2 mean max((V - R)^2, (V_clip - R)^2)``, where ``V_clip`` is at most `clip_range_vf` away from the old
    value. The mean of ``L_V`` is over `states`, the other means are over `decisions`.

    Args:
        log_probs: float (B, A), of the decisions now. The arrays below have the same shape.
        values: Values of the states now.
        entropy: Entropies of the distributions that the decisions were drawn from, now.
        old_log_probs: Log-probabilities when the decisions were sampled.
        old_values: Values when they were sampled.
        advantages: Advantages, normalised or not.
        returns: What the values should be.
        decisions: bool, the credited decisions. What stands elsewhere in policy arrays is never read.
        states: bool, the states whose value is learned. What stands elsewhere in value arrays is never read.
        clip_range: c above.
        clip_range_vf: How far a value may move before its gradient stops; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy bonus.
        num_decisions: int64 scalar, decisions that the means are over, where this batch is a part of a minibatch; None
            counts `decisions`.
        num_states: The same for states.
    """
    num_decisions = (decisions.sum() if num_decisions is None else num_decisions).clamp(min=1)
    num_states = (states.sum() if num_states is None else num_states).clamp(min=1)
    advantages, entropy, log_ratio = (
        tensor.masked_fill(~decisions, 0) for tensor in (advantages, entropy, log_probs - old_log_probs)
    )
    values, old_values, returns = (tensor.masked_fill(~states, 0) for tensor in (values, old_values, returns))
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    policy_loss = -surrogate.sum() / num_decisions

    squared_error = (values - returns).square()
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        squared_error = torch.maximum(squared_error, (clipped - returns).square())
    value_loss = 0.5 * squared_error.sum() / num_states

    mean_entropy = entropy.sum() / num_decisions
    with torch.no_grad():
        # http://joschu.net/blog/kl-approx.html: unbiased, never negative, and of less variance than -log_ratio
        approx_kl = (ratio - 1 - log_ratio).sum() / num_decisions
        clip_fraction = ((ratio - 1).abs() > clip_range).sum() / num_decisions
    loss = policy_loss + vf_coef * value_loss
    if ent_coef:  # a gradient of zeros would cost as much as any
        loss = loss - ent_coef * mean_entropy
    return PPOLoss(loss, policy_loss, value_loss, mean_entropy, approx_kl, clip_fraction)


def token_rewards(
    rewards: torch.Tensor, log_ratio: torch.Tensor, written: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Rewards of single steps: a KL penalty on each decision, the task's reward on the last step.

    Args:
        rewards: float (N,), of whole texts.
        log_ratio: float (N, T), ``log pi - log pi_ref`` of decisions, zero for steps of others; not read elsewhere.
        written: bool (N, T), the steps that get a reward. A row without any earns nothing.
        kl_coef: Weight of the penalty.

    Returns:
        float (N, T), zero outside of `written`.
    """
    return torch.where(last_of(written), rewards[:, None], 0) - kl_coef * log_ratio.masked_fill(~written, 0)


class PPO(PolicyGradient):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) for text.

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end | none | body | V of the policy, on body |

    In an environment with hand-offs the action to ask the guide is a decision like any other: credit ends there, with
    the reward of the text that the guide completed.

    Args:
        policy: As for `PolicyGradient`.
        env: As for `PolicyGradient`.
        gamma: Discount factor.
        gae_lambda: Trace decay of the advantages.
        clip_range: How far a ratio may move from 1.
        clip_schedule: How `clip_range` goes on, over `schedule_episodes`: "constant", "linear" or "cosine".
        clip_range_vf: How far a value may move; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy bonus.
        critic: "shared" is a head on the policy's own network; "separate" is a network of its own, a copy of the
            policy's to begin with.
        **shared: As for `PolicyGradient`.

    Raises:
        ValueError: An argument is wrong.
    """

    name = "ppo"

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        clip_schedule: Schedule = "constant",
        clip_range_vf: float | None = 0.2,
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        critic: Literal["shared", "separate"] = "shared",
        **shared: Any,
    ) -> None:
        check("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
        check("gae_lambda", gae_lambda, 0 <= gae_lambda <= 1, "in [0, 1]")
        check("clip_range", clip_range, clip_range > 0, "above 0")
        check("clip_schedule", clip_schedule, clip_schedule in SCHEDULES, f"one of {SCHEDULES}")
        if clip_schedule != "constant" and shared.get("schedule_episodes") is None:
            raise ValueError(f"schedule_episodes must be given where clip_schedule is {clip_schedule!r}")
        check("clip_range_vf", clip_range_vf, clip_range_vf is None or clip_range_vf > 0, "None or above 0")
        check("vf_coef", vf_coef, vf_coef >= 0, "at least 0")
        check("ent_coef", ent_coef, ent_coef >= 0, "at least 0")
        check("critic", critic, critic in ("shared", "separate"), '"shared" or "separate"')
        super().__init__(policy, env, **shared)
        self.hyperparameters |= {
            "gamma": gamma,
            "gae_lambda": gae_lambda,
            "clip_range": clip_range,
            "clip_schedule": clip_schedule,
            "clip_range_vf": clip_range_vf,
            "vf_coef": vf_coef,
            "ent_coef": ent_coef,
            "critic": critic,
        }
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_range, self.clip_schedule, self.clip_range_vf = clip_range, clip_schedule, clip_range_vf
        self.vf_coef, self.ent_coef = vf_coef, ent_coef
        self.critic = self.policy
        if critic == "separate":
            self.critic = self.policy.copy()
            self.critic_learner = self.twin_of(self.critic)
            parameters = [parameter for parameter in self.critic_learner.parameters() if parameter.requires_grad]
            self.optimizer.add_param_group({"params": parameters})
            self.trainable += parameters
        self.started: list[str] = []  # the critics that have judged episodes, see `state_values`

    @property
    def critic_of(self) -> Literal["policy", "guide"]:
        """Whose value the critic learns in this iteration: of who goes on after the credited decision."""
        return "policy"

    def estimate(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages and value targets by GAE over the decisions, before advantages are normalised."""
        decisions = rollout.decisions
        rewards = self.token_rewards(rollout, reference_log_probs, decisions)
        values = self.state_values(rollout, rewards, decisions, decisions)
        advantages, returns = gae(rewards, values, decisions, self.gamma, self.gae_lambda)
        return Credit(
            decisions=decisions,
            log_probs=rollout.log_probs,
            reference_log_probs=reference_log_probs,
            advantages=advantages,
            states=decisions,
            values=values,
            returns=returns,
        )

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """The estimate, with advantages normalised over all decisions of the iteration."""
        credit = self.estimate(rollout, reference_log_probs)
        return replace(credit, advantages=whiten(credit.advantages, credit.decisions))

    def token_rewards(self, rollout: Rollout, reference_log_probs: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Rewards of the steps in `written`, with the KL penalty of the decisions where it is a reward."""
        kl_coef = self.kl_coef if self.kl_penalty == "reward" else 0.0
        return token_rewards(self.rewards(rollout), rollout.log_ratio(reference_log_probs), written, kl_coef)

    def state_values(
        self, rollout: Rollout, rewards: torch.Tensor, states: torch.Tensor, learned: torch.Tensor
    ) -> torch.Tensor:
        """What the critic says of the states before the steps in `states`.

        A critic that judges for the first time is started first. It begins as a copy of the other one where that has
        learned already, since the features of the network now serve that head; and it is shifted to the mean return of
        the states that it will learn. Gradient steps of a size that suits the policy hardly move a bias: an offset
        would be learned through the mean of the features, in the wrong order of the states, and the first advantages
        would mostly say how near the end a token is.

        Args:
            rollout: N episodes.
            rewards: float (N, T), of the steps in `states`.
            states: bool (N, T), the steps to judge, up to the end of each episode.
            learned: bool (N, T), those of them whose value the critic learns.

        Returns:
            float (N, T), zero outside of `states`.
        """
        starts = self.critic_of not in self.started and bool(learned.any())
        copied = starts and bool(self.started)
        if copied:
            self.critic.copy_values(to=self.critic_of)
        recorded = self.critic is self.policy and self.critic_of == "policy" and not copied
        values = rollout.values if recorded else self.judged_again(rollout, states)
        values = values.masked_fill(~states, 0)
        if starts:
            _, returns = gae(rewards, values, states, self.gamma, 1.0)
            shift = float(masked_mean(returns - values, learned))
            self.critic.shift_values(**{f"of_{self.critic_of}": shift})
            self.started.append(self.critic_of)
            values = (values + shift).masked_fill(~states, 0)
        return values

    @torch.no_grad()
    def judged_again(self, rollout: Rollout, states: torch.Tensor) -> torch.Tensor:
        """Values (N, T) of the states before the steps in `states`, as the critic's network says now."""
        columns, values = rollout.columns(states), torch.zeros_like(rollout.values)
        mine = share(self.accelerator, torch.nonzero(states.any(1)).flatten())
        for rows in in_parts(mine, self.minibatch_size):
            of_policy, of_guide = self.critic.values(
                rollout.input_ids[rows], rollout.attention_mask[rows], columns[rows]
            )
            values[rows] = (of_policy if self.critic_of == "policy" else of_guide).to(values.dtype)
        return add(self.accelerator, values)

    def judge(self, rollout: Rollout, credit: Credit, rows: torch.Tensor) -> Evaluation:
        """Let a separate critic judge the states, and the policy only its decisions."""
        if self.critic is self.policy:
            return super().judge(rollout, credit, rows)
        now = super().judge(rollout, replace(credit, states=torch.zeros_like(credit.states)), rows)
        values, guide_values = self.critic_learner.values(
            rollout.input_ids[rows], rollout.attention_mask[rows], rollout.columns(credit.states[rows])
        )
        return now._replace(values=values, guide_values=guide_values)

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate, the value loss, the entropy bonus, and the KL penalty where it is a loss."""
        values = now.values if self.critic_of == "policy" else now.guide_values
        num_decisions = minibatch.decisions.sum()
        terms = ppo_loss(
            log_probs=now.log_probs,
            values=values,
            entropy=now.entropy,
            old_log_probs=old.log_probs,
            old_values=old.values,
            advantages=old.advantages,
            returns=old.returns,
            decisions=old.decisions,
            states=old.states,
            clip_range=self.clip_range * self.scheduled(self.clip_schedule),
            clip_range_vf=self.clip_range_vf,
            vf_coef=self.vf_coef,
            ent_coef=self.ent_coef,
            num_decisions=num_decisions,
            num_states=minibatch.states.sum(),
        )._asdict()
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_decisions.clamp(min=1))

    def models(self) -> dict[str, nn.Module]:
        """Add the critic's network, where it has one of its own."""
        return super().models() if self.critic is self.policy else {**super().models(), "critic": self.critic}

    def training_state(self) -> dict[str, Any]:
        """Add which critics have been started."""
        return {**super().training_state(), "started": list(self.started)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.started = list(state["started"])
