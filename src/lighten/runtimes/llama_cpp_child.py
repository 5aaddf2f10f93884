"""The process in which llama.cpp runs: one JSON request on stdin, one JSON answer on stdout.

Run by child_main.py and importing nothing of ours: so its resident memory is llama.cpp's and a bare
interpreter's, without torch, and a crash of the native code ends this process only.
"""

from __future__ import annotations

import json
import resource
import secrets
import sys
import time
import urllib.error
import urllib.request
from typing import Any


def peak_rss() -> int:
    """Peak resident bytes of this process, mapped file pages included.

    Linux keeps `ru_maxrss` across exec: a child of a large parent would report the parent's peak,
    so the high-water mark of the address space is read instead. macOS reports bytes, not KiB.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Refused(Exception):
    """llama.cpp took the file but not the request."""


class Session:
    """One model, open in llama.cpp's server with one slot."""

    def __init__(self, request: dict[str, Any]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = request["path"]
        params.n_ctx = request["context"]
        params.n_parallel = 1
        params.warmup = request["warmup"]
        params.verbosity = 2  # warnings and errors
        params.ui = False
        # Fitting opens the file once more, to choose what goes to a GPU: useless without one.
        cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
        params.fit_params = any(d["type"] != cpu for d in xllamacpp.get_device_info())
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        if request["threads"] is not None:
            params.cpuparams.n_threads = request["threads"]
            params.cpuparams_batch.n_threads = request["threads"]
        # The server listens on a local port whether or not one asks it to: nobody else may use it.
        self.key = secrets.token_hex(16)
        params.api_keys = [self.key]
        begin = time.perf_counter()
        self.server = xllamacpp.Server(params)
        self.load_seconds = time.perf_counter() - begin

    def http(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of the server's own interface, which says more than the wheel's functions."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.addheaders = [("Authorization", f"Bearer {self.key}")]
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        call = urllib.request.Request(self.server.listening_address + path, data, kind)
        try:
            with opener.open(call) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)["error"]["message"]) from error
        return found

    def facts(self) -> dict[str, Any]:
        """What the server says about the model: n_vocab, n_ctx_train, n_params, size (bytes)."""
        facts: dict[str, Any] = self.http("/v1/models")["data"][0]["meta"]
        return facts

    def ask(self, body: dict[str, Any], chat: bool = False) -> dict[str, Any]:
        """One completion; raises Refused."""
        handle = self.server.handle_chat_completions if chat else self.server.handle_completions
        answer = handle({"cache_prompt": False, **body})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else dict(answer)
        if "error" in answer:
            error = answer["error"]
            raise Refused(error["message"] if isinstance(error, dict) else str(error))
        return answer


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Open the file and run two tokens through it: an opened file may still not compute."""
    session = Session(request)
    facts = session.facts()
    session.ask({"prompt": [min(1, facts["n_vocab"] - 1)], "max_tokens": 2, "ignore_eos": True})
    return facts


def complete(request: dict[str, Any]) -> dict[str, Any]:
    session = Session(request)
    body = {k: request[k] for k in ("max_tokens", "seed", "temperature")}
    if request["chat"]:
        body["messages"] = [{"role": "user", "content": request["prompt"]}]
        return {"text": session.ask(body, chat=True)["choices"][0]["message"]["content"] or ""}
    return {"text": session.ask({"prompt": request["prompt"], **body})["choices"][0]["text"]}


def greedy(request: dict[str, Any]) -> dict[str, Any]:
    session = Session(request)
    body = {"prompt": request["prompt"], "n_predict": request["n"], "temperature": 0.0}
    more = {"n_probs": 1, "return_tokens": True, "ignore_eos": True, "cache_prompt": False}
    answer = session.http("/completion", body | more)
    seen = answer.get("completion_probabilities", [])
    # The server leaves out tokens that end inside a character: then none can be told apart.
    whole = [c["id"] for c in seen] == answer["tokens"]
    return {"tokens": answer["tokens"], "logprobs": [c["logprob"] for c in seen] if whole else None}


def speed(request: dict[str, Any]) -> dict[str, Any]:
    session = Session(request)
    vocabulary = session.facts()["n_vocab"]
    # Ids spread over the vocabulary (Knuth's multiplicative hash): what they say does not matter.
    prompt = [i * 2654435761 % vocabulary for i in range(1, request["prompt_tokens"] + 1)]
    body = {"max_tokens": request["generate_tokens"], "temperature": 0.0, "ignore_eos": True}
    timings = session.ask({"prompt": prompt, **body})["timings"]
    return {
        "load_seconds": session.load_seconds,
        "prompt_tokens_per_second": timings["prompt_per_second"],
        "generate_tokens_per_second": timings["predicted_per_second"],
        "peak_rss_bytes": peak_rss(),
    }


TASKS = {"check": check, "complete": complete, "greedy": greedy, "speed": speed}

FAILURES = (Refused, ImportError, RuntimeError)
