"""What all algorithms promise: reproducible, exactly resumable, clear when something is wrong."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import Notebook

from agents import ALGORITHMS, PPO, SL, CausalLMPolicy, PPOPlusPlus
from agents.supervised import supervised_loss
from textgym.checks import check
from textgym.engine import TextVectorEnv
from textgym.guides import CallableGuide, Completion
from textgym.guides.local import LocalGuide
from textgym.seeding import hash64

GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist())
        for r in requests
    ]
)


# What an algorithm can be beside its defaults, each on top of one of them.
SCHEDULED = {"lr_schedule": "cosine", "clip_schedule": "linear", "schedule_episodes": 80}
VARIANTS = {
    "ppo with a hand-off": ("ppo", {"ent_coef": 0.01, "kl_penalty": "loss"}),
    "ppo with a critic of its own and schedules": ("ppo", {"critic": "separate", **SCHEDULED}),
    "lols with a critic of its own": ("lols", {"critic": "separate", "tau": 0.5}),
    "d2lols that switches": ("d2lols", {"tau": 1, "gradient_accumulation_steps": 3}),
    "gail with a critic of its own": ("gail", {"critic": "separate", "discriminator_epochs": 2}),
    "guided rloo": ("rloo", {"beta": 0.7, "n_epochs": 2}),
    "guided rloo with a hand-off": ("rloo", {"beta": 0.7, "kl_penalty": "loss"}),
    "ppo with a curriculum": ("ppo", {"curriculum": "uniform"}),
    "grpo with adaback": ("grpo", {"curriculum": {"name": "adaback", "threshold": 0.6}}),
    "grpo with the trend": ("grpo", {"curriculum": "trend"}),
    "rloo with pope": ("rloo", {"curriculum": {"name": "pope", "tries": 4, "success": 0.8}}),
    "grpo with its own prefixes": ("grpo", {"curriculum": {"name": "prefix-rl", "success": 0.5}}),
    "grpo with rescue": ("grpo", {"dead_groups": "rescue", "success": 0.8}),
    "rloo with adaback and other samples": ("rloo", {"curriculum": "adaback", "dead_groups": "resample"}),
    "grpo in mixed groups": ("grpo", {"curriculum": "mixed", "baseline": "start", "guide_loss": "clipped"}),
    "ppo that imitates": ("ppo", {"curriculum": "uniform", "guide_loss": "likelihood", "critic": "separate"}),
    "guided grpo": ("grpo", {"beta": 1.0, "lr_schedule": "linear", "schedule_episodes": 64}),
    "relift with a small buffer": ("relift", {"buffer_size": 3, "success": 0.8, "group_size": 4}),
    "opd of whole texts, with reward": ("opd", {"gamma": 1.0, "reward_coef": 0.5, "n_epochs": 2}),
    "vine-ppo with a hand-off": ("vine-ppo", {"kl_penalty": "reward", "tokens_per_step": 2, "rollouts_per_state": 3}),
}


def guide_of(name, make_policy):
    """A guide that an algorithm can learn from."""
    if name in ("opd", "gkd"):
        return LocalGuide(make_policy(1).model, device="cpu")
    return "references" if name == "dr-po" else GUIDE


def make_agent(name, make_env, make_policy, **arguments):
    if name == "sl":
        return SL(make_policy(), make_env(4), episodes_per_iteration=16, learning_rate=3e-3, **arguments)
    handoff = name.endswith("hand-off")
    name, own = VARIANTS.get(name, (name, {}))
    policy, env = make_policy(), make_env(8, guide=guide_of(name, make_policy), handoff=handoff)
    if handoff:
        policy = type(policy)(policy.model, policy.tokenizer, handoff_prob=0.2)
    return ALGORITHMS[name](policy, env, episodes_per_iteration=16, **own, **arguments)


def iterate(agent, times):
    """Iterations, however many episodes each plays."""
    for _ in range(times):
        agent.learn(total_episodes=1)


def numbers(history):
    """A history without its clocks."""
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


@pytest.mark.parametrize("name", [*sorted(ALGORITHMS), *VARIANTS])
def test_a_seed_decides_the_history_to_the_bit(name, make_env, make_policy):
    histories = []
    for seed in (3, 3, 4):
        agent = make_agent(name, make_env, make_policy, seed=seed, eval_every=2, eval_prompts=8)
        histories.append(numbers(agent.learn(total_episodes=48).history))
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


def arrays(rollout):
    """What a rollout has, by name, with the kind of its numbers."""
    values = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    parts = {f"reward_parts/{name}": numbers for name, numbers in values.pop("reward_parts").items()}
    return {name: (np.asarray(value).dtype, np.asarray(value)) for name, value in (values | parts).items()}


@pytest.mark.parametrize("name", [*sorted(ALGORITHMS), *VARIANTS])
def test_saving_and_loading_changes_nothing(name, make_env, make_policy, tmp_path):
    arguments = {} if name == "sl" else {"kl_target": 0.1, "kl_coef": 0.05, "target_coef": 0.1}
    whole = make_agent(name, make_env, make_policy, **arguments)
    iterate(whole, 4)

    part = make_agent(name, make_env, make_policy, **arguments)
    iterate(part, 2)
    part.save(tmp_path / "checkpoint")
    last = getattr(part, "last_rollout", None)
    iterate(part, 1)  # what happens after a save is not in it
    resumed = type(part).load(tmp_path / "checkpoint", part.env)
    if last is not None:
        np.testing.assert_equal(arrays(resumed.last_rollout), arrays(last))
    iterate(resumed, 2)

    assert numbers(resumed.history) == numbers(whole.history)
    models = {"policy": whole.policy, **whole.models()}
    for kind, model in {"policy": resumed.policy, **resumed.models()}.items():
        for key, value in models.pop(kind).state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), (kind, key)
    assert not models
    assert resumed.num_timesteps == whole.num_timesteps == sum(r["policy_tokens"] for r in whole.history)


def in_double(part):
    """A rollout or credit with float64 arrays."""
    arrays = {field.name: getattr(part, field.name) for field in fields(part)}
    return replace(
        part, **{n: a.double() for n, a in arrays.items() if isinstance(a, torch.Tensor) and a.is_floating_point()}
    )


PIECES = {
    "ppo": {"ent_coef": 0.1},
    "ppo with a critic of its own and schedules": {},
    "ppo with a hand-off": {"kl_coef": 0.3},
    "ppo++": {"kl_penalty": "loss", "clip_range_vf": None},
    "aggrevated": {"kl_penalty": "loss", "beta": 0.6},
    "reinforce": {"kl_penalty": "loss", "minibatch_size": None},
    "rloo": {"kl_penalty": "loss"},
    "grpo": {"length_norm": "text"},
    "grpo by batch": {"length_norm": "batch"},
    "grpo by horizon": {"length_norm": "horizon", "scale": "batch"},
    "vine-ppo": {"tokens_per_step": 2, "rollouts_per_state": 3},
    "luffy": {},
    "hpt": {"success": 2.0},
    "grpo in mixed groups": {},
    "ppo that imitates": {},
    "gkd": {},
    "opd": {"kl_penalty": "loss", "reward_coef": 0.5},
}


@pytest.mark.parametrize("name", PIECES)
def test_a_minibatch_in_pieces_has_the_gradient_of_the_whole(name, make_env, make_policy):
    arguments = {"target_coef": 0.3, "max_grad_norm": 1e9, "kl_coef": 0.3, "minibatch_size": 16, **PIECES[name]}
    agent = make_agent(name.split(" by ")[0], make_env, make_policy, device="cpu", **arguments)
    agent.n_epochs, random = 1, torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, with critics that say something
        for parameter in agent.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    rollout = in_double(agent.play())
    for model in (agent.policy, *agent.models().values()):
        model.double()
    rollout.log_probs += 0.05 * torch.randn(rollout.log_probs.shape, generator=random)  # ratios that are not 1
    credit = in_double(agent.credit(rollout, agent.reference_log_probs(rollout)))
    if agent.imitation is not None:
        agent.credit_guide(rollout, credit, agent.imitation)
    start, results = [parameter.detach().clone() for parameter in agent.trainable], []
    for pieces in (1, 2, 5, 16):
        agent.gradient_accumulation_steps = pieces
        with torch.no_grad():
            for parameter, value in zip(agent.trainable, start, strict=True):
                parameter.copy_(value)
        losses = agent.update(rollout, credit)
        assert losses["gradient_steps"] == 1
        results.append((losses, [p.grad.clone() for p in agent.trainable if p.grad is not None]))
    assert {"target_loss", "loss"} <= results[0][0].keys()
    for losses, gradients in results[1:]:
        # Diagnostics are reported in float32.
        assert losses == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        for gradient, whole in zip(gradients, results[0][1], strict=True):
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-9)
    assert max(gradient.abs().max() for gradient in results[0][1]) > 1e-3


def test_a_checkpoint_of_another_algorithm_is_refused(make_env, make_policy, tmp_path):
    make_agent("ppo", make_env, make_policy).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="'ppo'"):
        SL.load(tmp_path / "ppo", make_env(4))
    with pytest.raises(ValueError, match="path"):
        PPO.load(tmp_path / "nowhere", make_env(8))


def test_numbers_that_are_not_finite_stop_with_a_clear_error(make_env, make_policy, tmp_path):
    calls = 0

    def exploding(*, prompts, completions, references):
        nonlocal calls
        calls += 1
        return [1e30 if calls == 3 else 0.5] * len(completions)

    env = make_env(16, reward=exploding)
    agent = PPO(make_policy(), env, episodes_per_iteration=16, output_dir=tmp_path / "run", seed=1)
    agent.learn(total_episodes=32)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="ppo, iteration 3: loss is not finite"):
        agent.learn(total_episodes=32)
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(value, before[name])
    assert sorted(made.name for made in (tmp_path / "run").iterdir()) == ["history.csv", "last"]
    assert PPO.load(tmp_path / "run" / "last", env).iteration == 2

    undefined = make_env(16, reward=lambda *, prompts, completions, references: [float("nan")] * len(completions))
    with pytest.raises(ValueError, match="finite") as error:
        PPO(make_policy(), undefined, episodes_per_iteration=16).learn(total_episodes=16)
    assert "iteration 1 of ppo" in error.value.__notes__[0]


def test_learning_evaluates_tracks_and_keeps_best_and_last(make_env, make_policy, tmp_path):
    notebook = Notebook()
    agent = PPO(
        make_policy(),
        make_env(16),
        episodes_per_iteration=16,
        learning_rate=3e-3,
        eval_every=2,
        eval_prompts=20,
        output_dir=tmp_path,
        track=[notebook],
    )
    agent.learn(total_episodes=16 * 6)
    judged = {record["iteration"]: record["eval/reward"] for record in agent.history if "eval/reward" in record}
    assert sorted(judged) == [2, 4, 6]
    best = PPO.load(tmp_path / "best", agent.env)
    assert judged[best.iteration] == max(judged.values()) == best.evaluate().reward
    assert PPO.load(tmp_path / "last", agent.env).iteration == 6
    assert [values for _, values in notebook.lines] == agent.history
    assert notebook.config["algorithm"] == "ppo"


def test_a_tracker_without_its_package_is_refused(make_env, make_policy, monkeypatch):
    monkeypatch.setattr("agents.processes.get_available_trackers", list)
    with pytest.raises(
        ImportError, match="track needs the packages of its trackers, and those of wandb, aim are not installed"
    ):
        PPO(make_policy(), make_env(16), episodes_per_iteration=16, track=["wandb", "aim"])


def test_checkpoints_that_an_end_came_between_are_those_of_an_unbroken_run(
    make_env, make_policy, tmp_path, monkeypatch
):
    def begin(folder):
        arguments = {"episodes_per_iteration": 8, "learning_rate": 3e-3, "eval_every": 1, "eval_prompts": 8}
        return PPO(make_policy(), make_env(8), output_dir=folder, **arguments)

    unbroken = begin(tmp_path / "unbroken").learn(total_episodes=8 * 4)
    best = PPO.load(tmp_path / "unbroken" / "best", unbroken.env)
    saved = []
    save = PPO.save

    def end_at(count):
        def saving(self, path):
            if len(saved) == count:
                raise KeyboardInterrupt
            saved.append(path)
            save(self, path)

        return saving

    ends = 0
    for count in range(1, 6):
        saved.clear()
        folder = tmp_path / str(count)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(PPO, "save", end_at(count))
            begin(folder).learn(total_episodes=8 * 4)
        ends += len(saved) == count
        agent = begin(folder)
        if (folder / "last").exists():
            agent = PPO.load(folder / "last", agent.env, output_dir=folder)
        agent.learn(total_episodes=8 * 4 - agent.num_episodes)
        again = PPO.load(folder / "best", agent.env)
        assert again.iteration == best.iteration
        torch.testing.assert_close(
            dict(again.policy.named_parameters()), dict(best.policy.named_parameters()), rtol=0, atol=0
        )
    assert ends == 5


def test_totals_and_callbacks_end_learning(make_env, make_policy):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8)
    agent.learn(total_episodes=9)
    assert (agent.num_episodes, agent.iteration) == (16, 2)
    start = agent.num_timesteps
    agent.learn(total_timesteps=60)
    assert agent.num_timesteps - start >= 60 > agent.num_timesteps - start - agent.history[-1]["policy_tokens"]
    before = agent.iteration
    agent.learn(total_episodes=800, callback=lambda scope, _: scope["record"]["iteration"] < before + 2)
    assert agent.iteration == before + 2
    for totals in ({}, {"total_timesteps": 1, "total_episodes": 1}, {"total_episodes": 0}):
        with pytest.raises(ValueError, match="total"):
            agent.learn(**totals)


def test_supervised_learning_stops_at_the_best_validation_loss(make_env, make_policy):
    agent = SL(
        make_policy(),
        make_env(4),
        n_epochs=200,
        episodes_per_iteration=60,
        learning_rate=1e-2,
        patience=3,
        eval_prompts=22,
    )
    start = agent.validation_loss()
    agent.learn()
    losses = [record["validation_loss"] for record in agent.history]
    best = int(np.argmin(losses))
    assert losses[best] < 0.5 * start
    assert len(losses) == best + 1 + 3 < 200
    assert agent.validation_loss() == pytest.approx(losses[best], abs=1e-6)


def test_supervised_loss_is_the_likelihood_of_completions_whatever_the_batch(make_env, make_policy):
    agent = SL(make_policy(), make_env(4), episodes_per_iteration=16)
    examples = agent.validation_examples[:5]
    total, count = 0.0, 0
    for context, target in examples:
        logits = agent.policy.model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
        total -= sum(logits[len(context) + h - 1, token].item() for h, token in enumerate(target))
        count += len(target)
        assert target[-1] == agent.env.eos_token_id
    assert supervised_loss(agent.policy, examples, 1).item() == pytest.approx(total / count, rel=1e-5)


def test_supervised_learning_reads_every_reference_once_an_epoch(make_env, make_policy):
    agent = SL(make_policy(), make_env(4), episodes_per_iteration=16, n_epochs=2.5)
    count = len(agent.train_pairs)
    order = agent.order(0, round(2.5 * count))
    assert sorted(order[:count]) == sorted(order[count : 2 * count]) == list(range(count))
    assert order[:count].tolist() != order[count : 2 * count].tolist()
    pieces = [agent.order(at, min(at + 16, len(order))) for at in range(0, len(order), 16)]
    assert np.concatenate(pieces).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", 0),
        ("gamma", 1.5),
        ("clip_range", -0.1),
        ("kl_coef", -1),
        ("minibatch_size", 0),
        ("episodes_per_iteration", 12),
        ("eval_every", -1),
        ("target_kl", 0),
    ],
)
def test_wrong_arguments_are_named(argument, value, make_env, make_policy):
    with pytest.raises(ValueError, match=argument):
        PPO(make_policy(), make_env(8), **{"episodes_per_iteration": 8, argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("reinforce", "minibatch_size", 0),
        ("ppo++", "beta", 1.1),
        ("aggrevated", "beta", -0.1),
        ("lols", "tau", 2),
        ("d2lols", "tau", -1),
        ("rloo", "clip_range", 0),
        ("gail", "discriminator_epochs", 0),
        ("grpo", "kl_target", 0),
        ("ppo", "gradient_accumulation_steps", 17),
        ("ppo", "lr_schedule", "step"),
        ("ppo", "critic", "none"),
        ("ppo", "kl_penalty", "both"),
    ],
)
def test_each_algorithm_names_its_wrong_arguments(name, argument, value, make_env, make_policy):
    with pytest.raises(ValueError, match=argument):
        make_agent(name, make_env, make_policy, **{argument: value})


def test_each_algorithm_names_a_guide_that_cannot_do_its_part(make_env, make_policy):
    for name in ("aggrevated", "lols", "d2lols"):
        with pytest.raises(ValueError, match=f"complete texts for {name}"):
            ALGORITHMS[name](make_policy(), make_env(16, guide="references"), episodes_per_iteration=16)
        policy = CausalLMPolicy(make_policy().model, make_policy().tokenizer, handoff_prob=0.5)
        with pytest.raises(ValueError, match="without handoff=True"):
            ALGORITHMS[name](policy, make_env(16, guide=GUIDE, handoff=True), episodes_per_iteration=16)
    with pytest.raises(ValueError, match="guide='references' for dr-po"):
        ALGORITHMS["dr-po"](make_policy(), make_env(16, guide=GUIDE), episodes_per_iteration=16)


def test_wrong_environments_are_refused(make_env, make_policy):
    with pytest.raises(ValueError, match="parking=True"):
        PPO(make_policy(), TextVectorEnv(8, task=make_env(8).task), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="guide"):
        PPOPlusPlus(make_policy(), make_env(8), episodes_per_iteration=8)


def test_what_was_frozen_and_how_wide_it_was_survives_a_checkpoint(make_env, make_policy, tmp_path):
    def make():
        policy = make_policy()
        policy.model.to(torch.bfloat16)
        policy.model.transformer.wte.requires_grad_(False)
        return PPO(policy, make_env(8), episodes_per_iteration=8, device="cpu")

    whole, part = make().learn(total_episodes=24), make().learn(total_episodes=16)
    part.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", part.env).learn(total_episodes=8)
    assert resumed.policy.model.dtype == resumed.reference.model.dtype == torch.bfloat16
    assert not resumed.policy.model.transformer.wte.weight.requires_grad
    assert numbers(resumed.history) == numbers(whole.history)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_arguments_are_shown_documented_and_named_when_wrong(name):
    """Once each: in the signature with the default, in `help`, in the error, and as the attribute."""
    algorithm = ALGORITHMS[name]
    parameters = inspect.signature(algorithm).parameters
    assert list(parameters)[:2] == ["policy", "env"]
    for part in fields(algorithm):
        assert f"\n    {part.name}: " in algorithm.__doc__, part.name
        assert parameters[part.name].default is (
            inspect.Parameter.empty if part.name in ("policy", "env") else part.default
        )
    with pytest.raises(TypeError, match=f"{algorithm.__name__} has no argument 'lr'; did you mean learning_rate?"):
        algorithm("nowhere", "textgym/IMDB-v0", lr=1e-4)
    for value in ("4", 2.5, True):
        with pytest.raises(ValueError, match=f"minibatch_size must be an int.*got {value!r}"):
            algorithm("nowhere", "textgym/IMDB-v0", minibatch_size=value)


def test_an_algorithm_of_your_own_declares_arguments_or_writes_a_constructor(make_env, make_policy):
    class Declared(PPO):
        name = "declared"

        strength: float = 2.0
        """How much."""

        def check_hyperparameters(self):
            super().check_hyperparameters()
            check("strength", self.strength, self.strength > 0, "above 0")

    class Written(PPO):
        name = "written"

        def __init__(self, policy, env, *, strength=2.0, **others):
            super().__init__(policy, env, learning_rate=strength * 1e-4, **others)

    arguments = {"episodes_per_iteration": 8, "device": "cpu"}
    declared = Declared(make_policy(), make_env(8), strength=3, **arguments)
    assert declared.strength == declared.hyperparameters["strength"] == 3
    assert declared.learn(total_episodes=8).num_episodes == 8
    written = Written(make_policy(), make_env(8), strength=3.0, **arguments)
    assert written.learning_rate == written.hyperparameters["learning_rate"] == pytest.approx(3e-4)
    with pytest.raises(TypeError, match=r"Declared has no argument 'strenght'; did you mean strength\?"):
        Declared(make_policy(), make_env(8), strenght=3)
    with pytest.raises(ValueError, match="strength must be above 0, got -1"):
        Declared(make_policy(), make_env(8), strength=-1)
    with pytest.raises(ValueError, match="strength must be a number, got 'much'"):
        Declared(make_policy(), make_env(8), strength="much")
