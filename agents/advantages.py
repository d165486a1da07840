"""Advantages and returns of the tokens of texts of different lengths, and masked statistics."""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over the credited tokens of each row.

    ``A_h = delta_h + gamma lambda A_{h+1}`` with ``delta_h = r_h + gamma V(s_{h+1}) - V(s_h)`` (Schulman et al. 2016,
    arXiv 1506.02438, equation 16). The credited tokens of a row are contiguous, anywhere in it. The value after them is
    zero: an episode that reaches EOS or the horizon is over.

    Args:
        rewards: float (N, T), the reward of each token.
        values: float (N, T), the value of the state before each token.
        mask: bool (N, T), which tokens are credited. Other entries of the other arrays are never read.
        gamma: Discount factor.
        gae_lambda: Trace decay; 1 gives Monte-Carlo returns, 0 one-step temporal differences.

    Returns:
        Advantages and returns (advantage plus value), float (N, T) each, zero outside the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for column in reversed(range(values.shape[1])):
        credited = mask[:, column]
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        next_advantage = torch.where(credited, delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(credited, values[:, column], next_value)
        advantages[:, column] = next_advantage
    return advantages.masked_fill(~mask, 0), (advantages + values).masked_fill(~mask, 0)


def policy_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    steps: torch.Tensor,
    decisions: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages where the policy continues after each decision: `gae` over `steps` (an `agents.phase.Estimator`)."""
    return gae(rewards, values, steps, gamma, gae_lambda)


def last_of(mask: torch.Tensor) -> torch.Tensor:
    """Bool (N, T): True only at the last True entry of each row of `mask`."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def kl_estimate(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Estimate ``KL(pi || pi_ref)`` of single tokens by ``rho - 1 - log rho`` with ``rho = pi_ref / pi``.

    Unbiased for tokens drawn from pi, and never negative (http://joschu.net/blog/kl-approx.html, k3; it is equation 4
    of Shao et al. 2024, arXiv 2402.03300).

    Args:
        log_probs: float (N, T), under pi.
        reference_log_probs: float (N, T), under the reference.
        mask: bool (N, T), where there is a token.

    Returns:
        float (N, T), zero outside the mask.
    """
    log_ratio = (reference_log_probs - log_probs).masked_fill(~mask, 0)
    return log_ratio.exp() - 1 - log_ratio


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the entries where `mask` is True (zero if there is none); other entries are never read."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """Shift and scale the entries where `mask` is True to mean 0 and standard deviation 1; zero elsewhere."""
    centred = (values - masked_mean(values, mask)).masked_fill(~mask, 0)
    return centred / (masked_mean(centred.square(), mask).sqrt() + epsilon)
