"""Calibrate + solve at 4 bits, groups of 64, symmetric: lighten beside llm-compressor's GPTQ.

    python benchmarks/compress_time/run.py MODEL --data TEXT --peer-python peer/bin/python

One after the other, each in a process of its own, on the same Hugging Face folder and the same
token windows. How to install the peer: see peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lighten.data import load_text, windows
from lighten.model import open_model

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--data", help="text to calibrate on (default: the text lighten brings)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peer-python", default=sys.executable, help="has llmcompressor")
    parser.add_argument("--peer-batch", type=int, help="windows it runs at a time (default: ours)")
    parser.add_argument("--no-peer", action="store_true", help="ours only")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    corpus, tokenizer = load_text(arguments.data), open_model(arguments.model).tokenizer
    ids = windows(corpus, tokenizer, arguments.length, arguments.samples)
    if len(ids) < arguments.samples:
        print(f"{corpus.source} gives only {len(ids)} windows: give more --data", file=sys.stderr)
        return 2
    if not arguments.no_peer and not _has_peer(arguments.peer_python):
        return 2  # before minutes of our own are spent
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "windows.safetensors"
        save_file({"windows": ids.contiguous()}, stored)
        ours = _child(sys.executable, "ours.py", arguments.model, stored)
        batch = str(arguments.peer_batch or ours["setup"]["batch"])
        peer = None
        if not arguments.no_peer:
            peer = _child(
                arguments.peer_python, "peer.py", arguments.model, stored, "--batch", batch
            )
    if peer and peer["setup"]["weights"] != ours["setup"]["weights"]:
        print(f"not the same job: {ours['setup']} and {peer['setup']}", file=sys.stderr)
        return 1
    settings = {
        "model": arguments.model.resolve().name, "data": Path(corpus.source).name,
        "windows": len(ids), "length": arguments.length, "bits": 4, "group": 64,
        "symmetric": True, "ours": ours["setup"], "peer": peer and peer["setup"],
    }  # fmt: skip
    result = {
        "ours": ours["used"],
        "peer": peer and peer["used"],
        "ratio_wall": peer and ours["used"]["wall_seconds"] / peer["used"]["wall_seconds"],
        "ratio_cpu": peer and ours["used"]["cpu_seconds"] / peer["used"]["cpu_seconds"],
        **ours["speed"],
        "machine": _machine(),
        "load_before": round(load, 1),
        "settings": settings,
    }
    if peer is None:
        result["note"] = "llm-compressor was not run (--no-peer)"
    text = json.dumps(result, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _child(python: str, script: str, *arguments: str | Path) -> dict[str, Any]:
    """What a script of this folder says on its last line."""
    command = [python, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{script} failed ({done.returncode})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _has_peer(python: str) -> bool:
    code = "import importlib.util as u, sys; sys.exit(not u.find_spec('llmcompressor'))"
    try:
        if subprocess.run([python, "-c", code]).returncode == 0:
            return True
    except OSError as error:
        print(f"cannot start {python}: {error}", file=sys.stderr)
    print(
        f"{python} has no llmcompressor. In an environment of its own: pip install torch==2.13.0"
        " llmcompressor; then --peer-python ENVIRONMENT/bin/python (or --no-peer)",
        file=sys.stderr,
    )
    return False


def _machine() -> str:
    """Processor and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
