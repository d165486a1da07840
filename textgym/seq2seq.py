"""Encoder-decoder language models: the prompt goes into the encoder, new tokens into the decoder."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textgym.caches import PaddedCache
from textgym.precision import nearly_equal


def decoder_start(model: PreTrainedModel) -> list[int]:
    """The tokens that the decoder reads before the first new one, by the model's generation config.

    Raises:
        ValueError: The config names none.
    """
    config = model.generation_config
    first = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if first is None:
        raise ValueError(f"model must have a decoder_start_token_id in its generation config: {type(model).__name__}")
    forced = config.forced_bos_token_id
    return [int(token) for token in (first, forced) if token is not None]


def encode(model: PreTrainedModel, prompts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read prompts (B, S) in the encoder, each different one once.

    They begin in the first column; columns after `lengths` (B,), each at least 1, are never read.

    Returns:
        The states (G, S, d) of the G different prompts, their mask (G, S) int64, and which of them each prompt is (B,).
    """
    columns = torch.arange(int(lengths.max()), device=prompts.device)
    marked = prompts[:, : len(columns)].masked_fill(columns >= lengths[:, None], -1)
    different, of_row = marked.unique(dim=0, return_inverse=True)
    mask = (different >= 0).long()
    output = model.get_encoder()(input_ids=different.clamp(min=0), attention_mask=mask)
    return output.last_hidden_state, mask, of_row


def read(
    model: PreTrainedModel, prompts: Tensor, prompt_lengths: Tensor, texts: Tensor, rows: Tensor, lengths: Tensor
) -> Tensor:
    """Hidden states of the decoder after the first new tokens of texts.

    Args:
        model: A sequence-to-sequence language model.
        prompts: (B, P) int64, prompts that begin in the first column.
        prompt_lengths: (B,) int64 of at least 1.
        texts: (B, S) int64, new tokens that begin in the first column; columns after them are never read.
        rows: (n,) int64, the text of each state.
        lengths: (n,) int64, the new tokens after which it is; zero is the state before the first.

    Returns:
        (n, d), with gradients.
    """
    if not len(rows):
        return model.get_input_embeddings()(texts.new_zeros(0))
    states, mask, of_row = encode(model, prompts, prompt_lengths)
    start = torch.tensor(decoder_start(model), device=texts.device)
    ids = torch.cat([start.expand(len(texts), -1), texts[:, : int(lengths.max())]], 1)
    # Padding stands after the tokens, where no token attends to it.
    output = model.get_decoder()(
        input_ids=ids,
        encoder_hidden_states=states.index_select(0, of_row),
        encoder_attention_mask=mask[of_row],
        use_cache=False,
    )
    return output.last_hidden_state[rows, lengths + len(start) - 1]


class Seq2SeqCache(PaddedCache):
    """Prompts and new tokens that are read and then continued, a token at a time.

    New tokens of all rows end in the same column. A decoder with an embedding of positions (BART and its relatives)
    takes the column for the position, so it is given each row's position. Others (T5) only know distances between
    tokens.

    Args:
        model: A sequence-to-sequence language model.
        texts: n pairs of arrays of token ids, the prompt, which is not empty, and the new tokens so far.
        steps: Most tokens that will follow.

    Raises:
        ValueError: New tokens of different lengths, and a model that cannot be given positions.
    """

    def __init__(self, model: PreTrainedModel, texts: list[tuple[np.ndarray, np.ndarray]], steps: int) -> None:
        start = decoder_start(model)
        super().__init__(model, [np.concatenate([start, new]) for _, new in texts], steps)
        self._prompts = [torch.from_numpy(prompt) for prompt, _ in texts]
        self._ragged = bool((self._positions < self._width).any())  # else columns are positions
        if self._ragged:
            _check_positions(model)
        self._embedding: Any = getattr(model.get_decoder(), "embed_positions", None) if self._ragged else None
        self._table: Tensor | None = None

    def prefill(self) -> Tensor:
        """Read the texts; the states (n, d) after them."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=device)
        prompts = nn.utils.rnn.pad_sequence(self._prompts, batch_first=True).to(device)
        states, mask, of_row = encode(self.model, prompts, lengths)
        self._states, self._prompt_mask = states[of_row], mask[of_row]
        return super().prefill()

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        def place(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Its output for a column is that of the position, and no position is beyond the last column.
            columns = output.reshape(-1, ids.shape[1], output.shape[-1])[0]
            if self._table is None:
                self._table = columns
            elif len(self._table) < self._width:
                self._table = torch.cat([self._table, columns])
            return self._table[positions]

        hook = None if self._embedding is None else self._embedding.register_forward_hook(place)
        try:
            output = self.model.get_decoder()(
                input_ids=ids,
                attention_mask=self._mask[:, : self._width],
                encoder_hidden_states=self._states,
                encoder_attention_mask=self._prompt_mask,
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            if hook is not None:
                hook.remove()
        self._cache = output.past_key_values
        return output.last_hidden_state[:, -1]

    def keep(self, order: Tensor, moved: Tensor) -> None:
        """Remove texts (see `PackedCache.keep`)."""
        super().keep(order, moved)
        self._prompt_mask = self._prompt_mask[order]
        # Of the encoder's states only the shape is still looked at: their keys and values are in the cache.
        self._states = self._states[: len(order)]
        if self._ragged and len(order):
            # The text that took the most columns may be gone; a decoder may have no more of them than positions.
            unused = int((self._width - self._positions).min())
            self._width, self._mask = self._width - unused, self._mask[:, unused:]
            for layer in self._cache.self_attention_cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]


# Whether texts of different lengths can be continued together, by the precision in which it was tried.
_CHECKED: WeakKeyDictionary[PreTrainedModel, dict[torch.dtype, bool]] = WeakKeyDictionary()


@torch.no_grad()
def _check_positions(model: PreTrainedModel) -> None:
    """Try, once for each precision, whether texts of different lengths get the states that they have alone."""
    kind = model.device.type
    # The caller may have cast the weights (`precision.Autocast`).
    autocast_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    verdicts, precision = _CHECKED.setdefault(model, {}), autocast_to or model.dtype
    if precision not in verdicts:
        verdicts[precision] = True  # for the caches made here
        prompt, new = np.arange(3, 6), np.arange(6, 10)
        cache = Seq2SeqCache(model, [(prompt, new), (prompt, new[:1])], 1)
        cache.prefill()
        states = cache.step(torch.from_numpy(new[[0, 1]]).to(model.device))
        ids = torch.from_numpy(np.stack([[*new, new[0]], new[[0, 1, 0, 0, 0]]])).to(model.device)
        prompts, rows = torch.from_numpy(prompt).to(model.device), torch.arange(2, device=model.device)
        alone = read(model, prompts.expand(2, -1), torch.full_like(rows, 3), ids, rows, 5 - 3 * rows)
        verdicts[precision] = nearly_equal(states, alone, dtype=autocast_to)
    if not verdicts[precision]:
        raise ValueError(
            f"model must be one that can continue texts of different lengths together, which {type(model).__name__} "
            "cannot: use it without a guide that writes prefixes"
        )
