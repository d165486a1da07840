"""In which precision a model computes, and when two computations differ by rounding alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textgym.checks import check


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type in which products of matrices are fastest on a device, of float32 and bfloat16."""
    if device.type == "cuda":
        half = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        half = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.bfloat16 if half else torch.float32


def check_autocast(name: str, dtype: Any) -> None:
    """Refuse a type in which products of matrices cannot be computed.

    Raises:
        ValueError: `dtype` is none of those allowed.
    """
    allowed = (None, "auto", torch.float32, torch.bfloat16)
    check(name, dtype, dtype in allowed, 'None, "auto", torch.float32 or torch.bfloat16')


class Autocast:
    """Autocast for a model that is run many times with the same weights.

    `torch.autocast` casts the weights in every run, which takes as long as a run over a hundred tokens does.

    Args:
        model: The model; its weights must not change.
        dtype: Precision of matrix products; None for the type of the weights.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        self._context = autocast(model.device, dtype)
        self._weights: list[tuple[dict[str, Any], str, Tensor]] = []
        for module in model.modules() if dtype is not None else ():
            if isinstance(module, nn.Linear | Conv1D):
                for name, weight in module._parameters.items():
                    if weight is not None and weight.dtype == torch.float32:
                        self._weights.append((module._parameters, name, weight.detach().to(dtype)))

    def __enter__(self) -> None:
        self._swap()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self._swap()

    def _swap(self) -> None:
        self._weights = [
            (parameters, name, _put(parameters, name, weight)) for parameters, name, weight in self._weights
        ]


def _put(parameters: dict[str, Any], name: str, weight: Tensor) -> Tensor:
    usual, parameters[name] = parameters[name], weight
    return usual


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast matrix products to `dtype`; None for no change."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None and dtype != torch.float32)


def nearly_equal(ours: Tensor, theirs: Tensor, rounding: float = 100, dtype: torch.dtype | None = None) -> bool:
    """Whether two computations of the same states differ by rounding alone.

    In half precision, rounding can send a token to another expert of a mixture, so there 60% of the rows decide: a real
    fault, such as padding that is seen or a text that reads another, shows in half of them.

    Args:
        ours: (n, d).
        theirs: (n, d).
        rounding: Allowed difference in units in the last place of the largest entry.
        dtype: Precision of the computation; None for the type of `theirs`.
    """
    dtype = dtype or theirs.dtype
    tolerance = min(rounding * torch.finfo(dtype).eps, 0.1)
    near = (ours - theirs).abs().amax(-1) <= tolerance * theirs.abs().max()
    return bool(near.float().mean() >= (0.6 if is_half(dtype) else 1))


def is_half(dtype: torch.dtype) -> bool:
    """Whether a type has 16 bits."""
    return torch.finfo(dtype).bits == 16


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which sums over a vocabulary lose too much; float64 stays what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
