"""Compress a language model from Python and say what it cost.

python examples/compress_language_model.py MODEL --budget 4.5bpw --data text.txt --out runs/mine

MODEL: a Hugging Face folder, a hub id or a .gguf file. The same line resumes what was stopped.
"""

from __future__ import annotations

import argparse
import sys

import lighten


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compress a language model.")
    parser.add_argument("model")
    parser.add_argument("--budget", default="4.5bpw", help="80MB, 4.5bpw or 25%%")
    parser.add_argument("--data", help="a .txt or .jsonl file, or a folder of them")
    parser.add_argument("--export", default="gguf", help="gguf or compressed_tensors")
    parser.add_argument("--out", default="runs/example")
    parser.add_argument("--samples", type=int, default=64, help="windows of text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    args = parser.parse_args(arguments)
    try:
        result = lighten.compress(
            args.model,
            budget=args.budget,
            data=args.data,
            export=args.export,
            out=args.out,
            samples=args.samples,
            length=args.length,
        )
    except lighten.UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    before, after = result.metrics["before"], result.metrics["after"]
    loss = after["mean_kld"]
    print(f"file            {result.exported}")
    print(f"size            {before['bytes'] / 1e6:.2f} MB -> {after['bytes'] / 1e6:.2f} MB")
    print(f"bits per weight {before['bits_per_weight']:.2f} -> {after['bits_per_weight']:.2f}")
    print(f"mean KLD        {loss['value']:.4g} nats per token, {loss['low']} to {loss['high']}")
    for name, spec in sorted(result.plan.specs.items()):
        print(f"{spec:20}{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
