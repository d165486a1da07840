"""GAIL: the reward is a discriminator that learns to tell the policy's texts from references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import softplus

from agents.ppo import PPO
from agents.processes import in_shares, reduce_gradients, reduce_terms, share_of_loss
from agents.rollout import Rollout
from agents.supervised import Example, collate
from textgym.checks import check

if TYPE_CHECKING:
    from torch import nn


class GAIL(PPO):
    """Generative adversarial imitation learning (Ho and Ermon 2016, arXiv 1606.03476, algorithm 1), with PPO's steps.

    The discriminator D(x, y) is the probability that a text is a reference: a copy of the starting policy whose value
    head, read after the last token, gives the log-odds. Every iteration it first learns from the policy's texts and the
    references of the same prompts (so that a prompt tells nothing about the class), and the reward of a text is then
    ``-log(1 - D(x, y))``. The task's own reward is recorded as "reward" and trains nothing.

    Differs from the paper: gradient steps are PPO's, not TRPO's; D classifies whole texts, not single steps.

    Raises:
        ValueError: An argument is wrong; while learning, an iteration without any reference.
    """

    name = "gail"

    discriminator_learning_rate: float = 1e-4
    """Step size of the discriminator's Adam."""
    discriminator_epochs: int = 1
    """The discriminator's passes over an iteration's texts."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        rate, epochs = self.discriminator_learning_rate, self.discriminator_epochs
        check("discriminator_learning_rate", rate, rate > 0, "above 0")
        check("discriminator_epochs", epochs, epochs >= 1, "at least 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.discriminator = self.policy.copy()  # frozen weights stay frozen
        self.discriminator_optimizer = torch.optim.Adam(
            [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad],
            lr=self.discriminator_learning_rate,
        )
        self._rewards = torch.zeros(0)

    def play(self) -> Rollout:
        """Play episodes, train the discriminator on them, and compute its rewards."""
        rollout = super().play()
        self.discriminator_record = self.train_discriminator(rollout)
        with torch.no_grad():
            self._rewards = in_shares(
                self.accelerator,
                torch.zeros_like(rollout.rewards),
                torch.arange(len(rollout), device=rollout.rewards.device),
                self.minibatch_size,
                lambda rows: softplus(self.log_odds(rollout, rows)),
            )
        self.check_finite("discriminator reward", self._rewards)
        return rollout

    def rewards(self, rollout: Rollout) -> torch.Tensor:
        """The discriminator's rewards of this iteration's texts, ``-log(1 - D)``."""
        return self._rewards

    def iterate(self) -> dict[str, Any]:
        """Add the discriminator's loss, accuracy and mean reward to the record."""
        record = super().iterate()
        return {**record, "discriminator_reward": float(self._rewards.mean()), **self.discriminator_record}

    def train_discriminator(self, rollout: Rollout) -> dict[str, float]:
        """Train the discriminator on pairs of a reference and a text of one prompt.

        Returns:
            Its loss and its accuracy before each step, means over the steps.
        """
        examples = self.demonstrations(rollout)
        if not examples:
            raise ValueError(
                f"env must have references for {self.name}: no sample of iteration {self.iteration + 1} has one "
                "that the task says to imitate"
            )
        paired = np.array(sorted(examples))
        parameters = [weight for weight in self.discriminator.parameters() if weight.requires_grad]
        random, steps = np.random.default_rng([self.seed, self.iteration, 2]), []
        for _ in range(self.discriminator_epochs):
            order = random.permutation(paired)
            for start in range(0, len(order), self.minibatch_size):
                chosen = order[start : start + self.minibatch_size]
                own_rows, weight = share_of_loss(self.accelerator, chosen)
                references = self.log_odds_of([examples[row] for row in own_rows])
                texts = self.log_odds(rollout, torch.from_numpy(own_rows).to(references.device))
                loss = weight * (softplus(-references).sum() / len(chosen) + softplus(texts).sum() / len(chosen))
                correct = weight * torch.cat([references > 0, texts < 0]).sum() / (2 * len(chosen))
                self.discriminator_optimizer.zero_grad()
                loss.backward()
                step = reduce_terms(self.accelerator, {"loss": loss.detach(), "accuracy": correct})
                self.check_finite("discriminator loss", step["loss"])
                reduce_gradients(self.accelerator, parameters)
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                self.discriminator_optimizer.step()
                steps.append((float(step["loss"]), float(step["accuracy"])))
        loss_mean, accuracy = np.mean(steps, axis=0)
        return {"discriminator_loss": float(loss_mean), "discriminator_accuracy": float(accuracy)}

    def log_odds(self, rollout: Rollout, rows: torch.Tensor) -> torch.Tensor:
        """Log-odds of D for some of the policy's texts."""
        ends = rollout.prompt_columns + (rollout.authors[rows] >= 0).sum(1, keepdim=True)
        return self.discriminator.values(rollout.input_ids[rows], rollout.attention_mask[rows], ends).squeeze(1)

    def log_odds_of(self, examples: list[Example]) -> torch.Tensor:
        """Log-odds of D for references."""
        input_ids, attention_mask, columns = (
            tensor.to(self.policy.device)
            for tensor in collate(examples, self.env.pad_token_id, self.env.max_prompt_tokens)
        )
        ends = columns.amax(1, keepdim=True) + 1
        return self.discriminator.values(input_ids, attention_mask, ends).squeeze(1)

    def models(self) -> dict[str, nn.Module]:
        """Add the discriminator."""
        return {**super().models(), "discriminator": self.discriminator}

    def training_state(self) -> dict[str, Any]:
        """Add the discriminator's optimiser."""
        return {**super().training_state(), "discriminator_optimizer": self.discriminator_optimizer.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
