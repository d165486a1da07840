"""Groups of guided episodes as the rollouts of TRL's `GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from agents.algorithm import check_guide
from agents.environments import learning_env
from agents.group import check_rescue, dead, rescue
from agents.policy import CausalLMPolicy
from agents.rollout import Rollout, replay
from textgym.checks import check, check_one_of
from textgym.decoding import Decoding
from textgym.guidance import Guidance
from textgym.seeding import hash64
from textgym.trl import engine_of, prompt_dataset, texts_per_process

if TYPE_CHECKING:
    import gymnasium as gym
    import trl
    from gymnasium.vector import VectorEnv


class GroupRollouts:
    """Episodes of an environment as the `rollout_func` of `GRPOTrainer`: every group has one start.

    The trainer chooses the prompts; the environment's guidance, drawn once for a group, decides about prefixes and
    hand-offs. The trainer learns from the environment's own token ids, of which `env_mask` leaves out those that the
    policy did not write: they carry no gradient. In evaluations the policy writes alone.

    The reward function of `textgym.trl.reward_function` takes the rewards of these episodes, and logs with them the
    share of dead groups, "dead_groups" and, after a rescue, "dead_groups_left", and "prefix_tokens".

    Args:
        env: A text environment, single or vector, of whose guidance the episodes are.
        args: The trainer's arguments. Of several samples with the same prompt a group plays one, drawn at random.
        dead_groups: "rescue" plays groups without a success again, from ever longer prefixes of the guide (see
            `agents.group.GroupPolicyGradient`); "keep" leaves them.
        rescue_fractions: Ascending parts of the guide's text that a rescue tries as prefixes.
        success: Reward from which a text is a success, for "rescue".

    Raises:
        ValueError: `env` is not a text environment, hands off by an action, has no guide for a rescue or rows that
            hold no whole groups; `args` have another length of texts, put a group into several processes, or decode or
            generate in a way that the environment's sampler does not.
    """

    def __init__(
        self,
        env: gym.Env | VectorEnv,
        args: trl.GRPOConfig,
        *,
        dead_groups: Literal["keep", "rescue"] = "keep",
        rescue_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        success: float = 1.0,
    ) -> None:
        self.env = learning_env(env, texts_per_process(args), engine_of(env).tokenizer)
        given: Any = args  # whose types allow None where there is none any more
        self.group_size: int = given.num_generations
        self.args, self.success = given, success
        self.dead_groups = check_one_of("dead_groups", dead_groups, ("keep", "rescue"))
        self.rescue_fractions = tuple(rescue_fractions)
        check_rescue(self.rescue_fractions)
        k, horizon = self.group_size, self.env.max_new_tokens
        check("num_envs", self.env.num_envs, self.env.num_envs % k == 0, f"a multiple of num_generations={k}")
        length = args.max_completion_length
        check("max_completion_length", length, length == horizon, f"{horizon}, the environment's max_new_tokens")
        others = {"use_vllm": False, "use_transformers_continuous_batching": False, "generation_kwargs": None}
        for name, usual in (others | {"min_p": None, "repetition_penalty": 1.0}).items():
            value = getattr(args, name)
            check(name, value, value == usual or not value, f"{usual}: the environment's sampler writes the texts")
        self.decoding = Decoding(args.temperature, args.top_k, args.top_p, self.env.min_new_tokens)
        if self.env.handoff:
            raise ValueError("env must be made without handoff=True: the model of GRPOTrainer has no such action")
        if not isinstance(self.env.guidance, Guidance):
            raise ValueError("env must have the same guidance in all rows, which a group shares")
        if self.dead_groups == "rescue":
            check_guide(self.env, 'dead_groups="rescue"')
        self._samples: dict[str, list[int]] = {}
        for sample, prompt in enumerate(prompt_dataset(self.env)["prompt"]):
            self._samples.setdefault(_text(prompt), []).append(sample)
        self._calls = 0

    def __call__(self, prompts: Sequence[Any], trainer: trl.GRPOTrainer) -> dict[str, Any]:
        """Play an episode for each prompt, which the trainer repeats for the texts of a group.

        Returns:
            What the trainer expects: lists with an entry for each episode.

        Raises:
            ValueError: A prompt that is not one of `prompt_dataset`, or weights that are spread over processes.
        """
        model: Any = trainer.model
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("GroupRollouts needs the whole model in every process: use neither FSDP nor DeepSpeed")
        learning = model.training
        try:
            policy = CausalLMPolicy(
                trainer.accelerator.unwrap_model(model),
                self.env.tokenizer,
                autocast=torch.bfloat16 if self.args.bf16 else None,
            )
            key = hash64(self.args.seed, trainer.state.global_step, self._calls, self.args.process_index)
            self._calls += 1
            if learning:
                rollout, metrics = self._play_groups(policy, prompts, key)
            else:
                rollout, metrics = self._play_alone(policy, prompts, key, trainer.eval_dataset), {}
        finally:
            model.train(learning)
        return self._columns(rollout.to("cpu"), metrics)

    def _play_groups(
        self, policy: CausalLMPolicy, prompts: Sequence[Any], key: np.ndarray
    ) -> tuple[Rollout, dict[str, torch.Tensor]]:
        """Play groups, rescue the dead ones, and say of each group whether it was and is dead."""
        k, guidance = self.group_size, self.env.guidance
        unknown = [text for text in map(_text, prompts) if text not in self._samples]
        check("prompt", unknown[:1], not unknown, "one of prompt_dataset(env), of the same environment")
        draws = hash64(key, np.arange(len(prompts)) // k, 1).tolist()
        choices = [self._samples[_text(prompt)] for prompt in prompts]
        samples = [own[draw % len(own)] for own, draw in zip(choices, draws, strict=True)]

        def play(rows: np.ndarray, attempt: int, given: Guidance) -> Rollout:
            return replay(
                self.env,
                policy,
                seeds=hash64(key, attempt, rows),
                options={"index": [samples[row] for row in rows.tolist()], "guidance": [given] * len(rows)},
                group_size=k,
                decoding=self.decoding,
                values=False,
            )

        def play_again(rows: torch.Tensor, fraction: float, attempt: int) -> Rollout:
            return play(rows.cpu().numpy(), attempt + 1, guidance.with_prefix(fraction, guidance.text_seed))

        rollout = play(np.arange(len(samples)), 0, guidance)
        metrics = {"dead_groups": dead(rollout, k)}
        if self.dead_groups == "rescue":
            rollout = rescue(rollout, k, self.rescue_fractions, self.success, play_again)
            metrics["dead_groups_left"] = dead(rollout, k)
        metrics = {name: values.repeat_interleave(k) for name, values in metrics.items()}
        return rollout, metrics | {"prefix_tokens": rollout.prefix_length}

    def _play_alone(self, policy: CausalLMPolicy, prompts: Sequence[Any], key: np.ndarray, dataset: Any) -> Rollout:
        """Play episodes of the evaluation's prompts without the guide."""
        parts = dataset.values() if isinstance(dataset, Mapping) else [] if dataset is None else [dataset]
        rows = {
            _text(row["prompt"]): row
            for part in parts
            for row in part.select_columns(["prompt", "task_prompt", "references"])
        }
        unknown = [text for text in map(_text, prompts) if text not in rows]
        check("prompt", unknown[:1], not unknown, "one of the trainer's eval_dataset, a prompt_dataset")
        chosen = [rows[_text(prompt)] for prompt in prompts]
        return replay(
            self.env,
            policy,
            seeds=hash64(key, np.arange(len(chosen))),
            options={
                "prompt": [row["task_prompt"] for row in chosen],
                "references": [row["references"] for row in chosen],
                "guidance": [Guidance()] * len(chosen),
            },
            decoding=self.decoding,
            values=False,
        )

    def _columns(self, rollout: Rollout, metrics: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The episodes as `GRPOTrainer` reads them."""
        columns = rollout.prompt_columns
        prompts, texts = rollout.input_ids[:, :columns], rollout.input_ids[:, columns:]
        read, written = rollout.attention_mask.bool().tensor_split([columns], dim=1)

        def lists(values: torch.Tensor, mask: torch.Tensor) -> list[list[Any]]:
            return [line[there].tolist() for line, there in zip(values, mask, strict=True)]

        def dicts(values: Mapping[str, Any]) -> list[dict[str, float]]:
            return [{name: float(column[row]) for name, column in values.items()} for row in range(len(rollout))]

        return {
            "prompt_ids": lists(prompts, read),
            "completion_ids": lists(texts, written),
            "env_mask": lists(rollout.body.int(), written),
            # TRL divides logits by the temperature before it takes log-probabilities.
            "logprobs": lists(rollout.log_probs, written) if self.decoding.temperature == 1 else None,
            "references": [list(texts) for texts in rollout.references],
            "reward_parts": dicts(rollout.reward_parts),
            "rollout_metrics": dicts(metrics),
        }


def _text(prompt: Any) -> str:
    """A prompt of `prompt_dataset`: a text, or a user's message."""
    return prompt if isinstance(prompt, str) else prompt[0]["content"]
