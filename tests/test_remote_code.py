"""What comes with a model or a checkpoint runs no code, unless somebody says that it may."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from agents import LanguageModelPolicy
from textgym.guides import GuideRequest
from textgym.guides.local import LocalGuide
from textgym.metrics.models import BertScore, Perplexity
from textgym.models import load_model
from textgym.rewards.classifier import ModelReward
from textgym.tokenization import pretrained_tokenizer

ROOT = Path(__file__).parents[1]
# Those that are ours: they load only through `textgym.hub.load_pretrained`.
OURS = {"LanguageModelPolicy", "policy_class", "type(policy)", "CausalLMPolicy"}


def calls(path: Path):
    """Every call in a file, as the text of what is called and the node."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_one_loader_and_nothing_else_reads_pickles():
    elsewhere, pickles = [], []
    for path in (path for room in ("textgym", "agents", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))):
        place = str(path.relative_to(ROOT))
        for called, node in calls(path):
            arguments = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
            if called.endswith(".from_pretrained") and called.removesuffix(".from_pretrained") not in OURS:
                elsewhere.append((place, called))
            unpickles = called.endswith(("pickle.load", "pickle.loads", "torch.load", "joblib.load"))
            if unpickles and arguments.get("weights_only") != "True":
                pickles.append((place, called))
            assert arguments.get("trust_remote_code") != "True", (place, called)
    assert elsewhere == [("textgym/hub.py", "kind.from_pretrained")]
    # In a zip of Stable-Baselines3, which opens only where it is trusted.
    assert pickles == [("agents/sb3/policies.py", "pickle.loads")]


@pytest.fixture
def hostile(tmp_path, words_tokenizer, monkeypatch):
    """A folder of a model whose own code writes a file, and the file; nobody is asked on the terminal."""

    def asked(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(kind: str):
        folder, marker = tmp_path / f"hostile-{kind}", tmp_path / "it-ran"
        if kind == "classifier":
            config = BertConfig(
                vocab_size=len(words_tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                intermediate_size=8, max_position_embeddings=32,
            )  # fmt: skip
            model, auto = BertForSequenceClassification(config), "AutoModelForSequenceClassification"
        else:
            config = GPT2Config(vocab_size=len(words_tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1)
            model, auto = GPT2LMHeadModel(config), "AutoModelForCausalLM"
        model.save_pretrained(folder)
        words_tokenizer.save_pretrained(folder)
        (folder / "own.py").write_text(
            f"open({str(marker)!r}, 'w').close()\n"
            "from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel\n"
            "from transformers import PreTrainedTokenizerFast\n"
            f"class OwnConfig({type(config).__name__}): model_type = 'own'\n"
            f"class OwnModel({type(model).__name__}): config_class = OwnConfig\n"
            "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
        )
        own = {"AutoConfig": "own.OwnConfig", auto: "own.OwnModel", "AutoModel": "own.OwnModel"}
        for file, more in (
            ("config.json", {"model_type": "own", "auto_map": own}),
            (
                "tokenizer_config.json",
                {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
            ),
        ):
            path = folder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return folder, marker

    return make


REQUEST = GuideRequest("red", (2,), "", (), 3, 0)
DOORS = {
    "policy": ("model", lambda path: LanguageModelPolicy.from_pretrained(path, device="cpu")),
    "model": ("model", load_model),
    "perplexity": ("model", Perplexity),
    "guide": ("model", lambda path: LocalGuide(path, device="cpu").complete([REQUEST], pretrained_tokenizer(path))),
    "tokenizer": ("model", pretrained_tokenizer),
    "reward": ("classifier", ModelReward),
    "encoder": ("classifier", BertScore),
}


@pytest.mark.parametrize("door", DOORS)
def test_code_of_a_folder_does_not_run(door, hostile):
    kind, load = DOORS[door]
    folder, marker = hostile(kind)
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code") as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("door", ["policy", "model", "reward", "tokenizer"])
def test_it_runs_where_it_is_trusted(door, hostile):
    folder, marker = hostile("classifier" if door == "reward" else "model")
    load = {
        "policy": lambda **how: LanguageModelPolicy.from_pretrained(folder, device="cpu", **how),
        "model": lambda **how: load_model(folder, **how),
        "reward": lambda **how: ModelReward(folder, **how),
        "tokenizer": lambda **how: pretrained_tokenizer(folder, **how),
    }[door]
    load(trust_remote_code=True)
    assert marker.exists()
