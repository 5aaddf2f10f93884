"""The process in which onnxruntime is timed: one JSON request on stdin, one JSON answer on stdout.

Run by child_main.py and importing nothing of ours: so its resident memory is onnxruntime's and a
bare interpreter's, without torch, and a crash of the native code ends this process only.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def peak_rss() -> int:
    """Peak resident bytes of this process; Linux keeps `ru_maxrss` across exec, so not that."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def session(path: str, threads: int, profile: str | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def example(opened: Any, batch: int) -> dict[str, Any]:
    """Inputs of an open model: normal numbers of one seed; every free dimension is `batch`."""
    import numpy

    kinds = {
        "tensor(float)": numpy.float32, "tensor(float16)": numpy.float16,
        "tensor(double)": numpy.float64, "tensor(int64)": numpy.int64,
        "tensor(int32)": numpy.int32, "tensor(uint8)": numpy.uint8, "tensor(int8)": numpy.int8,
        "tensor(bool)": numpy.bool_,
    }  # fmt: skip
    made = {}
    random = numpy.random.default_rng(0)
    for value in opened.get_inputs():
        shape = [d if isinstance(d, int) else batch for d in value.shape]
        kind = kinds[value.type]
        if issubclass(kind, numpy.floating):
            made[value.name] = random.standard_normal(shape).astype(kind)
        else:
            made[value.name] = random.integers(0, 2, shape).astype(kind)
    return made


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Open the file and run it once."""
    opened = session(request["path"], 1)
    outputs = opened.run(None, example(opened, 1))
    return {
        "inputs": {v.name: v.shape for v in opened.get_inputs()},
        "outputs": {
            v.name: list(o.shape) for v, o in zip(opened.get_outputs(), outputs, strict=True)
        },
    }


def memory(request: dict[str, Any]) -> dict[str, Any]:
    opened = session(request["path"], request["threads"])
    given = example(opened, request["batch"])
    for _ in range(3):
        opened.run(None, given)
    return {"peak_rss_bytes": peak_rss()}


def latencies(request: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of single runs of each file, in turns: A B B A A B ...

    A turn is a few runs of one file, the first of which is not counted: it finds the caches as the
    other file has left them.
    """
    runs: dict[str, Callable[[], Any]] = {}
    for name, path in request["files"].items():
        opened = session(path, request["threads"])
        given = example(opened, request["batch"])
        runs[name] = lambda opened=opened, given=given: opened.run(None, given)  # type: ignore[misc]
    once = {}
    for name, run in runs.items():
        for _ in range(3):
            begin = time.perf_counter()
            run()
            once[name] = time.perf_counter() - begin
    turn = {name: max(4, min(64, int(0.04 / max(t, 1e-6)))) for name, t in once.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    end = time.perf_counter() + request["seconds"] * len(runs)
    turns = 0
    while time.perf_counter() < end or turns < 4:
        for name in order:
            run = runs[name]
            run()
            for _ in range(turn[name]):
                begin = time.perf_counter()
                run()
                found[name].append(1e3 * (time.perf_counter() - begin))
        order.reverse()
        turns += 1
    return found


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """{node name: [microseconds in each run]} of one file, as onnxruntime's profiler says."""
    opened = session(request["path"], request["threads"], request["prefix"])
    given = example(opened, request["batch"])
    begin = time.perf_counter()
    done = 0
    while done < request["least"] or time.perf_counter() - begin < request["seconds"]:
        opened.run(None, given)
        done += 1
    with open(opened.end_profiling(), encoding="utf-8") as file:
        events = json.load(file)
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"])
    return found


TASKS = {"check": check, "memory": memory, "latencies": latencies, "profile": profile}

FAILURES = (Exception,)  # onnxruntime has a dozen kinds of its own
