"""Half of the multiply-adds go while a network trains, in a loop of your own.

python examples/prune_in_loop.py

Channels are masked on a cubic schedule, coupled ones together; at the end they are cut out, and the
small network computes what the masked one did.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from blurred_shapes import accuracy, network, shapes

import lighten
from lighten.gradual_shrinking import GradualShrinking


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and prune a small network.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", default="0.5 macs")
    args = parser.parse_args(arguments)
    module = network()
    images, labels = shapes(4000)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    try:
        shrinking = GradualShrinking(
            module, images[:2], args.budget,
            start=args.steps // 4, end=args.steps * 3 // 4, every=max(1, args.steps // 20),
        )  # fmt: skip
        print(f"multiply-adds   {shrinking.whole:>9,.0f}")
        for step in range(1, args.steps + 1):
            module.train()
            pick = torch.randint(len(images), (64,))
            F.cross_entropy(module(images[pick]), labels[pick]).backward()
            optimizer.step()
            shrinking.step(step, optimizer)
            optimizer.zero_grad()
        small = shrinking.finish()
    except lighten.UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"what is left    {small.cost:>9,.0f}")
    print(f"masked          {accuracy(module):>9.1%}")
    print(f"cut             {accuracy(small.module):>9.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
