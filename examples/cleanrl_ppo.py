"""PPO in one file, in the style of CleanRL: ``python examples/cleanrl_ppo.py --env-id textgym/IMDB-v0``.

It needs nothing of `agents`: an environment of this package is a Gymnasium vector environment like any other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import textgym  # noqa: F401  (registers the environments)


@dataclass
class Args:
    """The command's options."""

    env_id: str = "textgym/IMDB-v0"
    """Environment."""
    model: str | None = None
    """Hub id or folder of the language model to train, whose tokenizer the environment then has; None makes a small
    GPT-2 with random weights."""
    seed: int = 1
    """Seed of everything random."""
    total_timesteps: int = 200_000
    """Tokens to write."""
    num_envs: int = 32
    """Rows of the environment."""
    num_steps: int = 48
    """Tokens a row writes between updates."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    gamma: float = 1.0
    """Discount factor."""
    gae_lambda: float = 0.95
    """Trace decay of the advantages."""
    num_minibatches: int = 4
    """Minibatches an epoch."""
    update_epochs: int = 2
    """Epochs an update."""
    clip_coef: float = 0.2
    """How far a ratio may move from 1."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""


class Agent(nn.Module):
    """A language model, and a value head on its last hidden state."""

    def __init__(self, args: Args, vocab_size: int, columns: int) -> None:
        super().__init__()
        if args.model is not None:
            self.model = AutoModelForCausalLM.from_pretrained(args.model)
        else:
            size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
            self.model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=columns, **size))
        self.model.eval()  # no dropout, whose ratios would be noise
        self.critic = nn.Linear(self.model.config.hidden_size, 1)
        nn.init.zeros_(self.critic.weight)
        self.vocab_size = vocab_size

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """The distribution of the next token, and the value of the state."""
        # A row's tokens stand in one piece, with padding on both sides.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = self.model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        last = states[torch.arange(len(ids)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]
        logits = self.model.get_output_embeddings()(last)[:, : self.vocab_size]
        return Categorical(logits=logits), self.critic(last).squeeze(1)


def main(args: Args) -> list[float]:
    """Train, and return the mean reward of the episodes that ended between updates."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches

    envs = gym.make_vec(args.env_id, num_envs=args.num_envs, tokenizer=args.model, autoreset_mode="SameStep")
    columns = envs.single_observation_space["input_ids"].shape[0]
    agent = Agent(args, int(envs.single_action_space.n), columns).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    shape = (args.num_steps, args.num_envs)
    ids = torch.zeros((*shape, columns), dtype=torch.int64, device=device)
    masks = torch.zeros((*shape, columns), dtype=torch.int64, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, rewards, dones, values = (torch.zeros(shape, device=device) for _ in range(4))

    def tensors(obs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(obs["input_ids"]).to(device), torch.from_numpy(obs["attention_mask"]).long().to(device)

    history, start = [], time.time()
    next_ids, next_mask = tensors(envs.reset(seed=args.seed)[0])
    next_done = torch.zeros(args.num_envs, device=device)
    for update in range(1, args.total_timesteps // batch_size + 1):
        ended: list[float] = []
        for step in range(args.num_steps):
            ids[step], masks[step], dones[step] = next_ids, next_mask, next_done
            with torch.no_grad():
                distribution, values[step] = agent.read(next_ids, next_mask)
            actions[step] = distribution.sample()
            logprobs[step] = distribution.log_prob(actions[step])
            # No episode is ever truncated, so that nothing has to be bootstrapped from a last observation.
            obs, reward, terminations, _, _ = envs.step(actions[step].cpu().numpy())
            rewards[step] = torch.from_numpy(reward)
            next_done = torch.from_numpy(terminations).float().to(device)
            next_ids, next_mask = tensors(obs)
            ended += reward[terminations].tolist()

        with torch.no_grad():
            next_value = agent.read(next_ids, next_mask)[1]
            advantages, trace = torch.zeros_like(rewards), torch.zeros(args.num_envs, device=device)
            for step in reversed(range(args.num_steps)):
                done = next_done if step == args.num_steps - 1 else dones[step + 1]
                following = next_value if step == args.num_steps - 1 else values[step + 1]
                delta = rewards[step] + args.gamma * following * (1 - done) - values[step]
                trace = advantages[step] = delta + args.gamma * args.gae_lambda * (1 - done) * trace
            returns = advantages + values

        b_ids, b_masks = ids.flatten(0, 1), masks.flatten(0, 1)
        b_actions, b_logprobs, b_advantages, b_returns = (
            part.flatten() for part in (actions, logprobs, advantages, returns)
        )
        for _ in range(args.update_epochs):
            for chosen in torch.randperm(batch_size, device=device).split(minibatch_size):
                distribution, value = agent.read(b_ids[chosen], b_masks[chosen])
                ratio = (distribution.log_prob(b_actions[chosen]) - b_logprobs[chosen]).exp()
                advantage = b_advantages[chosen]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
                value_loss = 0.5 * (value - b_returns[chosen]).square().mean()
                entropy = distribution.entropy().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        history.append(float(np.mean(ended)) if ended else float("nan"))
        speed = update * batch_size / (time.time() - start)
        print(f"update {update}: {len(ended)} episodes, reward {history[-1]:.3f}, {speed:.0f} tokens/s", flush=True)
    envs.close()
    return history


if __name__ == "__main__":
    main(tyro.cli(Args))
