"""Inside Stable-Baselines3's algorithms a language model says, samples, learns and is saved as everywhere else."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecMonitor

from agents.policy import CausalLMPolicy
from agents.sb3 import (
    LANGUAGE_MODEL_DEFAULTS,
    CausalLMActorCriticPolicy,
    KLPenalty,
    MaskableCausalLMActorCriticPolicy,
    Portable,
    TextVecEnv,
    evaluate_transitions,
)
from agents.sb3.policies import _Texts
from textgym.decoding import Decoding
from textgym.sampling import nucleus

ROWS = 4
CLASSES = {
    "ppo": (stable_baselines3.PPO, CausalLMActorCriticPolicy, {"batch_size": 24, "n_epochs": 1}),
    "a2c": (stable_baselines3.A2C, CausalLMActorCriticPolicy, {}),
    "trpo": (sb3_contrib.TRPO, CausalLMActorCriticPolicy, {"batch_size": 24, "cg_max_steps": 3}),
    "maskable ppo": (sb3_contrib.MaskablePPO, MaskableCausalLMActorCriticPolicy, {"batch_size": 24, "n_epochs": 1}),
}


@pytest.fixture
def make_envs(words_tokenizer):
    """Make the small task for Stable-Baselines3."""

    def make(num_envs=ROWS, **arguments):
        return TextVecEnv(gym.make_vec(ENV_ID, num_envs=num_envs, tokenizer=words_tokenizer, **arguments))

    return make


@pytest.fixture
def make_model(make_envs):
    """Make an algorithm whose policy is a language model."""

    def make(name, model, envs=None, policy_kwargs=None, **arguments):
        algorithm, policy, tiny = CLASSES[name]
        return algorithm(
            policy,
            make_envs() if envs is None else envs,
            **{"n_steps": HORIZON, "seed": 3, "device": "cpu", **tiny, **arguments},
            policy_kwargs={"model": model, **(policy_kwargs or {})},
        )

    return make


def lively(policy):
    """The policy with values and probabilities that differ from state to state."""
    torch.manual_seed(1)
    for head in policy.heads.values():
        torch.nn.init.normal_(head.weight, std=0.3)
    return policy


def transitions(envs, steps=3 * HORIZON, ends=0.1):
    """Observations and actions of a random rollout, as the buffer would hold them."""
    rng = np.random.default_rng(0)
    envs.seed(0)
    obs, seen, taken = envs.reset(), [], []
    for _ in range(steps):
        actions = rng.integers(1, envs.action_space.n, envs.num_envs)
        actions[rng.random(envs.num_envs) < ends] = envs.env.eos_token_id
        seen.append(obs)
        taken.append(actions)
        obs = envs.step(actions)[0]
    stacked = {name: torch.from_numpy(np.concatenate([obs[name] for obs in seen])) for name in seen[0]}
    return stacked, torch.from_numpy(np.concatenate(taken))


def one_by_one(policy, obs, actions):
    """What the policy itself says of each action, a row at a time."""
    results = []
    for ids, mask, action in zip(obs["input_ids"], obs["attention_mask"], actions, strict=True):
        column = int(mask.nonzero().max()) + 1
        text, valid = ids.clone(), mask.clone()
        handed = action == len(policy.tokenizer)
        if not handed:
            text[column], valid[column] = action, 1
        handoffs = handed.view(1, 1) if policy.can_hand_off else None
        results.append(policy.evaluate_actions(text[None], valid[None], torch.tensor([[column]]), handoffs))
    return [torch.cat([result[i] for result in results]).squeeze(1) for i in range(3)]


@pytest.mark.parametrize("hands_off", [False, True])
def test_actions_are_judged_as_by_the_policy_itself(hands_off, make_policy, make_envs):
    policy = lively(make_policy())
    arguments = {}
    if hands_off:
        policy = lively(CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.3))
        arguments = {"handoff": True, "guide": lambda requests: [" sun" for _ in requests]}
    envs = make_envs(**arguments)
    obs, actions = transitions(envs)
    expected = one_by_one(policy, obs, actions)
    inside = CausalLMActorCriticPolicy(envs.observation_space, envs.action_space, lambda _: 1e-3, model=policy)
    values, log_probs, entropy = inside.evaluate_actions(obs, actions)
    torch.testing.assert_close(log_probs, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[:, 0], expected[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inside.predict_values(obs)[:, 0], expected[2], atol=1e-5, rtol=1e-5)
    assert len(_Texts(obs["input_ids"], obs["attention_mask"]).input_ids) < len(actions) / 3, "texts are shared"

    distribution = inside.get_distribution(obs)
    torch.testing.assert_close(distribution.log_prob(actions), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distribution.entropy(), expected[1], atol=1e-5, rtol=1e-5)
    weights = torch.randn(3, len(actions))
    gradients = [
        torch.autograd.grad(
            sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), policy.model.lm_head.weight
        )
        for parts in (expected[:3], (log_probs, entropy, values[:, 0]))
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("hands_off", [False, True])
def test_sampled_actions_carry_their_own_log_probabilities_and_values(name, hands_off, make_policy, make_envs):
    policy = make_policy()
    arguments = {}
    if hands_off:
        policy = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.3)
        arguments = {"handoff": True, "guide": lambda requests: [" sun" for _ in requests]}
    envs = make_envs(**arguments)
    obs, _ = transitions(envs)
    inside = CLASSES[name][1](envs.observation_space, envs.action_space, lambda _: 1e-3, model=lively(policy))
    actions, values, log_probs = inside.forward(obs)
    expected = inside.evaluate_actions(obs, actions)
    torch.testing.assert_close(values, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs, expected[1], atol=1e-5, rtol=1e-5)
    greedy, _, greedy_log_probs = inside.forward(obs, deterministic=True)
    probs = inside.get_distribution(obs).distribution.probs
    torch.testing.assert_close(greedy_log_probs.exp(), probs.amax(1), atol=1e-5, rtol=1e-5)
    assert (greedy != actions).any()
    # Frequencies of the first state's actions
    state = {key: value[:1].expand(4000, -1) for key, value in obs.items()}
    counts = inside.forward(state)[0].bincount(minlength=probs.shape[1])
    spread = (probs[0] * (1 - probs[0]) / 4000).sqrt()
    assert ((counts / 4000 - probs[0]).abs() <= 5 * spread + 1e-3).all()


@pytest.mark.parametrize("hands_off", [False, True])
def test_texts_that_go_on_cost_a_token_and_change_nothing(hands_off, make_policy, make_envs):
    policy = make_policy()
    arguments = {}
    if hands_off:
        policy = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.05)
        arguments = {"handoff": True, "guide": lambda requests: [" sun" for _ in requests]}
    policy.decoding = Decoding(top_k=20, min_new_tokens=2)
    rows, steps = 16, 6 * HORIZON
    embeddings = lively(policy).model.get_input_embeddings()
    end = embeddings.weight.data[policy.tokenizer.eos_token_id]
    policy.model.transformer.ln_f.bias.data += 4 * end / end.square().sum()  # some texts end early
    envs = make_envs(rows, **arguments)
    inside = CausalLMActorCriticPolicy(
        envs.observation_space, envs.action_space, lambda _: 1e-3, model=policy, prompt_columns=PROMPT_TOKENS
    )
    read = []
    embeddings.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    envs.seed(0)
    obs, readers, fresh, ended = envs.reset(), set(), 0, 0
    inside.set_training_mode(False)
    for step in range(steps):
        tensors = obs_as_tensor(copy.deepcopy(obs), "cpu")
        read.clear()
        with torch.no_grad():
            actions, values, log_probs = inside.forward(tensors)
        fresh += sum(read)
        readers.add(len(inside._readers))
        if step == 7:  # what somebody asks in between disturbs nothing
            inside.predict({name: array[:3] for name, array in obs.items()})
        expected = inside.evaluate_actions(tensors, actions)
        torch.testing.assert_close(values, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_probs, expected[1], atol=1e-5, rtol=1e-5)
        written = obs["attention_mask"][:, PROMPT_TOKENS:].sum(1)
        assert (written[actions == policy.tokenizer.eos_token_id] >= 2).all()
        assert all((tensors[name].numpy() == array).all() for name, array in obs.items()), "nothing is written to them"
        obs, _, dones, _ = envs.step(actions.numpy())
        ended += dones.sum()
    assert ended > 1.3 * steps / HORIZON * rows, "not all texts ended at the horizon"
    assert max(readers) > 1
    prompt = PROMPT_TOKENS / 2
    assert fresh < 0.6 * rows * steps * (prompt + HORIZON / 2)
    # Other weights are not taken for those that were read.
    policy.model.lm_head.weight.data += 0.1 * torch.randn(policy.model.lm_head.weight.shape)
    inside.set_training_mode(False)
    actions, _, log_probs = inside.forward(obs_as_tensor(obs, "cpu"))
    torch.testing.assert_close(
        log_probs, inside.evaluate_actions(obs_as_tensor(obs, "cpu"), actions)[1], atol=1e-5, rtol=1e-5
    )
    # Other texts neither.
    other = {name: torch.from_numpy(array).roll(1, 0) for name, array in envs.reset().items()}
    actions, _, log_probs = inside.forward(other)
    torch.testing.assert_close(log_probs, inside.evaluate_actions(other, actions)[1], atol=1e-5, rtol=1e-5)
    inside.forward({name: array[:2] for name, array in other.items()})


@pytest.mark.parametrize("name", ["ppo", "maskable ppo"])
def test_decoding_is_the_policys_own(name, make_policy, make_envs):
    policy, envs = make_policy(), make_envs()
    policy.decoding = Decoding(top_k=3, min_new_tokens=HORIZON)
    policy.model.lm_head.weight.data[policy.tokenizer.eos_token_id] += 1.0
    with pytest.raises(ValueError, match="prompt_columns"):
        CLASSES[name][1](envs.observation_space, envs.action_space, lambda _: 1e-3, model=policy)
    inside = CLASSES[name][1](
        envs.observation_space, envs.action_space, lambda _: 1e-3, model=policy, prompt_columns=PROMPT_TOKENS
    )
    obs, _ = transitions(envs)
    actions, _, log_probs = inside.forward(obs)
    probs = inside.get_distribution(obs).distribution.probs
    probs[:, policy.tokenizer.eos_token_id] = 0
    assert (probs.gather(1, actions[:, None]) >= probs.topk(3).values[:, -1:]).all()
    assert actions.unique().numel() > 3
    torch.testing.assert_close(log_probs, inside.evaluate_actions(obs, actions)[1], atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 2)), min_size=1, max_size=12)
)
def test_texts_that_begin_others_take_no_row_of_their_own(pairs):
    width, rows = 5, len(pairs)
    ids, mask = torch.full((2, rows, width), 2), torch.zeros(rows, width, dtype=torch.int8)
    for row, (text, _) in enumerate(pairs):
        ids[0, row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    texts = _Texts(ids[0], mask, torch.tensor([action for _, action in pairs]))
    whole = [(*text, action) for text, action in pairs]
    columns = torch.arange(width + 1).expand_as(texts.input_ids)
    ends = texts.of_each(texts.columns)
    tokens = texts.input_ids[texts._row]
    for row, (text, action) in enumerate(pairs):
        assert ends[row] == len(text)
        assert tokens[row, : ends[row] + 1].tolist() == [*text, action]
        assert texts.attention_mask[texts._row][row, : ends[row] + 1].all()
    assert (columns.masked_fill(~texts.attention_mask, 0).amax(1) == texts.columns.amax(1)).all()
    maximal = {text for text in whole if not any(other[: len(text)] == text != other for other in whole)}
    assert len(texts.input_ids) == len(maximal)


@pytest.mark.parametrize("name", CLASSES)
def test_algorithms_learn_and_their_zips_give_the_same_actions(name, make_policy, make_model, make_envs, tmp_path):
    policy = make_policy()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    model = make_model(name, Portable(policy))
    model.learn(4 * HORIZON * ROWS)
    changed = [key for key, value in policy.state_dict().items() if not torch.equal(value, before[key])]
    assert {"heads.value.weight", "model.lm_head.weight"} <= {*changed}
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=make_envs())
    obs, _ = transitions(make_envs())
    obs = {key: value.numpy() for key, value in obs.items()}
    for deterministic in (True, False):
        torch.manual_seed(0)
        actions, _ = model.predict(obs, deterministic=deterministic)
        torch.manual_seed(0)
        again, _ = loaded.predict(obs, deterministic=deterministic)
        np.testing.assert_array_equal(actions, again)
    for key, value in loaded.policy.state_dict().items():
        assert torch.equal(value, model.policy.state_dict()[key]), key
    loaded.save(tmp_path / "again")
    actions, _ = loaded.predict(obs, deterministic=True)
    again, _ = type(model).load(tmp_path / "again").predict(obs, deterministic=True)
    np.testing.assert_array_equal(actions, again)
    loaded.learn(HORIZON * ROWS)
    alone, _ = loaded.predict({key: value[0] for key, value in obs.items()}, deterministic=True)
    assert alone.shape == ()


def test_a_portable_zip_is_small_and_opens_elsewhere(make_policy, make_model, make_envs, tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "language model")
    model = make_model("ppo", Portable(tmp_path / "language model"))
    model.learn(HORIZON * ROWS)
    model.save(tmp_path / "ppo.zip")
    (tmp_path / "language model").rename(tmp_path / "gone")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    with zipfile.ZipFile(tmp_path / "ppo.zip") as archive:
        data = json.loads(archive.read("data"))
        kwargs = data["policy_kwargs"]
        assert len(json.dumps(kwargs)) < weights / 2
        assert archive.getinfo("policy.pth").file_size > weights
    obs, _ = transitions(make_envs())
    np.savez(tmp_path / "obs.npz", **obs)
    code = (
        "import numpy as np, stable_baselines3 as sb3\n"
        "model = sb3.PPO.load('ppo.zip')\n"
        "print(model.predict(dict(np.load('obs.npz')), deterministic=True)[0].tolist())\n"
    )
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    expected, _ = model.predict({key: value.numpy() for key, value in obs.items()}, deterministic=True)
    assert json.loads(result.stdout) == expected.tolist()


def test_copies_of_a_portable_model_have_their_own_weights(make_policy):
    policy = make_policy()
    twin = copy.deepcopy({"model": Portable(policy)})["model"].policy
    for name, value in policy.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
        assert twin.state_dict()[name].data_ptr() != value.data_ptr()


def test_a_policy_alone_is_saved_and_loaded_too(make_policy, make_envs, tmp_path):
    envs = make_envs()
    inside = MaskableCausalLMActorCriticPolicy(
        envs.observation_space, envs.action_space, lambda _: 1e-3, model=lively(make_policy()), top_p=0.5
    )
    inside.save(tmp_path / "policy.pth")
    loaded = MaskableCausalLMActorCriticPolicy.load(tmp_path / "policy.pth", device="cpu")
    obs, actions = transitions(envs)
    for one, other in zip(inside.evaluate_actions(obs, actions), loaded.evaluate_actions(obs, actions), strict=True):
        assert torch.equal(one, other)
    assert loaded.top_p == 0.5


def test_a_model_that_does_not_fit_is_refused(make_policy, make_envs, make_model):
    policy, envs = make_policy(), make_envs()
    other = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.1)
    with pytest.raises(ValueError, match="hand-off"):
        make_model("ppo", other, envs)
    with pytest.raises(ValueError, match="observation_space"):
        CausalLMActorCriticPolicy(envs.observation_space["input_ids"], envs.action_space, lambda _: 1, model=policy)
    for arguments in ({"top_p": 0.0}, {"mask_updates": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            make_model("maskable ppo", policy, envs, arguments)


@pytest.mark.parametrize("clip", [0.2])
def test_the_environments_masks_hold(clip, make_policy, make_envs, make_model):
    policy = make_policy()
    banned = [5, 9]
    envs = make_envs(num_envs=8, min_new_tokens=3, banned_tokens=banned)
    model = make_model("maskable ppo", policy, envs, clip_range=clip)
    model.learn(4 * HORIZON * 8)
    buffer, eos = model.rollout_buffer, policy.tokenizer.eos_token_id
    assert not np.isin(buffer.actions, banned).any()
    length = buffer.observations["attention_mask"][..., PROMPT_TOKENS:].sum(-1)
    assert (length[buffer.actions.squeeze(-1) == eos] >= 3).all()
    masks = torch.from_numpy(buffer.action_masks) != 0
    assert not masks[:, banned].any()
    obs = {key: torch.from_numpy(value) for key, value in buffer.observations.items()}
    distribution = model.policy.get_distribution(obs, masks)
    assert (distribution.distribution.probs[~masks] == 0).all()
    log_probs = evaluate_transitions(policy, obs, torch.from_numpy(buffer.actions).flatten()).log_probs
    allowed = (model.policy._log_probs(model.policy._states(obs)).exp() * masks).sum(1)
    _, own, _ = model.policy.evaluate_actions(obs, torch.from_numpy(buffer.actions).flatten(), masks)
    torch.testing.assert_close(own, log_probs - allowed.log(), atol=1e-4, rtol=1e-4)


def test_nucleus_masks_follow_the_policy_a_few_updates_behind(make_policy, make_envs, make_model):
    policy = make_policy()
    model = make_model(
        "maskable ppo", policy, policy_kwargs={"top_p": 0.3, "mask_updates": 2}, learning_rate=0.01, n_epochs=2
    )
    inside = model.policy
    obs, _ = transitions(make_envs())
    kept = []

    def near(language_model):
        with torch.no_grad():
            return nucleus(inside._log_probs(inside._states(obs, language_model), language_model), 0.3).isfinite()

    for _ in range(5):
        model.learn(HORIZON * ROWS, reset_num_timesteps=False)
        actions = inside.forward(obs)[0]
        assert near(inside.masking_model).gather(1, actions[:, None]).all()
        kept.append(inside.masking_model.model.lm_head.weight.clone())
    # Rollouts 1 and 2 have the first masks; 3 and 4, after two updates, the next ones.
    assert [torch.equal(one, other) for one, other in itertools.pairwise(kept)] == [True, False, True, False]
    assert not near(inside.masking_model).all()
    assert all(not parameter.requires_grad for parameter in inside.masking_model.parameters())
    # Where the environment allows nothing of the nucleus, its own mask holds.
    outside = ~near(inside.masking_model)
    actions = inside.forward(obs, action_masks=outside.numpy())[0]
    assert outside.gather(1, actions[:, None]).all()


def test_kl_penalty_is_part_of_rewards_and_returns(make_policy, make_envs, make_model):
    rows, steps, gamma, trace = 8, 2 * HORIZON, 0.9, 0.7
    policy, reference = make_policy(), make_policy(seed=1)
    model = make_model(
        "ppo", lively(policy), make_envs(rows), n_steps=steps, gamma=gamma, gae_lambda=trace, learning_rate=1e-9
    )
    rewards = {}
    for coef in (0.0, 0.5):
        model.set_random_seed(0)
        model._last_obs = None
        penalty = KLPenalty(reference, coef)
        model.learn(steps * rows, callback=penalty)
        rewards[coef] = model.rollout_buffer.rewards
    buffer = model.rollout_buffer
    # The buffer flattened all else when it was read, row by row.
    obs = {key: torch.from_numpy(value) for key, value in buffer.observations.items()}
    with torch.no_grad():
        log_probs = evaluate_transitions(reference, obs, torch.from_numpy(buffer.actions).flatten()).log_probs.numpy()
    ratio = (buffer.log_probs.flatten() - log_probs).reshape(rows, steps)
    np.testing.assert_allclose((rewards[0.0] - rewards[0.5]).T, 0.5 * ratio, atol=1e-5)
    assert penalty.kl_per_token == pytest.approx(float(ratio.mean()), abs=1e-5)
    assert np.abs(ratio).mean() > 0.01

    values, starts = buffer.values.reshape(rows, steps), buffer.episode_starts.T
    following = model.policy.predict_values(obs_as_tensor(model._last_obs, "cpu")).detach().numpy()
    values, starts = np.hstack([values, following]), np.hstack([starts, model._last_episode_starts[:, None]])
    advantage, expected = 0.0, np.zeros((rows, steps))
    for step in reversed(range(steps)):
        goes_on = 1 - starts[:, step + 1]
        advantage = rewards[0.5][step] + goes_on * gamma * (values[:, step + 1] + trace * advantage) - values[:, step]
        expected[:, step] = advantage
    np.testing.assert_allclose(buffer.advantages.reshape(rows, steps), expected, atol=1e-5)
    assert starts[:, 1:-1].any(), "episodes ended on the way"


def test_ppo_learns_with_a_language_model(make_policy, make_envs):
    envs = make_envs(32)
    model = stable_baselines3.PPO(
        CausalLMActorCriticPolicy,
        envs,
        n_steps=HORIZON,
        batch_size=8 * HORIZON,
        seed=0,
        device="cpu",
        policy_kwargs={"model": make_policy()},
        **{**LANGUAGE_MODEL_DEFAULTS, "learning_rate": 3e-3},  # for some thousand parameters
    )

    before, _ = evaluate_policy(model, VecMonitor(envs), n_eval_episodes=128, deterministic=False)
    model.learn(15 * HORIZON * 32)
    after, _ = evaluate_policy(model, VecMonitor(envs), n_eval_episodes=128, deterministic=False)
    assert after > before + 0.3
