"""Proximal policy optimisation for text, with a per-token KL penalty. Reads from top to bottom."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from agents.advantages import gae, masked_mean, whiten
from agents.algorithm import Algorithm, check
from agents.policy import Policy
from agents.rollout import Rollout
from agents.supervised import Example, encode_example, supervised_loss
from textgym.decoding import Decoding

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

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
    mask: torch.Tensor,
    clip_range: float,
    clip_range_vf: float | None,
    vf_coef: float,
    ent_coef: float,
) -> PPOLoss:
    """The clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9).

    ``L = -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + vf_coef L_V - ent_coef H`` with ``rho = pi / pi_old`` and
    ``L_V = 1/2 mean max((V - R)^2, (V_clip - R)^2)``, where ``V_clip`` is at most `clip_range_vf` away from the old
    value; all means are over credited tokens.

    Args:
        log_probs: float (B, A), of the tokens now. The arrays below have the same shape.
        values: Values of the states before the tokens, now.
        entropy: Entropies of the next-token distributions, now.
        old_log_probs: Log-probabilities when the tokens were sampled.
        old_values: Values when the tokens were sampled.
        advantages: Advantages, whitened or not.
        returns: What the values should be.
        mask: bool, the credited tokens. What stands elsewhere in the other arrays is never read.
        clip_range: c above.
        clip_range_vf: How far a value may move before its gradient stops; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy bonus.
    """
    values, old_values, advantages, returns, entropy, log_ratio = (
        tensor.masked_fill(~mask, 0)
        for tensor in (values, old_values, advantages, returns, entropy, log_probs - old_log_probs)
    )
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    policy_loss = -masked_mean(surrogate, mask)

    squared_error = (values - returns).square()
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        squared_error = torch.maximum(squared_error, (clipped - returns).square())
    value_loss = 0.5 * masked_mean(squared_error, mask)

    mean_entropy = masked_mean(entropy, mask)
    with torch.no_grad():
        # http://joschu.net/blog/kl-approx.html: unbiased, never negative, and of less variance than -log_ratio
        approx_kl = masked_mean(ratio - 1 - log_ratio, mask)
        clip_fraction = masked_mean(((ratio - 1).abs() > clip_range).float(), mask)
    loss = policy_loss + vf_coef * value_loss - ent_coef * mean_entropy
    return PPOLoss(loss, policy_loss, value_loss, mean_entropy, approx_kl, clip_fraction)


def token_rewards(rewards: torch.Tensor, log_ratio: torch.Tensor, body: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Rewards of single tokens: a KL penalty on each token of the body, the task's reward on its last.

    Args:
        rewards: float (N,), of whole texts.
        log_ratio: float (N, T), ``log pi - log pi_ref`` of body tokens; not read elsewhere.
        body: bool (N, T), the tokens the policy wrote. A row without any earns nothing.
        kl_coef: Weight of the penalty.

    Returns:
        float (N, T), zero outside the body.
    """
    last = body & (body.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, rewards[:, None], 0) - kl_coef * log_ratio.masked_fill(~body, 0)


class PPO(Algorithm):
    """Proximal policy optimisation: maximise ``E[r(x, y)] - kl_coef KL(pi || pi_ref)``.

    The reference policy is a frozen copy of the starting policy. Every iteration plays `episodes_per_iteration`
    episodes and goes over them `n_epochs` times. Ratios use untruncated log-probabilities at temperature 1, whatever
    the decoding was; with top-k or top-p sampling they are therefore not importance weights of what was sampled from.

    Args:
        policy: A `Policy`, or the hub id or path of a causal language model.
        env: The id of an environment, or a `TextVectorEnv` made with ``parking=True``.
        episodes_per_iteration: Episodes an iteration, a multiple of the rows of `env`.
        minibatch_size: Episodes a gradient step.
        n_epochs: Passes over an iteration's episodes.
        learning_rate: Step size of Adam.
        gamma: Discount factor.
        gae_lambda: Trace decay of the advantages.
        clip_range: How far a ratio may move from 1.
        clip_range_vf: How far a value may move; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy bonus.
        kl_coef: Weight of the per-token KL penalty (its start value, with `kl_target`).
        kl_target: Hold the KL of a text (nats, summed over its body) near this value by changing `kl_coef` after every
            iteration (Ziegler et al. 2019, arXiv 1909.08593, section 2.2); None keeps `kl_coef`.
        target_coef: Weight of a supervised loss on reference texts of the iteration's prompts (the rows that the task
            says to imitate).
        target_kl: Stop an iteration's updates when the policy is 1.5 times this far from the one that sampled (nats a
            token); None never stops.
        max_grad_norm: Gradients are scaled down to this norm.
        decoding: How training episodes are sampled (None: as the policy does).
        seed: Seed of everything random here and in the environment.
        device: "auto" or a torch device.
        eval_every: Iterations between evaluations on validation prompts; 0 never evaluates.
        eval_prompts: Validation prompts of such an evaluation.
        eval_env: What to evaluate on (None: the validation split of `env`, without a guide).
        output_dir: Where the checkpoints ``last`` and ``best`` go.
        track: Accelerate trackers.
    """

    name = "ppo"

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        episodes_per_iteration: int = 64,
        minibatch_size: int = 16,
        n_epochs: int = 2,
        learning_rate: float = 1e-4,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        clip_range_vf: float | None = 0.2,
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        kl_coef: float = 0.02,
        kl_target: float | None = None,
        target_coef: float = 0.0,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        decoding: Decoding | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        eval_every: int = 0,
        eval_prompts: int = 256,
        eval_env: TextVectorEnv | None = None,
        output_dir: str | os.PathLike | None = None,
        track: str | GeneralTracker | Sequence[str | GeneralTracker] | None = None,
    ) -> None:
        hyperparameters = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "policy", "env", "eval_env", "track", "__class__")
        }
        check("minibatch_size", minibatch_size, minibatch_size >= 1, "at least 1")
        check("n_epochs", n_epochs, n_epochs >= 1, "at least 1")
        check("learning_rate", learning_rate, learning_rate > 0, "above 0")
        check("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
        check("gae_lambda", gae_lambda, 0 <= gae_lambda <= 1, "in [0, 1]")
        check("clip_range", clip_range, clip_range > 0, "above 0")
        check("clip_range_vf", clip_range_vf, clip_range_vf is None or clip_range_vf > 0, "None or above 0")
        check(
            "kl_target",
            kl_target,
            kl_target is None or (kl_target > 0 and kl_coef > 0),
            "above 0 (as kl_coef), or None",
        )
        check("target_kl", target_kl, target_kl is None or target_kl > 0, "None or above 0")
        check("max_grad_norm", max_grad_norm, max_grad_norm > 0, "above 0")
        for name in ("vf_coef", "ent_coef", "kl_coef", "target_coef"):
            check(name, hyperparameters[name], hyperparameters[name] >= 0, "at least 0")
        super().__init__(
            policy,
            env,
            episodes_per_iteration=episodes_per_iteration,
            decoding=decoding,
            seed=seed,
            device=device,
            eval_every=eval_every,
            eval_prompts=eval_prompts,
            eval_env=eval_env,
            output_dir=output_dir,
            track=track,
            hyperparameters=hyperparameters,
        )
        self.minibatch_size, self.n_epochs = minibatch_size, n_epochs
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.vf_coef, self.ent_coef, self.target_coef = vf_coef, ent_coef, target_coef
        self.kl_coef, self.kl_target = kl_coef, kl_target
        self.target_kl, self.max_grad_norm = target_kl, max_grad_norm
        # The critic begins at zero, so rewards are counted from the first iteration's mean. A constant on every
        # episode's one reward changes no preference; without it, the first advantages of a reward that is always
        # positive would mostly say how near the end a token is.
        self.reward_baseline: float | None = None
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self._optimizer = torch.optim.Adam(self.trainable, lr=learning_rate, eps=1e-5)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the policy and its value head."""
        return self._optimizer

    def iterate(self) -> dict[str, Any]:
        """Play episodes, give credit to tokens, take gradient steps."""
        rollout = self.collect()
        body = rollout.body
        log_ratio = (rollout.log_probs - self.reference_log_probs(rollout)).masked_fill(~body, 0)
        if self.reward_baseline is None:
            self.reward_baseline = float(rollout.rewards.mean())
        rewards = token_rewards(rollout.rewards - self.reward_baseline, log_ratio, body, self.kl_coef)
        advantages, returns = gae(rewards, rollout.values, body, self.gamma, self.gae_lambda)
        losses = self.update(rollout, whiten(advantages, body), returns)

        kl = float(log_ratio.sum() / body.any(1).sum().clamp(min=1))
        error_variance = (
            masked_mean((returns - rollout.values).square(), body) - masked_mean(returns - rollout.values, body) ** 2
        )
        variance = masked_mean(returns.square(), body) - masked_mean(returns, body) ** 2
        record = {
            "reward": float(rollout.rewards.mean()),
            "kl": kl,
            "kl_per_token": float(masked_mean(log_ratio, body)),
            "kl_penalty": self.kl_coef * kl,
            "kl_coef": self.kl_coef,
            **losses,
            "explained_variance": float(1 - error_variance / variance.clamp(min=1e-12)),
            "value": float(masked_mean(rollout.values, body)) + self.reward_baseline,
            "length": float((rollout.authors >= 0).sum(1).float().mean()),
            "stop_fraction": float(np.mean(rollout.finish_reason == "stop")),
            "policy_tokens": int(rollout.policy_tokens.sum()),
            "guide_tokens": int(rollout.guide_tokens.sum()),
            **{f"reward/{name}": float(part.mean()) for name, part in rollout.reward_parts.items() if name != "reward"},
        }
        if self.kl_target is not None:
            error = np.clip(kl / self.kl_target - 1, -0.2, 0.2)
            self.kl_coef = float(self.kl_coef * (1 + 0.1 * error))
        return record

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities (N, T) of the body tokens under the reference policy, zero elsewhere."""
        result = torch.zeros_like(rollout.log_probs)
        for rows in torch.nonzero(rollout.body.any(1)).flatten().split(self.minibatch_size):
            result[rows] = self.reference.evaluate(
                rollout.input_ids[rows], rollout.attention_mask[rows], rollout.columns[rows]
            ).log_probs
        return result

    def update(self, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
        """Take gradient steps over the rows that have a body.

        Args:
            rollout: N episodes.
            advantages: float (N, T).
            returns: float (N, T).

        Returns:
            Losses and diagnostics, means over the gradient steps that were taken.
        """
        body, columns = rollout.body, rollout.columns
        demonstrations = self.demonstrations(rollout) if self.target_coef else {}
        steps: list[dict[str, torch.Tensor]] = []
        stopped = False
        for rows in self.minibatches(torch.nonzero(body.any(1)).flatten()):
            now = self.policy.evaluate(rollout.input_ids[rows], rollout.attention_mask[rows], columns[rows])
            terms = ppo_loss(
                log_probs=now.log_probs,
                values=now.values,
                entropy=now.entropy,
                old_log_probs=rollout.log_probs[rows],
                old_values=rollout.values[rows],
                advantages=advantages[rows],
                returns=returns[rows],
                mask=body[rows],
                clip_range=self.clip_range,
                clip_range_vf=self.clip_range_vf,
                vf_coef=self.vf_coef,
                ent_coef=self.ent_coef,
            )
            stopped = self.target_kl is not None and float(terms.approx_kl) > 1.5 * self.target_kl
            if stopped:
                break
            step = {name: term.detach() for name, term in terms._asdict().items()}
            loss = terms.loss
            examples = [demonstrations[row] for row in rows.tolist() if row in demonstrations]
            if examples:
                step["target_loss"] = supervised_loss(self.policy, examples, self.env.pad_token_id)
                loss = loss + self.target_coef * step["target_loss"]
            self.check_finite("loss", loss)
            self.optimizer.zero_grad()
            loss.backward()
            step["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm)
            self.check_finite("gradient norm", step["gradient_norm"])
            self.optimizer.step()
            steps.append(step)
        means = {
            name: float(torch.stack([step[name].detach() for step in steps if name in step]).mean())
            for name in {name for step in steps for name in step}
        }
        return {**dict(sorted(means.items())), "gradient_steps": len(steps), "stopped_early": float(stopped)}

    def minibatches(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Split rows at random, `n_epochs` times."""
        random = np.random.default_rng([self.seed, self.iteration])
        for _ in range(self.n_epochs):
            yield from rows[torch.from_numpy(random.permutation(len(rows))).to(rows.device)].split(self.minibatch_size)

    def demonstrations(self, rollout: Rollout) -> dict[int, Example]:
        """One reference text for each row with a prompt that the task says to imitate."""
        imitate = self.env.task.demonstration or (lambda row: True)
        prompts, masks = (
            array[:, : rollout.prompt_columns].cpu().numpy() for array in (rollout.input_ids, rollout.attention_mask)
        )
        random = np.random.default_rng([self.seed, self.iteration, 1])
        examples = {}
        for row, (sample, references) in enumerate(zip(rollout.sample_ids, rollout.references, strict=True)):
            if references and (sample < 0 or imitate(self.env.data.rows[int(sample)])):
                text = references[random.integers(len(references))]
                prompt_ids = prompts[row][masks[row] > 0].tolist()
                examples[row] = encode_example(
                    self.env.tokenizer, rollout.prompts[row], prompt_ids, text, self.env.max_new_tokens
                )
        return examples

    def training_state(self) -> dict[str, Any]:
        """Add the KL coefficient, which may have moved, and the reward's baseline."""
        return {**super().training_state(), "kl_coef": self.kl_coef, "reward_baseline": self.reward_baseline}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.kl_coef, self.reward_baseline = state["kl_coef"], state["reward_baseline"]

    def save_models(self, folder: Path) -> None:
        """Write the policy, and the reference policy into the folder ``reference`` beside it."""
        super().save_models(folder)
        self.reference.save_pretrained(folder / "reference")

    def load_models(self, folder: Path) -> None:
        """Read the reference policy."""
        reference = type(self.policy).from_pretrained(folder / "reference", device=self.policy.device)
        self.reference = reference.requires_grad_(False)
