"""Random numbers of episodes, each a function of (row seed, episode, purpose) alone."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from textgym import seeding
from textgym.checks import check, is_int


class Purpose(IntEnum):
    """The purposes of an episode's random numbers."""

    SAMPLE = 0
    RESTART = 1
    RESTART_LENGTH = 2
    RESTART_REDRAW = 3
    SCHEDULE = 4
    HANDOFF_LENGTH = 5
    RESTART_SEED = 6
    HANDOFF_SEED = 7
    NO_BODY = 8


class EpisodeDraws:
    """The random numbers of N rows. Rows of a group share those of their leader.

    Args:
        num_envs: N.

    Attributes:
        row_keys: uint64 (N,), hashes of the rows' seeds; None before the first reset.
        episode: int64 (N,), episodes that each row has begun since it was seeded.
        leader: int64 (N,), the first row of each row's group.
    """

    def __init__(self, num_envs: int) -> None:
        self.row_keys: np.ndarray | None = None
        self.episode = np.zeros(num_envs, np.int64)
        self.leader = np.arange(num_envs)
        self._drawn = np.zeros((num_envs, 2), np.uint64)  # (row key, episode) of each row's running episode

    def copy(self) -> EpisodeDraws:
        """The same numbers, now and later."""
        other = EpisodeDraws(0)
        other.row_keys = None if self.row_keys is None else self.row_keys.copy()
        other.episode, other.leader, other._drawn = self.episode.copy(), self.leader.copy(), self._drawn.copy()
        return other

    def seed(self, seed: int | Sequence[int | None] | None, rows: np.ndarray, generator: np.random.Generator) -> None:
        """Seed rows (see `TextVectorEnv.reset`); `generator` makes the first seeds of all others.

        Raises:
            ValueError: A sequence of another length than N, or no seed.
        """
        num_envs = len(self.episode)
        if self.row_keys is None:
            self.row_keys = generator.integers(2**64, size=num_envs, dtype=np.uint64)
        if seed is None:
            return
        seeds = [seed] if isinstance(seed, int | np.integer) else seed
        valid = all(own is None or (is_int(own) and 0 <= int(own) < 2**64) for own in seeds)
        check("seed", seed, valid, "an int in [0, 2**64) or, for each row, such an int or None")
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + row for row in range(num_envs)]
        if len(seed) != num_envs:
            raise ValueError(f"seed must be an int or have one entry per row ({num_envs}), got {len(seed)} entries")
        for row in rows:
            if (own := seed[row]) is not None:
                self.row_keys[row] = seeding.hash64(own)
                self.episode[row] = 0

    def begin(self, rows: np.ndarray, group_size: int) -> None:
        """Begin an episode in each of `rows`, in groups."""
        assert self.row_keys is not None
        leader = self.leader[rows] = rows - rows % group_size
        self._drawn[rows, 0] = self.row_keys[leader]
        self._drawn[rows, 1] = self.episode[leader].astype(np.uint64)
        self.episode[rows] += 1

    def uniform(self, rows: np.ndarray, purpose: Purpose, occasion: np.ndarray | int = 0) -> np.ndarray:
        """One number in [0, 1) per row, float64; another one for each occasion in the episode."""
        return seeding.uniform(self._drawn[rows, 0], self._drawn[rows, 1], purpose + len(Purpose) * occasion)

    def request_seeds(self, rows: np.ndarray, purpose: Purpose, occasion: np.ndarray | int = 0) -> list[int]:
        """One seed per row for a request to the guide; another one for each occasion in the episode."""
        # A group shares its prefix, yet each of its rows gets its own completion.
        member = rows - self.leader[rows] if purpose == Purpose.HANDOFF_SEED else 0
        number = purpose + len(Purpose) * occasion
        hashes = seeding.hash64(self._drawn[rows, 0], self._drawn[rows, 1], number, member)
        return (hashes >> np.uint64(1)).tolist()
