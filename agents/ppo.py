"""Proximal policy optimisation for text, with a per-token KL penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from agents.advantages import last_of, whiten
from agents.policy import Evaluation
from agents.policy_gradient import SCHEDULES, Credit, PolicyGradient, Schedule
from agents.rollout import Rollout
from agents.value_function import ValueFunction
from textgym.checks import check

if TYPE_CHECKING:
    from torch import nn


class PPO(PolicyGradient):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) for text.

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end | none | body | V of the policy, on body |

    In an environment with hand-offs the hand-off is a decision like any other, and the last one: it is credited with
    the reward of the text that the guide completed.

    Differs from the paper: rewards carry a KL penalty to the starting policy (Ziegler et al. 2019, arXiv 1909.08593);
    advantages are normalised over an iteration, not over a minibatch; the value loss is clipped (as in OpenAI's
    baselines); a value function is shifted to the mean return before it learns (`agents.value_function`).
    """

    name = "ppo"

    gamma: float = 1.0
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantages."""
    normalize_advantage: bool = True
    """Whether advantages are shifted and scaled to mean 0 and standard deviation 1 over an iteration's decisions."""
    clip_range: float = 0.2
    """Maximum distance of a ratio from 1."""
    clip_schedule: Schedule = "constant"
    """Schedule of `clip_range` over `schedule_episodes`: "constant", or "linear" or "cosine" to zero."""
    clip_range_vf: float | None = 0.2
    """Maximum change of a value; None does not clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    critic: Literal["shared", "separate"] = "shared"
    """"shared" is a head on the policy's network; "separate" is a second network, initially a copy of the policy's."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        check("gamma", self.gamma, 0 <= self.gamma <= 1, "in [0, 1]")
        check("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "in [0, 1]")
        check("clip_range", self.clip_range, self.clip_range > 0, "above 0")
        check("clip_schedule", self.clip_schedule, self.clip_schedule in SCHEDULES, f"one of {SCHEDULES}")
        if self.clip_schedule != "constant" and self.schedule_episodes is None:
            raise ValueError(f"schedule_episodes must be given where clip_schedule is {self.clip_schedule!r}")
        clip_range_vf = self.clip_range_vf
        check("clip_range_vf", clip_range_vf, clip_range_vf is None or clip_range_vf > 0, "None or above 0")
        check("vf_coef", self.vf_coef, self.vf_coef >= 0, "at least 0")
        check("ent_coef", self.ent_coef, self.ent_coef >= 0, "at least 0")
        check("critic", self.critic, self.critic in ("shared", "separate"), '"shared" or "separate"')

    def __post_init__(self) -> None:
        super().__post_init__()
        network, learner = self.policy, self.learner
        if self.critic == "separate":
            network = self.policy.copy()
            learner = self.twin_of(network)
            parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
            self.optimizer.add_param_group({"params": parameters})
            self.trainable += parameters
        self.value_function = ValueFunction(
            network,
            learner,
            recorded=self.critic == "shared",
            accelerator=self.accelerator,
            rows_at_once=self.minibatch_size,
            gamma=self.gamma,
        )

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages of the decisions and targets of the value function, as the iteration's `phase` says."""
        phase, decisions = self.phase, rollout.decisions
        learned = phase.learned(rollout)
        steps = decisions | learned
        kl_coef = self.kl_coef if self.kl_penalty == "reward" else 0.0
        rewards = token_rewards(self.rewards(rollout), rollout.log_ratio(reference_log_probs), steps, kl_coef)
        values = self.value_function(rollout, rewards, steps, learned, phase.continuation)
        advantages, returns = phase.advantages(rewards, values, steps, decisions, self.gamma, self.gae_lambda)
        return Credit(
            decisions=decisions,
            log_probs=rollout.log_probs,
            reference_log_probs=reference_log_probs,
            advantages=whiten(advantages, decisions) if self.normalize_advantage else advantages,
            states=learned,
            values=values,
            returns=returns,
        )

    def evaluate_actions(self, rollout: Rollout, credit: Credit, rows: torch.Tensor) -> Evaluation:
        """Evaluate the decisions and the states of some rows under the current weights."""
        texts, continuation = (rollout.input_ids[rows], rollout.attention_mask[rows]), self.phase.continuation
        decisions, states = credit.decisions[rows], credit.states[rows]
        if self.critic == "separate":
            values = self.value_function.learner.values(*texts, rollout.columns(states), continuation)
            return super().evaluate_actions(rollout, credit, rows)._replace(values=values)
        tokens = decisions | credit.guided[rows]
        columns = rollout.columns(tokens | states)
        return self.learner.evaluate_actions(
            *texts, columns, rollout.handoffs[rows], states_only=states & ~tokens, values_of=continuation
        )

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate, the value loss, the entropy bonus, and the KL penalty if it is a loss."""
        num_decisions = minibatch.decisions.sum()
        terms = ppo_loss(
            log_probs=now.log_probs,
            values=now.values,
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
        """Add the network of the value function, if it is separate."""
        separate = {"critic": self.value_function.network} if self.critic == "separate" else {}
        return {**super().models(), **separate}

    def training_state(self) -> dict[str, Any]:
        """Add the continuations whose values have started."""
        return {**super().training_state(), "started": list(self.value_function.started)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.value_function.started = list(state["started"])


class PPOLoss(NamedTuple):
    """Scalars; only `loss` is differentiated."""

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
        log_probs: float (B, A), current log-probabilities of the decisions. The arrays below have the same shape.
        values: Current values of the states.
        entropy: Current entropies of the distributions of the decisions.
        old_log_probs: Log-probabilities when the decisions were sampled.
        old_values: Values when they were sampled.
        advantages: Advantages, normalised or not.
        returns: Targets of the values.
        decisions: bool, the credited decisions. Other entries of policy arrays are never read.
        states: bool, the states whose value is learned. Other entries of value arrays are never read.
        clip_range: c above.
        clip_range_vf: How far a value may move before its gradient stops; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy bonus.
        num_decisions: int64 scalar, the number of decisions in the whole minibatch, of which this batch is a part; None
            counts `decisions`.
        num_states: The same for states.
    """
    num_decisions = decisions.sum() if num_decisions is None else num_decisions
    num_states = (states.sum() if num_states is None else num_states).clamp(min=1)
    policy = policy_terms(
        log_probs=log_probs,
        entropy=entropy,
        old_log_probs=old_log_probs,
        advantages=advantages,
        decisions=decisions,
        clip_range=clip_range,
        num_decisions=num_decisions,
    )
    values, old_values, returns = (tensor.masked_fill(~states, 0) for tensor in (values, old_values, returns))
    squared_error = (values - returns).square()
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        squared_error = torch.maximum(squared_error, (clipped - returns).square())
    value_loss = 0.5 * squared_error.sum() / num_states

    loss = policy["policy_loss"] + vf_coef * value_loss
    if ent_coef:  # a term of weight 0 would still be differentiated
        loss = loss - ent_coef * policy["entropy"]
    return PPOLoss(loss=loss, value_loss=value_loss, **policy)


def policy_terms(
    *,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    decisions: torch.Tensor,
    clip_range: float,
    num_decisions: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The policy's terms of `ppo_loss`, which has the same arguments: means over decisions, by name."""
    num_decisions = num_decisions.clamp(min=1)
    advantages, entropy, log_ratio = (
        tensor.masked_fill(~decisions, 0) for tensor in (advantages, entropy, log_probs - old_log_probs)
    )
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    terms = {"policy_loss": -surrogate.sum() / num_decisions, "entropy": entropy.sum() / num_decisions}
    with torch.no_grad():
        # http://joschu.net/blog/kl-approx.html: unbiased, never negative, and of less variance than -log_ratio
        terms["approx_kl"] = (ratio - 1 - log_ratio).sum() / num_decisions
        terms["clip_fraction"] = ((ratio - 1).abs() > clip_range).sum() / num_decisions
    return terms


def clipped_loss(now: Evaluation, old: Credit, minibatch: Credit, clip_range: float) -> dict[str, torch.Tensor]:
    """The clipped surrogate without a critic, "loss" among its terms (arguments as for `PolicyGradient.loss`)."""
    terms = policy_terms(
        log_probs=now.log_probs,
        entropy=now.entropy,
        old_log_probs=old.log_probs,
        advantages=old.advantages,
        decisions=old.decisions,
        clip_range=clip_range,
        num_decisions=minibatch.decisions.sum(),
    )
    return {"loss": terms["policy_loss"], **terms}


def token_rewards(
    rewards: torch.Tensor, log_ratio: torch.Tensor, written: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Rewards of single steps: a KL penalty on each decision, the task's reward on the last step.

    Args:
        rewards: float (N,), of whole texts.
        log_ratio: float (N, T), ``log pi - log pi_ref`` of decisions, zero for a guide's steps; not read elsewhere.
        written: bool (N, T), the steps that get a reward. A row without any gets none.
        kl_coef: Weight of the penalty.

    Returns:
        float (N, T), zero outside of `written`.
    """
    return torch.where(last_of(written), rewards[:, None], 0) - kl_coef * log_ratio.masked_fill(~written, 0)
