"""The published models and settings (arXiv 2306.11816 and its code), for GPUs: models and data come from the hub.

Two rewards differ: CommonGen's SPICE needs a parser that this project has not (its own reward is CIDEr-D and coverage),
and TL;DR's preferences are learned by the environment's own model.
"""

from benchmarks.profiles import Profile, TaskProfile
from benchmarks.profiles.suite import suite

SUPERVISED = {"n_epochs": 2, "episodes_per_iteration": 2048, "minibatch_size": 32, "learning_rate": 1e-5}
RL = {"target_coef": 0.1, "eval_every": 10}  # lambda .95 and clipping at .2 are the defaults

IMDB = TaskProfile(
    env_id="textgym/IMDB-v0",
    base="gpt2",
    supervised=SUPERVISED,
    episodes=50 * 112,
    rl={
        **RL,
        "episodes_per_iteration": 112,
        "minibatch_size": 28,
        "n_epochs": 5,
        "learning_rate": 1e-5,
        "kl_coef": 0.001,
    },
    rows=suite(iterations=50, beta=0.6, aggrevated_beta=0.8, d2lols_tau=20, critic={"gamma": 0.99, "vf_coef": 0.5}),
    env={"max_prompt_tokens": 64, "max_new_tokens": 48, "reward": "lvwerra/distilbert-imdb"},
    decoding={"top_k": 50, "min_new_tokens": 48},
    test_prompts=1000,
)
COMMONGEN = TaskProfile(
    env_id="textgym/CommonGen-v0",
    base="t5-base",
    supervised=SUPERVISED,
    episodes=500 * 128,
    rl={
        **RL,
        "episodes_per_iteration": 128,
        "minibatch_size": 32,
        "n_epochs": 4,
        "learning_rate": 5e-6,
        "kl_coef": 0.0,
    },
    rows=suite(iterations=500, beta=0.8, aggrevated_beta=0.8, d2lols_tau=100, critic={"gamma": 0.99, "vf_coef": 30.0}),
    env={"max_prompt_tokens": 15, "max_new_tokens": 20},
    decoding={"min_new_tokens": 5},
    test_decoding={"num_beams": 5, "min_new_tokens": 5},
    guide_decoding={"top_p": 0.92},
    test_prompts=1000,
)
TLDR = TaskProfile(
    env_id="textgym/TLDR-v0",
    base="EleutherAI/gpt-j-6b",
    policy={"lora": {"r": 8, "lora_alpha": 64}, "quantization": "4bit"},
    supervised=SUPERVISED,
    episodes=1000 * 128,
    rl={
        **RL,
        "episodes_per_iteration": 128,
        "minibatch_size": 32,
        "n_epochs": 4,
        "learning_rate": 5e-6,
        "kl_coef": 0.002,
    },
    rows=suite(iterations=1000, beta=0.8, aggrevated_beta=1.0, d2lols_tau=200, critic={"gamma": 1.0, "vf_coef": 0.1}),
    env={"max_prompt_tokens": 500, "max_new_tokens": 50, "reward": "preference"},
    test_decoding={"greedy": True},
    guide_decoding={"top_p": 0.92},
    test_prompts=1000,
)

PAPER = Profile(
    name="paper",
    source="hub",
    tasks={"imdb": IMDB, "commongen": COMMONGEN, "tldr": TLDR},
    default=("sl", "ppo", "ppo++", "aggrevated", "lols", "d2lols"),
)
