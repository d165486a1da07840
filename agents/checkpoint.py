"""Checkpoints: folders with the policy as a model, its card, and the state of the training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map

from textgym.decoding import Decoding
from textgym.storage import new_folder, readable, restore

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from agents.policy import Policy

TRAINING = "training"  # the subfolder of a checkpoint with the state of the training
DESCRIPTION = "algorithm.json"


@dataclass(frozen=True)
class Description:
    """What made a checkpoint, as `DESCRIPTION` holds it."""

    algorithm: str
    hyperparameters: dict[str, Any]
    environment: dict[str, Any] | None  # the arguments of `make_env` (see `agents.environments.description`)
    frozen: list[str]  # names of the policy's parameters that are not trained


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint other than the policy."""

    path: Path
    description: Description
    state: dict[str, Any]  # the algorithm's `training_state`

    def load_models(self, models: Mapping[str, nn.Module], policy: Policy) -> None:
        """Load the weights of the models other than the policy.

        Raises:
            ValueError: The checkpoint's weights do not fit one of them.
        """
        for name, model in models.items():
            file = self.path / TRAINING / f"{name}.safetensors"
            with readable(file):
                weights = load_file(file, device=str(policy.device))
            if weights.keys() != _own_weights(model, policy).keys():
                raise ValueError(f"path must hold weights that fit the {name}, got others in {str(self.path)!r}")
            model.load_state_dict(weights, strict=False)


def write_checkpoint(
    path: str | os.PathLike,
    policy: Policy,
    *,
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    environment: Mapping[str, Any] | None,
    models: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    card: ModelCard,
) -> None:
    """Write a checkpoint of an algorithm, by its name and arguments, into a folder, replacing an existing one.

    `environment` has the arguments of `make_env` that make its environment again, if that is known. `models` are those
    other than the policy, by file name without suffix; `state` is the algorithm's `training_state`, nested dicts and
    lists of arrays, tensors and numbers.
    """
    with new_folder(path) as folder:
        policy.save_pretrained(folder)
        training = folder / TRAINING
        training.mkdir()
        for name, model in models.items():
            save_file(_own_weights(model, policy), training / f"{name}.safetensors")
        torch.save(_plain(state), training / "state.pt")
        description = {
            "algorithm": algorithm,
            "hyperparameters": _plain(hyperparameters),
            "environment": environment,
            "frozen": [name for name, weight in policy.named_parameters() if not weight.requires_grad],
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))
        card.save(folder / "README.md")


def read_description(path: str | os.PathLike, writer: str) -> Description:
    """Read what made a checkpoint; `writer` is the name of the method that writes it, for errors.

    Raises:
        ValueError: `path` is no checkpoint, or the file is damaged.
    """
    restore(path)
    file = Path(path) / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"path must be a folder written by {writer}, or a repository of the hub with one, got {str(path)!r}"
        )
    with readable(file):
        description = Description(**json.loads(file.read_text(encoding="utf-8")))
        hyperparameters = description.hyperparameters
        if isinstance(hyperparameters.get("decoding"), dict):
            hyperparameters["decoding"] = Decoding(**hyperparameters["decoding"])
    return description


def read_checkpoint(path: str | os.PathLike, algorithm: str, writer: str) -> Checkpoint:
    """Read a checkpoint, except its models; `writer` is the name of the method that writes it, for errors.

    Raises:
        ValueError: `path` is no checkpoint of this algorithm, or one of its files is damaged or missing.
    """
    description = read_description(path, writer)
    if description.algorithm != algorithm:
        raise ValueError(f"path must hold a checkpoint of {algorithm!r}, got one of {description.algorithm!r}")
    file = Path(path) / TRAINING / "state.pt"
    if not file.is_file():
        raise ValueError(
            f"path must have the state of the training to go on, got {str(path)!r} without {TRAINING}: agents.load "
            "opens it, and begins anew from its policy"
        )
    with readable(file):
        # Only tensors and plain values: nothing in the file can run code.
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["counters"]["iteration"], state["history"]  # what every algorithm has
        # As arrays, as environments and curricula have them.
        for part in {"env", "guide_texts", "curriculum"} & state.keys():
            state[part] = tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf, state[part])
    return Checkpoint(Path(path), description, state)


def _own_weights(model: nn.Module, policy: Policy) -> dict[str, torch.Tensor]:
    """A model's weights, each once, without the frozen ones that it shares with the policy."""
    seen = {weight.data_ptr() for weight in policy.parameters() if not weight.requires_grad}
    own = {}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            own[name] = weight.contiguous()
    return own


def _plain(value: Any) -> Any:
    """Nested containers: arrays of numbers as tensors, of objects as lists, value objects and paths as plain data."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist()) if value.dtype == object else torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path | torch.device) else value
