"""Mini data, models of about a million parameters: the whole comparison in minutes on two CPU cores."""

from benchmarks.profiles import LanguageModel, Profile, TaskProfile
from benchmarks.profiles.suite import suite

LANGUAGE_MODEL = LanguageModel(
    n_embd=128,
    n_layer=2,
    n_head=4,
    training={"n_epochs": 1, "episodes_per_iteration": 2048, "minibatch_size": 32, "learning_rate": 3e-3},
)
SUPERVISED = {"n_epochs": 0.5, "episodes_per_iteration": 2048, "minibatch_size": 32, "learning_rate": 3e-3}
RL = {
    "episodes_per_iteration": 64,
    "minibatch_size": 32,
    "n_epochs": 3,
    "learning_rate": 1.5e-4,
    "kl_coef": 0.02,
    "eval_every": 8,
    "eval_prompts": 64,
}
# Texts of one sentence: an iteration is cheap, and needs more of them for the same signal.
SHORT_TEXTS = {"episodes_per_iteration": 128, "minibatch_size": 64, "learning_rate": 3e-4, "kl_coef": 0.03}

IMDB = TaskProfile(
    env_id="textgym/IMDB-v0",
    language_model=LANGUAGE_MODEL,
    supervised=SUPERVISED,
    episodes=64 * 24,
    rl=RL,
    rows=suite(iterations=24, beta=0.6, aggrevated_beta=0.8),
    decoding={"top_k": 50, "min_new_tokens": 48},
    test_prompts=250,
)
COMMONGEN = TaskProfile(
    env_id="textgym/CommonGen-v0",
    language_model=LANGUAGE_MODEL,
    supervised=SUPERVISED,
    episodes=128 * 32,
    rl=RL | SHORT_TEXTS,
    rows=suite(iterations=32, beta=0.8, aggrevated_beta=0.8),
    decoding={"min_new_tokens": 5},
    test_prompts=250,
)
TLDR = TaskProfile(
    env_id="textgym/TLDR-v0",
    language_model=LANGUAGE_MODEL,
    supervised=SUPERVISED,
    episodes=128 * 16,
    # The critic explains almost nothing of a summary's reward this early: credit comes from whole returns, and updates
    # are few and small, since larger ones (on validation prompts) only drift.
    rl=RL
    | {
        "episodes_per_iteration": 128,
        "minibatch_size": 128,
        "n_epochs": 2,
        "learning_rate": 1e-4,
        "kl_coef": 0.05,
    },
    rows=suite(iterations=16, beta=0.8, aggrevated_beta=1.0, critic={"gae_lambda": 1.0, "vf_coef": 0.5}),
    env={"max_prompt_tokens": 160},
    test_prompts=250,
)

QUICK = Profile(name="quick", source="mini", tasks={"commongen": COMMONGEN, "imdb": IMDB, "tldr": TLDR})
