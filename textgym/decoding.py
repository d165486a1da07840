"""How the next token is chosen from a model's distribution, as one immutable value."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from textgym.checks import check, is_number


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen from a model's distribution.

    Truncation is applied in the order of transformers: temperature, top-k, then top-p inside the top k.

    Attributes:
        temperature: Logits are divided by it.
        top_k: Only the k most probable tokens can be chosen; 0 allows all.
        top_p: Only the smallest set of most probable tokens whose probability reaches it can be chosen (nucleus
            sampling, Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"); at least one token.
        min_new_tokens: No token that ends the text can be chosen before the text has that many new tokens, prefix
            included.
        greedy: Always choose the most probable token.
        num_beams: More than 1 replaces sampling by a beam search of that width (see
            `textgym.generation.BeamSearch`): for evaluations, `generate` and guides, not for training.

    Raises:
        ValueError: A value outside its range, or beams together with a setting of sampling.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False
    num_beams: int = 1

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        finite = is_number(temperature) and 0 < temperature < math.inf
        check("Decoding.temperature", temperature, finite, "a finite number > 0")
        check("Decoding.top_p", top_p, is_number(top_p) and 0 < top_p <= 1, "a number with 0 < top_p <= 1")
        for name, least in (("top_k", 0), ("min_new_tokens", 0), ("num_beams", 1)):
            value = getattr(self, name)
            check(f"Decoding.{name}", value, type(value) is int and value >= least, f"an int >= {least}")
        check("Decoding.greedy", self.greedy, isinstance(self.greedy, bool), "True or False")
        draws = (temperature, self.top_k, top_p, self.greedy) != (1, 0, 1, False)
        check(
            "Decoding.num_beams",
            self.num_beams,
            self.num_beams == 1 or not draws,
            "1 with temperature, top_k, top_p or greedy (beams search among all tokens, and draw none)",
        )


def __getattr__(name: str) -> Any:
    if name == "load_model":  # which used to be here
        return importlib.import_module("textgym.models").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
