"""Gymnasium's specification of how an environment was made, with a clear word where it cannot be JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

from gymnasium.envs.registration import EnvSpec

from textgym.guidance import Guidance


class TextEnvSpec(EnvSpec):
    """An `EnvSpec` that says which arguments keep it from being JSON."""

    def to_json(self) -> str:
        """The specification as JSON, for `EnvSpec.from_json`.

        Raises:
            ValueError: An argument is an object, which JSON cannot hold.
        """
        objects = {name: value for name, value in self.kwargs.items() if not _is_plain(value)}
        if objects:
            raise ValueError(
                f"{' and '.join(objects)} must be plain data, such as a name, hub id or path, for the specification "
                f"of {self.id} to be JSON, got {', '.join(repr(value) for value in objects.values())}"
            )
        return super().to_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EnvSpec) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class WithSpec:
    """Turns the specification that `gymnasium.make` sets into a `TextEnvSpec`."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How the environment was made; None where `gymnasium.make` did not make it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = spec
        if spec is not None:
            self._spec = copy.copy(spec)
            self._spec.__class__ = TextEnvSpec


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, default=guidance_as_plain)
    except TypeError:
        return False
    return True


def guidance_as_plain(value: Any) -> Any:
    """Guidance as what JSON can hold, for the argument `default` of `json.dumps`.

    Raises:
        TypeError: It is not guidance.
    """
    if isinstance(value, Guidance):
        return asdict(value)
    raise TypeError
