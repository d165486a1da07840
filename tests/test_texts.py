"""From new tokens to text and back, with every kind of tokenizer: what a text is does not depend on who reads it."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from agents import SL, CausalLMPolicy, evaluate
from agents.sb3 import TextVecEnv
from benchmarks.comparison.samples import segments
from textgym import Task
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides import Author
from textgym.guides.local import LocalGuide
from textgym.tokenization import (
    Context,
    StopCriteria,
    decode,
    decode_by_author,
    decode_continuations,
    encode_continuations,
    encode_prompts,
    train_tokenizer,
)
from textgym.trl import reward_function

WORDS = ["the", "film", "was", "very", "good", "bad", "fun"]
LETTERS = "abcdefghijklmnopqrstuvwxyz.!?0123456789"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PROMPTS = [
    "the film was",
    "the film was ",
    "the film was  ",
    "fun\n",
    "the film was 好",
    "good 😀",
    "fun é",
    " the",
    "was.",
]
P, T = 48, 24


def llama(more=(), **arguments):
    """transformers' own class: BPE over letters and words, with or without a space before every text."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *LETTERS, *more])}
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
        merges.append(("▁", word))
        vocabulary.setdefault(f"▁{word}", len(vocabulary))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, **arguments)


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    pieces += [(letter, -8.0) for letter in LETTERS] + [(f"▁{word}", -2.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def unigram(prepend):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    pieces += [(letter, -8.0) for letter in LETTERS] + [(f"▁{word}", -2.0) for word in WORDS]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def wordpiece():
    tokens = ["[PAD]", "[SEP]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


KINDS = {
    "byte-level BPE": lambda: train_tokenizer([" ".join(WORDS), " " + " ".join(WORDS)] * 3),
    "SentencePiece BPE": lambda: llama(legacy=False),
    "SentencePiece BPE, a space before every piece": lambda: llama(legacy=True),
    "SentencePiece BPE, no space before a text": lambda: llama(add_prefix_space=False, legacy=False),
    "byte fallback": lambda: llama(BYTES, legacy=False),
    "T5": t5,
    "SentencePiece unigram": lambda: unigram("always"),
    "SentencePiece unigram, first only": lambda: unigram("first"),
    "SentencePiece unigram, no space before a text": lambda: unigram("never"),
    "WordPiece": wordpiece,
}


@functools.cache
def tokenizer_of(kind):
    made = KINDS[kind]()
    if made.pad_token is None:
        made.pad_token = made.eos_token
    return made


def task(prompt, reference, reward):
    return Task("t", [{"p": prompt, "r": reference}], "{p}", "r", P, T, reward)


def check_whole(tokenizer, prompt, ids, text):
    """`text` is what `ids` add to the prompt: together they are the text of all ids."""
    (_, prompt_ids) = encode_prompts(tokenizer, [("", prompt, "")], P)[0]
    before, whole = decode(tokenizer, [prompt_ids, [*prompt_ids, *ids]])
    if whole.startswith(before) and before[-1:].isspace() == prompt[-1:].isspace():
        assert whole == before + text  # else new bytes complete or spoil a character of the prompt, or space was lost
    if before == prompt.rstrip() and whole.startswith(before + " "):  # this tokenizer makes one space of all
        assert whole.split() == (prompt + text).split()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_prompt_and_its_text_are_the_text_of_all_tokens(kind, data):
    tokenizer = tokenizer_of(kind)
    prompt = data.draw(st.sampled_from(PROMPTS))
    tokens = st.integers(0, len(tokenizer) - 1).filter(lambda token: token != tokenizer.eos_token_id)
    ids = data.draw(st.lists(tokens, max_size=8))
    (_, prompt_ids) = encode_prompts(tokenizer, [("", prompt, "")], P)[0]
    (text,) = decode_continuations(tokenizer, [Context(prompt_ids, prompt)], [ids])
    check_whole(tokenizer, prompt, ids, text)
    # The end of the prompt is as good as all of it.
    (before, whole) = decode(tokenizer, [prompt_ids, [*prompt_ids, *ids]])
    if whole.startswith(before):
        assert decode_continuations(tokenizer, [Context(prompt_ids, before)], [ids]) == [whole[len(before) :]]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_encoded_together_as_each_alone(kind):
    tokenizer = tokenizer_of(kind)
    texts = ("very good", " very good", ".", "!", " a fun film", "")
    pairs = [(prompt, text) for prompt in (*PROMPTS, "") for text in texts]
    alone = [encode_continuations(tokenizer, [prompt], [text])[0] for prompt, text in pairs]
    assert encode_continuations(tokenizer, *zip(*pairs, strict=True)) == alone
    backwards = encode_continuations(tokenizer, *zip(*pairs[::-1], strict=True))
    assert backwards[::-1] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_that_is_encoded_after_a_prompt_is_read_again(kind, prompt):
    tokenizer = tokenizer_of(kind)
    (_, prompt_ids) = encode_prompts(tokenizer, [("", prompt, "")], P)[0]
    for reference in ("very good", " very good", ".", "!", " a fun film"):
        (ids,) = encode_continuations(tokenizer, [prompt], [reference])
        expected = reference if prompt[-1].isspace() or reference[0] == " " else " " + reference
        if prompt[-1].isspace() and not decode(tokenizer, [prompt_ids])[0][-1].isspace():
            expected = expected.lstrip()  # what stands between two words is lost, and stands in the prompt already
        (text,) = decode_continuations(tokenizer, [Context(prompt_ids, prompt)], [ids])
        if kind == "WordPiece":  # which joins a sign to the word before it, whatever stands between them
            text, expected = text.lstrip(), expected.lstrip()
        assert text == expected


def test_a_character_that_begins_in_the_prompt_belongs_to_the_text():
    tokenizer = tokenizer_of("byte-level BPE")
    face = tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert len(face) > 2
    for cut in range(1, len(face)):
        context = Context([*tokenizer("good")["input_ids"], *face[:cut]], "good\ufffd")
        assert decode_continuations(tokenizer, [context], [face[cut:]]) == ["😀"]


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte fallback", "ByT5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_is_cut_inside_a_character(kind, side):
    tokenizer = ByT5Tokenizer() if kind == "ByT5" else tokenizer_of(kind)
    for columns in range(4, 24):
        [(shown, ids)] = encode_prompts(tokenizer, [("", "good 😀😀 é film", "")], columns, side)
        for new in ("é", " good", "\nfun", "😀"):
            tokens = tokenizer(new, add_special_tokens=False)["input_ids"]
            (before, whole) = decode(tokenizer, [ids, [*ids, *tokens]])
            (text,) = decode_continuations(tokenizer, [Context(ids, shown)], [tokens])
            if whole.startswith(before):
                assert text in (whole[len(before) :], whole[len(before) :].lstrip())
            assert "\ufffd" not in text or kind == "byte fallback"


def test_bytes_that_make_no_character_leave_the_prompt_alone():
    tokenizer = tokenizer_of("byte fallback")
    ids = tokenizer("你好", add_special_tokens=False)["input_ids"]
    context = Context([*tokenizer("good")["input_ids"], *ids[-6:]], "good你好")
    (broken,) = decode_continuations(tokenizer, [context], [[tokenizer.convert_tokens_to_ids("<0xE4>")]])
    assert broken == "\ufffd"


def play(env, ids):
    """Write tokens in every row, then end the text where it has not ended."""
    env.reset(seed=0)
    for token in [*ids, env.eos_token_id]:
        _, _, ended, _, infos = env.step(np.full(env.num_envs, token))
        if ended[0]:
            return infos["text"][0]
    raise AssertionError("the text never ended")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_everybody_reads_the_same_text(kind, prompt):
    tokenizer, seen, asked = tokenizer_of(kind), [], []

    def reward(prompts, completions, references):
        seen.extend(completions)
        return [0.0] * len(prompts)

    def guide(requests):
        asked.extend(request.prefix for request in requests)
        return [" fun"] * len(requests)

    made = task(prompt, "very good", reward)
    env = TextVectorEnv(1, task=made, tokenizer=tokenizer, guide=guide, handoff=True, render_mode="ansi")
    (ids,) = encode_continuations(tokenizer, [prompt], ["very good"])
    text = play(env, ids)
    check_whole(tokenizer, prompt, ids, text)
    assert text == ("very good" if prompt[-1].isspace() else " very good")
    assert seen == [text]
    assert env.texts([ids], [prompt]) == [text]
    assert env.reward_arguments([0])["completions"] == [text]
    assert env.render()[0] == f"\x1b[2m{prompt}\x1b[0m\x1b[32m{text}\x1b[0m"
    env.reset(seed=0)
    for token in ids:
        env.step(np.array([token]))
    _, _, _, _, infos = env.step(np.array([env.vocab_size]))
    assert asked == [text]
    assert infos["text"][0] == text + " fun"
    assert env.render()[0].endswith(f"\x1b[32m{text}\x1b[0m\x1b[35m fun\x1b[0m")

    reward_function(env)(
        prompts=[prompt], completions=tokenizer.batch_decode([ids], skip_special_tokens=True), completion_ids=[ids],
        task_prompt=[prompt], references=[("very good",)],
    )  # fmt: skip
    assert seen[-1] == text
    rows = TextVecEnv(TextVectorEnv(2, task=made, tokenizer=tokenizer))
    rows.reset()
    for token in [*ids, tokenizer.eos_token_id]:
        rows.step_async(np.full(2, token))
        _, _, dones, infos = rows.step_wait()
    assert dones.all()
    assert [info["text"] for info in infos] == [text] * 2
    authors = [Author.GUIDE] * 2 + [Author.POLICY] * (len(ids) - 2)
    assert "".join(part for _, part in segments(prompt, ids, authors, tokenizer)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_with_a_space_end_a_text_at_its_first_token(kind):
    tokenizer = tokenizer_of(kind)
    env = TextVectorEnv(1, task=task("the film was", "", lambda **_: [0.0]), tokenizer=tokenizer, stop=(" very",))
    (ids,) = encode_continuations(tokenizer, ["the film was"], ["very good"])
    assert play(env, ids) == ""
    assert env._length[0] <= len(encode_continuations(tokenizer, ["the film was"], ["very"])[0])


@pytest.mark.parametrize("kind", ["SentencePiece BPE", "T5", "byte-level BPE", "WordPiece"])
def test_what_supervised_learning_learns_is_what_the_reward_knows(kind):
    tokenizer = tokenizer_of(kind)

    def exact(prompts, completions, references):
        return [float(text == " " + refs[0]) for text, refs in zip(completions, references, strict=True)]

    def env(**arguments):
        return TextVectorEnv(
            4, task=task("the film was", "very good", exact), tokenizer=tokenizer, parking=True, **arguments
        )

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=P + T)
    policy = CausalLMPolicy(GPT2LMHeadModel(config), tokenizer)
    SL(policy, env(), n_epochs=80, episodes_per_iteration=4, minibatch_size=4, learning_rate=1e-2, patience=99).learn(
        total_episodes=80
    )
    greedy = Decoding(greedy=True)
    assert evaluate(policy, env(order="sequential"), decoding=greedy, metrics=()).reward == 1
    assert policy.generate(["the film was"], max_new_tokens=T, decoding=greedy) == [" very good"]


@pytest.mark.parametrize("kind", ["SentencePiece BPE", "T5", "byte-level BPE", "WordPiece"])
def test_a_guide_with_a_tokenizer_of_its_own_reads_and_writes_the_space(kind):
    own, words = tokenizer_of(kind), tokenizer_of("byte-level BPE")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(own), n_embd=512, n_layer=1, n_head=2, n_positions=P + T)).eval()
    # Says "very good" after whatever it reads, then ends.
    very, good = own.convert_tokens_to_ids(own.tokenize("was very good"))[-2:]
    follow = {very: good, good: own.eos_token_id}
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for block in model.transformer.h:
            for parameter in block.parameters():
                parameter.zero_()
        states = model.transformer.ln_f(model.transformer.wte.weight)
        said = torch.tensor([follow.get(token, very) for token in range(len(own))])
        weight = torch.linalg.pinv(states) @ torch.nn.functional.one_hot(said, len(own)).float()
        model.lm_head.weight = torch.nn.Parameter(weight.T.contiguous())
    guide = LocalGuide(model, tokenizer=own, decoding=Decoding(greedy=True), template="{prompt}", device="cpu")
    env = TextVectorEnv(
        1, task=task("the film", "", lambda prompts, **_: [0.0]), tokenizer=words, guide=guide, handoff=True
    )
    env.reset(seed=0)
    for token in encode_continuations(words, ["the film"], ["was"])[0]:
        env.step(np.array([token]))
    *_, infos = env.step(np.array([env.vocab_size]))
    assert infos["text"][0] == " was very good"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_has_its_bos_gets_no_second_one(side):
    tokenizer = llama(legacy=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    plain = encode_prompts(tokenizer, [("", "the film was", "")], P)[0][1]
    assert plain[0] == tokenizer.bos_token_id
    (text, ids) = encode_prompts(tokenizer, [("", "the film was", "")], P, template=("<s>", ""))[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer("<s>the film was", add_special_tokens=False)["input_ids"]
    (text, ids) = encode_prompts(tokenizer, [("", "the film was very good", "")], 4, side, template=("<s>", ""))[0]
    assert len(ids) == 4
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert text.startswith("<s>")
    twice = encode_prompts(tokenizer, [("", "<s><s>the film", "")], P, template=None)[0][1]
    assert twice.count(tokenizer.bos_token_id) == 3, "what somebody writes twice is meant so"


def test_the_end_of_a_text_is_found_without_a_context_too():
    tokenizer = tokenizer_of("byte-level BPE")
    ends, ids = StopCriteria(tokenizer, ("good",)), tokenizer(" very good fun")["input_ids"]
    cut = ends.cut(ids)
    assert ends.texts([cut]) == [" very "]
    assert ends.reached(np.array(cut[-1:]), lambda _: cut).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stretches_of_authors_are_decoded_as_parts_of_one_text(kind):
    tokenizer = tokenizer_of(kind)
    context = Context(tokenizer("the film", add_special_tokens=False)["input_ids"], "the film")
    ids = encode_continuations(tokenizer, ["the film"], ["was very good fun"])[0]
    authors = [0, *[1] * (len(ids) - 2), 0]
    stretches = decode_by_author(tokenizer, context, ids, authors)
    assert [author for author, _ in stretches] == [0, 1, 0]
    assert "".join(text for _, text in stretches) == " was very good fun"
    assert decode_by_author(tokenizer, context, ids, np.array(authors, np.int8)) == stretches
    assert decode_by_author(tokenizer, context, [], []) == []


def test_making_an_environment_asks_no_word_of_a_tokenizer():
    """A vocabulary of words without one for the unknown, as the lock's, encodes nothing else."""
    env = gym.make("textgym/CombinationLock-v0")
    env.reset(seed=0)
    assert isinstance(env.step(1)[4], dict)
