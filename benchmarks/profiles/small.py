"""Real data, language models of a few million parameters: hours on two CPU cores.

With ``--base`` the start model is that model; without, a GPT-2 of about six million parameters is trained on the task's
text. What is published for full-size models (arXiv 2306.11816) is kept where a small model can follow it.
"""

from benchmarks.profiles import LanguageModel, Profile, TaskProfile
from benchmarks.profiles.suite import suite

LANGUAGE_MODEL = LanguageModel(
    n_embd=256,
    n_layer=5,
    n_head=4,
    training={"n_epochs": 4, "episodes_per_iteration": 4096, "minibatch_size": 32, "learning_rate": 1e-3},
)
SUPERVISED = {"n_epochs": 2, "episodes_per_iteration": 2048, "minibatch_size": 32, "learning_rate": 3e-4}
RL = {
    "minibatch_size": 64,
    "n_epochs": 2,
    "learning_rate": 1e-4,
    "eval_every": 5,
    "eval_prompts": 112,
}

IMDB = TaskProfile(
    env_id="textgym/IMDB-v0",
    language_model=LANGUAGE_MODEL,
    supervised=SUPERVISED,
    episodes=112 * 20,
    # At 0.04 PPO pays more for its KL than it gains in reward: it ends below supervised learning on its own objective.
    rl=RL | {"episodes_per_iteration": 112, "minibatch_size": 56, "kl_coef": 0.01},
    rows=suite(iterations=20, beta=0.6, aggrevated_beta=0.8),
    decoding={"top_k": 50, "min_new_tokens": 48},
    test_prompts=1000,
)
COMMONGEN = TaskProfile(
    env_id="textgym/CommonGen-v0",
    language_model=LANGUAGE_MODEL,
    # Looked at less often: after 2,048 of these short texts the validation loss is noise, and patience ends too early.
    supervised=SUPERVISED | {"episodes_per_iteration": 8192, "learning_rate": 1e-3},
    episodes=128 * 40,
    rl=RL | {"episodes_per_iteration": 128, "learning_rate": 1.5e-4, "kl_coef": 0.005, "eval_every": 10},
    rows=suite(iterations=40, beta=0.8, aggrevated_beta=0.8),
    decoding={"min_new_tokens": 5},
    test_prompts=1000,
)
TLDR = TaskProfile(
    env_id="textgym/TLDR-v0",
    language_model=LANGUAGE_MODEL,
    supervised=SUPERVISED,
    episodes=128 * 12,
    # One pass in smaller steps: a pass over these prompts costs as much as writing the texts.
    rl=RL
    | {
        "episodes_per_iteration": 128,
        "minibatch_size": 32,
        "n_epochs": 1,
        "learning_rate": 1.5e-4,
        "kl_coef": 0.2,
        "eval_every": 4,
    },
    # Rewards of the model of preferences are log-odds, about ten times as far apart as those of the other tasks.
    rows=suite(iterations=12, beta=0.8, aggrevated_beta=1.0, critic={"clip_range_vf": None, "vf_coef": 0.01}),
    env={"max_prompt_tokens": 256, "reward": "preference"},
    # Without, PPO learns to write next to nothing: a model this small says least wrong in "I buy it." A guide that may
    # end sooner would show, and be paid for, what the learner must not do.
    decoding={"min_new_tokens": 24},
    guide_decoding={"top_p": 0.92, "top_k": 50, "min_new_tokens": 24},
)

SMALL = Profile(
    name="small",
    source="hub",
    tasks={"imdb": IMDB, "commongen": COMMONGEN, "tldr": TLDR},
    default=("sl", "best-of-4", "ppo", "ppo++", "aggrevated", "lols", "d2lols", "dr-po", "rloo", "guided-rloo"),
)
