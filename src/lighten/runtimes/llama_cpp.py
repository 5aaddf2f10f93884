"""llama.cpp through the wheel `xllamacpp`: opens a GGUF, answers a prompt, says how fast it is.

Each call starts a process of its own, so that its memory is measured apart and its crashes reach
nobody. Errors: MissingPackage without the wheel, BadInput without the file, BadOutput when
llama.cpp refuses the file, dies or hangs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import BadInput, BadOutput, MissingPackage, WrongUse
from lighten.runtimes import child_main, llama_cpp_child

_LAST_LINES = 8
_INSTALL = "pip install lighten[llama]"


@dataclass(frozen=True)
class Speed:
    """Medians over repeats, each in a fresh process.

    load_seconds: from the file to ready, llama.cpp's own warm-up run included. peak_rss_bytes: the
    whole process: weights (mapped pages that were touched), caches, work buffers, and about 60 MB
    of interpreter and library; memory of a GPU is not in it.
    """

    load_seconds: float
    prompt_tokens_per_second: float
    generate_tokens_per_second: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Continuation:
    """Tokens that llama.cpp chose, each the likeliest, and their natural log probabilities.

    logprobs: None where a token ends inside a character, for which the server gives none.
    """

    tokens: list[int]
    logprobs: list[float] | None


def available() -> bool:
    """Whether the wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def check(path: str | Path, *, timeout: float = 300) -> None:
    """Open the file and compute two tokens; raises BadOutput with llama.cpp's last log lines."""
    _run("check", path, context=256, timeout=timeout, body={}, threads=1, warmup=False)


def complete(
    path: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    seed: int = 0,
    chat: bool = True,
    temperature: float = 0.0,
    threads: int | None = None,
    timeout: float = 600,
) -> str:
    """The model's answer; `chat` wraps the prompt in the chat template of the file.

    temperature 0 takes the likeliest token each time: then the seed changes nothing.
    """
    _positive(max_tokens=max_tokens)
    if not prompt:
        raise WrongUse("the prompt is empty", "give at least one character")
    # A token is at least a byte; a chat template adds its own words.
    context = len(prompt.encode()) + max_tokens + 1024
    body: dict[str, Any] = {
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
        "chat": chat,
    }
    body["prompt"] = prompt
    answer = _run("complete", path, context=context, timeout=timeout, body=body, threads=threads)
    return str(answer["text"])


def greedy(
    path: str | Path,
    prompt: str | Sequence[int],
    n: int,
    *,
    threads: int | None = None,
    timeout: float = 600,
) -> Continuation:
    """The n likeliest next tokens, one after another, end-of-text never among them.

    prompt: text, to which llama.cpp adds the tokens that the file asks for, or token ids as given.
    """
    _positive(n=n)
    if len(prompt) == 0:
        raise WrongUse("the prompt is empty", "give at least one token")
    given = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    length = len(given.encode()) if isinstance(given, str) else len(given)
    context = length + n + 64
    body = {"prompt": given, "n": n}
    answer = _run("greedy", path, context=context, timeout=timeout, body=body, threads=threads)
    return Continuation(list(answer["tokens"]), answer["logprobs"])


def speed(
    path: str | Path,
    *,
    prompt_tokens: int = 512,
    generate_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    timeout: float = 900,
) -> Speed:
    """Load time, prompt and generation speed (the server's own timings) and peak memory."""
    _positive(prompt_tokens=prompt_tokens, generate_tokens=generate_tokens, repeats=repeats)
    sizes = {"prompt_tokens": prompt_tokens, "generate_tokens": generate_tokens}
    context = prompt_tokens + generate_tokens + 64
    runs = [
        _run("speed", path, context=context, timeout=timeout, body=sizes, threads=threads)
        for _ in range(repeats)
    ]

    def median(key: str) -> float:
        return statistics.median(float(run[key]) for run in runs)

    return Speed(
        median("load_seconds"),
        median("prompt_tokens_per_second"),
        median("generate_tokens_per_second"),
        int(median("peak_rss_bytes")),
    )


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise WrongUse(f"{name} is {count}", "it must be at least 1")


def _run(
    task: str,
    path: str | Path,
    *,
    context: int,
    timeout: float,
    body: dict[str, Any],
    threads: int | None = None,
    warmup: bool = True,
) -> dict[str, Any]:
    """One task in one process."""
    if not available():
        raise MissingPackage("llama.cpp needs the package `xllamacpp`", _INSTALL)
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no file `{path}`", "give the path of a .gguf file")
    request = {"task": task, "path": os.fspath(path.resolve()), "context": context, **body}
    request |= {"threads": threads, "warmup": warmup}
    try:
        done = subprocess.run(
            [sys.executable, str(child_main.__file__), str(llama_cpp_child.__file__)],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # or an abort starts a debugger first
        )
    except subprocess.TimeoutExpired as error:
        raise BadOutput(
            f"llama.cpp did not finish `{task}` of {path} within {timeout:g} s",
            "the machine may be busy: give a longer timeout or fewer tokens",
        ) from error
    log = _last_lines(done.stderr)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        more = "\n" + log if log else ""
        raise BadOutput(
            f"llama.cpp was ended by {name} during `{task}` of {path}{more}",
            "SIGKILL mostly means too little memory, SIGSEGV and SIGABRT a file it cannot take",
        )
    answer = _answer(done.stdout)
    if "answer" in answer:
        result: dict[str, Any] = answer["answer"]
        return result
    if answer.get("why") == "ImportError":
        raise MissingPackage(f"`xllamacpp` does not load: {answer['failed']}", _INSTALL)
    if answer.get("why") == "Refused":
        raise BadOutput(f"llama.cpp opened {path} but refuses `{task}`: {answer['failed']}")
    reason = log or answer.get("failed") or f"exit code {done.returncode}, no message"
    raise BadOutput(f"llama.cpp cannot open {path}:\n{reason}")


def _last_lines(log: str) -> str:
    """The last errors that llama.cpp logged, without clock and without repetition.

    Lines look like `0.00.027.051 E srv  load_model: ...`; what has no level is kept as it is.
    """
    lines: dict[str, None] = {}
    for line in log.splitlines():
        levelled = re.fullmatch(r"[\d.]+ ([A-Z]) (.*)", line)
        if line.strip() and (levelled is None or levelled[1] == "E"):
            lines[levelled[2] if levelled else line] = None
    return "\n".join(list(lines)[-_LAST_LINES:])


def _answer(stdout: str) -> dict[str, Any]:
    """The child's one line of JSON; empty when it ended before it could answer."""
    try:
        answer = json.loads(stdout)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
