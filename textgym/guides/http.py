"""A language model behind an OpenAI-compatible server as a guide."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from textgym.checks import check, check_int, check_texts
from textgym.decoding import Decoding
from textgym.guides.base import Author, Completion, GuideRequest
from textgym.guides.budget import Budget, BudgetExceeded, Ledger, Usage, is_amount
from textgym.guides.completion_cache import CompletionCache
from textgym.guides.templates import COMPLETIONS_TEMPLATE, chat_messages, completions_template, without_echo
from textgym.packages import require

# openai and transformers are imported for the first completion, so that a guide is made quickly.
if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

__all__ = ["Budget", "BudgetExceeded", "HTTPGuide", "Usage"]

OPENAI_URL = "https://api.openai.com/v1"
# Most tokens of the server that are requested for one token of the environment.
_MOST_TOKENS_FOR_ONE = 16
_OWN_FIELDS = {
    "model", "prompt", "messages", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens",
    "max_completion_tokens", "n", "stream", "echo", "logprobs",
}  # fmt: skip


class HTTPGuide:
    """Continues texts with a model behind an OpenAI-compatible server: vLLM, llama.cpp, TGI, OpenAI itself.

    The server reads and writes text. Its text is encoded in the environment's vocabulary as a continuation of the
    tokens before it, which do not change. A text that reaches the server's limit of tokens before the limit of the
    request is continued by another call.

    A server of a model with the environment's vocabulary can also score the policy's tokens (`score`): vLLM, SGLang and
    others that return log-probabilities of what they read. It is sent token ids then.

    Every request has the seed of its episode, so a run repeats as far as the server uses `seed`. With a cache it
    repeats exactly.

    Args:
        model: The model's name at the server. Fingerprint and cache identify the weights by it.
        base_url: URL of the API, such as ``http://localhost:8000/v1``. None reads ``OPENAI_BASE_URL``, else is
            OpenAI's.
        api: "completions" for base models, which continue the text itself (``/completions``), or "chat" for instruct
            models, which are asked to (``/chat/completions``). Text that a chat answer repeats is removed.
        template: The text that the server reads, with ``{prompt}`` and ``{prefix}`` (the text after the prompt so far)
            and other braces doubled. For "completions" a string that ends in ``{prefix}``; None is
            ``{prompt}{prefix}``. For "chat" a string, as the user's message, or a sequence of messages (mappings of
            "role" and "content").
        decoding: How tokens are chosen. None is top-p 0.92, without the top-k that Chang et al. 2023 publish, which
            OpenAI's API does not have; `top_k` is sent where it is above 0.
        stop: Strings before which the server ends the text, at most four at OpenAI.
        extra_body: Further fields of every request, as JSON values.
        concurrency: Most requests under way at once.
        timeout: Seconds to wait for an answer.
        max_retries: Most tries after the first where the server cannot be reached, is too slow, or answers 408, 409,
            429 or 5xx. The wait before a try is the server's ``Retry-After`` (up to two minutes), else half a second,
            doubled with each try up to eight seconds.
        cache: Folder that keeps completions, one JSON file each, or None. The same request (api, model, filled
            template, decoding, stop, extra body, limit and, unless greedy, seed) is then sent only once. The URL is
            not part of it, so a server can move; use one folder per server where servers give different models the
            same name. Several processes can share a folder.
        budget: Limits on what it uses; None is no limit.
        api_key_env: Environment variable with the key, which is stored nowhere else. A server on this machine is used
            without a key where the variable is not set; None sends no key.

    Raises:
        ImportError: openai is not installed.
        ValueError: An argument is not allowed, or there is no key for a server on another machine.
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
        require("http", "HTTPGuide", "openai")
        check("model", model, isinstance(model, str) and bool(model), "the name of a model at the server")
        check("api", api, api in ("completions", "chat"), '"completions" or "chat"')
        check("timeout", timeout, is_amount(timeout) and timeout > 0, "a finite number of seconds > 0")
        check("budget", budget, budget is None or isinstance(budget, Budget), "None or a Budget")
        if not (api_key_env is None or (isinstance(api_key_env, str) and api_key_env.isidentifier())):
            # The value is not shown, since it can be the key itself.
            raise ValueError("api_key_env must be None or the name of an environment variable, not the key")
        self.model, self.api = model, api
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
        self.template = chat_messages(template) if api == "chat" else completions_template(template)
        self.decoding, self.stop = decoding, check_texts("stop", stop)
        self.extra_body = _checked_extra(extra_body)
        self.concurrency = check_int("concurrency", concurrency)
        self.max_retries = check_int("max_retries", max_retries, 0)
        self.timeout = timeout
        self.cache = None if cache is None else CompletionCache(cache)
        self.budget, self.api_key_env = budget or Budget(), api_key_env
        self._sampling = _sampling_fields(decoding)
        self._ledger = Ledger()
        self._client: tuple[int, OpenAI] | None = None
        self._key()

    @property
    def usage(self) -> Usage:
        """The `Usage` so far.

        Copies of a guide share it and the budget. A pickled guide counts from zero: each process has its own budget.
        """
        return self._ledger.usage

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with model, api, template, decoding, stop and extra body, but not with the URL."""
        parts = [self.api, self.model, self.template, self._sampling, self.stop, self.extra_body]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Continue every request (see `Guide.complete`).

        Returns:
            N completions in ids; empty and unfinished where the budget is spent and ``when_spent`` is "unguided".

        Raises:
            BudgetExceeded: The budget is spent and ``when_spent`` is "error".
            ConnectionError: The server cannot be reached.
            RuntimeError: The server answers with an error, or with no completion.
            TimeoutError: The server does not answer in time.
        """
        started = time.perf_counter()
        try:
            return self._complete(requests, tokenizer)
        finally:
            self._ledger.add(seconds=time.perf_counter() - started)

    def _complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        from textgym.tokenization import encode

        # Without sampling, requests that differ only in their seeds are the same.
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
                ids = encode(tokenizer, [texts[request]])[0]
                finished = answer.finish_reason not in ("length", "content_filter")
                completions[request] = Completion(token_ids=tuple(ids[: request.max_new_tokens]), finished=finished)
                left = request.max_new_tokens - len(ids)
                if answer.finish_reason == "length" and left > 0 and len(ids) > written:
                    # As many per token of the environment as so far.
                    each = min(limits[request] / (len(ids) - written), _MOST_TOKENS_FOR_ONE)
                    limits[request] = math.ceil(left * each)
                    again.append(request)
            waiting = again
        return [completions[request] for request in asked]

    def score(
        self,
        requests: Sequence[GuideRequest],
        continuations: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[np.ndarray]:
        """Log-probabilities of continuations (see `ScoringGuide.score`); equal texts are sent once.

        One call reads a whole text, as token ids, and writes one token: log-probabilities come as ``logprobs`` of an
        ``echo``, or as vLLM's ``prompt_logprobs``.

        Raises:
            BudgetExceeded: The budget is spent, whatever `when_spent` is: nothing can be learned without scores.
            ConnectionError: The server cannot be reached.
            RuntimeError: The server answers with an error, or without log-probabilities.
            TimeoutError: The server does not answer in time.
            ValueError: `api` is not "completions", there is a template, or the server's model has another vocabulary.
        """
        check("api", self.api, self.api == "completions", '"completions" to score tokens, which chats do not echo')
        plain = self.template == COMPLETIONS_TEMPLATE
        check("template", self.template, plain, "None to score tokens: the server reads those that the policy reads")
        started = time.perf_counter()
        try:
            return self._score(requests, continuations, tokenizer)
        finally:
            self._ledger.add(seconds=time.perf_counter() - started)

    def _score(
        self,
        requests: Sequence[GuideRequest],
        continuations: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[np.ndarray]:
        texts = [
            tuple(map(int, (*request.prompt_ids, *request.prefix_ids, *ids)))
            for request, ids in zip(requests, continuations, strict=True)
        ]
        asked = list(dict.fromkeys(text for text, ids in zip(texts, continuations, strict=True) if len(ids)))
        # The least that every server writes is a token. Of the untruncated softmax at temperature 1.
        how = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        bodies = [{"model": self.model, **self.extra_body, **how, "prompt": list(text)} for text in asked]
        scores = {}
        for text, answer in zip(asked, self._answers(bodies), strict=True):
            if answer is None:
                spent = self.budget.spent(self.usage)
                raise BudgetExceeded(f"the guide's budget is spent, and nothing is learned without its scores: {spent}")
            if not _is_echo(answer.text, text, tokenizer):
                raise ValueError(
                    f"guide must be a server of a model with the environment's vocabulary to score its tokens, and "
                    f"{self.model!r} reads {tokenizer.decode(list(text))!r} as {answer.text!r}"
                )
            scores[text] = np.array(answer.log_probs, np.float32)
        return [
            scores[text][len(text) - len(ids) - 1 :] if len(ids) else np.zeros(0, np.float32)
            for text, ids in zip(texts, continuations, strict=True)
        ]

    def _continuation(self, request: GuideRequest, text: str, answer: str) -> str:
        """Return what an answer adds to prompt, prefix and `text`."""
        from textgym.tokenization import as_continuation

        written = request.prefix + text
        if self.api == "chat":
            rest = without_echo(answer, request.prompt + written, written)
            exact, answer = rest is not None, answer if rest is None else rest
        else:
            # A template with other text before the prefix can be continued without the space that the prompt needs.
            exact = bool(written) or str(self.template).endswith("{prompt}{prefix}")
        return answer if exact else as_continuation(request.prompt + written, answer)

    def _body(self, request: GuideRequest, text: str, limit: int) -> dict[str, Any]:
        filled = {"prompt": request.prompt, "prefix": request.prefix + text}
        body = {"model": self.model, **self._sampling, **self.extra_body}
        if isinstance(self.template, str):
            body["prompt"] = self.template.format(**filled)
        else:
            body["messages"] = [message | {"content": message["content"].format(**filled)} for message in self.template]
        # Newer models of OpenAI refuse the old name, other servers do not know the new one.
        newer = self.api == "chat" and (urlsplit(self.base_url).hostname or "").endswith("openai.com")
        body["max_completion_tokens" if newer else "max_tokens"] = limit
        if self._sampled:
            body["seed"] = request.seed & 0x7FFFFFFF  # fits the integers of every server
        return body | ({"stop": list(self.stop)} if self.stop else {})

    @property
    def _sampled(self) -> bool:
        return self._sampling["temperature"] > 0

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[_Answer | None]:
        """Return the answers to all bodies, from the cache or the server; None where the budget is spent."""
        answers: list[_Answer | None] = [None] * len(bodies)
        futures: dict[int, Future[_Answer]] = {}
        running: set[Future[_Answer]] = set()
        with ThreadPoolExecutor(self.concurrency) as pool:
            for i, body in enumerate(bodies):
                answers[i] = self._cached(body)
                if answers[i] is not None:
                    continue
                # Calls begin in order, so that every run spends its budget of calls on the same requests.
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
                answer = _Answer.of(response.http_response.json(), body["prompt"] if "echo" in body else None)
            except (LookupError, TypeError, ValueError):
                self._ledger.add(failures=1)
                wanted = "the log-probabilities of the tokens that it read" if "echo" in body else "a completion"
                failure = RuntimeError(
                    self._public(f"{where} must answer with {wanted}, got {response.http_response.text[:200]!r}")
                )
            else:
                used = (answer.prompt_tokens, answer.completion_tokens)
                cost = sum(price * tokens for price, tokens in zip(self.budget.prices, used, strict=True))
                self._ledger.add(prompt_tokens=used[0], completion_tokens=used[1], cost=cost)
                if self.cache is not None:
                    self.cache.put(self._request(body), answer._asdict())
                return answer
        # Not chained to the client's error, which holds the headers and can hold the key.
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
        """Return a message without the key, which a server can repeat in its errors."""
        key = self._key()
        return message if key is None else message.replace(key, "***")

    def _connected(self) -> OpenAI:
        from openai import OpenAI

        # A forked process must not use the connections of its parent.
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

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return all of a body that its answer depends on, in the form by which the cache finds it."""
        # The limit of tokens has two names, one for OpenAI alone.
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        return {**body, "api": self.api, "max_tokens": limit, "max_completion_tokens": None}

    def _cached(self, body: dict[str, Any]) -> _Answer | None:
        kept = None if self.cache is None else self.cache.get(self._request(body))
        try:
            answer = None if kept is None else _Answer(**kept)
        except TypeError:  # other fields
            return None
        self._ledger.add(cache_hits=answer is not None)
        return answer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, base_url={self.base_url!r}, api={self.api!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HTTPGuide:
        """Share usage and connections."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the client, which holds the key, and the usage in this process."""
        return {**self.__dict__, "_client": None, "_ledger": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _ledger=Ledger())


class _Answer(NamedTuple):
    """A server's completion.

    Of a text that was scored, `log_probs` are those of its tokens after the first, and `text` begins with the text as
    the server reads it, or is empty where it does not say.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    log_probs: list[float] | None = None

    @classmethod
    def of(cls, answer: Any, scored: Sequence[int] | None = None) -> _Answer:
        """Read a server's answer, to a text to be scored if there is one.

        Raises:
            LookupError: It is no completion, or has no log-probabilities of the tokens to be scored.
            TypeError: As above.
            ValueError: As above.
        """
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = answer["usage"]
        log_probs = None
        if scored is not None:
            echoed = (choice.get("logprobs") or {}).get("token_logprobs") or []
            text = text if len(echoed) >= len(scored) else ""
            if (by_token := choice.get("prompt_logprobs")) is not None:
                log_probs = [float(by_token[at][str(token)]["logprob"]) for at, token in enumerate(scored) if at]
            else:
                log_probs = [float(echoed[at]) for at in range(1, len(scored))]
            if not all(map(math.isfinite, log_probs)):
                raise ValueError("a log-probability is not finite")
        return cls(
            "" if text is None else str(text),
            choice.get("finish_reason"),
            int(usage["prompt_tokens"]),
            int(usage.get("completion_tokens") or 0),
            log_probs,
        )


def _is_echo(answer: str, text: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer begins with a text, but for white space, special tokens and a last character that is cut."""
    squeezed = "".join(answer.split())
    written = [str(tokenizer.decode(list(text), skip_special_tokens=skip)) for skip in (True, False)]
    return not answer or any(squeezed.startswith("".join(t.rstrip("\ufffd").split())) for t in written)


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
        # The URL is not shown, since it can hold a password.
        raise ValueError("base_url must have no user, password or query; the key comes from api_key_env")
    if not fine:
        raise ValueError(f"base_url must be a URL such as 'http://localhost:8000/v1', got {url!r}")
    return str(url).rstrip("/")


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
    """Return a decoding as fields of a request."""
    if decoding is None:
        return {"temperature": 1.0, "top_p": 0.92}
    if not isinstance(decoding, Decoding) or decoding.min_new_tokens or decoding.num_beams > 1:
        raise ValueError(
            "decoding must be None or a Decoding without min_new_tokens and beams, which servers do not know, "
            f"got {decoding!r}"
        )
    if decoding.greedy:
        return {"temperature": 0.0}
    top_k = {"top_k": decoding.top_k} if decoding.top_k else {}
    return {"temperature": float(decoding.temperature), "top_p": float(decoding.top_p), **top_k}
