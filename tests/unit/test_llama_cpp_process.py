"""What happens around llama.cpp's process; a stand-in for the wheel plays every accident."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from lighten.errors import BadInput, BadOutput, MissingPackage, UserError, WrongUse
from lighten.runtimes import llama_cpp, llama_cpp_child

STAND_IN = """
import os, signal, sys, time
{on_import}
class _Part:
    n_threads = 0
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = _Part(), _Part(), _Part()
class ggml_backend_dev_type:
    GGML_BACKEND_DEVICE_TYPE_CPU = 0
class common_reasoning_format:
    COMMON_REASONING_FORMAT_NONE = 0
def get_device_info():
    return []
class Server:
    listening_address = ""
    def __init__(self, params):
        {on_open}
    def handle_completions(self, body):
        {on_ask}
    handle_chat_completions = handle_completions
"""


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """wheel(on_open=..., ...): put a module `xllamacpp` that does so before any other."""

    def write(on_open="pass", on_ask="return {'choices': [{'text': 'ok'}]}", on_import=""):
        folder = tmp_path / "wheel"
        folder.mkdir()
        text = STAND_IN.format(on_open=on_open, on_ask=on_ask, on_import=on_import)
        (folder / "xllamacpp.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        importlib.invalidate_caches()

    return write


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def ask(file: Path, **options) -> str:
    return llama_cpp.complete(file, "hello", chat=False, **options)


def test_an_answer_comes_through_whatever_the_library_prints(wheel, file):
    wheel(on_open="os.write(1, b'noise'); print('more noise', flush=True)")
    assert ask(file) == "ok"


def test_a_refused_file_shows_errors_once_and_without_clock(wheel, file):
    lines = [
        "0.00.001.000 W srv  init: no API key",
        "0.00.002.000 E load: bad magic",
        "0.00.003.000 E load: bad magic",
        "0.00.004.000 E init: giving up",
    ]
    wheel(on_open=f"print({chr(10).join(lines)!r}, file=sys.stderr); raise RuntimeError('no')")
    with pytest.raises(BadOutput) as raised:
        ask(file)
    assert raised.value.message == (
        f"llama.cpp cannot open {file}:\nload: bad magic\ninit: giving up"
    )
    assert raised.value.exit_code == 1


def test_a_refused_file_without_a_log_still_says_something(wheel, file):
    wheel(on_open="raise RuntimeError('init failed')")
    with pytest.raises(BadOutput, match=r"cannot open .*\ninit failed"):
        ask(file)


def test_a_refused_request_is_not_blamed_on_the_file(wheel, file):
    wheel(on_ask="return {'error': {'message': 'too many tokens'}}")
    with pytest.raises(BadOutput, match=r"opened .* but refuses `complete`: too many tokens"):
        ask(file)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT", "SIGSEGV"])
def test_a_killed_process_is_named(wheel, file, name):
    wheel(on_open=f"os.kill(os.getpid(), signal.{name})")
    with pytest.raises(BadOutput, match=f"ended by {name} during `complete`") as raised:
        ask(file)
    assert "memory" in raised.value.hint


def test_a_process_that_ends_without_an_answer(wheel, file):
    wheel(on_open="os._exit(3)")
    with pytest.raises(BadOutput, match="exit code 3, no message"):
        ask(file)


def test_a_process_that_hangs_is_ended(wheel, file, tmp_path):
    mark = tmp_path / "pid"
    wheel(on_open=f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(BadOutput, match=r"did not finish `complete` .* within 5 s") as raised:
        ask(file, timeout=5)
    assert "timeout" in raised.value.hint
    if mark.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.read_text()), 0)


def test_a_wheel_that_does_not_load(wheel, file):
    wheel(on_import="raise ImportError('GLIBC_2.99 not found') if 'child' in sys.argv[0] else None")
    with pytest.raises(MissingPackage, match=r"does not load: GLIBC_2\.99"):
        ask(file)


def test_without_the_wheel(monkeypatch, file):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: llama_cpp.check(file),
        lambda: ask(file),
        lambda: llama_cpp.speed(file),
        lambda: llama_cpp.greedy(file, [1], 1),
    ):
        with pytest.raises(MissingPackage) as raised:
            call()
        assert raised.value.hint == "pip install lighten[llama]"


def test_wrong_arguments(wheel, file, tmp_path):
    wheel()
    cases: list[tuple[type[UserError], object]] = [
        (BadInput, lambda: llama_cpp.check(tmp_path / "absent.gguf")),
        (BadInput, lambda: llama_cpp.check(tmp_path)),
        (WrongUse, lambda: llama_cpp.complete(file, "")),
        (WrongUse, lambda: llama_cpp.complete(file, "a", max_tokens=0)),
        (WrongUse, lambda: llama_cpp.greedy(file, [], 3)),
        (WrongUse, lambda: llama_cpp.speed(file, repeats=0)),
    ]
    for kind, call in cases:
        with pytest.raises(kind):
            call()


def test_the_process_imports_nothing_of_ours():
    text = Path(llama_cpp_child.__file__).read_text()
    assert "import lighten" not in text
    assert "from lighten" not in text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to inherit")
def test_peak_memory_of_a_process_is_not_its_parents(wheel, file):
    wheel(on_ask="import sys; m = sys.modules['child']; "
                 "return {'choices': [{'text': str(m.peak_rss())}]}")  # fmt: skip
    ballast = b"x" * 300_000_000
    assert llama_cpp_child.peak_rss() > len(ballast)
    assert 1_000_000 < int(ask(file)) < 100_000_000
