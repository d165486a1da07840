"""How a set of written texts is judged, beside the reward: every metric an `evaluate.Metric` that needs no network.

`load(name)` makes one, and it is used as any other:

    >>> load("rouge").compute(predictions=["a dog runs"], references=[["the dog runs", "a dog was running"]])
    {'rouge_1': 0.857..., 'rouge_2': 0.5, 'rouge_l': 0.857...}

A metric returns one or several numbers for the whole set, by names that no other metric uses. What it reads are its
features: `predictions`, and what it needs of `references` (any number for each text), `prompts`, `prompt_ids` and
`prediction_ids`; whatever else of these it is given, it leaves alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.metrics.base import Metric

__all__ = ["NAMES", "MissingRequirement", "load"]

_HOMES = {
    "perplexity": "models:Perplexity",
    "distinct": "diversity:Distinct",
    "self_bleu": "diversity:SelfBleu",
    "rouge": "overlap:Rouge",
    "bleu": "overlap:Bleu",
    "cider_d": "overlap:CiderD",
    "coverage": "overlap:Coverage",
    "meteor": "java:Meteor",
    "spice": "java:Spice",
    "bert_score": "models:BertScore",
    "sentiment": "rewards:Sentiment",
    "preference": "rewards:Preference",
}

#: The names of all metrics.
NAMES = tuple(_HOMES)


class MissingRequirement(ImportError):
    """Something optional that a metric needs is not here: a package, Java, or the files of a program."""


def load(name: str, **config: Any) -> Metric:
    """Make a metric.

    Args:
        name: One of `NAMES`.
        **config: The arguments of its class, which `help(type(load(name)))` shows: ``model`` of "perplexity",
            ``encoder`` of "bert_score", ``source`` of "sentiment" and "preference", ...

    Raises:
        ValueError: Another name.
        MissingRequirement: The metric needs something optional that is not installed.
    """
    if name not in _HOMES:
        raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
    module, _, kind = _HOMES[name].partition(":")
    return getattr(import_module(f"textgym.metrics.{module}"), kind)(**config)
