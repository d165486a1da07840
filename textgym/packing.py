"""Causal language models over packed tokens: no padding, and a shared prompt read once for all its continuations.

Everything in a decoder but attention works on single tokens, so texts of any lengths are given to it as one row of
tokens, one after another, and only attention sees which token belongs where. It enters transformers as an attention
function of its own. Models that cannot be used that way are run as transformers runs them, on padded rows (`can_pack`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from textgym.positions import short_context
from textgym.precision import autocast, fast_dtype, is_half, nearly_equal  # noqa: F401  (fast_dtype used to be here)
from textgym.storage import cache_dir

ATTENTION, COMPILED_ATTENTION = "textgym_packed", "textgym_packed_compiled"
# Arguments of attention functions that change the result and that this one does not support.
_UNKNOWN = ("softcap", "s_aux", "position_bias")
# Most tokens of a text on which a model is tried.
_TRIAL = 12
# The last layer runs in two parts if the wanted states are of at most this share of the tokens.
_SKIP_BELOW = 0.8


class Layout(Protocol):
    """Says which of the packed tokens attend to which."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: Its index.
            query: (tokens, heads, d).
            key: (tokens, key heads, d).
            value: (tokens, key heads, e).
            scale: Factor of the scores; None for 1 / sqrt(d).
            window: Tokens, itself included, that a token attends to; None for all before it.

        Returns:
            (tokens, heads, e).
        """


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with (1, heads, tokens, d) in and (1, tokens, heads, d) out."""
    layer: Any = module.layer_idx
    types: Any = getattr(module.config, "layer_types", None)
    windows = types[layer] == "sliding_attention" if types else getattr(module.config, "sliding_window", None)
    if windows and sliding_window is None:  # the mask alone knows it
        layout = None
    if layout is None or any(others.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError(f"{type(module).__name__} attends in a way that packed tokens cannot")
    # Rotary embeddings are float32, and under autocast so are the queries and keys that they return.
    query, key, value = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
    # Each layout knows in which type its attention is fastest.
    with torch.autocast(query.device.type, enabled=False):
        return layout.attend(layer, query, key, value, scaling, sliding_window)[None], None


# The first is opaque to torch.compile, which fuses the code between two attentions; the second is compiled with it.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention))
AttentionInterface.register(COMPILED_ATTENTION, _attention)


def decode_packed(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    layout: Layout,
    wanted: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Run the decoder of a causal language model over packed tokens.

    Args:
        model: The model; `can_pack` holds for it.
        input_ids: (tokens,) int64.
        position_ids: (tokens,) int64, the position of each token in its own text.
        layout: Which token attends to which.
        wanted: (n,) int64, the tokens whose states are wanted; None for all, in order. Of the others the last layer
            computes no more than keys and values.
        compiled: Whether to compile the whole run.

    Returns:
        The last hidden states, (n, d).
    """
    config = model.config.get_text_config(decoder=True)
    run = _run_compiled() if compiled else _run
    usual, config._attn_implementation = config._attn_implementation, COMPILED_ATTENTION if compiled else ATTENTION
    hooks = []
    try:
        if wanted is not None:
            different = wanted.unique()
            if len(different) < _SKIP_BELOW * len(input_ids):
                last, skip = decoder_layers(model)[-1], _OnlyWanted(different, len(input_ids))
                hooks.append(last.register_forward_pre_hook(skip.before, with_kwargs=True))
                hooks.append(last.register_forward_hook(skip.after))
        states = run(text_decoder(model), input_ids, position_ids, layout)
    finally:
        config._attn_implementation = usual
        for hook in hooks:
            hook.remove()
    return states if wanted is None else states.index_select(0, wanted)


def _run(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    output = decoder(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


@functools.cache
def _run_compiled() -> Callable[..., Tensor]:
    return torch.compile(_run, dynamic=True)


def text_decoder(model: PreTrainedModel) -> Any:
    """The part of a language model that makes hidden states of tokens, which `head` makes logits of.

    Raises:
        ValueError: The model has no such part.
    """
    # `get_decoder` looks for a name, which can be that of another part (a ModernBERT decoder's output embedding).
    for part in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(part, PreTrainedModel) and part is not model:
            return part
    raise ValueError(
        f"model must have a decoder that is a module apart from the output embedding, got {type(model).__name__}"
    )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder, first to last."""
    return [module for module in text_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


class _KeysAndValuesKnown(Exception):
    """Thrown out of a layer whose further results nobody would read."""


class _OnlyWanted:
    """Around a decoder's last layer: leave only the tokens whose states are wanted, and put zeros for the others.

    Of `count` tokens in all, `wanted`, int64 (n,), are in ascending order. The layer runs twice: over the other tokens
    until their keys and values are known, then over those wanted.
    """

    def __init__(self, wanted: Tensor, count: int) -> None:
        self.wanted, self.count = wanted, count
        others = torch.ones(count, dtype=torch.bool, device=wanted.device).index_fill_(0, wanted, False)
        self.others = others.nonzero().squeeze(1)
        self._known: tuple[Tensor, Tensor] | None = None

    @torch.compiler.disable
    def before(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer over the other tokens; returns its arguments for those wanted."""

        def part(tokens: Tensor) -> Any:
            def cut(value: Any) -> Any:
                of_tokens = isinstance(value, Tensor) and value.shape[:2] == (1, self.count)
                return value[:, tokens] if of_tokens else value

            return tree_map(cut, (args, {**kwargs, "layout": self}))

        self.layout = kwargs["layout"]
        other_args, other_kwargs = part(self.others)
        with contextlib.suppress(_KeysAndValuesKnown):
            layer.forward(*other_args, **other_kwargs)
        return part(self.wanted)

    @torch.compiler.disable
    def after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Put the states of the tokens wanted into their places."""
        states = output[0] if isinstance(output, tuple) else output
        states = states.new_zeros(1, self.count, states.shape[2]).index_copy(1, self.wanted, states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """See `Layout.attend`; first of the other tokens, then of those wanted."""
        if self._known is None:
            self._known = key, value
            raise _KeysAndValuesKnown
        places = torch.cat([self.others, self.wanted])
        key, value = (
            known.new_empty(self.count, *known.shape[1:]).index_copy(0, places, torch.cat([known, own]))
            for known, own in zip(self._known, (key, value), strict=True)
        )
        query = query.new_zeros(self.count, *query.shape[1:]).index_copy(0, self.wanted, query)
        return self.layout.attend(layer, query, key, value, scale, window).index_select(0, self.wanted)


class Grid:
    """Rows with `lengths` (B,) tokens, to which packed tokens are spread and from which they are gathered.

    Texts stand at the left end of all `columns`, or with `right` at their right end.
    """

    def __init__(self, lengths: Tensor, columns: int, right: bool = False) -> None:
        positions = torch.arange(columns, device=lengths.device)
        self.mask = positions >= columns - lengths[:, None] if right else positions < lengths[:, None]
        self.where = self.mask.flatten().nonzero().squeeze(1)
        self.full = len(self.where) == self.mask.numel()

    def spread(self, packed: Tensor) -> Tensor:
        """(tokens, ...) to (B, columns, ...), zero where no token is."""
        if not self.full:
            packed = packed.new_zeros(self.mask.numel(), *packed.shape[1:]).index_copy(0, self.where, packed)
        return packed.unflatten(0, self.mask.shape)

    def gather(self, spread: Tensor) -> Tensor:
        """(B, columns, ...) to (tokens, ...)."""
        packed = spread.flatten(0, 1)
        return packed if self.full else packed.index_select(0, self.where)


class PackedTexts:
    """Whole texts: contexts, which are different, and the continuations of them, after all contexts in the packing.

    Args:
        context_lengths: (G,) int64.
        contexts: (B,) int64, the context that each continuation continues; None where there are only contexts.
        lengths: (B,) int64, tokens of each continuation; zero is allowed.
        store: Called with each layer's index, keys and values of all tokens; None where no cache needs them.
    """

    def __init__(
        self,
        context_lengths: Tensor,
        contexts: Tensor | None = None,
        lengths: Tensor | None = None,
        store: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.context_grid = Grid(context_lengths, int(context_lengths.max()))
        self.contexts, self.store = contexts, store
        if contexts is not None and lengths is not None:
            self.grid = Grid(lengths, int(lengths.max()))
            width, new = self.context_grid.mask.shape[1], self.grid.mask.shape[1]
            causal = torch.ones(new, new, dtype=torch.bool, device=lengths.device).tril()
            seen = self.context_grid.mask[contexts][:, None].expand(-1, new, -1)
            self._mask = torch.cat([seen, causal.expand(len(contexts), -1, -1)], 2)
            offsets = context_lengths[contexts][:, None, None]
            before, own = (torch.arange(count, device=lengths.device) for count in (width, new))
            keys = torch.cat([before.expand(len(contexts), -1), offsets[:, 0] + own], 1)
            self._distances = (offsets + own[:, None]) - keys[:, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """See `Layout.attend`."""
        grid, dtype = self.context_grid, query.dtype
        count = len(grid.where)
        if self.store is not None:
            self.store(layer, key, value)
        if query.device.type == "cpu":
            # The processor's attention kernels are slower in half precision than in single.
            query, key, value = (part.to(torch.promote_types(dtype, torch.float32)) for part in (query, key, value))
        queries, keys, values = (grid.spread(part[:count]).transpose(1, 2) for part in (query, key, value))
        mask = None
        if window is not None and window < grid.mask.shape[1]:
            ones = torch.ones(2 * (grid.mask.shape[1],), dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(1 - window)
        result = grid.gather(_sdpa(queries, keys, values, mask, scale, causal=True).transpose(1, 2))
        if self.contexts is not None:
            own = [self.grid.spread(part[count:]).transpose(1, 2) for part in (query, key, value)]
            # The gradient of index_select takes a fifth of the time of that of indexing.
            keys = torch.cat([keys.index_select(0, self.contexts), own[1]], 2)
            values = torch.cat([values.index_select(0, self.contexts), own[2]], 2)
            mask = self._mask if window is None else self._mask & (self._distances < window)
            branches = _sdpa(own[0], keys, values, mask[:, None], scale)
            result = torch.cat([result, self.grid.gather(branches.transpose(1, 2))])
        return result.to(dtype)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )


def read(model: PreTrainedModel, input_ids: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states of texts after their first tokens, each token computed once and none that no state depends on.

    Rows that agree up to the first state that is asked of them share these tokens.

    Args:
        model: A causal language model.
        input_ids: (B, S) int64, texts that begin in the first column; columns after a text are never read.
        rows: (n,) int64, the text of each state.
        lengths: (n,) int64 of at least 1, the tokens after which it is.

    Returns:
        (n, d), with gradients.
    """
    if not len(rows):
        return model.get_input_embeddings()(input_ids[:0, 0])
    count, width = len(input_ids), int(lengths.max())
    input_ids = input_ids[:, :width]
    end = torch.zeros(count, dtype=torch.int64, device=rows.device).scatter_reduce_(0, rows, lengths, "amax")
    if not can_pack(model):
        mask = (torch.arange(width, device=rows.device) < end[:, None]).long()
        mask[:, 0] = 1  # attention needs a token, even in a row of which no state is asked
        positions = torch.arange(width, device=rows.device).expand_as(mask)
        output = text_decoder(model)(
            input_ids=input_ids * mask, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state[rows, lengths - 1]

    first = torch.full_like(end, width).scatter_reduce_(0, rows, lengths, "amin").minimum(end)
    columns = torch.arange(int(first.max()), device=rows.device)
    shared = input_ids[:, : len(columns)].masked_fill(columns >= first[:, None], -1)
    contexts, of_row = shared.unique(dim=0, return_inverse=True)
    if len(contexts) == count:
        layout = PackedTexts(end)
        ids = layout.context_grid.gather(input_ids)
        positions = layout.context_grid.gather(torch.arange(width, device=rows.device).expand(count, -1))
        starts = end.cumsum(0) - end
        return decode_packed(model, ids, positions, layout, starts[rows] + lengths - 1)

    context_lengths = (contexts >= 0).sum(1)
    layout = PackedTexts(context_lengths, of_row, end - first)
    after = (first[:, None] + torch.arange(layout.grid.mask.shape[1], device=rows.device)).clamp_(max=width - 1)
    ids = torch.cat([layout.context_grid.gather(contexts), layout.grid.gather(input_ids.gather(1, after))])
    positions = torch.cat([layout.context_grid.gather(columns.expand_as(contexts)), layout.grid.gather(after)])
    of_context = (context_lengths.cumsum(0) - context_lengths)[of_row] + context_lengths[of_row] - 1
    starts = context_lengths.sum() + (end - first).cumsum(0) - (end - first)
    own = lengths - first[rows]
    wanted = torch.where(own > 0, starts[rows] + own - 1, of_context[rows])
    return decode_packed(model, ids, positions, layout, wanted)


class _States(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states as the output of any decoder; other outputs (`router_logits`) are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (n, V) of hidden states (n, d).

    Some models cap or scale their logits after the output embedding, so the whole model runs, with its decoder replaced
    by one that returns the states.
    """
    ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": ids, "encoder_outputs": (states[None],)}
    decoder = text_decoder(model)
    usual = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: _States(last_hidden_state=states[None])
    try:
        return model(**inputs, use_cache=False).logits.squeeze(0)  # the gradient of [0] is a copy of them all
    finally:
        if usual is None:
            del decoder.forward
        else:
            decoder.forward = usual


_CAN_PACK: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed tokens give a model's own hidden states: it is tried, once, on two short texts."""
    if model not in _CAN_PACK:
        supported = getattr(model, "_supports_attention_backend", False) and not model.config.is_encoder_decoder
        _CAN_PACK[model] = bool(supported) and any(_packs(model, first) for first in trials(model))
    return _CAN_PACK[model]


@torch.no_grad()
def _packs(model: PreTrainedModel, first: int) -> bool:
    # Two short texts do not show attention to chunks, since these are longer.
    if not layer_types(model) <= {"full_attention", "sliding_attention"}:
        return False
    length = trial_length(model)
    ids = trial_ids(model, first, 2 * length).view(2, length)
    positions = torch.arange(length, device=model.device).expand_as(ids)
    with autocast(model.device, None):
        plain = text_decoder(model)(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
        ).last_hidden_state
        try:
            layout = PackedTexts(torch.tensor([length, length], device=model.device))
            packed = decode_packed(model, ids.flatten(), positions.flatten(), layout)
            ends = torch.tensor([length - 1, 2 * length - 1], device=model.device)
            last = decode_packed(model, ids.flatten(), positions.flatten(), layout, ends)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, IndexError, RuntimeError):  # NotImplementedError is one of the last
            return False
    return nearly_equal(packed, plain.flatten(0, 1)) and nearly_equal(last, plain[:, -1])


def layer_types(model: PreTrainedModel) -> set[str]:
    """The kinds of attention layers that a model's config names; none where it does not."""
    return {*(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())}


def trial_length(model: PreTrainedModel) -> int:
    """Tokens of a text on which a model is tried, as many as the model can read with one set of positions."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or -1
    ends = [_TRIAL, positions if positions > 0 else None, short_context(model)]  # XLNet's -1 is no end
    return min(end for end in ends if end is not None)


def trial_ids(model: PreTrainedModel, first: int, count: int) -> Tensor:
    """Token ids (count,) on which a model is tried: `first` and those that follow it."""
    embeddings: Any = model.get_input_embeddings()
    return torch.arange(first, first + count, device=model.device) % len(embeddings.weight)


def trials(model: PreTrainedModel) -> range:
    """First token ids of the texts on which a model is tried until it passes: in half precision there are several."""
    return range(3 if is_half(model.dtype) else 1)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder's layers, and whole steps of a `PackedCache`, for any sizes; code is kept on disk."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for layer in decoder_layers(model):
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)
