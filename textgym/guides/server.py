"""A server with OpenAI's API, which is asked within bounds of time, size, number and cost."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from textgym.guides.answers import Answer, limit, read_answer, sent
from textgym.guides.api_key import Redactor, read_key
from textgym.guides.budget import Budget, Ledger

if TYPE_CHECKING:
    from httpx2 import AsyncClient

# More than any honest answer has.
_MOST_BYTES = 1 << 26
# Seconds to wait before the second try, at most before a later one, and at most where the server asks for it.
_FIRST_WAIT, _MOST_WAIT, _MOST_WAIT_ASKED = 0.5, 8.0, 120.0
_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "proxy", "socks")))


class Server:
    """An OpenAI-compatible server, shared by all copies of a guide in a process.

    Args:
        url: URL of the API.
        api_key_env: As for `HTTPGuide`, and so on.
        concurrency: Most requests under way at once, whichever threads ask.
        timeout: Seconds of a try.
        max_retries: Most tries after the first.
        budget: Limits.

    Attributes:
        ledger: What was used.

    Raises:
        ValueError: There is no key for a server on another machine, or it has characters that no key has.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None,
        concurrency: int,
        timeout: float,
        max_retries: int,
        budget: Budget,
    ) -> None:
        self.url, self.api_key_env = url, api_key_env
        self.concurrency, self.timeout, self.max_retries, self.budget = concurrency, timeout, max_retries, budget
        self.ledger = Ledger()
        # By process, because a forked one must not use the connections of its parent.
        self._connections: dict[int, _Connection] = {}
        self._lock = threading.Lock()
        self._key()

    def ask(
        self, bodies: Sequence[Mapping[str, Any]], keep: Callable[[Mapping[str, Any], Answer], None]
    ) -> list[Answer | None]:
        """Ask for answers.

        Calls begin in order, so that every run spends its budget on the same requests. After a failure none begins, and
        those under way are finished, because they are paid for.

        Args:
            bodies: N requests.
            keep: Is called with each request and its answer as it comes, in another thread.

        Returns:
            N answers; None where the budget is spent and ``when_spent`` is "unguided".

        Raises:
            BudgetExceeded: The budget is spent and ``when_spent`` is "error".
            ConnectionError: The server cannot be reached.
            RuntimeError: The server answers with an error, or with no completion.
            TimeoutError: The server does not answer in time.
        """
        if not bodies:
            return []
        coroutine = self._ask(bodies, keep, self._connected())
        # A thread of its own, because this one may run an event loop, as notebooks do; and it can be interrupted.
        future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))
        try:
            return future.result()
        finally:
            future.cancel()

    async def _ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        keep: Callable[[Mapping[str, Any], Answer], None],
        connection: _Connection,
    ) -> list[Answer | None]:
        tasks: list[asyncio.Task[Answer | None]] = []
        failed = False

        def end(task: asyncio.Task) -> None:
            nonlocal failed
            failed = failed or task.cancelled() or task.exception() is not None
            connection.slots.release()

        try:
            for body in bodies:
                await connection.slots.acquire()
                if failed:
                    connection.slots.release()
                    break
                tasks.append(asyncio.create_task(self._answer(body, keep, connection)))
                tasks[-1].add_done_callback(end)
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        return [task.result() for task in tasks]

    async def _answer(
        self,
        body: Mapping[str, Any],
        keep: Callable[[Mapping[str, Any], Answer], None],
        connection: _Connection,
    ) -> Answer | None:
        """Try until there is an answer, or no hope for one."""
        tries = 0
        while self.ledger.begin(self.budget):
            tries += 1
            outcome = await self._try(body, tries, connection)
            if isinstance(outcome, Answer):
                keep(body, outcome)
                return outcome
            wait = outcome.wait
            if not outcome.again or tries > self.max_retries or (wait is not None and wait > _MOST_WAIT_ASKED):
                raise outcome.error
            if wait is None or not wait > 0:
                wait = min(_FIRST_WAIT * 2.0 ** min(tries - 1, 9), _MOST_WAIT) * random.SystemRandom().uniform(0.75, 1)
            await asyncio.sleep(wait)
        return None

    async def _try(self, body: Mapping[str, Any], tries: int, connection: _Connection) -> Answer | _Failure:
        import httpx2

        where, hide = f"the guide's server {self.url}", connection.redactor
        # What may have been paid for, unless it is known better.
        failures, used = 1, (sent(body), limit(body))
        try:
            try:
                async with asyncio.timeout(self.timeout):
                    reply = await _post(connection.client, body)
            except TimeoutError:
                late = f"{where} did not answer within timeout={self.timeout:g} seconds, {tries} tries"
                return _Failure(TimeoutError(late), True)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                if isinstance(error, httpx2.ConnectError | httpx2.InvalidURL):
                    used = (0, 0)
                reason = f": {hide.quote(str(error))}" if str(error) else ""
                return _Failure(ConnectionError(f"{where} cannot be reached, {tries} tries{reason}"), True)
            if not 200 <= reply.status < 300:
                used = (0, 0)
                told = f"{where} answered {reply.status} for model {body['model']!r}, {tries} tries: {reply.said(hide)}"
                if reply.location:
                    told += f" (it redirects to {hide.quote(reply.location)}, and prompts go to base_url alone)"
                again = reply.status in (408, 409, 429) or reply.status >= 500
                return _Failure(RuntimeError(told), again, reply.wait)
            try:
                answer = read_answer(json.loads(reply.payload), body, hide)
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
                told = f"{where} must answer with a completion, got {reply.said(hide)}, {tries} tries"
                return _Failure(RuntimeError(told), True)
            used = (answer.prompt_tokens, answer.completion_tokens)
            if "echo" in body and answer.log_probs is None:
                wanted = "the log-probabilities of the tokens that it read"
                return _Failure(RuntimeError(f"{where} must answer with {wanted}, got {reply.said(hide)}"), False)
            failures = 0
            return answer
        finally:
            cost = sum(price * tokens for price, tokens in zip(self.budget.prices, used, strict=True))
            self.ledger.add(failures=failures, prompt_tokens=used[0], completion_tokens=used[1], cost=cost)

    def _key(self) -> str | None:
        key = read_key(self.api_key_env)
        if key is None and self.api_key_env is not None and not _is_loopback(self.url):
            raise ValueError(
                f"api_key_env: the environment variable {self.api_key_env} is not set, and {self.url} is not on this "
                "machine; api_key_env=None sends no key"
            )
        return key

    def _connected(self) -> _Connection:
        import httpx2

        with self._lock:
            if os.getpid() not in self._connections:
                key = self._key()
                limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
                # Not compressed, because a small answer could become a huge one.
                headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
                headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
                client = httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=None, limits=limits)
                redactor = Redactor(key)
                for name in _LOGGERS:
                    logging.getLogger(name).addFilter(redactor)
                connection = _Connection(client, asyncio.Semaphore(self.concurrency), redactor)
                self._connections[os.getpid()] = connection
                weakref.finalize(self, _close, os.getpid(), connection).atexit = False
            return self._connections[os.getpid()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Server:
        """Share usage and connections."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the connections, which hold the key, and the usage in this process."""
        return {**self.__dict__, "_connections": None, "_lock": None, "ledger": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _connections={}, _lock=threading.Lock(), ledger=Ledger())


class _Connection(NamedTuple):
    client: AsyncClient
    slots: asyncio.Semaphore
    redactor: Redactor


class _Failure(NamedTuple):
    """A try without an answer: the error if it was the last, whether another makes sense, and when."""

    error: Exception
    again: bool
    wait: float | None = None


class _Reply(NamedTuple):
    status: int
    payload: bytes
    location: str
    wait: float | None

    def said(self, hide: Redactor) -> str:
        """Quote what an error says, else the reply."""
        try:
            reply = json.loads(self.payload)
        except (RecursionError, ValueError):
            return hide.quote(self.payload.decode("utf-8", "replace"))
        error = reply.get("error") if isinstance(reply, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        return hide.quote(message if isinstance(message, str) else json.dumps(reply, ensure_ascii=False))


async def _post(client: AsyncClient, body: Mapping[str, Any]) -> _Reply:
    path = "/chat/completions" if "messages" in body else "/completions"
    payload = bytearray()
    async with client.stream("POST", path, content=json.dumps(body).encode()) as response:
        async for chunk in response.aiter_bytes():
            payload += chunk
            if len(payload) > _MOST_BYTES:
                break
    location = response.headers.get("location", "") if 300 <= response.status_code < 400 else ""
    return _Reply(response.status_code, bytes(payload), location, _seconds_asked(response.headers))


def _seconds_asked(headers: Mapping[str, str]) -> float | None:
    """Return how long a server asks to wait before the next try; None where it does not say."""
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return float(headers[name]) / divisor
        except (LookupError, ValueError):
            continue
    try:
        return parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (LookupError, OverflowError, TypeError, ValueError):
        return None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of all servers in process `pid`, which is the one that asks."""
    loop = asyncio.new_event_loop()
    # A daemon, because a thread that waits for a server must not keep the process alive.
    threading.Thread(target=loop.run_forever, name="textgym.guides", daemon=True).start()
    return loop


def _close(pid: int, connection: _Connection) -> None:
    for name in _LOGGERS:
        logging.getLogger(name).removeFilter(connection.redactor)
    if pid == os.getpid():
        asyncio.run_coroutine_threadsafe(connection.client.aclose(), _event_loop(pid))
