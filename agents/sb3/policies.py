"""Language models as policies of Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, pad

from agents.policy import Evaluation, LanguageModelPolicy, Policy
from agents.policy.language_model import left_packed
from textgym.checks import check
from textgym.decoding import Decoding
from textgym.packing import head
from textgym.precision import at_least_float32, autocast
from textgym.sampling import Sample, TokenSampler, choose, nucleus, on_host
from textgym.tokenization import unused_ids, vocabulary_size

Observation = Mapping[str, Tensor]

#: Arguments of Stable-Baselines3's PPO with which a pretrained language model learns. Its own, among them ten epochs
#: with a step size of 3e-4, are for small networks that begin at random: a language model forgets how to write.
LANGUAGE_MODEL_DEFAULTS = {
    "learning_rate": 1e-4,  # for some million parameters; 1e-5 for some hundred million
    "n_epochs": 2,
    "gamma": 1.0,
    "vf_coef": 0.1,
    "clip_range_vf": 0.2,
}

# Rows that begin at different times have different readers. With more readers, reading all texts again is faster.
_MOST_READERS = 8


class CausalLMActorCriticPolicy(ActorCriticPolicy):
    """A `LanguageModelPolicy` as policy and critic of PPO, A2C and TRPO.

    Actions, log-probabilities, entropies and values are those of the language model and its value head: sampling
    follows ``model.decoding``, and log-probabilities are of the untruncated softmax at temperature 1, as everywhere in
    `agents`. In an update, texts that are prefixes of one another are read together, so that a large `batch_size`
    costs little more than its episodes.

    Args:
        observation_space: The environment's.
        action_space: The environment's.
        lr_schedule: Learning rate by the share of training that remains.
        model: The hub id or folder of a language model, causal or sequence-to-sequence; a `LanguageModelPolicy`, which
            is then trained itself; or a `Portable`. A saved zip holds the hub id or folder, or the
            `LanguageModelPolicy` with a second copy of its weights.
        prompt_columns: P, the number of prompt columns of an observation (the environment's ``max_prompt_tokens``);
            needed only by a model that encodes the prompt, like T5, or with ``model.decoding.min_new_tokens``, which
            counts the tokens after them.
        optimizer_class: The optimiser.
        optimizer_kwargs: Its arguments beside the learning rate; None for those of Stable-Baselines3.
        use_sde: Always False; exploration noise is for continuous actions.

    Raises:
        ValueError: `model` does not fit the spaces, or `prompt_columns` is missing.

    Attributes:
        language_model: The `LanguageModelPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Callable[[float], float],
        *,
        model: str | os.PathLike | LanguageModelPolicy | Portable,
        prompt_columns: int | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class is torch.optim.Adam else {}
        # Not ActorCriticPolicy's, which builds its own networks.
        BasePolicy.__init__(
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        check("use_sde", use_sde, not use_sde, "False with discrete actions")
        self.language_model = Portable(model).policy
        if prompt_columns is not None:
            self.language_model.prompt_columns = prompt_columns
        self.prompt_columns = prompt_columns
        size = vocabulary_size(self.language_model.tokenizer) + self.language_model.can_hand_off
        if not isinstance(action_space, spaces.Discrete) or action_space.n != size:
            raise ValueError(
                f"action_space must be Discrete({size}), the model's tokens and a hand-off where it has one, got "
                f"{action_space}: make the environment with the model's tokenizer"
            )
        if not isinstance(observation_space, spaces.Dict) or {"input_ids", "attention_mask"} - {*observation_space}:
            raise ValueError(f"observation_space must be that of a textgym environment, got {observation_space}")
        if prompt_columns is None and (
            self.language_model.decoding.min_new_tokens or self.language_model.encodes_prompts
        ):
            raise ValueError(
                "prompt_columns must be given where the model encodes prompts or its decoding has min_new_tokens: "
                "policy_kwargs={..., 'prompt_columns': env.max_prompt_tokens}"
            )
        self.language_model.context_length = observation_space["input_ids"].shape[0]  # type: ignore[index]
        self._readers: list[_Reader] = []
        self._build(lr_schedule)

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        arguments: Any = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(trained, **arguments)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "model": Portable(self.language_model),
            "prompt_columns": self.prompt_columns,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def forward(self, obs: Observation, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Choose actions after texts (n, P+T), the most probable ones if `deterministic`.

        Returns:
            Actions, int64 (n,), values (n, 1), and log-probabilities (n,).
        """
        sample = self._reader(obs, deterministic=True).sample() if deterministic else self._sample_next(obs)
        assert sample.values is not None
        return sample.tokens, sample.values[:, None], sample.log_probs

    def _predict(self, observation: Observation, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self._reader(observation, deterministic).sample().tokens

    def set_training_mode(self, mode: bool) -> None:
        """Begin an update or a rollout, without the caches of the texts so far."""
        self._readers.clear()
        super().set_training_mode(mode)

    def _sample_next(self, obs: Observation) -> Sample:
        """Sample the next token of every row; texts that continue those of the last call cost one token each."""
        arrays, everywhere = {name: on_host(array) for name, array in obs.items()}, np.arange(len(obs["input_ids"]))
        self._readers = [reader for reader in self._readers if reader.keep_continued(arrays)]
        rows = np.setdiff1d(everywhere, [row for reader in self._readers for row in reader.rows])
        if len(rows) and len(self._readers) == _MOST_READERS:
            self._readers, rows = [], everywhere
        if len(rows):
            self._readers.append(self._reader(arrays, rows=rows))
        samples = [reader.sample() for reader in self._readers]
        order = torch.from_numpy(np.concatenate([reader.rows for reader in self._readers]).argsort()).to(self.device)
        tokens, log_probs, values = (torch.cat(parts)[order] for parts in zip(*(s[:3] for s in samples), strict=True))
        return Sample(tokens, log_probs, values)

    def _reader(self, obs: Mapping[str, Any], deterministic: bool = False, rows: np.ndarray | None = None) -> _Reader:
        rows = np.arange(len(obs["input_ids"])) if rows is None else rows
        written = self._num_new_tokens(obs)[rows]
        obs = {name: on_host(array)[rows] for name, array in obs.items()}
        room = obs["attention_mask"][:, ::-1].argmax(1)
        sampler = self.language_model.sampler(
            obs,
            seeds=torch.randint(2**63 - 1, written.shape).numpy(),
            prefix_lengths=written,
            max_new_tokens=written + (1 if deterministic else np.maximum(room, 1)),
            decoding=self._decoding(deterministic),
        )
        return _Reader(sampler, obs, rows)

    def _num_new_tokens(self, obs: Mapping[str, Any]) -> np.ndarray:
        """Number of new tokens of each observation, (n,); zeros if nothing depends on it."""
        if self.prompt_columns is None:
            return np.zeros(len(obs["input_ids"]), np.int64)
        return (on_host(obs["attention_mask"])[:, self.prompt_columns :] != 0).sum(1)

    def _decoding(self, deterministic: bool) -> Decoding:
        decoding = self.language_model.decoding
        return Decoding(greedy=True, min_new_tokens=decoding.min_new_tokens) if deterministic else decoding

    def evaluate_actions(self, obs: Observation, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Values (n, 1), log-probabilities (n,) and entropies (n,) of actions (n,) after texts (n, P+T)."""
        result = evaluate_transitions(self.language_model, obs, actions)
        return result.values[:, None], result.log_probs, result.entropy

    def predict_values(self, obs: Observation) -> Tensor:  # type: ignore[override]
        """Values of states, (n, 1)."""
        columns = self.language_model.prompt_columns
        texts = _Texts(obs["input_ids"], obs["attention_mask"], prompt_columns=columns)
        values = self.language_model.values(texts.input_ids, texts.attention_mask, texts.columns)
        return texts.of_each(values)[:, None]

    def get_distribution(self, obs: Observation) -> CategoricalDistribution:  # type: ignore[override]
        """The distribution of the next action, twice differentiable, as TRPO needs it."""
        log_probs = self._log_probs(self._states(obs))
        return CategoricalDistribution(log_probs.shape[1]).proba_distribution(log_probs)

    def _states(self, obs: Observation, model: LanguageModelPolicy | None = None) -> Tensor:
        """Hidden states (n, d) of the language model, or of another, after texts."""
        model = model or self.language_model
        texts = _Texts(obs["input_ids"], obs["attention_mask"], prompt_columns=model.prompt_columns)
        rows, entries = (texts.columns >= 0).nonzero(as_tuple=True)
        # Only the plain kernel of attention has a second derivative.
        plain = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else contextlib.nullcontext()
        with plain:
            states = model._read(texts.input_ids, texts.attention_mask, rows, texts.columns[rows, entries])
        spread = states.new_zeros(*texts.columns.shape, states.shape[1]).index_put((rows, entries), states)
        return texts.of_each(spread)

    def _log_probs(self, states: Tensor, model: LanguageModelPolicy | None = None) -> Tensor:
        """Log-probabilities (n, actions) of all actions after hidden states."""
        model = model or self.language_model
        with autocast(model.device, model._dtype):
            logits = head(model.model, states)
        size = vocabulary_size(model.tokenizer)
        log_probs = at_least_float32(logits).log_softmax(-1)[:, :size]
        # Actions that are no token of the model have probability zero, and finite gradients.
        never = torch.finfo(log_probs.dtype).min
        log_probs = pad(log_probs, (0, size - log_probs.shape[1]), value=never)
        if unused := unused_ids(model.tokenizer):
            log_probs = log_probs.index_fill(1, torch.tensor(unused, device=log_probs.device), never)
        if not model.can_hand_off:
            return log_probs
        gate = model.heads["handoff"](at_least_float32(states))
        return torch.cat([log_probs + logsigmoid(-gate), logsigmoid(gate)], 1)


class MaskableCausalLMActorCriticPolicy(CausalLMActorCriticPolicy, MaskableActorCriticPolicy):  # type: ignore[misc]
    """`CausalLMActorCriticPolicy` for MaskablePPO, with the nucleus masks of NLPO.

    Only actions that the environment's `action_masks` allows can be chosen; log-probabilities and entropies are those
    of the masked distribution. With `top_p` below 1 a second mask leaves only the nucleus of a masking policy, a
    copy of the policy that is renewed every `mask_updates` updates: NLPO (Ramamurthy et al. 2022, arXiv 2210.01241,
    section 4). If the two masks together leave no action, only the environment's is used; the nucleus mask always
    allows the hand-off.

    Args:
        *arguments: As for `CausalLMActorCriticPolicy`.
        top_p: Probability mass of a nucleus, in (0, 1]; 1 masks nothing.
        mask_updates: Updates (calls of ``train``) after which the masking policy is renewed.
        **options: As for `CausalLMActorCriticPolicy`.

    Raises:
        ValueError: An argument is wrong.

    Attributes:
        masking_model: The masking policy; None where `top_p` is 1.
    """

    def __init__(self, *arguments: Any, top_p: float = 1.0, mask_updates: int = 20, **options: Any) -> None:
        super().__init__(*arguments, **options)
        check("top_p", top_p, 0 < top_p <= 1, "in (0, 1]")
        check("mask_updates", mask_updates, mask_updates >= 1, "at least 1")
        self.top_p, self.mask_updates = top_p, mask_updates
        self.masking_model: LanguageModelPolicy | None = None
        if top_p < 1:
            self.masking_model = copy.deepcopy(self.language_model).requires_grad_(False)
        self.updates_left: Tensor
        self.register_buffer("updates_left", torch.tensor(mask_updates))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "top_p": self.top_p, "mask_updates": self.mask_updates}

    def set_training_mode(self, mode: bool) -> None:
        """Count updates, which begin with True; renew the masking policy before rollouts, which begin with False."""
        if mode:
            self.updates_left -= 1
        elif self.masking_model is not None and self.updates_left <= 0:
            self.masking_model.load_state_dict(self.language_model.state_dict())
            self.updates_left.fill_(self.mask_updates)
        super().set_training_mode(mode)

    def forward(  # type: ignore[override]
        self, obs: Observation, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose actions that masks (n, actions) allow (see `CausalLMActorCriticPolicy.forward`)."""
        distribution, values = self._masked(obs, action_masks)
        actions = self._choose(obs, distribution, deterministic)
        return actions, values, distribution.log_prob(actions)

    def _predict(self, observation: Observation, deterministic: bool = False, action_masks: Any = None) -> Tensor:  # type: ignore[override]
        return self._choose(observation, self.get_distribution(observation, action_masks), deterministic)

    def _choose(self, obs: Observation, distribution: MaskableCategoricalDistribution, deterministic: bool) -> Tensor:
        decoding, ends = self._decoding(deterministic), list(self.language_model.end_token_ids)
        scores = distribution.distribution.logits.clone()
        if decoding.min_new_tokens:
            early = torch.from_numpy(self._num_new_tokens(obs) < decoding.min_new_tokens)
            scores[:, ends] = scores[:, ends].masked_fill(early.to(scores.device)[:, None], -torch.inf)
        return choose(scores, torch.rand(len(scores), dtype=torch.float64).to(scores.device), decoding)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Observation, actions: Tensor, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate actions under masks (n, actions) (see `CausalLMActorCriticPolicy.evaluate_actions`)."""
        distribution, values = self._masked(obs, action_masks)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Observation, action_masks: Any = None) -> MaskableCategoricalDistribution:  # type: ignore[override]
        """The distribution of the next action under the masks."""
        return self._masked(obs, action_masks)[0]

    def _masked(self, obs: Observation, action_masks: Any) -> tuple[MaskableCategoricalDistribution, Tensor]:
        """The distributions of the next actions under the masks, and the values (n, 1) of the states."""
        states = self._states(obs)
        log_probs = self._log_probs(states)
        allowed = None
        if action_masks is not None:
            allowed = torch.as_tensor(action_masks, device=log_probs.device).view_as(log_probs) != 0
        if self.masking_model is not None:
            with torch.no_grad():
                scores = self._log_probs(self._states(obs, self.masking_model), self.masking_model)
            in_nucleus = nucleus(scores, self.top_p).isfinite()
            in_nucleus[:, vocabulary_size(self.language_model.tokenizer) :] = True
            both = in_nucleus if allowed is None else in_nucleus & allowed
            allowed = both if allowed is None else torch.where(both.any(1, keepdim=True), both, allowed)
        distribution = MaskableCategoricalDistribution(log_probs.shape[1]).proba_distribution(log_probs)
        distribution.apply_masking(allowed)
        return distribution, self.language_model.heads["value"](at_least_float32(states))


class _Reader:
    """Rows (n,) of a rollout that were read together, each of which then costs one token per step."""

    def __init__(self, sampler: TokenSampler, obs: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        self.sampler, self._texts, self._rows = sampler, obs, rows

    @property
    def rows(self) -> np.ndarray:
        """(m,) rows that are still in the sampler, in the order of samples."""
        return self._rows[self.sampler.rows]

    def sample(self) -> Sample:
        """Choose their next tokens."""
        sample, rows = self.sampler.sample(), self.sampler.rows
        ids, mask = self._texts["input_ids"], self._texts["attention_mask"]
        ends = mask.shape[1] - mask[rows, ::-1].argmax(1)
        fits = ends < mask.shape[1]
        ids[rows[fits], ends[fits]], mask[rows[fits], ends[fits]] = sample.tokens.cpu().numpy()[fits], 1
        return sample

    def keep_continued(self, obs: Mapping[str, np.ndarray]) -> bool:
        """Remove rows whose text is not the continued one; returns whether any stay."""
        rows = self.rows
        same = np.zeros(len(rows), bool)
        if rows.max() < len(obs["input_ids"]):
            mask, own = obs["attention_mask"][rows], self._texts["attention_mask"][self.sampler.rows]
            other = (obs["input_ids"][rows] != self._texts["input_ids"][self.sampler.rows]) & (mask != 0)
            same = (mask == own).all(1) & ~other.any(1)
        self.sampler.keep(same)
        return bool(same.any())


class Portable:
    """A language model that is pickled without its weights, which Stable-Baselines3's zip holds already.

    The zip opens wherever these packages are installed, and holds the weights once:
    ``policy_kwargs={"model": Portable("my-model")}``.

    Args:
        model: The hub id or folder of a language model, or a `LanguageModelPolicy`.

    Attributes:
        policy: The `LanguageModelPolicy`.
    """

    def __init__(self, model: str | os.PathLike | LanguageModelPolicy | Portable) -> None:
        self.policy: LanguageModelPolicy
        if isinstance(model, Portable):
            self.policy = model.policy
        elif isinstance(model, LanguageModelPolicy):
            self.policy = model
        else:  # on the CPU, because Stable-Baselines3 moves it to its device
            self.policy = LanguageModelPolicy.from_pretrained(model, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Portable:
        return Portable(copy.deepcopy(self.policy, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        _WithoutWeights(file).dump(self.policy)
        return _read_portable, (file.getvalue(),)


class _WithoutWeights(cloudpickle.Pickler):
    """Pickles parameters as their shapes."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return _unwritten, (obj.shape, obj.dtype, obj.requires_grad)
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _read_portable(pickled: bytes) -> Portable:
    return Portable(pickle.loads(pickled))


def _unwritten(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad)


class _Texts:
    """Merges n texts that are prefixes of one another into shared rows.

    Args:
        input_ids: (n, S); valid tokens of a row can have padding on both sides.
        attention_mask: (n, S), nonzero where valid.
        actions: (n,) tokens that follow the texts; None for the texts alone.
        is_token: (n,) bool, which of the actions are tokens; None for all.
        prompt_columns: P, where new tokens begin in each row; None to align texts left.

    Attributes:
        input_ids: int64 (m, S+1), rows with m <= n different texts.
        attention_mask: bool (m, S+1).
        columns: int64 (m, k), the columns after the n texts, which hold their actions; -1 for none.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        actions: Tensor | None = None,
        is_token: Tensor | None = None,
        prompt_columns: int | None = None,
    ) -> None:
        valid = attention_mask != 0
        if prompt_columns is None:
            ids, lengths = left_packed(input_ids.long(), valid), valid.sum(1)
        else:  # texts whose prompts differ in padding are not merged
            ids, lengths = input_ids.long().masked_fill(~valid, -2), prompt_columns + valid[:, prompt_columns:].sum(1)
        ids, ends, count = pad(ids, (0, 1)), lengths, len(input_ids)
        if actions is not None:
            ids = ids.scatter(1, lengths[:, None], actions[:, None])
            ends = lengths + (1 if is_token is None else is_token.long())
        columns = torch.arange(ids.shape[1], device=ids.device)
        # `unique` sorts (-1 first), so that prefixes of a text are right before it.
        different, which = ids.masked_fill(columns >= ends[:, None], -1).unique(dim=0, return_inverse=True)
        is_prefix = ((different[:-1] == different[1:]) | (different[:-1] == -1)).all(1)
        last = pad(~is_prefix, (0, 1), value=True)
        self._row = (last.cumsum(0) - last.long())[which]
        different = different[last]
        self.attention_mask = different >= 0
        self.input_ids = different.clamp(min=0)
        order = self._row.argsort(stable=True)
        sizes = self._row.bincount(minlength=len(different))
        self._entry = torch.empty_like(order)
        self._entry[order] = torch.arange(count, device=ids.device) - (sizes.cumsum(0) - sizes)[self._row[order]]
        self.columns = torch.full((len(different), int(sizes.max())), -1, device=ids.device)
        self.columns[self._row, self._entry] = lengths

    def of_each(self, values: Tensor) -> Tensor:
        """Values (n, ...) of the texts, from values (m, k, ...) of the columns."""
        return values[self._row, self._entry]

    def to_columns(self, values: Tensor) -> Tensor:
        """Values (m, k) of the columns, zero where there is none, from values (n,) of the texts."""
        return values.new_zeros(self.columns.shape).index_put((self._row, self._entry), values)


def evaluate_transitions(policy: Policy, obs: Observation, actions: Tensor) -> Evaluation:
    """Evaluate actions of transitions; states that are prefixes of one another are read together.

    Args:
        policy: The policy that evaluates them.
        obs: "input_ids" and "attention_mask", each (n, P+T).
        actions: int64 (n,), tokens, or hand-offs.

    Returns:
        As `Policy.evaluate_actions`, each entry (n,).
    """
    is_handoff = actions == vocabulary_size(policy.tokenizer)
    texts = _Texts(obs["input_ids"], obs["attention_mask"], actions, ~is_handoff, policy.prompt_columns)
    handoffs = texts.to_columns(is_handoff) if policy.can_hand_off else None
    result = policy.evaluate_actions(texts.input_ids, texts.attention_mask, texts.columns, handoffs)
    return Evaluation(*(texts.of_each(part) for part in result))
