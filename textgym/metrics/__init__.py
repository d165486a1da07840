"""Metrics of a set of generated texts, in addition to the reward.

Those of this package are each an `evaluate.Metric` that needs no network. `load(name)` makes one:

    >>> load("rouge").compute(predictions=["a dog runs"], references=[["the dog runs", "a dog was running"]])
    {'rouge_1': 0.857..., 'rouge_2': 0.5, 'rouge_l': 0.857...}

A metric of your own is any object with a method `compute` (see `Metric`). Give it to a task or to an evaluation, or
`register` it under a name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from textgym.checks import check, check_one_of

__all__ = [
    "COLUMNS",
    "NAMES",
    "Metric",
    "MissingRequirement",
    "check_metrics",
    "columns_of",
    "load",
    "measure",
    "register",
    "select",
]

#: What a metric can read of N texts: prompts, texts written after them, for each text its references (any number of
#: them), and the token ids of prompts and texts.
COLUMNS = ("prompts", "predictions", "references", "prompt_ids", "prediction_ids")

# Ours are imported when they are first made: they need torch, evaluate, and more.
_FACTORIES: dict[str, str | Callable[..., Metric]] = {
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

#: The names of all metrics, registered ones included.
NAMES = _FACTORIES.keys()


@runtime_checkable
class Metric(Protocol):
    """A measure of a set of texts: an `evaluate.Metric`, or an object with this method.

    Its ``name`` (else its class) names it in results; its ``signature``, a string, says what its numbers depend on
    apart from the texts.
    """

    def compute(self, **columns: Any) -> Mapping[str, Any] | None:
        """Measure N texts.

        Args:
            **columns: Those of `COLUMNS` that ``features`` names, as an `evaluate.Metric` has them; without
                ``features``, those that are parameters of this method.

        Returns:
            Numbers for the whole set, by names that no other metric uses. Other values are left out of results.
        """
        ...


class MissingRequirement(ImportError):
    """Something optional that a metric needs is missing: a package, Java, or the files of a program."""


def register(name: str, factory: Callable[..., Metric]) -> None:
    """Make a metric known by a name, for `load`, for tasks and for evaluations.

    Args:
        name: The name. A metric registered before under the same name is replaced.
        factory: Returns the metric; often its class. An attribute ``needs`` of it maps its arguments to what an
            evaluation gives for them: "start_model" (a model or its hub id or folder), "encoder" (a hub id or folder)
            or "source" (the data source). Where one is not given, the metric cannot be computed.

    Raises:
        ValueError: The name belongs to a metric of textgym or is no string, or the factory cannot be called.
    """
    own = isinstance(name, str) and bool(name) and not isinstance(_FACTORIES.get(name), str)
    check("name", name, own, "a string that names no metric of textgym")
    check("factory", factory, callable(factory), "a function or class that returns a metric")
    _FACTORIES[name] = factory


def load(name: str, **config: Any) -> Any:
    """Make a metric.

    Args:
        name: One of `NAMES`.
        **config: The arguments of its class, which `help(type(load(name)))` shows: ``model`` of "perplexity",
            ``encoder`` of "bert_score", ``source`` of "sentiment" and "preference", ...

    Raises:
        ValueError: There is no metric of this name.
        MissingRequirement: The metric needs something optional that is not installed.
    """
    return _factory(name)(**config)


def check_metrics(metrics: Iterable[str | Metric]) -> None:
    """Refuse metrics that are neither one of `NAMES` nor a `Metric`.

    Raises:
        ValueError: There is such an entry.
    """

    def is_known(metric: Any) -> bool:
        if isinstance(metric, str):
            return metric in NAMES
        return isinstance(metric, Metric) and not isinstance(metric, type)

    if unknown := [metric for metric in metrics if not is_known(metric)]:
        raise ValueError(f"metrics must be of {list(NAMES)}, or objects with a method compute, got {unknown}")


def select(
    metrics: Iterable[str | Metric], *, leave_out: bool, **given: Any
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Make the metrics of an evaluation that can be computed.

    Args:
        metrics: Names or metrics.
        leave_out: Whether to leave out metrics whose needs are not met, instead of raising an error.
        **given: What there is for metrics that need it (see `register`); None is nothing.

    Returns:
        The metrics by name, and for each that was left out the reason.

    Raises:
        ValueError: A metric needs what is not given and `leave_out` is False, or two metrics have one name.
        MissingRequirement: A metric needs something optional that is not installed, and `leave_out` is False.
    """
    selected: dict[str, Metric] = {}
    left_out: dict[str, str] = {}
    for metric in metrics:
        name = metric if isinstance(metric, str) else str(getattr(metric, "name", type(metric).__name__))
        if name in selected:
            raise ValueError(f"metrics must have different names, got two of {name!r}")
        if not isinstance(metric, str):
            selected[name] = metric
            continue
        needs: Mapping[str, str] = getattr(_factory(name), "needs", {})
        missing = [need for need in needs.values() if given.get(need) is None]
        if missing and not leave_out:
            raise ValueError(f"metrics can hold {name!r} only where {missing[0]} is given")
        if missing:
            left_out[name] = f"{missing[0]} was not given"
            continue
        try:
            selected[name] = load(name, **{argument: given[need] for argument, need in needs.items()})
        except MissingRequirement as error:
            if not leave_out:
                raise
            left_out[name] = str(error)
    return selected, left_out


def columns_of(metric: Metric) -> tuple[str, ...]:
    """Return those of `COLUMNS` that a metric reads (see `Metric.compute`)."""
    features: Any = getattr(metric, "features", None)
    if features is None:
        parameters = inspect.signature(metric.compute).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return COLUMNS
        features = parameters
    names = features[0] if isinstance(features, list) else features  # a list of alternatives with the same names
    return tuple(name for name in COLUMNS if name in names)


def measure(name: str, metric: Metric, columns: Mapping[str, Any]) -> dict[str, float]:
    """Compute a metric from all of `COLUMNS`, each N long; returns its numbers by name.

    Raises:
        ValueError: It returns no number by name.
    """
    values = metric.compute(**{column: columns[column] for column in columns_of(metric)})
    named = values.items() if isinstance(values, Mapping) else ()
    numbers = {str(key): float(value) for key, value in named if isinstance(value, Real)}
    if not numbers:
        raise ValueError(f"metric {name!r} must return numbers by name, got {values!r}")
    return numbers


def _factory(name: str) -> Callable[..., Metric]:
    factory = _FACTORIES[check_one_of("name", name, list(NAMES))]
    if not isinstance(factory, str):
        return factory
    module, _, kind = factory.partition(":")
    return getattr(import_module(f"textgym.metrics.{module}"), kind)
