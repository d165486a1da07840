"""Mini data, models of about a million parameters: the whole comparison in minutes on two CPU cores."""

from benchmarks.profiles import LanguageModel, Profile, TaskProfile

LANGUAGE_MODEL = LanguageModel(
    n_embd=128,
    n_layer=2,
    n_head=4,
    training={"n_epochs": 1, "episodes_per_iteration": 1024, "minibatch_size": 32, "learning_rate": 3e-3},
)
SUPERVISED = {"n_epochs": 1, "episodes_per_iteration": 512, "minibatch_size": 32, "learning_rate": 1e-3}
RL = {
    "episodes_per_iteration": 64,
    "minibatch_size": 32,
    "n_epochs": 4,
    "learning_rate": 2e-4,
    "kl_coef": 0.01,
    "eval_every": 10,
    "eval_prompts": 64,
}
ALGORITHMS = {"ppo++": {"beta": 0.6}}

QUICK = Profile(
    name="quick",
    source="mini",
    tasks={
        name: TaskProfile(
            env_id=env_id,
            language_model=LANGUAGE_MODEL,
            supervised=SUPERVISED,
            episodes=64 * 30,
            rl=RL,
            algorithms=ALGORITHMS,
            env={"max_prompt_tokens": 160} if name == "tldr" else {},
            test_prompts=200,
        )
        for name, env_id in {
            "imdb": "textgym/IMDB-v0",
            "commongen": "textgym/CommonGen-v0",
            "tldr": "textgym/TLDR-v0",
        }.items()
    },
)
