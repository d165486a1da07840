"""Metrics by models: perplexity under a language model, BERTScore under an encoder."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from textgym.guides.local import fingerprint_of
from textgym.hub import load_pretrained
from textgym.metrics.base import TextMetric
from textgym.models import load_model, resolve_device
from textgym.positions import with_positions_alike

# The layer whose output correlates best with human judgement, as chosen by bert-score's authors on WMT16. Their table
# has model names, which folders do not have; this one has model types and numbers of layers.
_BEST_LAYERS = {
    ("bert", 6): 5,
    ("bert", 12): 9,
    ("bert", 24): 18,
    ("roberta", 6): 5,
    ("roberta", 12): 10,
    ("roberta", 24): 17,
    ("distilbert", 6): 5,
    ("xlm-roberta", 12): 9,
    ("xlm-roberta", 24): 17,
}


class Perplexity(TextMetric):
    """Perplexity of texts under a causal language model: exp of the mean negative log-likelihood of a token.

    It reads token ids and not texts, so that it measures the very tokens that were written. The mean is over all tokens
    of all predictions, each given its prompt and the tokens before it; EOS at the end of the ids counts, too. Prompt
    tokens do not count.

    Args:
        model: The language model, on any device, or its hub id or folder. The ids must be of its vocabulary.
        batch_size: Texts per batch.

    Returns:
        ``perplexity``, at least 1.

    Raises:
        ValueError: The model is not causal.
    """

    inputs = ("prompt_ids", "prediction_ids")
    needs: ClassVar = {"model": "start_model"}
    paper = "Jelinek et al. Perplexity: A Measure of the Difficulty of Speech Recognition Tasks. JASA 62, 1977."

    def __init__(self, model: PreTrainedModel | str | os.PathLike[str], *, batch_size: int = 16) -> None:
        super().__init__()
        self.model = load_model(model) if isinstance(model, str | os.PathLike) else model
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"model must be a causal language model, got a {type(self.model).__name__}")
        self.batch_size = batch_size
        # A folder can be anywhere, also in the cache; its weights are the same.
        name = self.model.name_or_path
        self.signature = f"model {name if name and not os.path.isdir(name) else fingerprint_of(self.model)}"

    @torch.inference_mode()
    def _scores(self, prompt_ids: Sequence[Sequence[int]], prediction_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        if not all(map(len, prompt_ids)):
            raise ValueError("prompt_ids must each hold at least one token, got an empty one")
        if not any(map(len, prediction_ids)):
            raise ValueError("prediction_ids must hold at least one token, got none")
        total, count = 0.0, 0
        lengths = np.array([len(prompt) + len(text) for prompt, text in zip(prompt_ids, prediction_ids, strict=True)])
        training = self.model.training
        self.model.eval()
        for alike in with_positions_alike(self.model, lengths):
            order = alike[np.argsort(-lengths[alike], kind="stable")].tolist()
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                of_batch = self._batch([prompt_ids[i] for i in rows], [prediction_ids[i] for i in rows])
                total, count = total + of_batch[0], count + of_batch[1]
        self.model.train(training)
        return {"perplexity": math.exp(total / count)}

    def _batch(self, prompt_ids: Sequence[Sequence[int]], prediction_ids: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Return the negative log-likelihood of a batch of predictions and their number of tokens."""
        # Prompts end at the same column, so that logits are needed only from there on.
        before = max(map(len, prompt_ids))
        after = max(map(len, prediction_ids))
        if not after:
            return 0.0, 0
        ids = torch.zeros(len(prompt_ids), before + after, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, text) in enumerate(zip(prompt_ids, prediction_ids, strict=True)):
            columns = slice(before - len(prompt), before + len(text))
            ids[row, columns] = torch.tensor([*prompt, *text])
            mask[row, columns] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=after + 1,
        ).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, before:].flatten(), reduction="none"
        )
        written = mask[:, before:].flatten()
        return float((losses * written).sum(dtype=torch.float64)), int(written.sum())


class BertScore(TextMetric):
    """BERTScore: greedy matching of tokens by the cosine of their contextual embeddings, without idf or rescaling.

    The precision of a text is the mean over its tokens of the largest cosine with a token of the reference, recall the
    same for the tokens of the reference, F1 their harmonic mean; all are 0 where text or reference is empty. Start and
    end tokens can be matched but do not count. Each of the three is the best over several references. The numbers are
    those of the package `bert-score`. Only numbers of the same encoder and layer are comparable; most published ones
    are of roberta-large, layer 17.

    Args:
        encoder: Hub id or folder of an encoder with safetensors weights.
        layer: The layer whose output is the embedding, counted from 1. None is the choice of bert-score's authors for
            BERT, RoBERTa, XLM-RoBERTa and DistilBERT of that depth, else the last.
        device: "auto" is CUDA where there is one, else CPU.
        batch_size: Texts per batch.

    Returns:
        ``bert_score_precision``, ``bert_score_recall``, ``bert_score_f1``, means in [-1, 1].

    Raises:
        ValueError: The encoder cannot be loaded, or has no such layer.
    """

    inputs = ("predictions", "references")
    needs: ClassVar = {"encoder": "encoder"}
    paper = "Zhang, Kishore, Wu, Weinberger, Artzi. BERTScore: Evaluating Text Generation with BERT. ICLR 2020."

    def __init__(
        self,
        encoder: str | os.PathLike[str],
        *,
        layer: int | None = None,
        device: str | torch.device = "auto",
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        name = os.fspath(encoder)
        try:
            model = load_pretrained(AutoModel, name)
            # bert-score's slow tokenizers put a space before the first word for RoBERTa. (Transformers 5 has only fast
            # ones, with which it does not.)
            prefix = {"add_prefix_space": True} if model.config.model_type == "roberta" else {}
            self.tokenizer = load_pretrained(AutoTokenizer, name, **prefix)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder must be a hub id or a folder of a model with safetensors weights, got {name!r}: {error}"
            ) from error
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        depth = model.config.num_hidden_layers
        if layer is None:
            layer = _BEST_LAYERS.get((model.config.model_type, depth), depth)
        if not 1 <= layer <= depth:
            raise ValueError(f"layer must be in 1 to {depth}, the encoder's number of layers, got {layer!r}")
        self.model = model.eval().to(resolve_device(device))
        self.layer = layer
        self.batch_size = batch_size
        limit = getattr(model.config, "max_position_embeddings", None)
        self.max_length = min(self.tokenizer.model_max_length, limit or self.tokenizer.model_max_length)
        self.signature = f"{name}, layer {layer}, no idf, no rescaling"

    @torch.inference_mode()
    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        embedded = self._embed({*predictions, *(text for texts in references for text in texts)})
        best = [
            torch.stack([_match(embedded[text], embedded[target]) for target in targets]).amax(0)
            for text, targets in zip(predictions, references, strict=True)
        ]
        precision, recall, f1 = torch.stack(best).double().mean(0)
        return {"bert_score_precision": precision, "bert_score_recall": recall, "bert_score_f1": f1}

    def _embed(self, texts: Collection[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return for every text the unit embeddings (L, D) of its tokens, and which of them count, bool (L,)."""
        embedded = {}
        ends = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id} - {None}
        # Texts of similar lengths in a batch, the longest first.
        order = sorted(texts, key=lambda text: (-len(text), text))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            encoded = self.tokenizer(
                [text.strip() for text in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            states = self.model(**encoded.to(self.model.device), output_hidden_states=True).hidden_states[self.layer]
            units = torch.nn.functional.normalize(states.float(), dim=-1).cpu()
            tokens = encoded["attention_mask"].bool().cpu()
            counted = ~torch.isin(encoded["input_ids"].cpu(), torch.tensor([*ends], dtype=torch.long))
            for row, text in enumerate(batch):
                embedded[text] = units[row, tokens[row]], counted[row, tokens[row]]
        return embedded


def _match(text: tuple[torch.Tensor, torch.Tensor], target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return precision, recall and F1 (3,) of a text against one reference; 0 where one of them is empty."""
    (written, of_text), (wanted, of_target) = text, target
    if not (of_text.any() and of_target.any()):
        return torch.zeros(3)
    cosines = written @ wanted.T
    precision, recall = cosines.amax(1)[of_text].mean(), cosines.amax(0)[of_target].mean()
    return torch.stack([precision, recall, 2 * precision * recall / (precision + recall)])
