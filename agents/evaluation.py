"""Evaluation of a policy: a completion for every prompt of a split, its reward, and metrics.

Also a command: ``python -m agents.evaluation --policy PATH --env textgym/IMDB-v0 --split test``.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from agents.environments import differences, make_env, sibling_env
from agents.policy import Actor, LanguageModelPolicy
from agents.processes import gather
from agents.rollout import Rollout, collect
from textgym.checks import check, check_int, is_int
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guidance import Guidance
from textgym.guides.base import Author
from textgym.metrics import Metric, check_metrics, columns_of, measure, select
from textgym.seeding import hash64
from textgym.storage import new_file
from textgym.task import SplitName

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class Agent(Protocol):
    """An object with a policy to evaluate, such as an algorithm."""

    policy: Any


@dataclass(repr=False)
class EvaluationResult:
    """A policy's completions of the prompts of a split, with their rewards and metrics.

    Attributes:
        task: Name of the task.
        split: Name of the split.
        source: Source of the data: "mini", "hub" or a folder.
        fingerprint: Fingerprint of the split's data.
        reward_fingerprint: Fingerprint of the reward; None if it has none.
        reward_accuracy: Held-out accuracy of a reward that is a trained model; None for others.
        decoding: How texts were decoded.
        seed: Seed of the sampling.
        best_of: Number of texts per prompt, of which the one with the highest reward was chosen.
        samples_per_prompt: Number of texts per prompt, of which the first was chosen.
        rewards: float (N,), of the chosen texts, in the order of `sample_ids`; so are the fields below, unless they
            say otherwise.
        reward_parts: Mean of each part of the reward.
        metrics: Values of the metrics over all texts, by name.
        metric_signatures: What these values depend on besides the texts, by name of the metric.
        metrics_left_out: Metrics of the task that were not computed, each with the reason.
        sample_ids: int (N,), rows of the split, ascending.
        prompts: N prompts.
        completions: N texts, without special tokens.
        references: N tuples of reference texts.
        finish_reasons: N times "stop", "length" or "handoff".
        token_ids: N lists of the tokens after the prompt.
        authors: N lists of their authors (`textgym.guides.base.Author`).
        all_completions: N lists of all n texts, n = `best_of` or `samples_per_prompt`, in the order they were drawn.
        all_rewards: float (N, n), their rewards.
        policy_tokens: Number of tokens written by the policy, of all texts.
        guide_tokens: Number of tokens written by a guide, of all texts.
        seconds: Wall-clock time of generation and scoring.
    """

    task: str
    split: str
    source: str
    fingerprint: str
    reward_fingerprint: str | None
    reward_accuracy: float | None
    decoding: Decoding
    seed: int
    best_of: int
    samples_per_prompt: int
    rewards: np.ndarray
    reward_parts: dict[str, float]
    metrics: dict[str, float]
    metric_signatures: dict[str, str]
    metrics_left_out: dict[str, str]
    sample_ids: np.ndarray
    prompts: list[str]
    completions: list[str]
    references: list[tuple[str, ...]]
    finish_reasons: list[str]
    token_ids: list[list[int]] = field(repr=False)
    authors: list[list[int]] = field(repr=False)
    all_completions: list[list[str]] = field(repr=False)
    all_rewards: np.ndarray = field(repr=False)
    policy_tokens: int
    guide_tokens: int
    seconds: float

    def __repr__(self) -> str:
        """What was measured, in a line; `to_dict` and `save` have the rest."""
        numbers = {"reward": self.reward, **self.reward_parts, **self.metrics, "length": self.length}
        measured = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        return f"EvaluationResult({self.task} {self.split}, {len(self.rewards)} prompts: {measured})"

    def _repr_html_(self, shown: int = 10) -> str:
        """For notebooks: what was measured, and the first texts."""
        rows = zip(self.rewards[:shown], self.prompts[:shown], self.completions[:shown], strict=True)
        cells = "".join(
            f"<tr><td>{reward:.3f}</td><td>{escape(prompt)}</td><td>{escape(text)}</td></tr>"
            for reward, prompt, text in rows
        )
        head = "<tr><th>reward</th><th>prompt</th><th>text</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{cells}</table>"

    @property
    def reward(self) -> float:
        """Mean reward."""
        return float(self.rewards.mean())

    @property
    def length(self) -> float:
        """Mean number of tokens after the prompt, EOS counted."""
        return float(np.mean([len(authors) for authors in self.authors]))

    @property
    def handoff_fraction(self) -> float:
        """Share of the texts that a guide completed."""
        return float(np.mean([reason == "handoff" for reason in self.finish_reasons]))

    def successes(self, success: float = 1.0) -> np.ndarray:
        """How many of a prompt's n texts have a reward of at least `success`, int (N,)."""
        return (self.all_rewards >= success).sum(1)

    def solved(self, success: float = 1.0) -> np.ndarray:
        """Whether any of a prompt's n texts has a reward of at least `success`, bool (N,)."""
        return self.successes(success) > 0

    def pass_at(self, k: int, success: float = 1.0) -> float:
        """Estimate pass@k: the probability that one of k texts has a reward of at least `success` (see `pass_at`).

        Args:
            k: Number of texts, from 1 to n.
            success: The least reward of a text that succeeds.

        Raises:
            ValueError: `k` is out of this range.
        """
        return pass_at(self.successes(success), self.all_rewards.shape[1], k)

    def to_dict(self, success: float = 1.0) -> dict[str, Any]:
        """Everything except texts and tokens, as values for JSON.

        Args:
            success: The least reward of a text that counts in "successes": for each prompt the number of such texts
                among "texts_per_prompt", of which `pass_at` makes pass@k.
        """
        return {
            "task": self.task,
            "split": self.split,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "reward_fingerprint": self.reward_fingerprint,
            "reward_accuracy": self.reward_accuracy,
            "decoding": asdict(self.decoding),
            "seed": self.seed,
            "best_of": self.best_of,
            "samples_per_prompt": self.samples_per_prompt,
            "num_prompts": len(self.rewards),
            "reward": self.reward,
            "reward_parts": self.reward_parts,
            "metrics": self.metrics,
            "metric_signatures": self.metric_signatures,
            "metrics_left_out": self.metrics_left_out,
            "length": self.length,
            "stop_fraction": float(np.mean([reason == "stop" for reason in self.finish_reasons])),
            "handoff_fraction": self.handoff_fraction,
            "policy_tokens": self.policy_tokens,
            "guide_tokens": self.guide_tokens,
            "seconds": self.seconds,
            "rewards": self.rewards.tolist(),
            "texts_per_prompt": self.all_rewards.shape[1],
            "success": success,
            "successes": self.successes(success).tolist(),
            "sample_ids": self.sample_ids.tolist(),
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON line per prompt: the prompt, its completion with tokens and authors, and the reward.

        Where there are several texts per prompt, "all_completions" and "all_rewards" are there, too.
        """
        lines = []
        for row in range(len(self.rewards)):
            sample: dict[str, Any] = {
                "sample_id": int(self.sample_ids[row]),
                "prompt": self.prompts[row],
                "completion": self.completions[row],
                "references": list(self.references[row]),
                "reward": float(self.rewards[row]),
                "finish_reason": self.finish_reasons[row],
                "token_ids": self.token_ids[row],
                "authors": [Author(author).name.lower() for author in self.authors[row]],
            }
            if len(self.all_completions[row]) > 1:
                sample["all_completions"] = self.all_completions[row]
                sample["all_rewards"] = self.all_rewards[row].tolist()
            lines.append(json.dumps(sample, ensure_ascii=False))
        with new_file(path) as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pass_at(successes: Sequence[int] | np.ndarray, n: int, k: int) -> float:
    """Estimate pass@k: the mean over prompts of the probability that one of k texts succeeds.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, equation 1), 1 - C(n-c, k) / C(n, k) for a prompt of
    whose n texts c succeeded, as the product 1 - prod (1 - k/i) over i from n-c+1 to n, without large numbers.

    Args:
        successes: For each prompt the number c of texts that succeeded, integers (N,) in [0, n].
        n: Number of texts per prompt.
        k: Number of texts, from 1 to n.

    Raises:
        ValueError: `k` or one of `successes` is out of its range.
    """
    check("k", k, is_int(k) and 1 <= k <= n, f"an int from 1 to the number of texts per prompt, {n}")
    counts = np.asarray(successes)
    check("successes", successes, bool(((counts >= 0) & (counts <= n)).all()), f"between 0 and {n}")
    i = np.arange(1, n + 1)
    fails = np.where(i > n - counts[:, None], np.maximum(1 - k / i, 0), 1.0).prod(1)
    return float(np.mean(1 - fails))


def evaluate(
    agent: Actor | Agent,
    env: str | TextVectorEnv | None = None,
    split: SplitName = "test",
    *,
    num_prompts: int | None = None,
    num_envs: int = 64,
    decoding: Decoding | None = None,
    guidance: Guidance | Mapping[str, Any] | None = None,
    seed: int = 0,
    best_of: int = 1,
    samples_per_prompt: int = 1,
    metrics: Sequence[str | Metric] | None = None,
    start_model: PreTrainedModel | str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    accelerator: Accelerator | None = None,
    **env_arguments: Any,
) -> EvaluationResult:
    """Complete every prompt of a split, and compute rewards and metrics.

    A completion depends only on the policy, `seed` and the sample, not on the number of rows, so that policies are
    compared on paired draws.

    A policy that can hand off is evaluated with that action: ``evaluate(policy, id, guide=..., handoff=True,
    handoff_cost=...)``. The cost is subtracted from its rewards, and reported as a part of the reward.

    Args:
        agent: A policy, or an algorithm, whose policy is evaluated.
        env: None for the environment that an algorithm learned in; the id of an environment; or a `TextVectorEnv` made
            with ``parking=True``, whose split and rows are then used. It is reset with new seeds.
        split: "train", "validation" or "test"; not with a `TextVectorEnv`.
        num_prompts: Number of prompts, a random subset that is always the same; None uses all.
        num_envs: Number of rows; not with a `TextVectorEnv`.
        decoding: How texts are decoded; None for the policy's own decoding.
        guidance: When the environment's guide takes part, whose tokens are then in the texts that are judged; None for
            never, whatever the environment was made with. With ``Guidance(handoff_prob=1, no_body_prob=1)`` the guide
            writes whole texts, and the result is the guide's own.
        seed: Seed of the sampling.
        best_of: Number of texts per prompt, of which the one with the highest reward is kept; the first is that of
            ``best_of=1``. The same reward selects and scores the texts: the result is what a user gains who has this
            reward at inference time, and it grows with `best_of` by selection alone, even if the texts become worse
            by other measures.
        samples_per_prompt: Number n of texts per prompt, drawn as those of `best_of`, of which all are kept and scored:
            for pass@k (`EvaluationResult.pass_at`). Reward, metrics and tokens in the result are those of the first
            text of each prompt, which is that of ``samples_per_prompt=1``; only the counts of tokens are of all texts.
            Excludes `best_of`, with which these would be of the best text: its result has all n texts, too.
        metrics: Names in `textgym.metrics.NAMES`, or metrics (see `textgym.metrics.Metric`); None takes those of the
            task, without those that cannot be computed here.
        start_model: The model under which "perplexity" is measured, or its hub id or folder; it must have the
            environment's tokenizer.
        encoder: Hub id or folder of the encoder of "bert_score".
        accelerator: Divides the prompts among its processes, which all call this, with environments of equally many
            rows, and return the same result. None: this process alone.
        **env_arguments: Further arguments of the environment ("source", "reward", "guide", ...), which override those
            of an algorithm's own; not with a `TextVectorEnv`.

    Warns:
        UserWarning: An algorithm is evaluated in an environment that differs from its own in more than the split; the
            message names the differences.

    Raises:
        ValueError: An argument is wrong.
        textgym.metrics.MissingRequirement: One of `metrics` needs an optional package or model that is missing.
    """
    if num_prompts is not None:
        check_int("num_prompts", num_prompts)
    check_int("best_of", best_of)
    check_int("samples_per_prompt", samples_per_prompt)
    check_int("num_envs", num_envs)
    check_int("seed", seed, 0)
    writes = isinstance(agent if isinstance(agent, Actor) else getattr(agent, "policy", None), Actor)
    check("agent", agent, writes, "an algorithm or an Actor, such as a policy")
    kind = env is None or isinstance(env, str | TextVectorEnv)
    check("env", env, kind, "None, the id of an environment or a TextVectorEnv")
    if best_of > 1 and samples_per_prompt > 1:
        raise ValueError(
            f"best_of and samples_per_prompt exclude each other, got {best_of} and {samples_per_prompt}: both draw "
            "several texts per prompt, and the result is of the best or of the first"
        )
    texts_per_prompt = max(best_of, samples_per_prompt)
    check_metrics(metrics or ())
    guidance = Guidance.of(guidance)
    policy: Any = agent if isinstance(agent, Actor) else agent.policy
    how = decoding or policy.decoding
    if texts_per_prompt > 1 and (how.greedy or how.num_beams > 1):
        name = "best_of" if best_of > 1 else "samples_per_prompt"
        raise ValueError(
            f"{name} must be 1 with greedy decoding or beams, which write one text only, got {texts_per_prompt}"
        )
    own: Any = getattr(agent, "env", None)
    if env is None and not isinstance(own, TextVectorEnv):
        raise ValueError(f"env must be given for {type(agent).__name__}, which has no environment of its own")
    if isinstance(env, TextVectorEnv) and env_arguments:
        raise ValueError(f"env_arguments need env to be an id or None, got {sorted(env_arguments)} and {env!r}")
    made = own if env is None else env
    handoff = env_arguments.get("handoff", False) if isinstance(made, str) else made.handoff
    if handoff != policy.can_hand_off:
        raise ValueError(
            f"handoff must be {policy.can_hand_off} as the policy's can_hand_off, got {handoff}: a policy that can "
            "hand off is evaluated with evaluate(..., guide=..., handoff=True), or in an environment made so"
        )
    if env is None:
        guided = guidance.needs_guide
        env = sibling_env(own, num_envs=num_envs, split=split, guided=guided, **env_arguments)
    elif isinstance(env, str):
        env = make_env(env, num_envs=num_envs, **{"tokenizer": policy.tokenizer, **env_arguments, "split": split})
    if isinstance(own, TextVectorEnv) and (others := differences(own, env)):
        warnings.warn(
            "the agent is evaluated in another environment than it learned in: "
            + ", ".join(f"{name}={there!r} instead of {here!r}" for name, (here, there) in others.items())
            + "; evaluate(agent) is in its own",
            stacklevel=2,
        )
    # Before generation, so that a missing requirement is reported at once.
    wanted = env.task.metrics if metrics is None else metrics
    judges, left_out = select(
        wanted, leave_out=metrics is None, start_model=start_model, encoder=encoder, source=env.source
    )
    started = time.perf_counter()
    indices = np.random.default_rng(0).permutation(len(env.data))[:num_prompts]
    indices.sort()
    # The last round is filled up with repeated samples, whose results are dropped.
    index, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    rounds = np.resize(indices, (-(-len(indices) // (processes * env.num_envs)), processes, env.num_envs))
    rollouts = []
    for attempt in range(texts_per_prompt):
        for rows in rounds[:, index]:
            seeds = hash64(seed, rows, attempt) if attempt else hash64(seed, rows)
            rollouts.append(
                collect(
                    env,
                    policy,
                    seeds=seeds,
                    decoding=decoding,
                    values=False,
                    # One per row, so that a guide's text depends on the sample, not on the row.
                    reset_seed=seeds.tolist(),
                    options={"index": rows.tolist(), "guidance": guidance},
                )
            )
    if accelerator is not None:
        rollouts = gather(accelerator, rollouts)
    rollout, count = Rollout.concatenate(rollouts), len(indices)
    # Text t of prompt i is in row all_texts[i, t].
    all_texts = np.arange(texts_per_prompt) * rounds.size + np.arange(count)[:, None]
    all_rewards = rollout.rewards[all_texts].cpu().numpy()
    kept = all_texts[np.arange(count), all_rewards.argmax(1) if best_of > 1 else 0]
    ids, mask = (array[kept].cpu().numpy() for array in (rollout.input_ids, rollout.attention_mask > 0))
    authors = rollout.authors[kept].cpu().numpy()
    prompt_ids, token_ids = (
        [row[valid].tolist() for row, valid in zip(ids[:, columns], mask[:, columns], strict=True)]
        for columns in (slice(rollout.prompt_columns), slice(rollout.prompt_columns, None))
    )
    texts: dict[str, Any] = {
        "prompts": rollout.prompts[kept].tolist(),
        "completions": rollout.texts[kept].tolist(),
        "references": rollout.references[kept].tolist(),
    }
    values: dict[str, float] = {}
    columns = {
        "prompts": texts["prompts"],
        "predictions": texts["completions"],
        "references": texts["references"],
        "prompt_ids": prompt_ids,
        "prediction_ids": token_ids,
    }
    for name, judge in judges.items():
        if metrics is None and "references" in columns_of(judge) and not any(texts["references"]):
            left_out[name] = "no sample has a reference"
            continue
        measured = measure(name, judge, columns)
        if taken := values.keys() & measured.keys():
            raise ValueError(f"metric {name!r} must return names that no other metric has, got {sorted(taken)}")
        values |= measured
    return EvaluationResult(
        task=env.task.name,
        split=env.split,
        source=env.source,
        fingerprint=env.data.fingerprint,
        reward_fingerprint=getattr(env.reward_function, "fingerprint", None),
        reward_accuracy=getattr(env.reward_function, "accuracy", None),
        decoding=how,
        seed=seed,
        best_of=best_of,
        samples_per_prompt=samples_per_prompt,
        rewards=rollout.rewards[kept].cpu().numpy().astype(np.float64),
        reward_parts={name: float(part[kept].mean()) for name, part in rollout.reward_parts.items()},
        metrics=values,
        metric_signatures={
            name: getattr(judge, "signature", type(judge).__qualname__)
            for name, judge in judges.items()
            if name not in left_out
        },
        metrics_left_out=left_out,
        sample_ids=rollout.sample_ids[kept],
        **texts,
        finish_reasons=rollout.finish_reason[kept].tolist(),
        token_ids=token_ids,
        authors=[row[row >= 0].tolist() for row in authors],
        all_completions=rollout.texts[all_texts].tolist(),
        all_rewards=all_rewards.astype(np.float64),
        policy_tokens=int(rollout.policy_tokens[all_texts].sum()),
        guide_tokens=int(rollout.guide_tokens[all_texts].sum()),
        seconds=time.perf_counter() - started,
    )


def main(
    policy: str,
    env: str,
    split: SplitName = "test",
    source: str | None = None,
    num_prompts: int | None = None,
    num_envs: int = 64,
    greedy: bool = False,
    num_beams: int = 1,
    seed: int = 0,
    best_of: int = 1,
    samples_per_prompt: int = 1,
    guide: str | None = None,
    handoff_cost: float = 0.0,
    start_model: str | None = None,
    encoder: str | None = None,
    device: str = "auto",
    output: Path | None = None,
) -> None:
    """Evaluate a policy on every prompt of a split, and print the result as JSON.

    Args:
        policy: Hub id or folder of a language model or of a checkpoint.
        env: Id of the environment.
        split: Split to evaluate on.
        source: "mini", "hub" or a folder.
        num_prompts: Number of prompts; by default all.
        num_envs: Number of rows.
        greedy: Always take the most probable token, instead of decoding as the policy does.
        num_beams: Number of beams; above 1 beam search is used, with the policy's `min_new_tokens`.
        seed: Seed of the sampling.
        best_of: Number of texts per prompt, of which the one with the highest reward is kept.
        samples_per_prompt: Number of texts per prompt, all kept and scored, for pass@k: "successes" of the result.
        guide: Hub id or folder of the guide, for a policy that can hand off.
        handoff_cost: Cost of each token of that guide.
        start_model: Model under which the texts' perplexity is measured.
        encoder: Hub id or folder of the encoder of BERTScore.
        device: Device of the policy.
        output: File for the texts, one JSON line per prompt.
    """
    import textgym  # noqa: F401  (registers the environments)

    loaded = LanguageModelPolicy.from_pretrained(policy, device=device)
    decoding = Decoding(greedy=True) if greedy else None
    if num_beams > 1:
        decoding = Decoding(num_beams=num_beams, min_new_tokens=loaded.decoding.min_new_tokens, greedy=greedy)
    result = evaluate(
        loaded,
        env,
        split,
        source=source,
        num_prompts=num_prompts,
        num_envs=num_envs,
        decoding=decoding,
        seed=seed,
        best_of=best_of,
        samples_per_prompt=samples_per_prompt,
        start_model=start_model,
        encoder=encoder,
        guide=guide,
        handoff=loaded.can_hand_off,
        handoff_cost=handoff_cost,
    )
    if output is not None:
        result.save(output)
    print(json.dumps(result.to_dict(), indent=2))


if __name__ == "__main__":
    import tyro

    from textgym.process import keep_freed_memory

    keep_freed_memory()
    tyro.cli(main)
