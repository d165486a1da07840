"""Every token that ends a text for its model ends it everywhere: in environments, policies, guides and targets."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from test_policy import tiny_tokenizer
from test_texts import llama
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from agents import PPO, SL, CausalLMPolicy, evaluate
from agents.rollout import collect
from textgym import Task
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.generation import generate
from textgym.guides.local import LocalGuide
from textgym.tokenization import StopCriteria, end_ids, end_of_turn, ends_beside, unused_ids, vocabulary_size

VOCAB, P, T = 64, 8, 10
CHAT = (
    "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<turn>{% else %}w7{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def turn_tokenizer(chat=True):
    made = tiny_tokenizer(VOCAB - 1)
    made.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    made.chat_template = CHAT if chat else None
    return made


TURN = VOCAB - 1


def chain_model(follow, ends=(0, TURN)):
    """A model that writes after each token the one that follows it, and w20 after any other."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=VOCAB, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=False, max_position_embeddings=P + T, bos_token_id=None, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    model.generation_config.eos_token_id = list(ends)
    said = torch.tensor([follow.get(token, 20) for token in range(VOCAB)])
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.copy_(torch.nn.functional.one_hot(said, VOCAB).float().T * 4)
    return model


ANSWER = {9: 10, 7: 10, 10: TURN, TURN: 20, 20: 21, 21: 20}  # w10, then the end of the turn; beyond it w20 and on


def env(n=4, seen=None, **arguments):
    def reward(prompts, completions, references):
        if seen is not None:
            seen.extend(completions)
        return [0.0] * len(prompts)

    arguments = {"tokenizer": turn_tokenizer(), **arguments}
    return TextVectorEnv(n, task=Task("t", [{"p": "w5 w9", "r": "w3"}], "{p}", "r", P, T, reward), **arguments)


def test_which_tokens_end_a_text(tmp_path):
    tokenizer = turn_tokenizer()
    assert end_ids(tokenizer, None) == (0,)
    assert end_ids(tokenizer, [5, 0, TURN, 999]) == (0, 5, TURN)
    assert end_ids(tokenizer, TURN) == (0, TURN)
    assert end_ids(tokenizer, 5) == (0,), "a single word is a default that nobody chose"
    assert end_of_turn(tokenizer) == TURN
    assert end_of_turn(turn_tokenizer(chat=False)) is None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, TURN]}))
    assert ends_beside(type(tokenizer).from_pretrained(tmp_path)) == (0, TURN)
    assert env(tokenizer=tmp_path).end_token_ids == (0, TURN)
    assert env(chat=True, max_prompt_tokens=12).end_token_ids == (0, TURN)
    assert env(stop=["<turn>"]).end_token_ids == (0, TURN)
    assert env().end_token_ids == (0,)


@pytest.mark.parametrize("after", [" </s>", "\n</s>", "</s>", ""])
def test_the_space_before_an_end_of_turn_is_no_end(after):
    tokenizer = llama(legacy=False)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}" + after + "{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    assert end_of_turn(tokenizer) == (tokenizer.eos_token_id if after else None)


@pytest.mark.parametrize("content", ["{bad", "[]", '{"eos_token_id": "x"}'])
def test_a_generation_config_that_cannot_be_read_is_named(content, tmp_path):
    turn_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json must be a JSON object whose eos_token_id"):
        env(tokenizer=tmp_path)


def test_a_policy_stops_where_its_model_does(tmp_path):
    model, tokenizer = chain_model(ANSWER), turn_tokenizer()
    policy, greedy = CausalLMPolicy(model, tokenizer), Decoding(greedy=True)
    ids = tokenizer("w5 w9", return_tensors="pt")["input_ids"]
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    assert theirs == [10, TURN]
    for decoding in (greedy, Decoding(num_beams=2)):
        assert policy.generate(["w5 w9"], max_new_tokens=8, decoding=decoding) == ["w10"]
    policy.save_pretrained(tmp_path)
    assert CausalLMPolicy.from_pretrained(tmp_path, device="cpu").end_token_ids == (0, TURN)
    # An environment that was made without the model learns from the policy where a text ends.
    made = env(parking=True)
    rollout = collect(made, policy, seeds=np.arange(4, dtype=np.uint64), decoding=greedy)
    assert rollout.policy_tokens.tolist() == [2] * 4
    assert set(rollout.texts) == {" w10"}
    assert set(rollout.finish_reason) == {"stop"}
    # And the policy from the environment.
    other, stopping = CausalLMPolicy(chain_model(ANSWER, ends=[0]), tokenizer), env(parking=True, stop=["<turn>"])
    least = Decoding(min_new_tokens=3)
    assert collect(stopping, other, seeds=np.arange(4, dtype=np.uint64), decoding=least).policy_tokens.min() >= 3
    # For as long as they play together.
    assert (made.end_token_ids, other.end_token_ids) == ((0,), (0,))
    PPO(other, stopping, episodes_per_iteration=4, device="cpu")
    assert other.end_token_ids == (0, TURN)
    other.save_pretrained(tmp_path / "other")
    assert CausalLMPolicy.from_pretrained(tmp_path / "other", device="cpu").end_token_ids == (0, TURN)


@pytest.mark.parametrize("decoding", [Decoding(greedy=True), Decoding(), Decoding(num_beams=3)], ids=str)
def test_a_minimum_length_holds_back_every_end(decoding):
    model = chain_model({20: TURN, TURN: 0, 0: 20})
    least = Decoding(**{**vars(decoding), "min_new_tokens": 6})
    ids = np.full((8, 3), 20)
    written = generate(
        model, ids, np.ones_like(ids), decoding=least, seeds=np.arange(8), eos_token_id=(0, TURN), max_new_tokens=9
    )
    assert all(not {0, TURN} & set(line[:6]) for line in written)
    assert any({0, TURN} & set(line[6:]) for line in written)
    masks = env(min_new_tokens=2, stop=["<turn>"])
    masks.reset(seed=0)
    assert not masks.action_masks()[:, [0, TURN]].any()


def test_log_probabilities_do_not_see_what_is_held_back():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=P + T, initializer_range=0.5)
    policy = CausalLMPolicy(AutoModelForCausalLM.from_config(config).eval(), turn_tokenizer())
    made = env(16, parking=True, stop=["<turn>", "w3"])
    rollout = collect(made, policy, seeds=np.arange(16, dtype=np.uint64), decoding=Decoding(min_new_tokens=5))
    judged = policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body))
    torch.testing.assert_close(judged.log_probs, rollout.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{"chat": True}, {"template": "{prompt} w9", "stop": ["<turn>"]}, {"stop": ["<turn>"]}, {}], ids=str
)
def test_a_guide_stops_where_its_model_does(arguments):
    named = not arguments.get("chat") and "stop" in arguments
    model = chain_model(ANSWER, ends=[0] if named else [0, TURN])
    seen = []
    guide = LocalGuide(model, tokenizer=turn_tokenizer(), decoding=Decoding(greedy=True), device="cpu", **arguments)
    made = env(1, seen, guide=guide, handoff=True)
    made.reset(seed=0)
    *_, infos = made.step(np.array([made.vocab_size]))
    assert seen == [" w10"]
    assert infos["guide_tokens"][0] == 2
    assert made._input_ids[0][made._attention_mask[0] > 0][-1] == 0, "a finished text ends as the environment's do"
    chatting = env(1, guide=guide, handoff=True, stop=["<turn>"])
    chatting.reset(seed=0)
    chatting.step(np.array([made.vocab_size]))
    assert chatting._input_ids[0][chatting._attention_mask[0] > 0][-1] == (TURN if arguments else 0 if named else TURN)
    made.reset(seed=1, options={"guidance": {"restart_prob": 1.0, "restart_length": [6, 8]}})
    assert made._prefix_length[0] <= 1


def test_an_end_of_turn_model_learns_its_end_of_turn():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=16 + T)
    for arguments, end in (({"chat": True}, TURN), ({"stop": ["<turn>"]}, TURN), ({}, 0)):
        torch.manual_seed(0)
        policy = CausalLMPolicy(AutoModelForCausalLM.from_config(config).eval(), turn_tokenizer())
        made = env(4, parking=True, max_prompt_tokens=16, **arguments)
        assert made.end_token_id == end
        agent = SL(
            policy, made, n_epochs=120, episodes_per_iteration=4, minibatch_size=4, learning_rate=1e-2, patience=99
        )
        agent.learn(total_episodes=120)
        rollout = collect(made, policy, seeds=np.arange(4, dtype=np.uint64), decoding=Decoding(greedy=True))
        assert set(rollout.texts) == {" w3"}
        assert rollout.input_ids[0, 17] == end


def test_algorithms_train_and_evaluate_with_several_ends():
    policy = CausalLMPolicy(chain_model(ANSWER), turn_tokenizer())
    agent = PPO(policy, env(parking=True), episodes_per_iteration=4, minibatch_size=4, seed=0, device="cpu")
    agent.learn(total_episodes=4)
    result = evaluate(agent, env(order="sequential", parking=True), decoding=Decoding(greedy=True), metrics=())
    assert [len(ids) for ids in result.token_ids] == [2]


# Vocabularies that are not those of the model


def gap_tokenizer(end=VOCAB + 10):
    """The EOS token has an id beyond the number of tokens."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"].append(
        {"id": end, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    content["model"]["vocab"]["<end>"] = end
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<end>")


def random_model(vocabulary, **more):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=P + T, **more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "decoding", [Decoding(), Decoding(top_k=70), Decoding(top_p=0.99), Decoding(greedy=True)], ids=str
)
def test_a_vocabulary_with_gaps(decoding):
    tokenizer = gap_tokenizer()
    assert vocabulary_size(tokenizer) == VOCAB + 11
    assert unused_ids(tokenizer) == tuple(range(VOCAB, VOCAB + 10))
    made = env(32, tokenizer=tokenizer, parking=True)
    made.reset(seed=0)
    assert made.single_action_space.n == VOCAB + 11
    assert (~made.action_masks()).any(0).nonzero()[0].tolist() == list(unused_ids(tokenizer))
    policy = CausalLMPolicy(random_model(VOCAB + 16, initializer_range=0.5), tokenizer, handoff_prob=None)
    rollout = collect(made, policy, seeds=np.arange(32, dtype=np.uint64), decoding=decoding)
    written = rollout.input_ids[:, P:][rollout.body]
    assert not set(written.tolist()) & set(unused_ids(tokenizer))
    assert written.max() <= VOCAB + 10
    judged = policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body))
    torch.testing.assert_close(judged.log_probs, rollout.log_probs, atol=1e-5, rtol=0)
    beams = policy.generate(["w1 w2"], max_new_tokens=4, decoding=Decoding(num_beams=2))
    assert all(word.startswith("w") for word in beams[0].split())


def test_a_hand_off_is_the_action_after_all_ids():
    tokenizer = gap_tokenizer()
    policy = CausalLMPolicy(random_model(VOCAB + 16), tokenizer, handoff_prob=0.5)
    made = env(16, tokenizer=tokenizer, parking=True, handoff=True, guide=lambda requests: ["w1"] * len(requests))
    rollout = collect(made, policy, seeds=np.arange(16, dtype=np.uint64))
    assert rollout.handoffs.any()


@pytest.mark.parametrize("handoff", [False, True])
def test_a_tokenizer_with_more_tokens_than_the_model(handoff):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<image>"]})
    assert tokenizer.pad_token_id >= VOCAB
    guide = LocalGuide(random_model(VOCAB), tokenizer=tokenizer, device="cpu")
    made = env(16, tokenizer=tokenizer, parking=True, guide=guide, handoff=handoff, guidance={"restart_prob": 0.5})
    policy = CausalLMPolicy(random_model(VOCAB), tokenizer, handoff_prob=0.2 if handoff else None)
    agent = PPO(policy, made, episodes_per_iteration=16, minibatch_size=8, device="cpu")
    agent.learn(total_episodes=16)
    rollout = agent.last_rollout
    assert rollout.input_ids[rollout.attention_mask > 0].max() < VOCAB
    assert bool(rollout.handoffs.any()) == handoff
    image = tokenizer.convert_tokens_to_ids("<image>")
    framed = env(1, tokenizer=tokenizer, template="<image> {prompt}", guide=guide, guidance={"restart_prob": 1.0})
    for judge in (
        lambda: policy.generate(["w1 <image>"], max_new_tokens=2),
        lambda: policy.evaluate_actions(torch.tensor([[3, image, 5]]), torch.ones(1, 3), torch.tensor([[2]])),
        lambda: framed.reset(seed=0, options={"guidance": {"restart_prob": 1.0, "restart_length": 3}}),
    ):
        with pytest.raises(
            ValueError, match=f"texts must hold only tokens that GPT2LMHeadModel embeds.*{image}.*<image>"
        ):
            judge()


def test_an_end_that_the_model_does_not_know_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    with pytest.raises(ValueError, match="tokenizer has 65 tokens, but the model's vocabulary has only 64"):
        CausalLMPolicy(random_model(VOCAB), tokenizer)


def test_end_tokens_of_a_policy_can_be_lent_to_an_environment():
    made = env(stop=["<turn>"])
    with contextlib.suppress(RuntimeError), made.extra_end_tokens([5, TURN]):
        assert made.end_token_ids == (0, TURN, 5)
        raise RuntimeError
    assert made.end_token_ids == (0, TURN)
    made.add_end_tokens([5])
    assert (made.end_token_ids, made.end_token_id) == ((0, TURN, 5), TURN)


def test_criteria_with_further_tokens_leave_the_first_alone():
    tokenizer = turn_tokenizer()
    first = StopCriteria(tokenizer, ["w3"], [7], chat=True)
    more = first.with_tokens([9, 0])
    assert (first.token_ids, more.token_ids) == ((0, 7, TURN), (0, 7, TURN, 9))
    assert np.flatnonzero(first.tokens).tolist() == sorted(first.token_ids)
    assert np.flatnonzero(more.tokens).tolist() == sorted(more.token_ids)
    assert first.closing_token == more.closing_token == TURN
    three = tokenizer("w3", add_special_tokens=False)["input_ids"]
    assert more.cut([4, *three, 5]) == [4, *three]
    assert more.cut([4, 9, *three]) == [4, 9]
