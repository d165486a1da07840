"""TorchRL collects episodes from an environment of this package: ``python examples/torchrl_collector.py``."""

from __future__ import annotations

import torch
import tyro
from torch import nn

import textgym  # noqa: F401  (registers the environments)

try:
    from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
    from torch.distributions import Categorical
    from torchrl.collectors import Collector
    from torchrl.envs import GymEnv, InitTracker, RewardSum, StepCounter, TransformedEnv
except ImportError as error:
    raise ImportError('this example needs TorchRL: pip install "textgym[torchrl]"') from error


class NextToken(nn.Module):
    """Logits of the next token from the mean embedding of those before it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 32)
        self.head = nn.Linear(32, vocab_size)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(..., columns) each, to (..., vocab_size)."""
        weights = attention_mask.float() / attention_mask.float().sum(-1, keepdim=True)
        return self.head((self.embedding(input_ids.long()) * weights[..., None]).sum(-2))


def main(
    env_id: str = "textgym/IMDB-v0", frames_per_batch: int = 480, total_frames: int = 960, seed: int = 0
) -> list[float]:
    """Collect tokens, and return the mean reward of the episodes of each batch.

    Args:
        env_id: Environment.
        frames_per_batch: Tokens a batch.
        total_frames: Tokens in all.
        seed: Seed of the environment and the policy.
    """
    torch.manual_seed(seed)
    env = TransformedEnv(GymEnv(env_id, categorical_action_encoding=True))
    for transform in (InitTracker(), StepCounter(), RewardSum()):
        env.append_transform(transform)
    env.set_seed(seed)
    policy = TensorDictSequential(
        TensorDictModule(NextToken(env.action_spec.space.n), ["input_ids", "attention_mask"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )
    collector = Collector(env, policy, frames_per_batch=frames_per_batch, total_frames=total_frames)
    rewards = []
    for batch in collector:
        ended = batch["next", "done"].squeeze(-1)
        rewards.append(float(batch["next", "episode_reward"][ended].mean()))
        lengths = batch["next", "step_count"][ended].float()
        print(f"{int(ended.sum())} episodes of {lengths.mean():.1f} tokens, reward {rewards[-1]:.3f}", flush=True)
    collector.shutdown()
    return rewards


if __name__ == "__main__":
    tyro.cli(main)
