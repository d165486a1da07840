"""Log-probabilities and entropies of tokens, with gradients that take little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_prob_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens (n,) and entropies, both (n,), in nats, of logits (n, V), with gradients."""
    return _LogProbAndEntropy.apply(logits, tokens)  # type: ignore[no-any-return]


class _LogProbAndEntropy(torch.autograd.Function):
    """Both gradients in closed form.

    Autograd would keep several tensors of the logits' size, by far the largest of an update, and take their
    exponentials again; this keeps p = softmax(logits). With H its entropy, d log p_a / d logits = onehot(a) - p and
    d H / d logits = -p (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        probs, peaks = logits.softmax(-1), logits.amax(-1)
        # The largest probability is at least 1/V, so its logarithm is precise.
        largest = probs.amax(-1).log()
        log_probs = logits.gather(1, tokens[:, None]).squeeze(1) - peaks + largest
        entropy = peaks - largest - (probs * logits).sum(-1)
        ctx.save_for_backward(probs, tokens, entropy)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        probs, tokens, entropy = ctx.saved_tensors
        of_log_prob, of_entropy = gradients
        total = None
        if of_entropy is not None:
            log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log_()
            total = log_probs.add_(entropy[:, None]).mul_(probs).mul_(-of_entropy[:, None])
        if of_log_prob is not None:
            of_log_prob = of_log_prob[:, None]
            # The probabilities are not needed any more: the gradient takes their memory.
            total = probs.mul_(-of_log_prob) if total is None else total.addcmul_(probs, of_log_prob, value=-1)
            total.scatter_add_(1, tokens[:, None], of_log_prob)
        return total, None
