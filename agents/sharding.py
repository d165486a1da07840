"""Sharded weights: with FSDP every process holds a part of the weights, gradients and optimiser state.

Every process samples and evaluates texts with a complete policy. Gradient steps are taken on a twin of it, whose
weights, gradients and optimiser state are sharded by torch's `fully_shard` (FSDP2); afterwards the twin's weights are
copied to the policy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from accelerate import Accelerator

    from agents.policy import Policy


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to use FSDP.

    Raises:
        ValueError: FSDP was configured with options that are not supported.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    for name, default, needed, why in (
        ("version", "1", "2", "the first version wraps modules"),
        ("offload_params", "false", "false", "weights stay on the device"),
        ("cpu_ram_efficient_loading", "false", "false", "guides and rewards would be empty in all processes but one"),
    ):
        value = os.environ.get(f"FSDP_{name.upper()}", default)
        if value.lower() != needed:
            raise ValueError(f"fsdp_{name} must be {needed}, got {value}: {why} (see examples/accelerate/fsdp.yaml)")
    return True


def shard(accelerator: Accelerator, policy: Policy) -> Policy:
    """A sharded twin of a policy where processes were started with FSDP, else the policy itself.

    Frozen weights are not sharded; twin and policy use the same ones.
    """
    if accelerator.num_processes == 1 or not uses_fsdp():
        return policy
    plugin = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` was told
    twin = policy.copy()
    how: dict[str, Any] = {
        "mesh": init_device_mesh(policy.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "ignored_params": {weight for weight in twin.parameters() if not weight.requires_grad},
    }
    layers = getattr(getattr(twin, "model", None), "_no_split_modules", None) or ()
    heads = set(getattr(twin, "heads", torch.nn.ModuleDict()).values())  # in a precision of their own
    for module in list(twin.modules()):
        if type(module).__name__ in layers or module in heads:
            fully_shard(module, **how)
    fully_shard(twin, **how)
    for name in ("evaluate_actions", "values"):
        register_fsdp_forward_method(twin, name)
    for module in twin.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses of the processes add up
    return twin


@torch.no_grad()
def scatter(policy: Policy, twin: Policy) -> None:
    """Copy the policy's weights into the twin."""
    for weight, sharded in zip(policy.parameters(), twin.parameters(), strict=True):
        if isinstance(sharded, DTensor):
            sharded.copy_(_shard_like(weight.detach(), sharded))


@torch.no_grad()
def assemble(policy: Policy, twin: Policy) -> None:
    """Copy the twin's weights into the policy."""
    for weight, sharded in zip(policy.parameters(), twin.parameters(), strict=True):
        if isinstance(sharded, DTensor):
            weight.copy_(sharded.full_tensor())


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients, sharded or not, down to a norm, and return the norm before."""
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def whole(state: Any) -> Any:
    """Nested containers with sharded tensors replaced by whole ones."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser state of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def fit(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return _shard_like(value, parameter)
        return value

    fitting = {
        index: {name: fit(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": fitting})


def _shard_like(value: torch.Tensor, like: DTensor) -> DTensor:
    # Every process has the whole tensor, so nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
