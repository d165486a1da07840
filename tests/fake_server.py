"""A small server on loopback with OpenAI's API, which counts what it is asked and does whatever a test wants."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from conftest import WORDS

from textgym.guides import GuideRequest


class FakeServer(ThreadingHTTPServer):
    """Answers with words that hang on the text and the seed, one word a token; `answers` and `plan` override it.

    Token ids to be scored are answered by `scores`.

    Attributes:
        bodies: Everything that was asked, in order.
        plan: What happens to the next calls instead of an answer: (status, headers, body), or a function that does it
            with the handler.
        always: The same for all calls.
        busiest: Most calls that were under way at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.bodies, self.headers, self.plan, self.times = [], [], [], []
        self.delay = 0.0
        self.answer = self.scores = self.always = None
        self.busy = self.busiest = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server: FakeServer = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            planned = server.plan.pop(0) if server.plan else server.always
        time.sleep(server.delay)
        if callable(planned):
            with contextlib.suppress(OSError):  # whoever asked may have given up
                planned(self)
            with server.lock:
                server.busy -= 1
            self.close_connection = True
            return
        chat = self.path == "/v1/chat/completions"
        assert chat or self.path == "/v1/completions"
        if server.scores and body.get("echo"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            choice, reason = server.scores(body["prompt"]), "length"
        else:
            text = body["messages"][-1]["content"] if chat else body["prompt"]
            limit = body["max_tokens"]
            written, reason = server.answer(text, body) if server.answer else self.words(text, body, limit)
            choice = {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
            usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(written.split())}
        answer = {"choices": [{**choice, "index": 0, "finish_reason": reason}], "usage": usage}
        status, headers, sent = planned or (200, {}, answer)
        payload = sent.encode() if isinstance(sent, str) else sent
        payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        with server.lock:
            server.busy -= 1
        with contextlib.suppress(ConnectionError):  # whoever asked may have given up
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    @staticmethod
    def words(text, body, limit):
        draws = np.random.default_rng([body.get("seed", 0), len(text), *text.encode()])
        count = int(draws.integers(1, 9))
        chosen = "".join(f" {WORDS[i]}" for i in draws.integers(0, 12, min(count, limit)))
        return chosen, "length" if count >= limit else "stop"

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(monkeypatch):
    """A server, and no key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def request(prompt="red sun", prefix="", limit=6, seed=0):
    return GuideRequest(prompt, (2, 3), prefix, (), limit, seed)


def requests(count):
    return [request(f"red sun {WORDS[i % 12]}", seed=i) for i in range(count)]
