"""Rows of the profiles here: all algorithms, guided variants, best-of-n, dearer guides, learners below their guide.

`d2lols-early` imitates for half as long as `d2lols`; `guide` is the guide itself, which a learner is to surpass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.profiles import Row

GROUP = {"group_size": 4}
# Its KL is a term of the loss beside advantages in units of a standard deviation, so the weight that others put into
# the reward means something else here.
PUBLISHED_GRPO = {"kl_coef": 0.04}
HANDOFF_COSTS = (0.0, 0.002, 0.01)  # of a token; a reward is about 1 at most
FROM_BASE = ("ppo", "ppo++", "aggrevated", "d2lols")
HANDOFF_PROB = 0.02  # of a token, to begin with: most texts of 50 tokens are handed off


def suite(
    *,
    iterations: int,
    beta: float,
    aggrevated_beta: float,
    d2lols_tau: int | None = None,
    critic: Mapping[str, Any] | None = None,
) -> dict[str, Row]:
    """Make the rows of a task.

    Args:
        iterations: Iterations of a run.
        beta: Share of episodes with a prefix.
        aggrevated_beta: Share of AggreVaTeD's episodes with a body.
        d2lols_tau: Iterations in which D2LOLS imitates; None for the first 40% (published: 20 to 40%).
        critic: Arguments that only algorithms with a critic share.
    """
    critic = critic or {}
    d2lols_tau = round(0.4 * iterations) if d2lols_tau is None else d2lols_tau
    rows = {
        "sl": Row("sl"),
        "best-of-4": Row("sl", best_of=4),
        "ppo": Row("ppo", critic),
        "ppo++": Row("ppo++", {**critic, "beta": beta}),
        "dr-po": Row("dr-po", {**critic, "beta": beta}, env={"guide": "references"}),
        "aggrevated": Row("aggrevated", {**critic, "beta": aggrevated_beta}),
        "lols": Row("lols", {**critic, "tau": 0.8, "beta": 0.8}),
        "d2lols": Row("d2lols", {**critic, "tau": d2lols_tau, "beta": 0.8}),
        "gail": Row("gail", critic),
        "reinforce": Row("reinforce", {**critic, "n_epochs": 1, "minibatch_size": None}),
        "rloo": Row("rloo", {**GROUP, "n_epochs": 1}),
        "guided-rloo": Row("rloo", {**GROUP, "n_epochs": 1, "beta": beta}),
        "grpo": Row("grpo", {**GROUP, **PUBLISHED_GRPO}),
        "guided-grpo": Row("grpo", {**GROUP, **PUBLISHED_GRPO, "beta": beta}),
        **{
            f"handoff-{cost:g}": Row(
                "ppo", critic, env={"handoff": True, "handoff_cost": cost}, policy={"handoff_prob": HANDOFF_PROB}
            )
            for cost in HANDOFF_COSTS
        },
    }
    # The guide knows more than these learners, which have not learned the task from references.
    rows |= {f"{name}-from-base": replace(rows[name], start="start_model") for name in FROM_BASE}
    return rows | {
        "d2lols-early": Row("d2lols", {**rows["d2lols"].arguments, "tau": d2lols_tau // 2}),
        "guide": Row("sl", as_guide=True),
        # Three or so states of a text of 48 tokens: each costs as many texts as there are rollouts.
        "vine-ppo": Row("vine-ppo", {"rollouts_per_state": 4, "tokens_per_step": 16}),
        "pav": Row("pav", {**GROUP, "rollouts_per_state": 2, "tokens_per_step": 16}),
        # What learns from the guide's tokens; rewards of texts are dense, and half of the range counts as a success.
        "uft": Row("uft", GROUP),
        "luffy": Row("luffy", GROUP),
        "prefix-rft": Row("prefix-rft", GROUP),
        "hpt": Row("hpt", {**GROUP, "success": 0.5}),
        "relift": Row("relift", {**GROUP, "success": 0.5}),
        "mentor": Row("mentor", {**GROUP, "guided_texts": 2, "iterations": iterations}),
        # From below its guide: the supervised policy is the guide, and has nothing to learn from itself.
        "opd-from-base": Row("opd", {"n_epochs": 1, "kl_coef": 0.0}, start="start_model"),
        "gkd-from-base": Row("gkd", {"n_epochs": 1, "kl_coef": 0.0}, start="start_model"),
    }
