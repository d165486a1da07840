"""Stable-Baselines3 and sb3-contrib on textgym.

.. code-block:: python

    envs = TextVecEnv(gym.make_vec("textgym/IMDB-v0", num_envs=32, tokenizer="gpt2"))
    given = {"policy_kwargs": {"model": "gpt2"}, **LANGUAGE_MODEL_DEFAULTS}
    model = stable_baselines3.PPO(CausalLMActorCriticPolicy, envs, n_steps=48, batch_size=768, **given)
    model.learn(100_000)
    model.save("ppo")
"""

from agents.sb3.algorithm import KLPenalty, SB3Algorithm, SB3Policy
from agents.sb3.policies import (
    LANGUAGE_MODEL_DEFAULTS,
    CausalLMActorCriticPolicy,
    MaskableCausalLMActorCriticPolicy,
    Portable,
    evaluate_transitions,
)
from agents.sb3.vec_env import TextVecEnv

__all__ = [
    "LANGUAGE_MODEL_DEFAULTS",
    "CausalLMActorCriticPolicy",
    "KLPenalty",
    "MaskableCausalLMActorCriticPolicy",
    "Portable",
    "SB3Algorithm",
    "SB3Policy",
    "TextVecEnv",
    "evaluate_transitions",
]
