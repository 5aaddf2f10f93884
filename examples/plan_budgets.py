"""What would other budgets cost? Predicted from a run's candidates, in seconds.

python examples/plan_budgets.py runs/mine 3.5bpw 4bpw 4.5bpw 5bpw 6bpw
"""

from __future__ import annotations

import argparse
import sys

import lighten


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predict the loss of several budgets.")
    parser.add_argument("run", help="the folder that `lighten compress` wrote")
    parser.add_argument("budgets", nargs="+", help="such as 70MB, 4.5bpw or 25%%")
    args = parser.parse_args(arguments)

    print(f"{'budget':>10}{'MB':>10}{'nats/token':>14}   layers by format")
    for budget in args.budgets:
        try:
            plan = lighten.replan(args.run, budget)
        except lighten.UserError as error:  # one impossible budget does not spoil the others
            print(f"{budget:>10}   {error.message}")
            continue
        formats = ", ".join(f"{row['layers']} {row['spec']}" for row in plan["layers"])
        size, loss = plan["predicted_bytes"] / 1e6, plan["predicted_kld"]
        print(f"{budget:>10}{size:>10.2f}{loss:>14.3g}   {formats}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
