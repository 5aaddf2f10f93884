"""Two weights of four go while the Trainer of transformers trains a language model: one callback.

pip install lighten[train]
python examples/prune_with_trainer.py --out runs/sparse

The model is tiny and counts: its text is numbers, each the last one and one more. The callback
keeps its masks in the trainer's checkpoints: `trainer.train(resume_from_checkpoint=True)` goes on.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lighten.gradual import GradualPruning
from lighten.trainer_callback import trainer_callback

WORDS = 32


def sequence(start: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(start, start + 16) % WORDS
    return {"input_ids": ids, "labels": ids}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and prune a language model.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/sparse")
    args = parser.parse_args(arguments)
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    ))  # fmt: skip
    names = [n for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    steps = args.steps
    pruning = GradualPruning(model, "2:4", start=steps // 4, end=steps // 2, every=5, names=names)
    settings = TrainingArguments(
        output_dir=args.out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2,
        save_steps=steps, report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=steps,
    )  # fmt: skip
    data = [sequence(n) for n in range(WORDS)]
    Trainer(model, settings, train_dataset=data, callbacks=[trainer_callback(pruning)]).train()
    pruning.finish().save_pretrained(args.out)
    ids = torch.stack([x["input_ids"] for x in data])
    right = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    print(f"zeros      {pruning.share:.1%} of {len(names)} weights")
    print(f"right      {right.float().mean():.1%} of the next words")
    return 0


if __name__ == "__main__":
    sys.exit(main())
