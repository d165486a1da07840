"""The model card of a checkpoint: model, task, algorithm and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from agents.policy import LanguageModelPolicy
from agents.policy.lora import has_adapters
from textgym.rendering import inert, visible

if TYPE_CHECKING:
    from agents.policy import Policy
    from textgym.engine import TextVectorEnv


def model_card(
    policy: Policy,
    env: TextVectorEnv,
    *,
    algorithm: str,
    load: str,
    training: str,
    parts: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> ModelCard:
    """Make the card of a policy that was trained on an environment; it contains no local paths.

    `load` is the name of the method that continues the training, `training` its amount in words, `parts` are guide and
    reward by name (None if unused), and `history` has a record for each iteration.
    """
    model = policy.model if isinstance(policy, LanguageModelPolicy) else None
    seq2seq = model is not None and model.config.is_encoder_decoder
    library = "textgym" if model is None else "peft" if has_adapters(model) else "transformers"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text2text-generation" if seq2seq else "text-generation",
        base_model=None if model is None else _hub_id(model.name_or_path),
        tags=["textgym", "reinforcement-learning", algorithm, env.task.name],
    )
    rows = {
        "Task": inert(env.task.name) + ("" if env.spec is None else f" (`{env.spec.id}`)"),
        "Algorithm": inert(algorithm),
        "Prompt / new tokens": f"{env.max_prompt_tokens} / {env.max_new_tokens}",
        "Training": training,
        "Data": f"{env.source if env.source in ('mini', 'hub') else 'a folder'}, split {env.split}, fingerprint "
        + _code(env.data.fingerprint),
    }
    for name, part in parts.items():
        fingerprint = getattr(part, "fingerprint", None)
        known = "" if fingerprint is None or Path(fingerprint).exists() else f", fingerprint {_code(fingerprint)}"
        if part is not None:
            rows[name] = inert(getattr(part, "__name__", type(part).__name__)) + known
    for record in history:  # the last evaluation counts
        scores = [name for name in record if name.startswith(("eval/reward", "eval/length", "validation_"))]
        rows |= {name: f"{record[name]:.4f}" for name in scores}
    if history:
        rows["Iteration"] = str(history[-1]["iteration"])
    use = f"agents.{'LanguageModelPolicy' if model is not None else type(policy).__name__}.from_pretrained(folder)"
    lines = [f"| {inert(name)} | {value} |" for name, value in rows.items()]
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {inert(algorithm)} on {inert(env.task.name)}\n\n"
        "Trained with textgym. Scores are those of the last evaluation on validation prompts.\n\n| | |\n|---|---|\n"
        + "\n".join(lines)
        + f"\n\n`{use}` loads the policy with its heads, decoding and tokenizer; `{load}(folder, env)` continues the "
        "training. All hyperparameters are in `algorithm.json`"
        + ("" if model is None else f"; transformers opens the folder as a `{type(model).__name__}`")
        + ".\n"
    )


def _code(text: str) -> str:
    return "`" + visible(text).replace("`", "'").replace("\n", " ") + "`"


def _hub_id(name: str | None) -> str | None:
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name
