"""The base class of RLOO and GRPO: several texts of one prompt, which are each other's baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from agents.algorithm import check_guide
from agents.phase import Phase
from agents.policy_gradient import Credit, PolicyGradient
from agents.ppo_plus_plus import restart
from agents.processes import gather, in_parts, share
from agents.rollout import Rollout, replay
from textgym.checks import check, check_one_of, is_number
from textgym.seeding import hash64


class GroupPolicyGradient(PolicyGradient):
    """Base class of the algorithms whose baseline is a group: k texts of one prompt and, with a guide, one prefix.

    The rows of `env`, in every process, are a multiple of `group_size`.

    A group whose rewards are all equal is dead: its advantages are zero, apart from a KL penalty in the reward. Every
    record has the share of dead groups, "dead_groups". Where `dead_groups` is not "keep" it also has the share that is
    left, "dead_groups_left", and the mean reward before groups were replaced, "reward_before"; "reward" is that of the
    episodes that are learned.

    Raises:
        ValueError: The environment has no guide and `beta` is above 0, its number of rows is not a multiple of
            `group_size`, or an argument is wrong.
    """

    credits_texts = True

    group_size: int = 4
    """k, the number of texts of a group, which have the same prompt and, without a curriculum, the same prefix."""
    baseline: Literal["group", "start", "unguided"] = "group"
    """Whose returns are a text's baseline, where the guide helps with some texts of a group: those of the "group"
    (LUFFY, Yan et al. 2025, arXiv 2504.14945); of the texts of the group with the same prefix, "start", so that a start
    is not credited with being easy; or of those without prefix and guide, "unguided", where the others learn only from
    a higher return (MENTOR, arXiv 2510.04140). A text with nobody to compare with has the advantage 0."""
    beta: float = 0.0
    """Probability that a group starts from a guide's prefix, cut as in PPO++; 0 needs no guide."""

    dead_groups: Literal["keep", "rescue", "resample"] = "keep"
    """"rescue" plays groups without a success again from ever longer prefixes of the guide, until one has a success
    (BREAD, arXiv 2506.17211; Scaf-GRPO, arXiv 2510.19807, with hints). "resample" plays other samples in the place of
    dead groups (DAPO, Yu et al. 2025, arXiv 2503.14476). All tokens are counted. "keep" leaves groups as they are."""
    rescue_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    """Ascending parts of the guide's text that a rescue tries as prefixes."""
    resamplings: int = 4
    """Most rounds of "resample" in an iteration."""
    drop_dead: bool = False
    """Whether gradient steps leave out the groups that are dead in the end, as if they had not been played: the loss
    and the diagnostics are means over the others, and an iteration without any takes no step. That saves the time of
    their passes, which change nothing but the divisor of the loss, and the KL penalty of these texts."""
    success: float = 1.0
    """Reward from which a text is a success, for "rescue"."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide where `beta` needs one."""
        super().check_hyperparameters()
        check("group_size", self.group_size, self.group_size >= 2, "at least 2")
        check("beta", self.beta, 0 <= self.beta <= 1, "in [0, 1]")
        check_one_of("baseline", self.baseline, ("group", "start", "unguided"))
        check_one_of("dead_groups", self.dead_groups, ("keep", "rescue", "resample"))
        check("resamplings", self.resamplings, self.resamplings >= 1, "at least 1")
        check_rescue(self.rescue_fractions)
        if self.dead_groups == "rescue":
            check_guide(self.env, f'{self.name} with dead_groups="rescue"')
        if self.beta:
            check_guide(self.env, f"{self.name} with beta={self.beta}")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.env.num_envs
        check("group_size", self.group_size, rows % self.group_size == 0, f"a divisor of {rows} rows")

    @property
    def phase(self) -> Phase:
        """Groups restart from a guide's prefix with probability beta."""
        return restart(self.beta) if self.beta else Phase()

    def play(self) -> Rollout:
        """Play whole groups, one after another, and deal with the dead ones."""
        rollout = super().play()
        self.play_record["dead_groups"] = float(self.dead(rollout).float().mean())
        if self.dead_groups != "keep":
            self.play_record["reward_before"] = float(rollout.rewards.mean())
            rollout = self.rescue(rollout) if self.dead_groups == "rescue" else self.resample(rollout)
            self.play_record["dead_groups_left"] = float(self.dead(rollout).float().mean())
            self.last_rollout = rollout
        return rollout

    def dead(self, rollout: Rollout) -> torch.Tensor:
        """Bool (groups,): whether the rewards of a group are all equal."""
        return dead(rollout, self.group_size)

    def rescue(self, rollout: Rollout) -> Rollout:
        """Play groups without a success again, from the shortest prefix of the guide's text that leads to one."""

        def play(rows: torch.Tensor, fraction: float, attempt: int) -> Rollout:
            return self.replay_from(rollout, rows, fraction, attempt)

        return rescue(rollout, self.group_size, self.rescue_fractions, self.success, play)

    def resample(self, rollout: Rollout) -> Rollout:
        """Play other samples in the place of dead groups; a curriculum plans them, and does not learn from them."""
        random = np.random.default_rng([self.seed, self.iteration, 4])
        for attempt in range(self.resamplings):
            rows = self.rows(torch.nonzero(self.dead(rollout)).flatten())
            count = len(rows) // self.group_size
            if not count:
                break
            guidance = self.guidance_of(rows.cpu().numpy())
            if self.rule is not None:
                plan = self.rule.plan(self.iteration, count, self.group_size, random)
                options = plan.options(np.arange(len(rows)), guidance, text_seed=self.seed)
            else:
                samples = random.integers(len(self.env.data), size=count)
                options = {"index": samples.repeat(self.group_size).tolist(), "guidance": guidance}
            tried = self.replay(rollout, rows, options, attempt)
            alive = ~self.dead(tried).repeat_interleave(self.group_size)
            rollout = rollout.with_rows(rows[alive], tried[alive])
        return rollout

    def rows(self, groups: torch.Tensor) -> torch.Tensor:
        """The rows of some groups, int64."""
        return rows_of(groups, self.group_size)

    def replay_from(
        self, rollout: Rollout, rows: torch.Tensor, fraction: float, attempt: int, group_size: int | None = None
    ) -> Rollout:
        """Play some episodes again from a fraction of the guide's text (other arguments as for `replay`)."""
        places = rows.cpu().numpy()
        guidance = [given.with_prefix(fraction, self.seed) for given in self.guidance_of(places)]
        options = {"index": rollout.sample_ids[places].tolist(), "guidance": guidance}
        return self.replay(rollout, rows, options, attempt, group_size)

    def replay(
        self,
        rollout: Rollout,
        rows: torch.Tensor,
        options: Mapping[str, Sequence[Any]],
        attempt: int,
        group_size: int | None = None,
    ) -> Rollout:
        """Play some episodes again, each process its share, and count them.

        Args:
            rollout: The iteration's episodes.
            rows: int64 (n,), their rows.
            options: Reset options, each with an entry per row.
            attempt: Number of times that this was done before in the iteration.
            group_size: Neighbouring episodes that share a prefix; None for whole groups, as they were played.
        """
        size = group_size or (1 if self.rule else self.group_size)
        numbers = rows.cpu().numpy()
        own = share(self.accelerator, torch.arange(len(rows)).view(-1, size)).flatten().tolist()
        played = rollout[rows[:0]]
        if own:
            played = replay(
                self.env,
                self.policy,
                seeds=hash64(self.seed, self.iteration, attempt, 1, numbers[own]),
                options={name: [values[row] for row in own] for name, values in options.items()},
                group_size=size,
                decoding=self.decoding,
            )
        everything = Rollout.concatenate(gather(self.accelerator, [played]))
        self.check_finite("reward", everything.rewards)
        self.count(everything)
        return everything

    def learned_rows(self, rollout: Rollout, credit: Credit) -> torch.Tensor:
        """Leave out dead groups if `drop_dead` says so, unless the guide's tokens are learned whatever they earn."""
        rows = super().learned_rows(rollout, credit)
        if not self.drop_dead:
            return rows
        left = ~self.dead(rollout)
        if self.imitation is not None and not self.imitation.credited:
            left |= credit.guided.any(1).view(-1, self.group_size).any(1)
        return rows[left[rows // self.group_size]]

    def minibatches(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Split groups at random, `n_epochs` times: a group stays together, so that its prompt is read once."""
        random = np.random.default_rng([self.seed, self.iteration])
        for _ in range(self.n_epochs):
            places = torch.from_numpy(random.permutation(len(self.last_rollout) // self.group_size)).to(rows.device)
            order = places[rows // self.group_size].argsort(stable=True)
            yield from in_parts(rows[order], self.minibatch_size)

    def group_returns(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> torch.Tensor:
        """Returns, (groups, k): rewards, minus kl_coef times the summed KL if it is part of the reward."""
        returns = self.rewards(rollout)
        if self.kl_penalty == "reward":
            returns = returns - self.kl_coef * rollout.log_ratio(reference_log_probs).sum(1)
        return returns.unflatten(0, (-1, self.group_size))

    def helped(self, rollout: Rollout) -> torch.Tensor:
        """Bool (N,): in which texts the guide takes part, for the baseline "unguided"."""
        return (rollout.prefix_length > 0) | rollout.guided.any(1)

    def relative(self, rollout: Rollout, returns: torch.Tensor, leave_one_out: bool) -> torch.Tensor:
        """Returns (groups, k) minus their `baseline`, a mean over other texts and, unless `leave_one_out`, the text."""
        starts = rollout.prefix_length.view_as(returns)
        helped = self.helped(rollout).view_as(returns)
        if self.baseline == "start":  # prefixes of one length are equal: they are cut from one text
            members = starts[:, :, None] == starts[:, None, :]
        else:
            members = ~helped[:, None, :] | (self.baseline == "group")
            members = members.expand(-1, self.group_size, -1)
        if leave_one_out:
            members = members & ~torch.eye(self.group_size, dtype=torch.bool, device=returns.device)
        count = members.sum(2)
        advantages = returns - (members * returns[:, None, :]).sum(2) / count.clamp(min=1)
        if self.baseline == "unguided":
            advantages = torch.where(helped, advantages.clamp(min=0), advantages)
        return advantages.masked_fill(count == 0, 0)


def dead(rollout: Rollout, group_size: int) -> torch.Tensor:
    """Bool (groups,): whether the rewards of a group are all equal."""
    rewards = rollout.rewards.unflatten(0, (-1, group_size))
    return rewards.amax(1) == rewards.amin(1)


def rows_of(groups: torch.Tensor, group_size: int) -> torch.Tensor:
    """The rows of some groups, int64."""
    return (groups[:, None] * group_size + torch.arange(group_size, device=groups.device)).flatten()


def rescue(
    rollout: Rollout,
    group_size: int,
    fractions: Sequence[float],
    success: float,
    play: Callable[[torch.Tensor, float, int], Rollout],
) -> Rollout:
    """Replace groups without a success by the first attempt that has one, from ever longer prefixes of the guide.

    Args:
        rollout: Groups of episodes.
        group_size: Episodes of a group.
        fractions: Parts of the guide's text that the attempts start from, ascending.
        success: Reward from which an episode counts as a success.
        play: Plays the episodes of some rows again, given the rows (int64 (n,)), the fraction and the number of the
            attempt.
    """

    def successful(played: Rollout) -> torch.Tensor:
        return (played.rewards >= success).unflatten(0, (-1, group_size)).any(1)

    for attempt, fraction in enumerate(fractions):
        failed = torch.nonzero(~successful(rollout)).flatten()
        if not len(failed):
            break
        rows = rows_of(failed, group_size)
        tried = play(rows, fraction, attempt)
        helped = successful(tried).repeat_interleave(group_size)
        rollout = rollout.with_rows(rows[helped], tried[helped])
    return rollout


def check_rescue(fractions: Sequence[float]) -> None:
    """Refuse fractions that a rescue cannot try.

    Raises:
        ValueError: They are not ascending numbers in (0, 1], at least one.
    """
    valid = all(is_number(fraction) and 0 < fraction <= 1 for fraction in fractions)
    valid = valid and list(fractions) == sorted(fractions) and len(fractions) > 0
    check("rescue_fractions", fractions, valid, "ascending numbers in (0, 1]")
