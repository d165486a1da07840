"""On-policy distillation: a guide that scores says of each of the policy's tokens how likely it finds it."""

from __future__ import annotations

import torch

from agents.advantages import gae
from agents.algorithm import check_guide
from agents.policy import Evaluation
from agents.policy_gradient import Credit, PolicyGradient
from agents.ppo import clipped_loss
from agents.processes import in_shares
from agents.rollout import Rollout
from textgym.checks import check
from textgym.guides import GuideRequest, ScoringGuide


class OnPolicyDistillation(PolicyGradient):
    """On-policy distillation (Agarwal et al. 2024, GKD, arXiv 2306.13649; Lu and Thinking Machines Lab 2025).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end | none | body | none |

    The policy writes, and the guide scores what it wrote: ``A_h = sum_{k >= h} gamma^(k-h) (log pi_guide - log pi)`` of
    the tokens, with the clipped loss of `PPO`. With ``gamma=0`` this is the gradient of the reverse KL to the guide of
    the next token, in states that the policy visits, as published; with ``gamma=1`` that of the reverse KL of whole
    texts (Gu et al. 2024, MiniLLM, arXiv 2306.08543). The guide scores the policy's tokens and writes none, so that
    `guide_tokens` are 0. Records have the KL of a text to the guide, ``guide_kl`` (nats, estimated on the texts).

    Differs from the papers: GKD's divergence is a sum over the vocabulary, and here an estimate from the one token that
    was drawn, which servers can return; ratios are clipped.

    Raises:
        ValueError: The environment has no guide that can score the policy's tokens, or was made with ``handoff=True``,
            an action that no guide has a probability of; or an argument is wrong.
    """

    name = "opd"

    gamma: float = 0.0
    """Discount of what later tokens cost."""
    reward_coef: float = 0.0
    """Weight of the task's reward, minus its mean over the iteration, in the advantages of a text's tokens."""
    clip_range: float = 0.2
    """Maximum distance of a ratio from 1."""
    n_epochs: int = 1
    """Passes over an iteration's episodes."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the starting policy, beside the KL to the guide."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can score the policy's tokens."""
        super().check_hyperparameters()
        check("gamma", self.gamma, 0 <= self.gamma <= 1, "in [0, 1]")
        check("reward_coef", self.reward_coef, self.reward_coef >= 0, "at least 0")
        check("clip_range", self.clip_range, self.clip_range > 0, "above 0")
        check_guide(self.env, self.name, scores=True)

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages are what the guide finds a token likelier than the policy does, with its consequences."""
        decisions, log_ratio = rollout.decisions, rollout.log_ratio(self.guide_log_probs(rollout))
        self.play_record["guide_kl"] = float(log_ratio.sum() / decisions.any(1).sum().clamp(min=1))
        if self.kl_penalty == "reward":
            log_ratio = log_ratio + self.kl_coef * rollout.log_ratio(reference_log_probs)
        advantages, _ = gae(-log_ratio, torch.zeros_like(log_ratio), decisions, self.gamma, 1.0)
        rewards = self.rewards(rollout)
        advantages = advantages + self.reward_coef * (rewards - rewards.mean())[:, None]
        return Credit.without_critic(rollout, reference_log_probs, advantages)

    def guide_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities (N, T) of the decisions under the guide, zero elsewhere; each process asks for its share.

        Raises:
            FloatingPointError: The guide finds a token impossible.
        """
        guide, before, decisions = self.env.guide, rollout.prompt_columns, rollout.decisions
        assert isinstance(guide, ScoringGuide)
        rows = torch.nonzero(decisions.any(1)).flatten()

        def score(part: torch.Tensor) -> torch.Tensor:
            requests, texts = [], []
            for row in part.tolist():
                prompt_ids = rollout.input_ids[row, :before][rollout.attention_mask[row, :before] > 0].tolist()
                end = int(torch.nonzero(decisions[row])[-1]) + 1
                texts.append(rollout.input_ids[row, before : before + end].tolist())
                prompt = str(rollout.prompts[row])
                requests.append(GuideRequest(prompt, tuple(prompt_ids), "", (), self.env.max_new_tokens, 0))
            scores = torch.zeros(len(part), decisions.shape[1], device=part.device)
            for row, log_probs in zip(scores, guide.score(requests, texts, self.env.tokenizer), strict=True):
                row[: len(log_probs)] = torch.from_numpy(log_probs)
            return scores.masked_fill(~decisions[part], 0)

        # At once, because the guide makes its own batches.
        log_probs = in_shares(self.accelerator, torch.zeros_like(rollout.log_probs), rows, max(len(rows), 1), score)
        self.check_finite("the guide's score", log_probs)
        return log_probs

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate, and the KL penalty if it is a loss."""
        num_decisions = minibatch.decisions.sum().clamp(min=1)
        terms = clipped_loss(now, old, minibatch, self.clip_range)
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_decisions)
