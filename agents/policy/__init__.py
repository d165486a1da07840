"""Policies: the interface that algorithms train, and language models of transformers behind it."""

from agents.policy.interface import Actor, Continuation, Evaluation, Policy
from agents.policy.language_model import CausalLMPolicy, LanguageModelPolicy, Seq2SeqPolicy

__all__ = [
    "Actor",
    "CausalLMPolicy",
    "Continuation",
    "Evaluation",
    "LanguageModelPolicy",
    "Policy",
    "Seq2SeqPolicy",
]
