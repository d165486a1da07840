"""A language model behind an OpenAI-compatible server as a guide."""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from textgym.guides.base import Author, Completion, GuideRequest

# openai is imported when the first text is completed: a guide can be named at `gym.make`, which must be quick.
if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

    from textgym.decoding import Decoding

OPENAI_URL = "https://api.openai.com/v1"
COMPLETIONS_TEMPLATE = "{prompt}{prefix}"
CHAT_TEMPLATE = (
    {
        "role": "system",
        "content": "You are given the beginning of a text and write what comes next in it. Answer with that alone: "
        "nothing of what is already there, no comment, no quotation marks.",
    },
    {"role": "user", "content": "{prompt}{prefix}"},
)
# Most tokens of the server's that are asked for to fill one of the environment's.
_MOST_TOKENS_FOR_ONE = 16
_OWN_FIELDS = {
    "model", "prompt", "messages", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens",
    "max_completion_tokens", "n", "stream",
}  # fmt: skip


class BudgetExceeded(RuntimeError):
    """A guide would have to go beyond its `Budget`."""


@dataclass(frozen=True)
class Usage:
    """What a guide has used so far, in this process.

    Attributes:
        calls: Completions that the server was asked for, however often each was tried.
        cache_hits: Completions that were read from the cache instead.
        failures: Tries that brought no completion: refused, timed out or answered with an error.
        prompt_tokens: Tokens read, counted by the server.
        completion_tokens: Tokens written, counted by the server.
        seconds: Wall-clock time in `HTTPGuide.complete`.
        cost: Of these tokens at the budget's prices.
    """

    calls: int = 0
    cache_hits: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What a guide may use, and what happens when it is spent.

    No call begins once any limit is reached. Calls that are under way are finished, so tokens and cost can exceed their
    limits by what `concurrency` calls use; `calls` is never exceeded. What the cache answers is free.

    Attributes:
        calls: Most completions asked of the server.
        tokens: Most tokens, those read and those written together.
        cost: Highest cost, in the unit of `prices`.
        prices: Cost of one prompt token and of one completion token.
        when_spent: "error" raises `BudgetExceeded`. "unguided" goes on without the guide: an episode that was to
            restart begins at its prompt, and a text that is handed off ends where it is, without EOS. Which episodes
            are guided then hangs on what was spent before, so a run repeats only from the same budget and cache.

    Raises:
        ValueError: A limit or price that is negative, or a limit of cost without prices.
    """

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    when_spent: Literal["error", "unguided"] = "error"

    def __post_init__(self) -> None:
        for name in ("calls", "tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"Budget.{name} must be None or an int >= 0, got {value!r}")
        if self.cost is not None and not _is_amount(self.cost):
            raise ValueError(f"Budget.cost must be None or a finite number >= 0, got {self.cost!r}")
        if not (isinstance(self.prices, tuple) and len(self.prices) == 2 and all(map(_is_amount, self.prices))):
            raise ValueError(
                "Budget.prices must be two finite numbers >= 0, of a prompt and of a completion token, "
                f"got {self.prices!r}"
            )
        if self.cost is not None and not any(self.prices):
            raise ValueError(f"Budget.cost={self.cost!r} needs Budget.prices")
        if self.when_spent not in ("error", "unguided"):
            raise ValueError(f'Budget.when_spent must be "error" or "unguided", got {self.when_spent!r}')

    def spent(self, usage: Usage) -> str | None:
        """Which limit `usage` has reached, in words; None where there is room."""
        used = {"calls": usage.calls, "tokens": usage.prompt_tokens + usage.completion_tokens, "cost": usage.cost}
        for name, value in used.items():
            limit = getattr(self, name)
            if limit is not None and value >= limit:
                return f"{value:g} of {limit:g} {name}" if name == "cost" else f"{value:,} of {limit:,} {name}"
        return None


class HTTPGuide:
    """Continues texts with a model behind an OpenAI-compatible server: vLLM, llama.cpp, TGI, OpenAI itself.

    The server reads and writes text. What it writes is encoded in the environment's vocabulary as a continuation, after
    the tokens that are already there, which stay as they are. A text that the server's own count of tokens cuts short
    of the request's limit is continued by another call.

    Every request carries the seed of its episode, so a run repeats as far as the server honours `seed`. With a cache it
    repeats exactly.

    Args:
        model: The model's name at the server. It stands for the weights in fingerprint and cache.
        base_url: Where the API is, such as ``http://localhost:8000/v1``. None reads ``OPENAI_BASE_URL``, else is
            OpenAI's.
        api: "completions" for base models, which continue the text itself (``/completions``), or "chat" for instruct
            models, which are asked to (``/chat/completions``). An answer that repeats the text before it is cut.
        template: What the server reads, with ``{prompt}`` and ``{prefix}`` (what is already written) in it, and other
            braces doubled. For "completions" a string that ends in ``{prefix}``; None is ``{prompt}{prefix}``. For
            "chat" a string, as the user's message, or a sequence of messages (mappings of "role" and "content").
        decoding: How its tokens are chosen. None is top-p 0.92, without the top-k of the decoding that Chang et al.
            2023 publish, which OpenAI's API does not know; `top_k` is sent where it is above 0.
        stop: Strings before which the server ends the text, at most four at OpenAI.
        extra_body: Further fields of every request, as JSON values.
        concurrency: Most requests under way at once.
        timeout: Seconds to wait for one answer.
        max_retries: Tries after the first one where the server cannot be reached, is too slow, or answers 408, 409, 429
            or 5xx. Between them it waits as long as the server's ``Retry-After`` says (up to two minutes), else from
            half a second on, twice as long each time up to eight.
        cache: Folder in which completions are kept, one JSON file each, or None. The same request (api, model,
            template filled in with prompt and prefix, decoding, stop, extra body, limit and, unless greedy, seed) is
            then never sent twice. The address is no part of it, so a server can move: where two servers give different
            models one name, use a folder for each. Several processes can share a folder.
        budget: What it may use; None is no limit.
        api_key_env: Environment variable with the key, which is kept nowhere else. A server on this machine is used
            without a key where the variable is not set; None sends no key.

    Attributes:
        author: `Author.GUIDE`.
        can_hand_off: True.
        fingerprint: 16 hex digits that change when the model's name, api, template, decoding, stop or extra body do;
            they do not hang on the address.
        usage: What was used so far, a `Usage`. Copies of a guide share it, as they share the budget; a pickled guide
            counts from zero, so processes have a budget each.

    Raises:
        ImportError: openai is not installed.
        ValueError: An argument outside of what is allowed, or no key for a server elsewhere.
    """

    author = Author.GUIDE
    can_hand_off = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api: Literal["completions", "chat"] = "completions",
        template: str | Sequence[Mapping[str, str]] | None = None,
        decoding: Decoding | None = None,
        stop: Sequence[str] = (),
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 5,
        cache: str | os.PathLike | None = None,
        budget: Budget | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ImportError('HTTPGuide needs openai: pip install "textgym[http]"')
        if not (isinstance(model, str) and model):
            raise ValueError(f"model must be the name of a model at the server, got {model!r}")
        if api not in ("completions", "chat"):
            raise ValueError(f'api must be "completions" or "chat", got {api!r}')
        for name, number, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be an int >= {least}, got {number!r}")
        if not (_is_amount(timeout) and timeout > 0):
            raise ValueError(f"timeout must be a finite number of seconds > 0, got {timeout!r}")
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {stop!r}")
        if budget is not None and not isinstance(budget, Budget):
            raise ValueError(f"budget must be None or a Budget, got {budget!r}")
        if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
            raise ValueError(f"cache must be a folder, got the file {str(cache)!r}")
        if not (api_key_env is None or (isinstance(api_key_env, str) and api_key_env.isidentifier())):
            # Not shown: it may be the key itself.
            raise ValueError("api_key_env must be None or the name of an environment variable, not the key")
        self.model, self.api = model, api
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
        self.template = _messages(template) if api == "chat" else _checked_template(template)
        self.decoding, self.stop = decoding, tuple(stop)
        self.extra_body = _checked_extra(extra_body)
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.cache = None if cache is None else Path(cache).expanduser()
        self.budget, self.api_key_env = budget or Budget(), api_key_env
        self._sampling = _sampling_fields(decoding)
        self._ledger = _Ledger()
        self._client: tuple[int, OpenAI] | None = None
        self._key()

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        return self._ledger.usage

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the model's name or anything else that shapes its texts does."""
        parts = [self.api, self.model, self.template, self._sampling, self.stop, self.extra_body]
        return hashlib.sha256(_canonical(parts)).hexdigest()[:16]

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Continue every request.

        Args:
            requests: N requests.
            tokenizer: The environment's tokenizer.

        Returns:
            N completions in ids; empty and unfinished where the budget is spent and says to go on "unguided".

        Raises:
            BudgetExceeded: The budget is spent, and says to raise an error.
            ConnectionError: The server cannot be reached.
            RuntimeError: It answers with an error, or with something else than a completion.
            TimeoutError: It does not answer in time.
        """
        started = time.perf_counter()
        try:
            return self._complete(requests, tokenizer)
        finally:
            self._ledger.add(seconds=time.perf_counter() - started)

    def _complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        # Without a draw, requests that differ in their seeds alone are the same.
        asked = [request if self._sampled else replace(request, seed=0) for request in requests]
        texts = dict.fromkeys(asked, "")
        completions = dict.fromkeys(asked, Completion(token_ids=(), finished=False))
        limits = {request: request.max_new_tokens for request in texts}
        waiting = [request for request in texts if request.max_new_tokens > 0]
        while waiting:
            bodies = [self._body(request, texts[request], limits[request]) for request in waiting]
            again = []
            for request, answer in zip(waiting, self._answers(bodies), strict=True):
                if answer is None:
                    continue
                written = len(completions[request].token_ids or ())
                texts[request] += self._continuation(request, texts[request], answer.text)
                ids = tokenizer(texts[request], add_special_tokens=False, verbose=False)["input_ids"]
                finished = answer.finish_reason not in ("length", "content_filter")
                completions[request] = Completion(token_ids=tuple(ids[: request.max_new_tokens]), finished=finished)
                left = request.max_new_tokens - len(ids)
                if answer.finish_reason == "length" and left > 0 and len(ids) > written:
                    # As many as the tokens so far took each.
                    each = min(limits[request] / (len(ids) - written), _MOST_TOKENS_FOR_ONE)
                    limits[request] = math.ceil(left * each)
                    again.append(request)
            waiting = again
        return [completions[request] for request in asked]

    def _continuation(self, request: GuideRequest, text: str, answer: str) -> str:
        """What an answer adds to prompt, prefix and `text`."""
        from textgym.tokenization import as_continuation

        written = request.prefix + text
        if self.api == "chat":
            rest = without_echo(answer, request.prompt + written, written)
            exact, answer = rest is not None, answer if rest is None else rest
        else:
            # What follows something else than the prompt in a template need not fit the prompt.
            exact = bool(written) or str(self.template).endswith("{prompt}{prefix}")
        return answer if exact else as_continuation(request.prompt + written, answer)

    def _body(self, request: GuideRequest, text: str, limit: int) -> dict[str, Any]:
        filled = {"prompt": request.prompt, "prefix": request.prefix + text}
        body = {"model": self.model, **self._sampling, **self.extra_body}
        if isinstance(self.template, str):
            body["prompt"] = self.template.format(**filled)
        else:
            body["messages"] = [
                {"role": message["role"], "content": message["content"].format(**filled)} for message in self.template
            ]
        # OpenAI's newer models refuse the one name, other servers do not know the other.
        newer = self.api == "chat" and (urlsplit(self.base_url).hostname or "").endswith("openai.com")
        body["max_completion_tokens" if newer else "max_tokens"] = limit
        if self._sampled:
            body["seed"] = request.seed & 0x7FFFFFFF  # what every server's integers can hold
        if self.stop:
            body["stop"] = list(self.stop)
        return body

    @property
    def _sampled(self) -> bool:
        return self._sampling["temperature"] > 0

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[_Answer | None]:
        """The answers to all bodies, from the cache or the server; None where the budget is spent."""
        answers: list[_Answer | None] = [None] * len(bodies)
        futures: dict[int, Future[_Answer]] = {}
        running: set[Future[_Answer]] = set()
        with ThreadPoolExecutor(self.concurrency) as pool:
            for i, body in enumerate(bodies):
                answers[i] = self._cached(body)
                if answers[i] is not None:
                    continue
                # Calls begin in order, so that a budget of calls is spent on the same requests in every run.
                if len(running) == self.concurrency:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                if self._ledger.begin(self.budget):
                    futures[i] = pool.submit(self._ask, body)
                    running.add(futures[i])
            for i, future in futures.items():
                answers[i] = future.result()
        return answers

    def _ask(self, body: dict[str, Any]) -> _Answer:
        import openai

        client = self._connected()
        endpoint: Any = client.chat.completions if self.api == "chat" else client.completions
        required = {name: body[name] for name in ("model", "prompt", "messages") if name in body}
        headers = {} if self._key() else {"Authorization": openai.Omit()}
        where = f"the guide's server {self.base_url}"
        failure: Exception
        try:
            response = endpoint.with_raw_response.create(
                **required,
                extra_body={name: value for name, value in body.items() if name not in required},
                extra_headers=headers,
            )
        except openai.APIError as error:
            tries = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
            if isinstance(error, openai.APITimeoutError):
                failure = TimeoutError(f"{where} did not answer within timeout={self.timeout:g} seconds, {tries} tries")
            elif isinstance(error, openai.APIConnectionError):
                reason = f": {error.__cause__}" if error.__cause__ else ""
                failure = ConnectionError(self._public(f"{where} cannot be reached, {tries} tries{reason}"))
            else:
                status = getattr(error, "status_code", "an error")
                failure = RuntimeError(
                    self._public(f"{where} answered {status} for model {self.model!r}, {tries} tries: {error.message}")
                )
            self._ledger.add(failures=tries)
        else:
            self._ledger.add(failures=response.retries_taken)
            try:
                answer = _Answer.of(response.http_response.json())
            except (LookupError, TypeError, ValueError):
                self._ledger.add(failures=1)
                failure = RuntimeError(
                    self._public(f"{where} must answer with a completion, got {response.http_response.text[:200]!r}")
                )
            else:
                used = (answer.prompt_tokens, answer.completion_tokens)
                cost = sum(price * tokens for price, tokens in zip(self.budget.prices, used, strict=True))
                self._ledger.add(prompt_tokens=used[0], completion_tokens=used[1], cost=cost)
                self._keep(body, answer)
                return answer
        # Not chained to the client's error, which holds the headers and whatever the server says about them.
        raise failure from None

    def _key(self) -> str | None:
        key = os.environ.get(self.api_key_env) if self.api_key_env is not None else None
        if not key and self.api_key_env is not None and not _is_loopback(self.base_url):
            raise ValueError(
                f"api_key_env: the environment variable {self.api_key_env} is not set, and {self.base_url} is not on "
                "this machine; api_key_env=None sends no key"
            )
        return key or None

    def _public(self, message: str) -> str:
        """A message without the key, which a server may repeat in its errors."""
        key = self._key()
        return message if key is None else message.replace(key, "***")

    def _connected(self) -> OpenAI:
        from openai import OpenAI

        # A forked process must not write to its parent's connections.
        with self._ledger.lock:
            if self._client is None or self._client[0] != os.getpid():
                client = OpenAI(
                    api_key=self._key() or "none",
                    base_url=self.base_url,
                    timeout=self.timeout,
                    max_retries=self.max_retries,
                )
                self._client = os.getpid(), client
            return self._client[1]

    def _file(self, body: dict[str, Any]) -> Path:
        assert self.cache is not None
        # What bounds a text has two names, one for OpenAI alone.
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        key = {**body, "api": self.api, "max_tokens": limit, "max_completion_tokens": None}
        name = hashlib.sha256(_canonical(key)).hexdigest()
        return self.cache / name[:2] / f"{name}.json"

    def _cached(self, body: dict[str, Any]) -> _Answer | None:
        if self.cache is None:
            return None
        try:
            answer = _Answer(**json.loads(self._file(body).read_text(encoding="utf-8"))["answer"])
        except (FileNotFoundError, LookupError, TypeError, ValueError):
            return None
        self._ledger.add(cache_hits=1)
        return answer

    def _keep(self, body: dict[str, Any], answer: _Answer) -> None:
        if self.cache is None:
            return
        file = self._file(body)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump({"request": body, "answer": answer._asdict()}, stream)
        os.replace(temporary, file)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, base_url={self.base_url!r}, api={self.api!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HTTPGuide:
        """Share what is used and the connections."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the client, which holds the key, and what was used in this process."""
        return {**self.__dict__, "_client": None, "_ledger": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _ledger=_Ledger())


class _Answer(NamedTuple):
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, answer: Any) -> _Answer:
        """Read a server's answer; a LookupError, TypeError or ValueError where it is none."""
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = answer["usage"]
        return cls(
            "" if text is None else str(text),
            choice.get("finish_reason"),
            int(usage["prompt_tokens"]),
            int(usage.get("completion_tokens") or 0),
        )


class _Ledger:
    """A `Usage` that threads and copies of a guide add to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.usage = Usage()

    def add(self, **amounts: float) -> None:
        with self.lock:
            before = self.usage
            self.usage = replace(before, **{name: getattr(before, name) + more for name, more in amounts.items()})

    def begin(self, budget: Budget) -> bool:
        """Count a call that is about to begin, where the budget has room for one."""
        with self.lock:
            spent = budget.spent(self.usage)
            if spent is None:
                self.usage = replace(self.usage, calls=self.usage.calls + 1)
        if spent is not None and budget.when_spent == "error":
            raise BudgetExceeded(f"the guide's budget is spent: {spent}")
        return spent is None


def without_echo(answer: str, *befores: str) -> str | None:
    """What an answer adds where it begins by repeating a text before it; None where it does not.

    A single word is an echo only where it is repeated as a whole word: "and so" does not repeat "a".

    Args:
        answer: The answer.
        *befores: Texts it may repeat, the longest first.
    """
    begun = answer.lstrip()
    for before in befores:
        echo = before.strip()
        if not echo or not begun.startswith(echo):
            continue
        rest = begun[len(echo) :]
        if len(echo.split()) == 1 and echo[-1].isalnum() and rest[:1].isalnum():
            continue
        return rest.lstrip() if before[-1].isspace() else rest
    return None


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_url(url: Any) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (AttributeError, TypeError, ValueError):
        fine = False
    if fine and ("@" in parts.netloc or parts.query or parts.fragment):
        # Not shown: it may hold a password.
        raise ValueError("base_url must have no user, password or query; the key comes from api_key_env")
    if not fine:
        raise ValueError(f"base_url must be a URL such as 'http://localhost:8000/v1', got {url!r}")
    return str(url).rstrip("/")


def _fields(template: Any) -> set[str]:
    """The names in braces in a template.

    Raises:
        ValueError: No template.
    """
    if not isinstance(template, str):
        raise ValueError("not a string")
    parsed = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    if any(name not in ("prompt", "prefix") or spec or conversion for name, spec, conversion in parsed):
        raise ValueError("other fields")
    return {name for name, _, _ in parsed}


def _checked_template(template: Any) -> str:
    template = COMPLETIONS_TEMPLATE if template is None else template
    try:
        fine = _fields(template) == {"prompt", "prefix"} and template.endswith("{prefix}")
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(
            "template must be a string with {prompt} that ends in {prefix}, other braces doubled, "
            f"for api='completions', got {template!r}"
        )
    return template


def _messages(template: Any) -> tuple[dict[str, str], ...]:
    if template is None:
        template = CHAT_TEMPLATE
    elif isinstance(template, str):
        template = [{"role": "user", "content": template}]
    try:
        messages = tuple({"role": str(message["role"]), "content": message["content"]} for message in template)
        fine = set().union(*(_fields(message["content"]) for message in messages)) == {"prompt", "prefix"}
    except (LookupError, TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(
            "template must be a string or a sequence of messages with 'role' and 'content', with {prompt} and {prefix} "
            f"in it and other braces doubled, for api='chat', got {template!r}"
        )
    return messages


def _checked_extra(extra_body: Any) -> dict[str, Any]:
    if extra_body is None:
        return {}
    if not isinstance(extra_body, Mapping) or set(extra_body) & _OWN_FIELDS:
        raise ValueError(
            f"extra_body must be a mapping without the fields that the guide sets, {sorted(_OWN_FIELDS)}, "
            f"got {extra_body!r}"
        )
    try:
        return json.loads(json.dumps(dict(extra_body), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra_body must be JSON values, got {extra_body!r}") from error


def _sampling_fields(decoding: Any) -> dict[str, Any]:
    """A decoding as fields of a request."""
    if decoding is None:
        return {"temperature": 1.0, "top_p": 0.92}
    from textgym.decoding import Decoding  # imports torch, as whoever made one has done

    if not isinstance(decoding, Decoding) or decoding.min_new_tokens or decoding.num_beams > 1:
        raise ValueError(
            "decoding must be None or a Decoding without min_new_tokens and beams, which servers do not know, "
            f"got {decoding!r}"
        )
    if decoding.greedy:
        return {"temperature": 0.0}
    top_k = {"top_k": decoding.top_k} if decoding.top_k else {}
    return {"temperature": float(decoding.temperature), "top_p": float(decoding.top_p), **top_k}
