"""ReLIFT: GRPO, between whose iterations the guide's texts for unsolved problems are learned."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from agents.algorithm import check_guide
from agents.grpo import GRPO
from agents.rollout import Rollout
from agents.sharding import load_optimizer, whole
from agents.supervised import encode_written, supervised_step, written_by_guide
from textgym.checks import check
from textgym.guides import Author


class ReLIFT(GRPO):
    """Reinforcement learning interleaved with online fine-tuning (Ma et al. 2025, arXiv 2506.07527).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end | none | body; likelihood of the guide's whole texts, in steps of their own | none |

    For every group without a success the guide writes a text, which waits in a buffer. An iteration after which
    `buffer_size` texts wait ends with a supervised step on the latest of them, taken by an Adam of its own; as many of
    the others go on waiting, and older ones are dropped. A problem that stays unsolved enters the buffer again whenever
    it is played; its text is kept, and not written again. References are learned where the task says to imitate them.

    Records have the share of groups without a success, "unsolved_groups", the number of texts that wait, "buffer", and
    where a supervised step was taken its loss, "supervised_loss".

    Differs from the paper: texts that the guide got wrong can be left out (`min_reward`); the authors' data has none.

    Raises:
        ValueError: As for `GroupPolicyGradient`, or `dead_groups` is not "keep".
    """

    name = "relift"

    group_size: int = 8
    """k, the number of texts of a group."""
    buffer_size: int = 64
    """Number of texts of a supervised step; 64 as in the authors' code."""
    min_reward: float | None = None
    """The least reward of a text of the guide that is learned; None: all are."""
    kl_coef: float = 0.0
    """Weight of the KL penalty; none as published."""
    scale: Literal["group", "batch", "none"] = "none"
    """As for `GRPO`."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide."""
        super().check_hyperparameters()
        check("buffer_size", self.buffer_size, self.buffer_size >= 1, "at least 1")
        check(
            "dead_groups", self.dead_groups, self.dead_groups == "keep", f'"keep" for {self.name}, which imitates them'
        )
        check_guide(self.env, self.name)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supervised_optimizer = torch.optim.Adam(self.trainable, lr=self.learning_rate, eps=1e-5, fused=True)
        self.buffer: list[tuple[int, list[int]]] = []

    def play(self) -> Rollout:
        """Play groups, and let the guide write for those without a success."""
        rollout = super().play()
        unsolved = (rollout.rewards < self.success).view(-1, self.group_size).all(1)
        self.play_record["unsolved_groups"] = float(unsolved.float().mean())
        samples = rollout.sample_ids[:: self.group_size][unsolved.cpu().numpy()].tolist()
        if getattr(self.env.guide, "author", None) == Author.REFERENCE:
            samples = [sample for sample in samples if self.env.imitates(sample)]
        # Not yet in the buffer: nothing has been learned if the rest of the iteration fails.
        _, _, self.written = written_by_guide(self.accelerator, self.env, samples, [self.seed], self.min_reward)
        return rollout

    def iterate(self) -> dict[str, Any]:
        """An iteration of GRPO, and a supervised step if enough texts wait."""
        record = super().iterate()
        waiting = self.written + self.buffer
        if len(waiting) >= self.buffer_size:
            latest, waiting = waiting[: self.buffer_size], waiting[self.buffer_size : 2 * self.buffer_size]
            for group in self.supervised_optimizer.param_groups:
                group["lr"] = record["learning_rate"]
            examples = encode_written(self.env, self.env.data, latest)
            # As many texts a pass as a minibatch of episodes takes.
            texts = math.ceil(self.minibatch_size / self.gradient_accumulation_steps)
            with self.learning():
                loss = supervised_step(self, self.supervised_optimizer, examples, self.max_grad_norm, texts)
            record["supervised_loss"] = float(loss)
        self.buffer = waiting  # not before: a step that fails is taken again with the same texts
        return {**record, "buffer": len(self.buffer)}

    def training_state(self) -> dict[str, Any]:
        """Add the buffer, and the optimiser of the supervised steps."""
        own = {"buffer": self.buffer, "supervised_optimizer": whole(self.supervised_optimizer.state_dict())}
        return {**super().training_state(), **own}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.buffer = [(sample, list(ids)) for sample, ids in state["buffer"]]
        load_optimizer(self.supervised_optimizer, state["supervised_optimizer"])
