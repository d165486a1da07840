"""Causal language models over packed tokens: no padding, a prompt once for all its continuations, a static cache.

Everything in a decoder but attention works on single tokens, so texts of any lengths are given to it as one row of
tokens, one after another, and only attention sees which token belongs where. It enters transformers as an attention
function of its own. Models that cannot be used that way are run as transformers runs them, on padded rows (`can_pack`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from inspect import signature
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

from textgym.positions import short_context
from textgym.storage import cache_dir

ATTENTION, COMPILED_ATTENTION = "textgym_packed", "textgym_packed_compiled"
# Arguments of attention functions that change what attention computes and that this one does not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias")
# Layers that attend to blocks of columns of a batch, padding included: two short texts do not show what that changes.
_OF_COLUMNS = {
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "reference_sliding_attention",
    "window_attention",
}

# Tokens of a text on which a model is tried.
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
            window: Tokens, itself counted, that a token attends to; None for all before it.

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


# Opaque to torch.compile, which fuses what stands between one attention and the next; and compiled with all else.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention))
AttentionInterface.register(COMPILED_ATTENTION, _attention)


def decode_packed(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout, wanted: Tensor | None = None
) -> Tensor:
    """Run the decoder of a causal language model over packed tokens.

    Args:
        model: The model; `can_pack` holds for it.
        input_ids: (tokens,) int64.
        position_ids: (tokens,) int64, the position of each token in its own text.
        layout: Which token attends to which.
        wanted: (n,) int64, the tokens whose states are wanted; None for all, in order. Of the others the last layer
            computes no more than keys and values.

    Returns:
        The last hidden states, (n, d).
    """
    config = model.config.get_text_config(decoder=True)
    attention = ATTENTION
    run: Callable[..., Tensor] = _run
    if isinstance(layout, PackedCache) and layout.compiled:
        attention, run = COMPILED_ATTENTION, _run_compiled()
        layout.mark_sizes()
    usual, config._attn_implementation = config._attn_implementation, attention
    hooks = []
    try:
        if wanted is not None:
            different = wanted.unique()
            if len(different) < _SKIP_BELOW * len(input_ids):
                last, skip = _layers(model)[-1], _OnlyWanted(different, len(input_ids))
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
    # What `get_decoder` finds by name can be another part (the output embedding of a ModernBERT decoder).
    for part in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(part, PreTrainedModel) and part is not model:
            return part
    raise ValueError(f"model must have a decoder of its own beside its output embedding, got {type(model).__name__}")


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in text_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


class _KeysAndValuesKnown(Exception):
    """Thrown out of a layer whose further results nobody would read."""


class _OnlyWanted:
    """Around a decoder's last layer: leave only the tokens whose states are wanted, and put zeros for the others.

    The layer runs twice: over the other tokens until their keys and values are known, then over those wanted.

    Args:
        wanted: (n,) int64, in ascending order.
        count: Tokens in all.
    """

    def __init__(self, wanted: Tensor, count: int) -> None:
        self.wanted, self.count = wanted, count
        others = torch.ones(count, dtype=torch.bool, device=wanted.device).index_fill_(0, wanted, False)
        self.others = others.nonzero().squeeze(1)
        self._known: tuple[Tensor, Tensor] | None = None

    @torch.compiler.disable
    def before(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer over the other tokens; what it is to be given for those wanted."""

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
        """Put what the layer made of the tokens wanted into their places."""
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


class _Grid:
    """Rows of texts of different lengths, to which packed tokens are spread and from which they are gathered.

    Args:
        lengths: (B,) int64, tokens of each row.
        columns: Columns of the grid.
        right: Whether texts stand at its right end; else at its left.
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
        cache: Where keys and values of contexts are kept.

    Attributes:
        context_grid: Places of the tokens of contexts.
        grid: Places of the tokens of continuations, where there are any.
    """

    def __init__(
        self,
        context_lengths: Tensor,
        contexts: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: PackedCache | None = None,
    ) -> None:
        self.context_grid = _Grid(context_lengths, int(context_lengths.max()))
        self.contexts, self.cache = contexts, cache
        if contexts is not None and lengths is not None:
            self.grid = _Grid(lengths, int(lengths.max()))
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
        if self.cache is not None:
            self.cache.fill(layer, key, value)
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
        input_ids: (B, S) int64, texts that begin in the first column; what stands after a text is never read.
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
        mask[:, 0] = 1  # a row of which nothing is asked must not attend to nothing
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


class PackedCache:
    """Texts that are read and then continued, a token at a time, with keys and values in memory that is laid out once.

    Args:
        model: A causal language model for which `can_pack` holds.
        texts: n arrays of token ids, none of them empty.
        steps: Most tokens that will follow.

    Attributes:
        compiled: Whether the model's layers are compiled, so that steps are too.
    """

    def __init__(self, model: PreTrainedModel, texts: list[np.ndarray], steps: int) -> None:
        self.model = model
        lengths = np.array([len(text) for text in texts])
        self._width, self._columns = int(lengths.max()), int(lengths.max()) + steps
        self._texts: Any = texts
        self._positions = torch.from_numpy(lengths).to(model.device)
        self._bias: Tensor | None = None
        if (lengths != self._width).any():
            padding = self._width - self._positions[:, None]
            self._bias = torch.zeros(len(texts), self._columns, device=model.device).masked_fill_(
                torch.arange(self._columns, device=model.device) < padding, -math.inf
            )
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._past: Tensor
        self.compiled = _layers(model)[0]._compiled_call_impl is not None

    def prefill(self) -> Tensor:
        """Read the texts, each different one once; the states (n, d) after them."""
        unique: dict[bytes, int] = {}
        contexts = [unique.setdefault(text.tobytes(), len(unique)) for text in self._texts]
        different = [self._texts[contexts.index(i)] for i in range(len(unique))]
        device = self.model.device
        lengths = torch.tensor([len(text) for text in different], device=device)
        ids = torch.from_numpy(np.concatenate(different)).to(device)
        positions = torch.from_numpy(np.concatenate([np.arange(len(text)) for text in different])).to(device)
        self._contexts = None if len(unique) == len(contexts) else torch.tensor(contexts, device=device)
        self._right = _Grid(lengths, self._width, right=True)
        layout = PackedTexts(lengths, cache=self)
        hidden = decode_packed(self.model, ids, positions, layout, lengths.cumsum(0) - 1)
        del self._texts, self._right
        return hidden if self._contexts is None else hidden[self._contexts]

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take what a layer made of the texts: (tokens, heads, d)."""
        buffers = []
        for packed in (key, value):
            texts = self._right.spread(packed)
            buffer = packed.new_empty(len(self._positions), packed.shape[1], self._columns, packed.shape[2])
            buffer[:, :, : self._width] = (texts if self._contexts is None else texts[self._contexts]).transpose(1, 2)
            buffers.append(buffer)
        self._layers[layer] = (buffers[0], buffers[1])

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token (n,) of every text; the states (n, d) after it."""
        self._past = torch.arange(self._width + 1, dtype=torch.int32, device=tokens.device)
        hidden = decode_packed(self.model, tokens, self._positions, self)
        self._width += 1
        self._positions = self._positions + 1
        return hidden

    def mark_sizes(self) -> None:
        """Tell the compiler which sizes of what `attend` reads are not always the same."""
        for buffers in self._layers.values():
            for buffer in buffers:
                torch._dynamo.maybe_mark_dynamic(buffer, (0, 2))
        torch._dynamo.maybe_mark_dynamic(self._past, 0)
        if self._bias is not None:
            torch._dynamo.maybe_mark_dynamic(self._bias, (0, 1))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """See `Layout.attend`; one token of every text."""
        # Sizes are read from tensors: compiled code is for any of them, but for the one number that an int is.
        all_keys, all_values = self._layers[layer]
        rows, end = len(query), len(self._past)
        keys, values = all_keys[:rows, :, :end], all_values[:rows, :, :end]
        keys[:, :, end - 1 :], values[:, :, end - 1 :] = key[:, :, None], value[:, :, None]
        bias = None if self._bias is None else self._bias[:, :end]
        if window is not None:
            outside = self._past < end - window
            bias = query.new_zeros(rows, end, dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(outside, -math.inf)
        bias = None if bias is None else bias.to(query.dtype)[:, None, None]
        # All query heads of a key head as so many queries of it.
        queries = query.unflatten(1, (keys.shape[1], -1))
        if query.device.type != "cpu":
            return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale).flatten(1, 2)
        # With one query a row the processor's attention kernels take twice as long as the products alone, of which the
        # second is fastest as what it is for each row: a weighted sum of rows of a table.
        queries = queries * (query.shape[2] ** -0.5 if scale is None else scale)
        scores = torch.bmm(keys.flatten(0, 1), queries.flatten(0, 1).mT).mT.unflatten(0, keys.shape[:2])
        weights = (scores if bias is None else scores + bias).softmax(-1).flatten(0, 2)
        heads = torch.arange(len(weights), dtype=torch.int32) // queries.shape[2]
        places, table = heads[:, None] * all_values.shape[2] + self._past, all_values.view(-1, values.shape[3])
        result = embedding_bag(places, table, mode="sum", per_sample_weights=weights)
        return result.view(*query.shape[:2], -1)  # values can be of another size than keys (DeepSeek's are)

    def keep(self, order: Tensor, moved: Tensor) -> None:
        """Let texts leave.

        Args:
            order: (m,) int64, which of the n texts stay, in their new order.
            moved: Places in `order` that are not what they were; only these are copied.
        """
        for layer in self._layers.values():
            for buffer in layer:
                buffer[moved, :, : self._width] = buffer[order[moved], :, : self._width]
        self._positions = self._positions[order]
        self._bias = None if self._bias is None else self._bias[order]


class PaddedCache:
    """What `PackedCache` does, as transformers does it: padded rows, and its cache, which grows."""

    def __init__(self, model: PreTrainedModel, texts: list[np.ndarray], steps: int) -> None:
        self.model = model
        lengths = np.array([len(text) for text in texts])
        width = int(lengths.max())
        ids = np.zeros((len(texts), width), np.int64)
        mask = np.zeros((len(texts), width + steps), np.int64)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :] = text
            mask[row, width - len(text) :] = 1
        self._ids, self._mask = torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)
        self._width, self._positions = width, torch.from_numpy(lengths).to(model.device)
        self._cache: Any = None

    def prefill(self) -> Tensor:
        """Read the texts; the states (n, d) after them."""
        return self._read(self._ids, (self._mask[:, : self._width].cumsum(1) - 1).clamp_(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token (n,) of every text; the states (n, d) after it."""
        self._width += 1
        self._positions = self._positions + 1
        return self._read(tokens[:, None], self._positions[:, None] - 1)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        decoder = text_decoder(self.model)
        inputs: dict[str, Any] = {"attention_mask": self._mask[:, : self._width]}
        name = "past_key_values"
        if "cache_params" in signature(decoder.forward).parameters:  # Mamba, whose states know no positions
            name = "cache_params"
            if self._cache is not None:
                inputs = {}
        else:
            inputs["position_ids"] = positions
        output = decoder(input_ids=ids, **inputs, **{name: self._cache}, use_cache=True)
        self._cache = getattr(output, name)
        return output.last_hidden_state[:, -1]

    def keep(self, order: Tensor, moved: Tensor) -> None:
        """Let texts leave (see `PackedCache.keep`)."""
        self._cache.reorder_cache(order)  # which, other than batch_select_indices, knows states of linear attention
        self._mask, self._positions = self._mask[order], self._positions[order]


class _States(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states as the output of any decoder: what else a decoder returns (`router_logits`) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (n, V) of hidden states (n, d).

    The head is the model's own (some cap or scale their logits after the output embedding), so the model runs, with
    the states in the place of what its decoder would return.
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
        _CAN_PACK[model] = bool(supported) and any(_packs(model, first) for first in _trials(model))
    return _CAN_PACK[model]


@torch.no_grad()
def _packs(model: PreTrainedModel, first: int) -> bool:
    # Two short texts do not show attention to chunks, since these are longer.
    if not _layer_types(model) <= {"full_attention", "sliding_attention"}:
        return False
    length = _trial_length(model)
    ids = _trial_ids(model, first, 2 * length).view(2, length)
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
    return _agree(packed, plain.flatten(0, 1)) and _agree(last, plain[:, -1])


_SERVED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def check_served(model: PreTrainedModel) -> None:
    """Refuse a causal model whose texts cannot be read together: it is tried, once, on two short texts.

    Raises:
        ValueError: Rows of a batch, cached or not, or the head alone, do not give what the model gives for a text.
    """
    if model in _SERVED or model.config.is_encoder_decoder or model.device.type == "meta" or _trial_length(model) < 4:
        return
    name = type(model).__name__
    if of_columns := _layer_types(model) & _OF_COLUMNS:
        raise ValueError(
            f"model must give the same for a text alone and beside others; {name} does not, in {sorted(of_columns)}: "
            "these attend to blocks of columns, padding included"
        )
    for first in _trials(model):
        fault = _fault(model, first)
        if fault is None:
            _SERVED[model] = True
            return
    raise ValueError(f"model must give the same for a text alone and beside others; {name} does not, in {fault}")


@torch.no_grad()
def _fault(model: PreTrainedModel, first: int) -> str | None:
    """Where rows of a batch are not what a model makes of a text alone; None for nowhere.

    Raises:
        ValueError: Its code cannot run that way.
    """
    # Two texts of which the first leaves before the last step.
    long, short = (length := _trial_length(model)) - 2, max(length // 2 - 2, 1)
    ids = _trial_ids(model, first, long + short + 5)
    texts, steps = ids[: long + short].split([long, short]), ids[long + short :].split([2, 2, 1])
    try:
        with autocast(model.device, None):
            wholes = [
                torch.cat([texts[0], steps[0][:1], steps[1][:1]]),
                torch.cat([texts[1], steps[0][1:], steps[1][1:], steps[2]]),
            ]
            outputs = [text_decoder(model)(input_ids=whole[None], use_cache=False) for whole in wholes]
            own = [output.last_hidden_state[0] for output in outputs]
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
    except Exception as error:  # whatever a model's code raises where it is called in a way that it does not know
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
        # Less strict than `can_pack`, which chooses the way: what is refused here has no other.
        if not _agree(ours, theirs, 10_000):
            return f"{what}: they differ by up to {(ours - theirs).abs().max():.1g}"
    return None


def _layer_types(model: PreTrainedModel) -> set[str]:
    return {*(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())}


def _trial_length(model: PreTrainedModel) -> int:
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or -1
    ends = [_TRIAL, positions if positions > 0 else None, short_context(model)]  # XLNet's -1 is no end
    return min(end for end in ends if end is not None)


def _trial_ids(model: PreTrainedModel, first: int, count: int) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    return torch.arange(first, first + count, device=model.device) % len(embeddings.weight)


def _agree(ours: Tensor, theirs: Tensor, rounding: float = 100) -> bool:
    """Whether two computations of the same (n, d) differ by rounding alone, of so many units in the last place.

    In half precision, rounding can send a token of a mixture to another expert, so there most rows decide: padding that
    is seen, or a text that reads another, shows in half of them.
    """
    tolerance = min(rounding * torch.finfo(theirs.dtype).eps, 0.1)
    near = (ours - theirs).abs().amax(-1) <= tolerance * theirs.abs().max()
    return bool(near.float().mean() >= (0.6 if _is_half(theirs.dtype) else 1))


def _is_half(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits == 16


def _trials(model: PreTrainedModel) -> range:
    """First token ids of the texts on which a model is tried until it passes: in half precision there are several."""
    return range(3 if _is_half(model.dtype) else 1)


def fuse_activations(model: nn.Module) -> None:
    """Replace GELUs that transformers writes out in eight elementwise steps by the one kernel of the same function."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder's layers, and whole steps of a `PackedCache`, for any number of tokens and texts.

    Compiled code is kept on disk for the next process.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for layer in _layers(model):
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type in which products of matrices are fastest on a device, of float32 and bfloat16."""
    if device.type == "cuda":
        half = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        half = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.bfloat16 if half else torch.float32


def check_autocast(name: str, dtype: Any) -> None:
    """Refuse what products of matrices cannot be computed in.

    Raises:
        ValueError: `dtype` is none of what there is.
    """
    if dtype not in (None, "auto", torch.float32, torch.bfloat16):
        raise ValueError(f'{name} must be None, "auto", torch.float32 or torch.bfloat16, got {dtype!r}')


class Autocast:
    """Autocast for a model that is run many times without being changed.

    `torch.autocast` casts the weights in every run, which takes as long as a run over a hundred tokens does.

    Args:
        model: The model; its weights must not change.
        dtype: What it computes in; None for the type of its weights.
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
    """Compute products of matrices in `dtype`; None for no change."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None and dtype != torch.float32)
