"""The model card of a checkpoint: what was trained on what, by which algorithm, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from agents.lora import has_adapters

if TYPE_CHECKING:
    from agents.algorithm import Algorithm


def model_card(agent: Algorithm) -> ModelCard:
    """Write the card from what an algorithm knows; paths of this machine are not in it."""
    env, policy = agent.env, agent.policy
    model: Any = getattr(policy, "model", None)
    seq2seq = model is not None and model.config.is_encoder_decoder
    library = "textgym" if model is None else "peft" if has_adapters(model) else "transformers"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text2text-generation" if seq2seq else "text-generation",
        base_model=None if model is None else _hub_id(model.name_or_path),
        tags=["textgym", "reinforcement-learning", agent.name, env.task.name],
    )
    rows = {
        "Task": env.task.name if env.spec is None else f"{env.task.name} (`{env.spec.id}`)",
        "Algorithm": agent.name,
        "Prompt / new tokens": f"{env.max_prompt_tokens} / {env.max_new_tokens}",
        "Training": f"{agent.num_episodes:,} episodes, {agent.num_timesteps:,} tokens of the policy, "
        f"{agent.num_guide_tokens:,} of a guide, seed {agent.seed}",
        "Data": f"{env.source if env.source in ('mini', 'hub') else 'a folder'}, split {env.split}, fingerprint "
        f"`{env.data.fingerprint}`",
    }
    # What was not used may not be loaded.
    guide = env.guide if agent.num_guide_tokens else None
    reward = env.reward_function if agent.plays_episodes and agent.num_episodes else None
    for what, part in (("Guide", guide), ("Reward", reward)):
        fingerprint = getattr(part, "fingerprint", None)
        known = "" if fingerprint is None or Path(fingerprint).exists() else f", fingerprint `{fingerprint}`"
        if part is not None:
            rows[what] = getattr(part, "__name__", type(part).__name__) + known
    scores = {name: value for record in agent.history for name, value in record.items() if _is_score(name)}
    rows |= {name: f"{value:.4f}" for name, value in scores.items()}
    if agent.history:
        rows["Iteration"] = str(agent.iteration)
    use = f"agents.{'LanguageModelPolicy' if model is not None else type(policy).__name__}.from_pretrained(folder)"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {agent.name} on {env.task.name}\n\n"
        "Trained with textgym. Scores are those of the last look at validation prompts.\n\n| | |\n|---|---|\n"
        + "\n".join(lines)
        + f"\n\n`{use}` reads the policy with its heads, decoding and tokenizer; `{type(agent).__name__}.load(folder, "
        "env)` continues the training. All hyperparameters are in `algorithm.json`"
        + ("" if model is None else f"; transformers opens the folder as a `{type(model).__name__}`")
        + ".\n"
    )


def _is_score(name: str) -> bool:
    return name.startswith(("eval/reward", "eval/length", "validation_"))


def _hub_id(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name or None
