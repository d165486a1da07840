"""Stable-Baselines3 and sb3-contrib on textgym.

.. code-block:: python

    envs = TextVecEnv(gym.make_vec("textgym/IMDB-v0", num_envs=32, tokenizer="gpt2"))
    model = stable_baselines3.PPO(CausalLMActorCriticPolicy, envs, policy_kwargs={"model": "gpt2"})
    model.learn(100_000)
    model.save("ppo")
"""

from agents.sb3.algorithm import KLPenalty, SB3Algorithm, SB3Policy
from agents.sb3.policies import (
    CausalLMActorCriticPolicy,
    MaskableCausalLMActorCriticPolicy,
    Portable,
    evaluate_transitions,
)
from agents.sb3.vec_env import TextVecEnv

__all__ = [
    "CausalLMActorCriticPolicy",
    "KLPenalty",
    "MaskableCausalLMActorCriticPolicy",
    "Portable",
    "SB3Algorithm",
    "SB3Policy",
    "TextVecEnv",
    "evaluate_transitions",
]
