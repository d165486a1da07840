"""Communication between processes that train one policy together.

Every process plays a share of an iteration's episodes. Afterwards every process holds all episodes and computes the
same; only passes through networks are divided among processes. Losses are divided by the counts of the whole minibatch,
so that losses and gradients, summed over processes, are those of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, gather_object, parse_flag_from_env
from torch.distributed.tensor import DTensor

from agents.rollout import Rollout
from agents.sharding import uses_fsdp
from textgym.checks import check

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.FSDP,
)
Items = TypeVar("Items", torch.Tensor, np.ndarray, Sequence[Any])


def make_accelerator(
    algorithm: str,
    track: str | GeneralTracker | Sequence[str | GeneralTracker] | None,
    output_dir: str | os.PathLike | None,
) -> Accelerator:
    """Make the accelerator of an algorithm.

    Args:
        algorithm: The algorithm's name, for errors.
        track: Accelerate's trackers.
        output_dir: Where trackers write.

    Raises:
        ImportError: A tracker's package is not installed.
        ValueError: The processes were started in a way that is not supported.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"{algorithm} does not run under DeepSpeed; FSDP spreads the same over processes: accelerate launch "
            "--config_file examples/accelerate/fsdp.yaml"
        )
    check_trackers(track)
    uses_fsdp()  # refuses what is not supported, before weights are loaded
    accelerator = Accelerator(
        # Without a GPU, the processes of torchrun would otherwise each train a policy alone.
        cpu=not torch.accelerator.is_available(),
        log_with=track,  # type: ignore[arg-type]
        project_dir=output_dir,
    )
    if (kind := accelerator.distributed_type) not in SUPPORTED:
        raise ValueError(f"distributed_type must be one of {[k.value for k in SUPPORTED]}, got {kind.value!r}")
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision must be 'no', got {accelerator.mixed_precision!r}: a policy has its own, "
            'from_pretrained(..., dtype="auto")'
        )
    if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1 == accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE={started} processes were started, but each runs alone: make no PartialState or "
            "Accelerator before the algorithm, or set ACCELERATE_USE_CPU=true where there is no GPU"
        )
    return accelerator


def check_trackers(track: str | GeneralTracker | Sequence[str | GeneralTracker] | None) -> None:
    """Check that trackers are Accelerate's, and that their packages are installed; Accelerate would leave them out.

    Raises:
        ImportError: A package is not installed.
        ValueError: One is no tracker.
    """
    given = [track] if isinstance(track, str) or not isinstance(track, Sequence) else track
    known, found = {*LoggerType.list()}, {*map(str, get_available_trackers()), LoggerType.ALL.value}
    names = [str(one) for one in given if one is not None and not isinstance(one, GeneralTracker)]
    check("track", track, {*names} <= known, f"None, trackers, or some of {sorted(known)}")
    if missing := [name for name in names if name not in found]:
        raise ImportError(
            f"track needs the packages of its trackers, and those of {', '.join(missing)} are not installed "
            '(tensorboard: pip install "textgym[track]")'
        )


def share(accelerator: Accelerator, items: Items) -> Items:
    """This process's part of items that every process holds: contiguous, and of equal sizes up to one."""
    index, count = accelerator.process_index, accelerator.num_processes
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def join_shares(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes in order: those of which each process had its `share`."""
    return items if accelerator.num_processes == 1 else gather_object(items)


def share_of_loss(accelerator: Accelerator, items: Items) -> tuple[Items, float]:
    """This process's part of a minibatch, and the weight 1.0 of its loss; the first item and 0.0 if the part is empty.

    With sharded weights every process takes part in every forward and backward pass.
    """
    part = share(accelerator, items)
    return (part, 1.0) if len(part) else (items[:1], 0.0)


def in_parts(rows: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Split rows into parts of a size; no rows give no part, where `Tensor.split` gives an empty one."""
    return rows.split(size) if len(rows) else ()


def in_shares(
    accelerator: Accelerator,
    result: torch.Tensor,
    rows: torch.Tensor,
    size: int,
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Fill rows of a tensor that is zero elsewhere, each process its share.

    Args:
        accelerator: The processes.
        result: (N, ...), which is filled.
        rows: int64, the rows to fill.
        size: Number of rows that are computed at once.
        compute: Takes some of the rows, and returns their part of `result`.

    Returns:
        The tensor with the rows of all processes.
    """
    for part in in_parts(share(accelerator, rows), size):
        result[part] = compute(part).to(result.dtype)
    return reduce(accelerator, result)


def reduce(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    return accelerator.reduce(values.to(accelerator.device), "sum") if accelerator.num_processes > 1 else values


def reduce_terms(accelerator: Accelerator, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over all processes of scalars by name; every process has the same names."""
    if accelerator.num_processes == 1:
        return terms
    names = sorted(terms)
    return dict(zip(names, reduce(accelerator, torch.stack([terms[name] for name in names])), strict=True))


def reduce_gradients(accelerator: Accelerator, parameters: Sequence[torch.Tensor]) -> None:
    """Make the gradient of each parameter its sum over all processes.

    A gradient that one process lacks counts as zero there; one that all lack stays None. Gradients of sharded weights
    are sums already.
    """
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if accelerator.num_processes == 1 or not parameters:
        return
    # One exchange, which begins with flags of the gradients that exist.
    exists = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([exists.to(gradients[0].dtype), *(gradient.flatten() for gradient in gradients)])
    torch.distributed.all_reduce(flat)
    parts = flat[len(exists) :].split([gradient.numel() for gradient in gradients])
    for parameter, present, gradient, part in zip(
        parameters, (flat[: len(exists)] > 0).tolist(), gradients, parts, strict=True
    ):
        if present:
            parameter.grad = gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def start_equal(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Copy the first process's weights to all processes."""
    if accelerator.num_processes > 1:
        for weight in [*module.parameters(), *module.buffers()]:
            whole = weight.detach().contiguous()
            torch.distributed.broadcast(whole, src=0)
            weight.copy_(whole)


def gather(accelerator: Accelerator, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of all processes, equally many each: the first of each process, then the second of each, ...

    Their rows are in the order of one environment with the rows of all processes.
    """
    if accelerator.num_processes == 1:
        return rollouts
    gathered = gather_object([rollout.to("cpu") for rollout in rollouts])
    device = rollouts[0].rewards.device
    return [rollout.to(device) for part in range(len(rollouts)) for rollout in gathered[part :: len(rollouts)]]


def gather_state(accelerator: Accelerator, state: dict[str, Any]) -> dict[str, Any]:
    """The state (see `TextVectorEnv.get_state`) of one environment with the rows of all processes."""
    states = [state] if accelerator.num_processes == 1 else gather_object([state])
    keys = [part["row_keys"] for part in states]
    return state | {
        "row_keys": None if keys[0] is None else np.concatenate(keys),
        "episode": np.concatenate([part["episode"] for part in states]),
        "guidance": [guidance for part in states for guidance in part["guidance"]],
    }


def gather_texts(accelerator: Accelerator, texts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The texts (see `TextVectorEnv.kept_texts`) that the environments of all processes keep, each once."""
    if accelerator.num_processes == 1:
        return texts
    parts = gather_object([texts])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in texts}
    _, first = np.unique(joined["keys"], return_index=True)
    return {name: values[first] for name, values in joined.items()}


def own_state(accelerator: Accelerator, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part of the state that `gather_state` returned."""
    rows = {name: state[name] for name in ("row_keys", "episode", "guidance") if state[name] is not None}
    return state | {name: share(accelerator, values) for name, values in rows.items()}
