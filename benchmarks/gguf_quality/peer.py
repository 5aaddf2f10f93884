"""The peer: llama.cpp's own quantizer, importance matrix and perplexity tool, and their table.

    python benchmarks/gguf_quality/peer.py CALIBRATION.txt TEST.txt [--model MODEL-F16.gguf]

The tools are built once, from the source distribution of `llama-cpp-python`, into a cache folder
outside of the repository (`LIGHTEN_CACHE`, else `~/.cache/lighten/peer`); this needs cmake, ninja
and a C++ compiler. The quality numbers are those which llama.cpp reports about itself. The
importance matrix and the reference's log-probabilities stay there too: delete them for other texts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SDIST = "llama-cpp-python"
VERSION = "0.3.36"
OPTIONS = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "GGML_NATIVE=ON"]
UNWANTED = ["CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP"]
UNWANTED += ["BUILD_UI", "USE_PREBUILT_UI"]
MIXES = ["IQ2_M", "IQ3_S", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M"]
MIXES += ["Q6_K", "Q8_0"]
PURE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0"]
MODEL = "smollm2-rescaled-f16.gguf"  # as rescale.py writes it into the cache folder


@dataclass(frozen=True)
class Tools:
    """Paths of the built programs."""

    quantize: Path
    imatrix: Path
    perplexity: Path
    bench: Path


def cache_dir() -> Path:
    """The cache folder, made if absent: `LIGHTEN_CACHE` where set, else `~/.cache/lighten/peer`."""
    cache = Path(os.environ.get("LIGHTEN_CACHE") or Path.home() / ".cache" / "lighten" / "peer")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def build_tools(cache: Path, jobs: int = os.cpu_count() or 1) -> Tools:
    """Download, unpack and build what `cache` does not hold yet; a second call takes no time.

    Raises `subprocess.CalledProcessError` if a step fails; its output goes to stderr.
    """
    stem = f"{SDIST.replace('-', '_')}-{VERSION}"
    source, build = cache / stem / "vendor" / "llama.cpp", cache / stem / "build"
    names = [f"llama-{name}" for name in ("quantize", "imatrix", "perplexity", "bench")]
    programs = [build / "bin" / name for name in names]

    def step(*command: str | Path) -> None:
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)

    if not all(program.exists() for program in programs):
        if not source.exists():
            pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SDIST)
            step(*pip, "--dest", cache, f"{SDIST}=={VERSION}")
            with tarfile.open(cache / f"{stem}.tar.gz") as archive:
                archive.extractall(cache / "unpacking", filter="data")
            (cache / "unpacking" / stem).rename(cache / stem)
        options = [f"-D{option}" for option in OPTIONS] + [
            f"-DLLAMA_{name}=OFF" for name in UNWANTED
        ]
        step("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)
        step("cmake", "--build", build, "-j", str(jobs), "--target", *names)
    return Tools(*programs)


def _run(*command: str | Path, out: Path | None = None, sign: str = "") -> str:
    """What one program printed, which must hold `sign`: some failures end with code 0. Where its
    reports go, standard output or error, differs between builds.

    `out`, a file that the program writes, comes to be only when it is whole.
    """
    part = out.with_name(f"part-{out.name}") if out else None
    if part:
        part.unlink(missing_ok=True)
    done = subprocess.run(
        [str(part if piece is out else piece) for piece in command],
        capture_output=True,
        text=True,
    )
    printed = f"{done.stdout}\n{done.stderr}"
    if done.returncode or sign not in printed or (part and not part.exists()):
        tail = "\n".join(printed.splitlines()[-15:])
        raise RuntimeError(f"{command[0]} did not finish, code {done.returncode}:\n{tail}")
    if part and out:
        part.replace(out)
    return printed


def imatrix(tools: Tools, model: Path, text: Path, out: Path, chunks: int, ctx: int = 512) -> None:
    """Mean squared inputs of every matrix over the first `chunks` windows of `ctx` tokens."""
    size = ("-c", str(ctx), "--chunks", str(chunks))
    _run(tools.imatrix, "-m", model, "-f", text, "-o", out, *size, "--no-ppl", out=out)


def quantize(
    tools: Tools, model: Path, out: Path, kind: str, imatrix: Path | None = None, *extra: str
) -> None:
    """Quantize to the file type `kind`; `extra` are options such as `--pure`."""
    matrix = ("--imatrix", imatrix) if imatrix else ()
    _run(tools.quantize, *matrix, *extra, model, out, kind, out=out)


def kld_base(tools: Tools, model: Path, text: Path, out: Path, chunks: int, ctx: int = 512) -> None:
    """Write the reference's tokens and log-probabilities (16 bits each) over windows of `text`.

    The second half of each window is scored: `ctx // 2 - 1` tokens.
    """
    what = ("-m", model, "-f", text, "-c", str(ctx), "--chunks", str(chunks))
    _run(tools.perplexity, *what, "--kl-divergence-base", out, out=out, sign="Final estimate")


def kld(tools: Tools, model: Path, base: Path, ctx: int = 512) -> dict[str, float]:
    """KL(reference || model) in nats, perplexity and share of equal top tokens; `_err`: 1 sigma.

    The tokens come from `base`; `ctx` must be the one it was made with.
    """
    # repacked for a processor with AMX, quantized weights end this version of it by a crash
    what = ("-m", model, "-c", str(ctx), "--no-repack")
    report = _run(
        tools.perplexity, *what, "--kl-divergence", "--kl-divergence-base", base,
        sign="Same top p:",
    )  # fmt: skip

    def read(label: str) -> list[float]:
        line = re.search(rf"^{label}\s*:(.*)$", report, re.MULTILINE)
        if line is None:
            raise RuntimeError(f"no line {label!r} in the report of {tools.perplexity}")
        return [float(number) for number in re.findall(r"-?\d+\.\d+", line[1])]

    ppl, mean, top = read(r"Mean PPL\(Q\)"), read(r"Mean\s+KLD"), read("Same top p")
    return {
        "ppl": ppl[0],
        "ppl_err": ppl[1],
        "kld_mean": mean[0],
        "kld_mean_err": mean[1],
        "kld_p99": read(r"99\.0%\s+KLD")[0],
        "top1": round(top[0] / 100, 5),
        "top1_err": round(top[1] / 100, 5),
    }


def anatomy(model: Path) -> dict[str, object]:
    """Bytes of the file, bits per weight of all its tensors, and the types really used per kind."""
    from gguf import GGUFReader

    tensors = GGUFReader(model).tensors
    kinds: dict[str, Counter[str]] = {}
    for tensor in tensors:
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(kind, Counter())[tensor.tensor_type.name] += 1
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors)
    return {
        "bytes": model.stat().st_size,
        "bpw": round(bits / sum(int(tensor.n_elements) for tensor in tensors), 4),
        "types": {kind: dict(used) for kind, used in kinds.items() if "norm" not in kind},
    }


def main() -> None:
    """Measure the reference and every row, and write the table after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", type=Path, help="default: what rescale.py made")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("peer.json"))
    arguments = parser.parse_args()
    cache = cache_dir()
    tools, model = build_tools(cache), arguments.model or cache / MODEL
    matrix, base = cache / f"{model.stem}.imatrix.gguf", cache / f"{model.stem}.kld"
    if not matrix.exists():
        imatrix(tools, model, arguments.calibration, matrix, chunks=64)
    if not base.exists():
        kld_base(tools, model, arguments.test, base, chunks=16)
    itself = kld(tools, model, base)
    if itself["kld_mean"] > 1e-4:
        raise SystemExit(f"{base} was made from another model\nhint: delete it")
    rows: list[dict[str, object]] = [{"name": "F16", **anatomy(model), **itself}]
    pure = ("--pure", "--token-embedding-type", "q8_0")
    for name, kind, extra in [(k, k, ()) for k in MIXES] + [(f"{k} pure", k, pure) for k in PURE]:
        out = cache / f"{model.stem.removesuffix('-f16')}-{name.lower().replace(' ', '-')}.gguf"
        quantize(tools, model, out, kind, matrix, *extra)
        rows.append({"name": name, **anatomy(out), **kld(tools, out, base)})
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), file=sys.stderr)


if __name__ == "__main__":
    main()
