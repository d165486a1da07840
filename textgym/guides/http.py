"""A language model behind an OpenAI-compatible server as a guide."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np

from textgym.checks import check, check_int, check_texts
from textgym.decoding import Decoding
from textgym.guides.answers import Answer, limit
from textgym.guides.base import Author, Completion, GuideRequest
from textgym.guides.budget import Budget, BudgetExceeded, Usage, is_amount
from textgym.guides.completion_cache import CompletionCache
from textgym.guides.server import Server
from textgym.guides.templates import COMPLETIONS_TEMPLATE, chat_messages, completions_template, without_echo
from textgym.packages import require

# httpx2 and transformers are imported for the first completion, so that a guide is made quickly.
if TYPE_CHECKING:
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
        concurrency: Most requests under way at once, of all copies of the guide in this process.
        timeout: Seconds for an answer in all, from the connection to its last byte.
        max_retries: Most tries after the first where the server cannot be reached, is too slow, answers 408, 409, 429
            or 5xx, or answers with something else than a completion. The wait before a try is the server's
            ``Retry-After`` (an error where that is more than two minutes), else half a second, doubled with each try up
            to eight seconds. Redirects are errors: prompts go to `base_url` alone.
        cache: Folder that keeps completions, in an SQLite database, or None. The same request (api, model, filled
            template, decoding, stop, extra body, limit and, unless greedy, seed) is then sent only once. The URL is
            not part of it, so a server can move; use one folder per server where servers give different models the
            same name. Several processes can share a folder on a disk of their machine. Where it cannot be read or
            written, the guide warns and goes on without.
        budget: Limits on what it uses; None is no limit.
        api_key_env: Environment variable with the key, which is stored nowhere else and is not in what a server says
            (a key of less than eight characters is a placeholder). A server on this machine is used without a key where
            the variable is not set; None sends no key.

    Raises:
        ImportError: httpx2 is not installed.
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
        require("http", "HTTPGuide", "httpx2")
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
        self._server = Server(
            self.base_url,
            api_key_env=api_key_env,
            concurrency=self.concurrency,
            timeout=timeout,
            max_retries=self.max_retries,
            budget=self.budget,
        )

    @property
    def usage(self) -> Usage:
        """The `Usage` so far.

        Copies of a guide share it and the budget. A pickled guide counts from zero: each process has its own budget.
        """
        return self._server.ledger.usage

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
            self._server.ledger.add(seconds=time.perf_counter() - started)

    def _complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        from textgym.tokenization import beginning, encode

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
                text = texts[request] + self._continuation(request, texts[request], answer.text)
                texts[request] = beginning(tokenizer, text, request.max_new_tokens)
                ids = encode(tokenizer, [texts[request]], literal=True)[0]
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
            self._server.ledger.add(seconds=time.perf_counter() - started)

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

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[Answer | None]:
        """Return the answers to all bodies, from the cache or the server; None where the budget is spent."""
        answers = [None if self.cache is None else self.cache.get(self._request(body)) for body in bodies]
        asked = [i for i, answer in enumerate(answers) if answer is None]
        self._server.ledger.add(cache_hits=len(bodies) - len(asked))
        for i, answer in zip(asked, self._server.ask([bodies[i] for i in asked], self._keep), strict=True):
            answers[i] = answer
        return answers

    def _keep(self, body: Mapping[str, Any], answer: Answer) -> None:
        if self.cache is not None:
            self.cache.put(self._request(body), answer)

    def _request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of a body that its answer depends on, in the form by which the cache finds it."""
        return {**body, "api": self.api, "max_tokens": limit(body), "max_completion_tokens": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, base_url={self.base_url!r}, api={self.api!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HTTPGuide:
        """Share usage and connections."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin


def _is_echo(answer: str, text: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer begins with a text, but for white space, special tokens and a last character that is cut."""
    squeezed = "".join(answer.split())
    written = [str(tokenizer.decode(list(text), skip_special_tokens=skip)) for skip in (True, False)]
    return not answer or any(squeezed.startswith("".join(t.rstrip("\ufffd").split())) for t in written)


def _checked_url(url: Any) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        fine = fine and url.isascii() and url.isprintable()
    except (AttributeError, TypeError, ValueError):
        fine = False
    if ("@" in parts.netloc or parts.query or parts.fragment) if fine else "@" in str(url):
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
