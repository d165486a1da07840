"""Tests whether a causal language model gives a text the same states alone and in a batch."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from textgym.caches import PackedCache, PaddedCache
from textgym.packing import can_pack, head, layer_types, read, text_decoder, trial_ids, trial_length, trials
from textgym.precision import autocast, nearly_equal

# Layers that attend to blocks of columns of a batch, padding included, which two short texts do not show.
_OF_COLUMNS = {
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "reference_sliding_attention",
    "window_attention",
}
_NOT_FINITE = "states that are not finite"
_SERVED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def check_served(model: PreTrainedModel, copy_of: PreTrainedModel | None = None) -> None:
    """Refuse a causal model that cannot read texts in a batch: it is tried, once, on two short texts.

    Where the model of which it is a copy on the same device, `copy_of`, has been tried, the copy is not.

    Raises:
        ValueError: Rows of a batch, cached or not, or the head alone, differ from the model's results for single texts.
    """
    if copy_of in _SERVED:
        _SERVED[model] = True
    if model in _SERVED or model.config.is_encoder_decoder or model.device.type == "meta" or trial_length(model) < 4:
        return
    name = type(model).__name__
    if of_columns := layer_types(model) & _OF_COLUMNS:
        raise ValueError(
            f"model must give the same for a text alone and in a batch; {name} does not, in {sorted(of_columns)}: "
            "these attend to blocks of columns, padding included"
        )
    for first in trials(model):
        fault = _fault(model, first)
        if fault is None:
            _SERVED[model] = True
            return
    if fault == _NOT_FINITE:
        weights = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        what = f"in {', '.join(weights[:3])}" if weights else f"as far as {model.dtype} reaches: its states overflow"
        raise ValueError(f"model must have finite weights; {name} has none {what}")
    raise ValueError(f"model must give the same for a text alone and in a batch; {name} does not, in {fault}")


@torch.no_grad()
def _fault(model: PreTrainedModel, first: int) -> str | None:
    """The results that differ between a text alone and a row of a batch; None for none.

    Raises:
        ValueError: Its code cannot run that way.
    """
    # Two texts of which the first leaves before the last step.
    long, short = (length := trial_length(model)) - 2, max(length // 2 - 2, 1)
    ids = trial_ids(model, first, long + short + 5)
    texts, steps = ids[: long + short].split([long, short]), ids[long + short :].split([2, 2, 1])
    try:
        with autocast(model.device, None):
            wholes = [
                torch.cat([texts[0], steps[0][:1], steps[1][:1]]),
                torch.cat([texts[1], steps[0][1:], steps[1][1:], steps[2]]),
            ]
            outputs = [text_decoder(model)(input_ids=whole[None], use_cache=False) for whole in wholes]
            own = [output.last_hidden_state[0] for output in outputs]
            if not all(states.isfinite().all() for states in own):
                return _NOT_FINITE
            logits = [model(input_ids=whole[None], use_cache=False).logits[0] for whole in wholes]
            heads = torch.cat([head(model, states) for states in own])
            cache_class = PackedCache if can_pack(model) else PaddedCache
            cache = cache_class(model, [text.cpu().numpy() for text in texts], 3)
            cached = [cache.prefill(), cache.step(steps[0]), cache.step(steps[1])]
            cache.keep(ids.new_ones(1), ids.new_zeros(1))
            cached.append(cache.step(steps[2]))
            rows, lengths = torch.tensor([[0, 0, 1, 1], [2, length, 1, short + 3]], device=ids.device)
            together = read(model, nn.utils.rnn.pad_sequence(wholes, batch_first=True), rows, lengths)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code can raise anything when it is called in an unusual way
        raise ValueError(
            f"model must read texts of several lengths together, padded and from a cache of transformers; "
            f"{type(model).__name__} does not: {type(error).__name__}: {error}"
        ) from error
    pairs = {
        "logits of its hidden states alone": (heads, torch.cat(logits)),
        "texts read together": (together, torch.cat([own[0][[1, -1]], own[1][[0, -1]]])),
        "texts continued from a cache": (
            torch.cat(cached),
            torch.cat([torch.stack([own[0][-3:], own[1][-4:-1]], 1).flatten(0, 1), own[1][-1:]]),
        ),
    }
    for what, (ours, theirs) in pairs.items():
        # Less strict than `can_pack`, since a model that is refused here cannot be used at all.
        if not nearly_equal(ours, theirs, 10_000):
            return f"{what}: they differ by up to {(ours - theirs).abs().max():.1g}"
    return None
