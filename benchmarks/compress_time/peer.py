"""llm-compressor's GPTQ on stored token windows; prints what it took as one line of JSON.

    python benchmarks/compress_time/peer.py MODEL WINDOWS.safetensors

Needs no lighten, so it runs in an environment of its own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor

Timed is `oneshot` alone: the model stands in memory, in float32, and nothing is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version

from usage import used

INSTALL = "pip install torch==2.13.0 llmcompressor (its transformers may differ from lighten's)"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("windows", help="safetensors file with `windows` (count, length)")
    parser.add_argument("--batch", type=int, default=4, help="windows run at a time")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"{sys.executable} lacks {error.name or error}: {INSTALL}", file=sys.stderr)
        return 2
    ids = load_file(arguments.windows)["windows"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    batches = torch.utils.data.DataLoader(_Windows(ids), batch_size=arguments.batch)
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
    }  # fmt: skip
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    with used() as found:
        oneshot(
            model=model,
            dataset=batches,
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
        )
    layers = [m for m in model.modules() if hasattr(m, "weight_scale")]
    setup = {
        "layers": len(layers),
        "weights": sum(m.weight.numel() for m in layers),
        "threads": torch.get_num_threads(),
        "batch": arguments.batch,
        "versions": {k: version(k) for k in ("llmcompressor", "transformers", "torch")},
    }
    print(json.dumps({"used": found, "setup": setup}))
    return 0


class _Windows:
    """What the model is called with, window by window."""

    def __init__(self, ids: object) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> dict[str, object]:
        row = self.ids[i]  # type: ignore[index]
        return {"input_ids": row, "attention_mask": row.new_ones(row.shape)}


if __name__ == "__main__":
    sys.exit(main())
