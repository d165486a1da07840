"""A local model as a guide: ids stay ids, text stays text, and its weights never move."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from test_decoding import tiny_model
from test_policy import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, RecurrentGemmaConfig

from textgym import model_checks
from textgym.decoding import Decoding
from textgym.generation import generate
from textgym.guides import GuideRequest, load_guide
from textgym.guides.local import LocalGuide
from textgym.tokenization import train_tokenizer

WORDS = tiny_tokenizer()
TEXT = ["a red sun over the sea", " the moon and one green star", "two hills, a blue tree and the sea"] * 4


def requests(count=24):
    """Requests in the vocabulary of `WORDS`, of several lengths, prefixes and limits."""
    made = []
    for i in range(count):
        prompt_ids, prefix_ids = tuple(range(2, 4 + i % 7)), tuple(range(20, 20 + i % 3))
        made.append(
            GuideRequest(
                prompt=" ".join(f"w{token}" for token in prompt_ids),
                prompt_ids=prompt_ids,
                prefix="".join(f" w{token}" for token in prefix_ids),
                prefix_ids=prefix_ids,
                max_new_tokens=3 + 2 * (i % 11),
                seed=2**64 - 1 - i,
            )
        )
    return made


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("decoding", [None, Decoding(temperature=2.0)])
def test_same_vocabulary_is_ids_of_the_model(folder, decoding):
    model, asked = tiny_model(), requests()
    guide = LocalGuide(folder, device="cpu", batch_size=4, decoding=decoding)
    published = Decoding(top_p=0.92, top_k=50)
    written = guide.complete(asked, WORDS)
    for request, completion in zip(asked, written, strict=True):
        context = [[*request.prompt_ids, *request.prefix_ids]]
        [expected] = generate(
            model, context, [[1] * len(context[0])], decoding=decoding or published, seeds=[request.seed],
            eos_token_id=0, prefix_lengths=[len(request.prefix_ids)],
            max_new_tokens=[request.max_new_tokens + len(request.prefix_ids)],
        )  # fmt: skip
        assert list(completion.token_ids) == expected
        assert len(expected) <= request.max_new_tokens
        assert completion.finished == (expected[-1] == 0)
    assert decoding is None or len({completion.finished for completion in written}) == 2
    assert [guide.complete([request], WORDS)[0] for request in asked] == written
    assert guide.complete([], WORDS) == []


def test_a_guide_from_a_model_is_the_guide_from_its_folder(folder):
    model = tiny_model()
    from_object = LocalGuide(model, device="cpu")
    from_folder = LocalGuide(folder, device="cpu")
    assert from_object.complete(requests(), WORDS) == from_folder.complete(requests(), WORDS)
    assert from_object.fingerprint == from_folder.fingerprint
    assert from_object.fingerprint != LocalGuide(model, decoding=Decoding()).fingerprint


def test_training_the_original_never_moves_the_guide():
    model = tiny_model()
    guide = LocalGuide(model)
    before, fingerprint = guide.complete(requests(), WORDS), guide.fingerprint
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    assert guide.complete(requests(), WORDS) == before
    assert guide.fingerprint == fingerprint != LocalGuide(model).fingerprint
    assert not any(parameter.requires_grad for parameter in guide._model.parameters())


@pytest.mark.parametrize("source", ["folder", "model"])
def test_copies_share_weights_and_pickles_write_the_same(folder, source):
    guide = LocalGuide(folder if source == "folder" else tiny_model())
    fresh = pickle.loads(pickle.dumps(guide))
    expected = guide.complete(requests(), WORDS)
    assert copy.deepcopy(guide)._model is guide._model
    pickled = pickle.dumps(guide)
    assert (len(pickled) < 3000) == (source == "folder"), "a path is loaded again, a model travels"
    for other in (fresh, pickle.loads(pickled), copy.deepcopy(guide)):
        assert other.complete(requests(), WORDS) == expected
    if source == "folder":
        assert fresh._model is guide._model, "guides of one folder share its model while it is loaded"


def test_a_folder_that_was_written_over_is_loaded_again(folder):
    first = LocalGuide(folder)
    before = first.fingerprint
    model = tiny_model()
    model.lm_head.weight.data.neg_()
    model.save_pretrained(folder)
    assert LocalGuide(folder).fingerprint != before == first.fingerprint


def text_guide(**arguments):
    """A guide with a byte-level vocabulary of its own."""
    own = train_tokenizer(TEXT, vocab_size=280)
    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=160, vocab_size=len(own), initializer_range=0.3,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    return LocalGuide(model, tokenizer=own, **arguments), own


def test_another_vocabulary_reads_and_writes_text():
    guide, own = text_guide(decoding=Decoding(temperature=1.5))
    asked = requests()
    written = guide.complete(asked, WORDS)
    for request, completion in zip(asked, written, strict=True):
        assert completion.token_ids is None
        length = len(WORDS(completion.text, add_special_tokens=False)["input_ids"])
        assert completion.finished or length >= request.max_new_tokens, "enough text to fill the limit"
        assert own.eos_token not in completion.text
    assert len({completion.finished for completion in written}) == 2
    assert [guide.complete([request], WORDS)[0] for request in asked] == written


def test_another_vocabulary_stops_at_the_end_of_the_models_positions():
    guide, _ = text_guide(decoding=Decoding(min_new_tokens=1000))
    words = GuideRequest("a red sun", (2, 3, 4), "", (), 500, 1)
    [completion] = guide.complete([words], WORDS)
    assert not completion.finished
    assert len(completion.text) > 0


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="model must be a hub id, a path or a language model"):
        LocalGuide(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="batch_size must be an int >= 1, got 0"):
        LocalGuide("gpt2", batch_size=0)
    with pytest.raises(ValueError, match="dtype must be None"):
        LocalGuide("gpt2", dtype="bf16")
    with pytest.raises(ValueError, match="must be a hub id or a folder of a causal or sequence"):
        LocalGuide(tmp_path / "nothing").complete(requests(), WORDS)
    with pytest.raises(ValueError, match="the tokenizer has 99 tokens"):
        LocalGuide(tiny_model()).complete(requests(), tiny_tokenizer(99))
    request = GuideRequest("w2", (2,), "", (), 60, 1)
    with pytest.raises(ValueError, match="40 positions"):
        LocalGuide(tiny_model()).complete([request], WORDS)


@pytest.mark.parametrize(
    "path", ["/models/nothing", "./nothing", "../a/b", "~/nothing", "a/b/c", "nothing/", "", "a b"]
)
def test_a_path_at_which_there_is_nothing_is_refused_at_once(path, folder):
    with pytest.raises(
        ValueError, match="guide must be the hub id or path of a language model, and there is nothing at"
    ):
        load_guide(path)
    for fine in ("gpt2", "google/gemma-3-270m", "a_b/c.d-1", str(folder), folder, f"{folder}/"):
        assert isinstance(load_guide(fine), LocalGuide)


def test_naming_a_guide_does_not_import_torch():
    code = (
        "import sys, copy, pickle; from textgym.guides.local import LocalGuide; guide = LocalGuide('gpt2');"
        "pickle.loads(pickle.dumps(copy.deepcopy(guide))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def asked_guide(**arguments):
    """A guide and what it was given to continue, as text."""
    guide, own = text_guide(**arguments)
    own.chat_template = CHAT
    read = []
    write = guide._write
    guide._write = lambda contexts, *rest: read.extend(own.decode(c[0]) for c in contexts) or write(contexts, *rest)
    return guide, own, read


def test_templates_and_chats_are_what_the_model_reads():
    begun, fresh = (GuideRequest("a red sun", (2,), prefix, (), 4, 1) for prefix in (" over the", ""))
    for arguments, first, second in (
        ({}, "a red sun over the", "a red sun"),
        ({"template": "{{x}} Go on: {prompt}\n"}, "{x} Go on: a red sun\n over the", "{x} Go on: a red sun\n"),
        ({"chat": True}, "<user>a red sun</><answer>over the", "<user>a red sun</><answer>"),
        ({"template": "Say {prompt}!", "chat": True}, "<user>Say a red sun!</><answer>over the",
         "<user>Say a red sun!</><answer>"),
    ):  # fmt: skip
        guide, own, read = asked_guide(**arguments)
        written = guide.complete([begun, fresh], WORDS)
        assert read[:2] == [first, second]
        guide.tokenizer = own
        same = guide.complete([begun, fresh], own)
        assert (same[0].text is None) == (not arguments), "ids only where the prompt alone is read"
        assert guide.fingerprint == asked_guide(**arguments)[0].fingerprint
        assert [type(completion.text) for completion in written] == [str, str]
    prints = [text_guide(**options)[0].fingerprint for options in ({}, {"chat": False}, {"stop": ["x"]})]
    assert prints[0] == prints[1] != prints[2]


def test_a_model_that_cannot_be_served_is_refused_every_time(tmp_path):
    config = RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, lru_width=32, attention_window_size=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    guide = LocalGuide(tmp_path, device="cpu")
    for asked in (guide, guide, LocalGuide(tmp_path, device="cpu")):
        with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM does not"):
            asked.complete(requests(1), WORDS)


def test_a_text_ends_before_a_stop_string():
    free, _ = text_guide(decoding=Decoding(temperature=1.5))
    asked = requests()
    whole = [completion.text for completion in free.complete(asked, WORDS)]
    stop = [" s", "e"]
    stopping, _ = text_guide(decoding=Decoding(temperature=1.5), stop=stop)
    cut = stopping.complete(asked, WORDS)
    assert any(end in text for text in whole for end in stop)
    for text, completion in zip(whole, cut, strict=True):
        ends = [text.index(end) for end in stop if end in text]
        if ends:
            assert (completion.text, completion.finished) == (text[: min(ends)], True)
        else:
            assert completion.text.startswith(text)
            assert not any(end in completion.text for end in stop)


def test_what_cannot_be_asked_is_named():
    with pytest.raises(ValueError, match=r"template must hold \{prompt\}"):
        LocalGuide("gpt2", template="Go on:")
    for stop in ("x", [""], [3]):
        with pytest.raises(ValueError, match="stop must be a sequence of strings"):
            LocalGuide("gpt2", stop=stop)
    guide, _ = text_guide(chat=True)
    with pytest.raises(ValueError, match="chat must be False for a tokenizer without a chat template"):
        guide.complete(requests(), WORDS)


def test_a_copy_of_a_model_that_was_tried_is_not_tried_again(monkeypatch):
    model, tried = tiny_model(), []
    monkeypatch.setattr(model_checks, "_fault", lambda model, first: tried.append(model))
    LocalGuide(model, device="cpu")
    assert len(tried) == 1
    model_checks.check_served(model)
    assert tried[1:] == [model]
    LocalGuide(model, device="cpu")
    assert len(tried) == 2
