"""Monte Carlo values of states, which an environment that restores any state gives for free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.processes import reduce
from agents.rollout import Rollout, replay
from textgym.guidance import Guidance
from textgym.seeding import hash64

if TYPE_CHECKING:
    from agents.policy_gradient import PolicyGradient

#: A sample, and the token ids of an unfinished text.
State = tuple[int, tuple[int, ...]]


def monte_carlo_values(
    algorithm: PolicyGradient, states: Sequence[State], count: int, guidance: Guidance | None = None
) -> tuple[torch.Tensor, int]:
    """The mean reward of further texts that complete each state.

    Each process completes every so many of the states. A state's completions depend on its place in the list, not on
    the number of rows or processes, and the environment's later episodes do not depend on them.

    Args:
        algorithm: Whose policy, environment and rewards are meant.
        states: S states.
        count: Number of texts for each.
        guidance: Who completes them; None for the guidance in force.

    Returns:
        The values, float (S,), and the number of tokens that the policy wrote.
    """
    accelerator, device = algorithm.accelerator, algorithm.policy.device
    rewards = torch.zeros(len(states) * count, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    own = np.arange(len(rewards)).reshape(-1, count)[accelerator.process_index :: accelerator.num_processes].flatten()
    if len(own):
        chosen = [states[number] for number in (own // count).tolist()]
        options: dict[str, list[Any]] = {
            "index": [sample for sample, _ in chosen],
            "prefix": [text for _, text in chosen],
        }
        if guidance is not None:
            options["guidance"] = [guidance] * len(own)
        rollout = replay(
            algorithm.env,
            algorithm.policy,
            # The last key, because those of `play` are hashes of four numbers too.
            seeds=hash64(algorithm.seed, algorithm.iteration, *np.divmod(own, count), 0),
            options=options,
            decoding=algorithm.decoding,
            values=False,
        )
        rewards[own] = algorithm.rewards(rollout)
        tokens = rollout.policy_tokens.sum()
    return reduce(accelerator, rewards).view(-1, count).mean(1), int(reduce(accelerator, tokens))


def progress(
    algorithm: PolicyGradient, rollout: Rollout, tokens_per_step: int, count: int, guidance: Guidance | None = None
) -> tuple[torch.Tensor, int]:
    """How much each step of an episode raises the value of its state.

    Every episode is cut into steps of so many decisions. The value of the state before a step is that of
    `monte_carlo_values`; after the last step it is the episode's own reward.

    Args:
        algorithm: As for `monte_carlo_values`.
        rollout: N episodes.
        tokens_per_step: Decisions of a step; 1 values every state.
        count: As for `monte_carlo_values`, as the next.
        guidance: As for `monte_carlo_values`.

    Returns:
        For all decisions of a step from state s to s' the difference V(s') - V(s), float (N, T), and the number of
        tokens that the policy wrote for these values.
    """
    decisions = rollout.decisions
    number = (decisions.cumsum(1) - 1).clamp(min=0)
    step = number // tokens_per_step
    starts = torch.nonzero(decisions & (number % tokens_per_step == 0))

    texts = rollout.input_ids[:, rollout.prompt_columns :].tolist()
    before = [(int(rollout.sample_ids[row]), tuple(texts[row][:column])) for row, column in starts.tolist()]
    # Texts of one prompt share states, which are valued once. Those of one length are completed together.
    states = sorted(set(before), key=lambda state: (len(state[1]), state))
    found, tokens = monte_carlo_values(algorithm, states, count, guidance)
    value = dict(zip(states, found.tolist(), strict=True))

    # Before each step, and from an episode's end on its reward.
    values = algorithm.rewards(rollout)[:, None].repeat(1, int(step.max()) + 2)
    values[starts[:, 0], step[starts[:, 0], starts[:, 1]]] = values.new_tensor([value[state] for state in before])
    return values.gather(1, step + 1) - values.gather(1, step), tokens
