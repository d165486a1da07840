"""The longest text that a model can read, and positions that do not depend on the other texts of a batch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED = "longrope, fixed"


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse texts longer than a model can read.

    Raises:
        ValueError: `length` is larger than the model's number of positions, where it has one.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        which = "prompt or new tokens" if model.config.is_encoder_decoder else "prompt and new tokens together"
        raise ValueError(
            f"{which} can be {length} tokens long, but {type(model).__name__} has {positions} positions: lower "
            "max_prompt_tokens or max_new_tokens"
        )


def short_context(model: PreTrainedModel) -> int | None:
    """The most tokens that a LongRoPE model reads with its short factors; None for a model of another kind.

    LongRoPE (Ding et al. 2024, arXiv 2402.13753; Phi 3, 3.5 and 4) has two sets of factors for its rotary positions:
    one for texts up to the length of pretraining, one for longer texts. transformers takes the set that the longest row
    of a batch needs, so the states of a row would depend on the other rows, and on how long the text is so far.
    """
    rope: Any = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    lengths = [part["original_max_position_embeddings"] for part in kinds if part.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def fix_positions(model: PreTrainedModel, context_length: int | None) -> None:
    """Give a LongRoPE model the factors for one length of context, for all texts; other models do not change.

    Args:
        model: The model, which is changed (see `short_context`).
        context_length: Most tokens of a text, prompt included; None for the short factors.
    """
    border = short_context(model)
    if border is None:
        return
    long = context_length is not None and context_length > border
    module: Any
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):  # one for each kind of layer
            for layer_type, kind in rope_type.items():
                if kind in ("longrope", _FIXED):
                    _fix(module, long, border, layer_type)
            module.rope_type = {key: _FIXED if kind == "longrope" else kind for key, kind in rope_type.items()}
        elif rope_type in ("longrope", _FIXED):
            _fix(module, long, border, None)
            module.rope_type = _FIXED  # transformers leaves an unknown type alone


def with_positions_alike(model: PreTrainedModel, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Split a batch into parts that need the same positions, and set these for each part.

    Args:
        model: The model, which is changed for each part (see `fix_positions`).
        lengths: (n,) integers, most tokens of each text.

    Yields:
        Indices of texts, integers (m,): all at once, but for a LongRoPE model first short texts and then long ones.
    """
    border = short_context(model)
    long = np.zeros(len(lengths), bool) if border is None else np.asarray(lengths) > border
    for part, context_length in ((~long, None), (long, sys.maxsize)):
        if part.any():
            fix_positions(model, context_length)
            yield np.flatnonzero(part)


def _fix(module: Any, long: bool, border: int, layer_type: str | None) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = getattr(module, f"{prefix}inv_freq")
    if long:
        more = {} if layer_type is None else {"layer_type": layer_type}
        wanted, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, frequencies.device, seq_len=border + 1, **more)
    else:
        wanted = getattr(module, f"{prefix}original_inv_freq").to(frequencies.device)
    if not torch.equal(frequencies, wanted):
        frequencies.copy_(wanted)


def warn_of_short_factors(model: PreTrainedModel, length: int, context_length: int | None) -> None:
    """Warn of a text that is too long for the factors in force.

    Args:
        model: The model.
        length: Tokens of the text.
        context_length: The argument of `fix_positions`.
    """
    border = short_context(model)
    if border is not None and length > border >= (context_length or 0):
        warnings.warn(
            f"a text of {length} tokens is read with the LongRoPE factors of {type(model).__name__} for texts of up to "
            f"{border}: set policy.context_length to the most tokens of a text, as algorithms do",
            stacklevel=3,
        )
