"""Prompts, rewards and episodes for TRL are the environment's, and its GRPO trains on them."""

from __future__ import annotations

import copy
import math
import re
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ENV_ID, HORIZON, letters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from agents.trl import GroupRollouts
from textgym.guides import CallableGuide, Completion
from textgym.seeding import hash64
from textgym.trl import environment_factory, prompt_dataset, reward_function

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason='needs trl: pip install "textgym[trl]"')
pytestmark = pytest.mark.filterwarnings("ignore:You are using '(rollout_func|environment_factory)'")
LESS = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
TOOLS = (  # a chat template in which all parts of a conversation with tools can be read, as trl demands
    "{% for message in messages %}<{{ message['role'] }} {{ message['name'] }}>{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant >{% endif %}"
)


def settings(tmp_path, **arguments):
    """Arguments of a trainer that logs every step."""
    from trl import GRPOConfig

    arguments = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "logging_steps": 1} | arguments
    return GRPOConfig(str(tmp_path / "out"), **LESS | arguments)


def tiny(tokenizer):
    """A model with rotary positions: trl gives absolute ones no positions, and reads padded prompts at others."""
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ends, **sizes))


def train(env, args, rollouts, **arguments):
    """Train, and return the trainer, whose `steps` hold what each step learned from and its gradient."""
    from trl import GRPOTrainer

    class Watched(GRPOTrainer):
        steps = ()

        def compute_loss(self, model, inputs, **named):
            loss = super().compute_loss(model, inputs, **named)
            if model.training:
                (gradient,) = torch.autograd.grad(loss, model.get_input_embeddings().weight, retain_graph=True)
                self.steps = [*self.steps, (inputs, gradient)]
            return loss

    trainer = Watched(
        model=tiny(env.unwrapped.tokenizer),
        processing_class=env.unwrapped.tokenizer,
        train_dataset=prompt_dataset(env),
        rollout_func=rollouts,
        reward_funcs=reward_function(env),
        args=args,
        **arguments,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("id", ["textgym/CommonGen-v0", "textgym/IMDB-v0"])
def test_prompts_are_those_the_environment_shows(id):
    arguments = {"max_prompt_tokens": 12, "truncation_side": "left"} if "IMDB" in id else {}
    env = gym.make(id, split="validation", **arguments)
    data = env.unwrapped.data
    dataset = prompt_dataset(env)
    assert len(dataset) == len(data)
    assert data.fingerprint in dataset.info.description
    for index in (0, 3, len(data) - 1):
        observation, info = env.reset(seed=0, options={"index": index})
        row = dataset[index]
        assert row["prompt"] == row["task_prompt"] == info["prompt"]
        assert (tuple(row["references"]), row["sample_id"]) == (info["references"], info["sample_id"])
        shown = observation["input_ids"][observation["attention_mask"] == 1].tolist()
        if "IMDB" in id:  # read again, the rest of a cut text can be split otherwise
            assert env.unwrapped.tokenizer.decode(shown) == row["prompt"]
        else:
            assert env.unwrapped.tokenizer(row["prompt"])["input_ids"] == shown


def test_reward_is_what_the_environment_pays():
    env = gym.make_vec("textgym/CommonGen-v0", num_envs=8).unwrapped
    _, infos = env.reset(seed=0)
    tokenizer, horizon = env.tokenizer, env.max_new_tokens
    rng = np.random.default_rng(0)
    # Half of the texts end; what follows the end or the horizon counts for nothing.
    ids = rng.integers(2, 600, (8, horizon + 5))
    words = [tokenizer(f" {refs[0]}")["input_ids"][:horizon] for refs in infos["references"]]
    for row in range(0, 8, 2):
        ids[row, : len(words[row])] = words[row]
        ids[row, min(len(words[row]), horizon - 1)] = tokenizer.eos_token_id
    rewards, parts, running = np.zeros(8), {}, np.ones(8, bool)
    for actions in ids.T[:horizon]:
        _, paid, terminations, _, infos_now = env.step(actions)
        ended = terminations & running
        rewards[ended] = paid[ended]
        for name, values in infos_now.get("reward_parts", {}).items():
            if not name.startswith("_"):
                parts.setdefault(name, np.zeros(8))[ended] = values[ended]
        running &= ~terminations
    assert not running.any()
    assert len(set(rewards)) > 3

    logged = {}
    columns = {"prompts": infos["prompt"].tolist(), "references": infos["references"].tolist()}
    columns["task_prompt"] = columns["prompts"]
    completions = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    reward = reward_function(env)
    arguments = {**columns, "completions": completions, "completion_ids": ids.tolist(), "sample_id": [0] * 8}
    assert reward(**arguments, log_metric=logged.__setitem__) == rewards.tolist()
    assert reward.__name__ == "commongen"
    assert logged == {f"rewards/commongen/{name}": pytest.approx(values.mean()) for name, values in parts.items()}
    with pytest.raises(ValueError, match="completion_ids must be tokens of the environment's tokenizer"):
        reward(**{**arguments, "completions": [text + "." for text in completions]})


def test_other_environments_are_refused():
    with pytest.raises(ValueError, match="env must be a text environment"):
        prompt_dataset(gym.make("CartPole-v1"))


@needs_trl
@pytest.mark.parametrize("guided", [False, True])
def test_grpo_of_trl_trains_as_the_ecosystem_page_says(tmp_path, guided):
    """With a small model in the place of GPT-2."""
    page = (Path(__file__).parents[1] / "docs/ecosystem.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page[page.index("## TRL") :], re.DOTALL)[guided]
    tokenizer = gym.make("textgym/CommonGen-v0").unwrapped.tokenizer
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = []

    def watched(reward):
        def watching(**arguments):
            asked.extend(zip(arguments["prompts"], arguments["references"], arguments["sample_id"], strict=True))
            return reward(**arguments)

        watching.__name__ = reward.__name__
        return watching

    less = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_steps": 2,
        "logging_steps": 1,
        **LESS,
    }
    for usual, here in (
        ('"gpt2"', f"{str(tmp_path)!r}"),
        ('"gpt2-large"', f"{str(tmp_path)!r}"),
        ("reward_function(env)", "watched(reward_function(env))"),
        ("max_completion_length=20", "max_completion_length=20, **less"),
    ):
        code = code.replace(usual, here)
    namespace = {"watched": watched, "less": less}
    exec(code, namespace)
    logs = [log for log in namespace["trainer"].state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert math.isfinite(log["reward"])
        assert log["rewards/commongen/mean"] == pytest.approx(log["reward"])
        assert math.isfinite(log["rewards/commongen/coverage"])
        assert ("dead_groups_left" in log) == guided
    assert len(asked) == 8
    dataset = prompt_dataset(namespace["env"])
    for prompt, references, sample_id in asked:
        row = dataset[sample_id]
        assert (prompt, references) == (row["prompt"], row["references"])


@needs_trl
def test_a_group_has_one_start_whose_tokens_carry_no_gradient(tmp_path, words_tokenizer):
    guide = CallableGuide(
        lambda requests: [
            Completion(token_ids=(262 + hash64(r.seed, np.arange(r.max_new_tokens)) % 30).astype(int).tolist())
            for r in requests
        ]
    )
    guidance = {"restart_prob": 1.0, "restart_length": (1, 3), "handoff_prob": 0.5, "handoff_length": 2}
    env = gym.make(ENV_ID, tokenizer=words_tokenizer, guide=guide, guidance=guidance)
    args = settings(tmp_path, per_device_train_batch_size=16, max_completion_length=HORIZON)
    inside, asked, given = GroupRollouts(env, args), [], {}

    def rollouts(prompts, trainer):
        asked.extend(prompts)
        given.update(inside(prompts, trainer))
        return given

    trainer = train(env, args, rollouts)
    assert trainer.model.training
    starts = set()
    shown = {row["prompt"]: row["sample_id"] for row in reversed(list(prompt_dataset(env)))}
    for group in range(0, 16, 4):
        assert len({*asked[group : group + 4]}) == 1
        observation, _ = env.reset(options={"index": shown[asked[group]], "guidance": {}})
        prompt = observation["input_ids"][observation["attention_mask"] == 1].tolist()
        assert given["prompt_ids"][group : group + 4] == [prompt] * 4
        masks = given["env_mask"][group : group + 4]
        (length,) = {mask.index(1) for mask in masks}
        (start,) = {tuple(text[:length]) for text in given["completion_ids"][group : group + 4]}
        assert 1 <= length <= 3
        starts.add(start)
    assert len(starts) == 4
    handed = sum(not mask[-1] for mask in given["env_mask"])
    assert 0 < handed < 16, "the guide completes some texts"

    # The tokens of the step are these, in whatever order; those of the guide are masked, the others as likely as said.
    ((inputs, gradient),) = trainer.steps
    texts, masks = inputs["completion_ids"], inputs["completion_mask"].bool()
    learned = masks & inputs["tool_mask"].bool()
    rows = list(zip(given["prompt_ids"], given["completion_ids"], given["env_mask"], strict=True))
    for row in range(16):
        ids = inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1].tolist()
        assert (ids, texts[row][masks[row]].tolist(), inputs["tool_mask"][row][masks[row]].tolist()) in rows
    fresh = tiny(env.unwrapped.tokenizer)
    fresh.eval()
    whole = torch.cat([inputs["prompt_ids"], texts], 1)
    attention = torch.cat([inputs["prompt_mask"], masks.long()], 1)
    before = inputs["prompt_ids"].shape[1] - 1
    logits = fresh(whole, attention_mask=attention).logits[:, before:-1]
    log_probs = logits.log_softmax(-1).gather(2, texts[:, :, None]).squeeze(2)
    torch.testing.assert_close(inputs["sampling_per_token_logps"][learned], log_probs[learned], atol=1e-4, rtol=0)
    loss = -(inputs["advantages"][:, None] * log_probs)[learned].sum()
    (expected,) = torch.autograd.grad(loss, fresh.get_input_embeddings().weight)
    torch.testing.assert_close(gradient / gradient.norm(), expected / expected.norm(), atol=1e-3, rtol=0)

    # The rewards are what the environment pays for these tokens.
    columns = {name: given[name] for name in ("references", "completion_ids")} | {"task_prompt": asked}
    texts = env.unwrapped.tokenizer.batch_decode(given["completion_ids"], skip_special_tokens=True)
    paid = reward_function(env)(prompts=asked, completions=texts, **columns)
    assert paid == pytest.approx([sum(parts.values()) for parts in given["reward_parts"]])
    assert len(set(paid)) > 3
    log = trainer.state.log_history[0]
    assert log["rewards/words/mean"] == pytest.approx(np.mean(paid))
    assert log["prefix_tokens"] == pytest.approx(np.mean([mask.index(1) for mask in given["env_mask"]]))


@needs_trl
def test_dead_groups_are_rescued_and_the_policy_learns_to_do_without(tmp_path):
    """A lock of two symbols out of eleven: GRPO alone has nothing to learn from."""
    lock = {"vocab_size": 12, "length": 2, "guide_accuracy": 1.0}
    env, other = (gym.make("textgym/CombinationLock-v0", split=split, **lock) for split in ("train", "validation"))
    args = settings(
        tmp_path,
        per_device_train_batch_size=32,
        num_generations=16,
        max_steps=20,
        max_completion_length=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_eval_batch_size=32,
        logging_steps=1,
    )
    rollouts = GroupRollouts(env, args, dead_groups="rescue")
    evaluated = prompt_dataset(other).select(range(4))
    trainer = train(env, args, rollouts, eval_dataset=evaluated)
    first = trainer.state.log_history[0]
    assert (first["dead_groups"], first["prefix_tokens"]) == (1, 1)
    assert first["dead_groups_left"] < 1
    assert first["reward"] > 0
    inputs, gradient = trainer.steps[0]
    assert inputs["tool_mask"][:, 0].sum() == 0, "the guide wrote the first symbol of both groups"
    assert gradient.abs().sum() > 0
    assert trainer.evaluate()["eval_reward"] > 0.8, "alone, without the guide"
    trainer.model.eval()
    with pytest.raises(ValueError, match="prompt must be one of the trainer's eval_dataset"):
        rollouts(["another"], trainer)

    args = settings(
        tmp_path, per_device_train_batch_size=32, num_generations=16, max_steps=2, max_completion_length=2, seed=1
    )
    kept = train(env, args, GroupRollouts(env, args))
    assert [log["dead_groups"] for log in kept.state.log_history if "reward" in log] == [1, 1]
    assert all(gradient.abs().sum() == 0 for _, gradient in kept.steps)


@needs_trl
def test_rollouts_that_cannot_be_played_are_refused(tmp_path):
    env = gym.make("textgym/CommonGen-v0", guide="references")
    horizon = env.unwrapped.engine.max_new_tokens
    usual = {"max_completion_length": horizon}
    for arguments, message in (
        ({}, "max_completion_length must be"),
        ({**usual, "per_device_train_batch_size": 2, "steps_per_generation": 3, "num_generations": 6}, None),
        ({**usual, "min_p": 0.1}, "min_p must be None"),
        ({**usual, "repetition_penalty": 1.2}, "repetition_penalty must be 1.0"),
        ({**usual, "use_transformers_continuous_batching": True}, "use_transformers_continuous_batching must be False"),
    ):
        args = settings(tmp_path, **arguments)
        if message is None:
            assert GroupRollouts(env, args).env.num_envs == 6
        else:
            with pytest.raises(ValueError, match=message):
                GroupRollouts(env, args)
    args = settings(tmp_path, **usual)
    args.num_generations = 3  # as in processes that hold parts of groups
    with pytest.raises(ValueError, match="a multiple of num_generations=3: a group has one start, in one process"):
        GroupRollouts(env, args)
    args.num_generations = 4
    with pytest.raises(ValueError, match='env must have a guide that can start texts for dead_groups="rescue"'):
        GroupRollouts(gym.make("textgym/CommonGen-v0"), args, dead_groups="rescue")
    with pytest.raises(ValueError, match=r"rescue_fractions must be ascending numbers in \(0, 1\]"):
        GroupRollouts(env, args, rescue_fractions=(0.5, 0.25))
    with pytest.raises(ValueError, match="num_envs must be a multiple of num_generations=4"):
        GroupRollouts(gym.make_vec("textgym/CommonGen-v0", num_envs=6), args)
    with pytest.raises(ValueError, match="env must be a text environment"):
        GroupRollouts(gym.make("CartPole-v1"), args)


@needs_trl
def test_environments_of_trl_share_the_starts_of_groups(tmp_path, words_tokenizer):
    from trl import GRPOTrainer

    tokenizer = copy.deepcopy(words_tokenizer)
    tokenizer.chat_template = TOOLS
    guidance = {"restart_prob": 1.0, "restart_length": 1}
    env = gym.make(ENV_ID, tokenizer=tokenizer, chat=True, guide="references", guidance=guidance, max_prompt_tokens=99)
    args = settings(tmp_path, per_device_train_batch_size=8, max_steps=2, max_completion_length=HORIZON)
    reward, seen = reward_function(env), []

    def watched(**columns):
        rewards = reward(**columns)
        seen.append((columns, [(member.task_prompt, member.references) for member in columns["environments"]], rewards))
        return rewards

    trainer = GRPOTrainer(
        model=tiny(tokenizer),
        processing_class=tokenizer,
        environment_factory=environment_factory(env, args),
        reward_funcs=watched,
        args=args,
    )
    trainer.train()
    starts = []
    for columns, samples, rewards in seen:
        shown = [prompt[-1]["content"] for prompt in columns["prompts"]]
        for group in (0, 4):
            (message,) = set(shown[group : group + 4])
            ((task_prompt, (answer,)),) = set(samples[group : group + 4])
            assert message == f"{task_prompt}\nBegin with: {answer.split()[0]}"
            starts.append(message)
        texts = [completion[-1]["content"] for completion in columns["completions"]]
        assert rewards == pytest.approx(letters(prompts=[], completions=texts, references=[]))
    assert len(set(starts)) == 4, "groups and steps differ"

    # A row of a dataset is played as it is, in evaluations too.
    row = prompt_dataset(env)[3]
    member = environment_factory(env, args)()
    assert member.reset(**row) is None
    assert (member.task_prompt, member.references) == (row["task_prompt"], tuple(row["references"]))
    with pytest.raises(ValueError, match="env must be made with chat=True"):
        environment_factory(gym.make(ENV_ID), args)
    with pytest.raises(ValueError, match=r"hint must be a text with \{prefix\}"):
        environment_factory(env, args, hint="go on")
