"""Keys and values of texts that a causal language model reads once and then continues, a token at a time."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from textgym.packing import Grid, PackedTexts, decode_packed, decoder_layers, text_decoder


class PackedCache:
    """Texts that are read and then continued, a token at a time, with keys and values in preallocated memory.

    Args:
        model: A causal language model for which `can_pack` holds.
        texts: n arrays of token ids, none of them empty.
        steps: Most tokens that will follow.
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
        # Where the model's layers are compiled, steps are too.
        self.compiled = decoder_layers(model)[0]._compiled_call_impl is not None

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
        self._right = Grid(lengths, self._width, right=True)
        layout = PackedTexts(lengths, store=self._store)
        hidden = decode_packed(self.model, ids, positions, layout, lengths.cumsum(0) - 1)
        del self._texts, self._right
        return hidden if self._contexts is None else hidden[self._contexts]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values of a layer, (tokens, heads, d) each."""
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
        if self.compiled:
            self._mark_sizes()
        hidden = decode_packed(self.model, tokens, self._positions, self, compiled=self.compiled)
        self._width += 1
        self._positions = self._positions + 1
        return hidden

    def _mark_sizes(self) -> None:
        """Tell the compiler which sizes of the tensors that `attend` reads can change."""
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
        # With one query per row the processor's attention kernels take twice as long as the two products alone. The
        # second is fastest as a weighted sum of rows of a table.
        queries = queries * (query.shape[2] ** -0.5 if scale is None else scale)
        scores = torch.bmm(keys.flatten(0, 1), queries.flatten(0, 1).mT).mT.unflatten(0, keys.shape[:2])
        weights = (scores if bias is None else scores + bias).softmax(-1).flatten(0, 2)
        heads = torch.arange(len(weights), dtype=torch.int32) // queries.shape[2]
        places, table = heads[:, None] * all_values.shape[2] + self._past, all_values.view(-1, values.shape[3])
        result = embedding_bag(places, table, mode="sum", per_sample_weights=weights)
        return result.view(*query.shape[:2], -1)  # values can be of another size than keys (DeepSeek's are)

    def keep(self, order: Tensor, moved: Tensor) -> None:
        """Remove texts.

        Args:
            order: (m,) int64, which of the n texts stay, in their new order.
            moved: Places in `order` whose text is another one now; only these are copied.
        """
        for layer in self._layers.values():
            for buffer in layer:
                buffer[moved, :, : self._width] = buffer[order[moved], :, : self._width]
        self._positions = self._positions[order]
        self._bias = None if self._bias is None else self._bias[order]


class PaddedCache:
    """The cache of transformers, with padded rows, behind the methods of `PackedCache`."""

    def __init__(self, model: PreTrainedModel, texts: list[np.ndarray], steps: int) -> None:
        self.model = model
        self._positions = torch.tensor([len(text) for text in texts], device=model.device)
        self._width = int(self._positions.max())
        ids = [torch.from_numpy(text).long() for text in texts]
        self._ids = pad_sequence(ids, batch_first=True, padding_side="left").to(model.device)
        columns = torch.arange(self._width + steps, device=model.device)
        self._mask = (columns >= self._width - self._positions[:, None]).long()
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
        """Remove texts (see `PackedCache.keep`)."""
        self._cache.reorder_cache(order)  # which, other than batch_select_indices, knows states of linear attention
        self._mask, self._positions = self._mask[order], self._positions[order]
