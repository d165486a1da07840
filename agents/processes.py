"""What processes that train one policy together tell each other.

Every process plays a share of an iteration's episodes. From then on all of them hold all episodes and decide the same;
only passes through networks are shared out. A loss is divided by what a whole minibatch counts, so the sum of what the
processes computed is what one process would have, and so are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from agents.rollout import Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.FSDP,
)
Items = TypeVar("Items", torch.Tensor, np.ndarray, Sequence[Any])


def share(accelerator: Accelerator, items: Items) -> Items:
    """This process's part of what all of them hold: a run of neighbours, as many as the others have, or one more."""
    index, count = accelerator.process_index, accelerator.num_processes
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def turn(accelerator: Accelerator, items: Items) -> tuple[Items, float]:
    """This process's share and 1.0; where it would have none, the first item and 0.0, the weight of its loss.

    With weights in pieces every process takes part in every pass that gradients come from.
    """
    mine = share(accelerator, items)
    return (mine, 1.0) if len(mine) else (items[:1], 0.0)


def add(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    return accelerator.reduce(values.to(accelerator.device), "sum") if accelerator.num_processes > 1 else values


def add_terms(accelerator: Accelerator, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of scalars over all processes, which have the same names for them."""
    if accelerator.num_processes == 1:
        return terms
    names = sorted(terms)
    return dict(zip(names, add(accelerator, torch.stack([terms[name] for name in names])), strict=True))


def add_gradients(accelerator: Accelerator, parameters: Sequence[torch.Tensor]) -> None:
    """Make the gradient of each parameter its sum over all processes.

    What has no gradient in one process counts as zero; what has none in any is left without. Gradients of weights in
    pieces are sums already.
    """
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if accelerator.num_processes == 1 or not parameters:
        return
    # In one exchange, which begins with who has a gradient at all.
    exists = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([exists.to(gradients[0].dtype), *(gradient.flatten() for gradient in gradients)])
    torch.distributed.all_reduce(flat)
    parts = flat[len(exists) :].split([gradient.numel() for gradient in gradients])
    for parameter, some, gradient, part in zip(
        parameters, (flat[: len(exists)] > 0).tolist(), gradients, parts, strict=True
    ):
        if some:
            parameter.grad = gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def start_equal(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Give all processes the weights that the first one has."""
    if accelerator.num_processes > 1:
        for weight in [*module.parameters(), *module.buffers()]:
            whole = weight.detach().contiguous()
            torch.distributed.broadcast(whole, src=0)
            weight.copy_(whole)


def gather(accelerator: Accelerator, rollouts: list[Rollout]) -> list[Rollout]:
    """What all processes played, as many rollouts each: the first of each, in order, then the second of each, ...

    Rows of all processes stand as those of one environment would.
    """
    if accelerator.num_processes == 1:
        return rollouts
    gathered = gather_object([rollout.to("cpu") for rollout in rollouts])
    device = rollouts[0].rewards.device
    return [rollout.to(device) for part in range(len(rollouts)) for rollout in gathered[part :: len(rollouts)]]


def gather_state(accelerator: Accelerator, state: dict[str, Any]) -> dict[str, Any]:
    """The state (see `TextVectorEnv.get_state`) of an environment that has the rows of all processes' environments."""
    states = [state] if accelerator.num_processes == 1 else gather_object([state])
    keys = [part["row_keys"] for part in states]
    return state | {
        "row_keys": None if keys[0] is None else np.concatenate(keys),
        "episode": np.concatenate([part["episode"] for part in states]),
        "guidance": [guidance for part in states for guidance in part["guidance"]],
    }


def own_state(accelerator: Accelerator, state: dict[str, Any]) -> dict[str, Any]:
    """What `gather_state` took from this process."""
    rows = {name: state[name] for name in ("row_keys", "episode", "guidance") if state[name] is not None}
    return state | {name: share(accelerator, values) for name, values in rows.items()}
