"""A compressed weight that can be trained and goes back into the very same bytes.

The grid's tensors (scales, mins, float16 factors, zero points) become parameters; what is computed
with is always what can be stored: rounded by the format, with the gradient passed straight through.

    value = settle(start * (1 + row) + unit * theta)

row: one number for an output, on the factors that its whole row is multiplied by. theta: one for
each entry. unit: (out, 1, ...), the mean magnitude of the row's entries, so that rates are shares;
WHOLE where they are whole numbers.
Few numbers learn well from little text, many do not, so row has the larger rate.

With mode "all" the codes move too: a latent weight lies inside the cell of its code, leaning to
where the original weight is, and a code changes when the latent crosses into the next cell.

*Source:* straight-through: Bengio et al. 2013 (arXiv 1308.3432), section 3; learned step sizes:
Esser et al. 2020 (arXiv 1902.08153), equation 3; codes that move within reach: Cheng et al. 2023
(SignRound, arXiv 2309.05516), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.types import Compressed, Grid

MODES = ("scales", "all")
WHOLE = 100.0
"""The unit of entries that are whole numbers (sub-scales, zero points): they are stored otherwise
only once half of 1 is reached, which shares of their magnitude never do at the rates of scales."""

LEAN = 0.45
"""How far a latent weight may begin from its code's level towards the original, in steps; beyond
0.5 the nearest code would be another one."""


class LearnedWeight(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) that gives a weight as the runtime decodes it.

    mode: "scales" (codes frozen) or "all" (codes may move; needs `original` (out, in)). Parameters:
    row (out, 1), a theta for each tensor of the grid, for "all" offset (out, in) in steps of it.
    transposed: the module stores (in, out).
    """

    def __init__(
        self,
        weight: Compressed,
        mode: str = "scales",
        original: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise WrongUse(f"`{mode}` cannot be learned", f"known: {', '.join(MODES)}")
        self.weight, self.mode, self.transposed = weight, mode, transposed
        codes, grid = weight.format.unpack(weight.parts, weight.shape)
        self.codes: Tensor
        self.register_buffer("codes", codes, persistent=False)
        self.theta = nn.ParameterDict(
            {k: nn.Parameter(torch.zeros_like(g)) for k, g in grid.items()}
        )
        self.row = nn.Parameter(torch.zeros(weight.shape[0], 1, device=codes.device))
        self.factors = {"d", "dmin"} if "d" in grid else {"scale", "min"}
        for name, g in grid.items():
            unit = g.abs().mean(tuple(range(1, g.dim())), keepdim=True)
            if name not in self.factors and ("d" in grid or name == "zero"):
                unit = torch.full_like(unit, WHOLE)
            self.register_buffer(f"start_{name}", g, persistent=False)
            self.register_buffer(f"unit_{name}", unit, persistent=False)
        if mode == "all":
            if original is None:
                raise WrongUse("codes can be learned beside the original weight only")
            pace = steps(weight.format, codes, grid)
            self.pace: Tensor
            self.level: Tensor
            self.register_buffer("pace", pace, persistent=False)
            now = weight.format.decode(codes, grid)
            away = (original.to(now) - now) / pace.clamp_min(1e-30)
            self.register_buffer("level", now, persistent=False)
            self.offset = nn.Parameter(torch.where(pace > 0, away, 0.0).clamp_(-LEAN, LEAN))

    def grid(self) -> Grid:
        """The grid as it would be stored, its gradient straight through the rounding."""
        found = {}
        for name, theta in self.theta.items():
            start: Tensor = getattr(self, f"start_{name}")
            start = start * (1 + self.row) if name in self.factors else start
            value = start + getattr(self, f"unit_{name}") * theta
            stored = self.weight.format.settle(name, value.detach().clone())
            found[name] = value + (stored - value).detach()
        return found

    def forward(self, _: Tensor) -> Tensor:
        """The weight as its module holds it; the argument (the old parameter) is not read."""
        grid, format = self.grid(), self.weight.format
        if self.mode == "all":
            w = format.decode(self._codes(self._latent(), grid), grid)
            w = _Straight.apply(w, self.offset, self.pace)  # type: ignore[no-untyped-call]
        else:
            w = format.decode(self.codes, grid)
        return w.T if self.transposed else w

    @torch.no_grad()
    def _latent(self) -> Tensor:
        return torch.addcmul(self.level, self.offset, self.pace)

    def _codes(self, latent: Tensor, grid: Grid) -> Tensor:
        with torch.no_grad():
            codes: Tensor = self.weight.format.encode(
                latent, {k: g.detach() for k, g in grid.items()}
            )
        return codes

    @torch.no_grad()
    def freeze(self) -> Compressed:
        """The weight as a value again: the same spec, format and number of bytes."""
        grid = {name: g.detach() for name, g in self.grid().items()}
        codes = self.codes
        if self.mode == "all":
            codes = self._codes(self._latent(), grid)
        w = self.weight
        parts = w.format.pack(codes, grid)
        return Compressed(w.spec, w.shape, w.format, parts)


class _Straight(torch.autograd.Function):
    """A decoded weight whose gradient is that of the latent weight too: offset times pace. What is
    passed straight through is never added to it and taken off again, for weights are large."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, offset: Tensor, pace: Tensor) -> Tensor:
        ctx.save_for_backward(pace)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (pace,) = ctx.saved_tensors
        return gradients[0], gradients[0] * pace, None


class LearnedVector(nn.Module):
    """A norm or a bias, which is stored in full: value = start + unit * vector, unit |start|, or a
    tenth of the mean where that is more."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.unit: Tensor
        self.register_buffer("start", start.detach().clone(), persistent=False)
        size = self.start.abs()
        self.register_buffer("unit", size.maximum(0.1 * size.mean()), persistent=False)
        self.vector = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, _: Tensor) -> Tensor:
        return self.start + self.unit * self.vector

    @torch.no_grad()
    def freeze(self) -> Tensor:
        return self(self.start)  # type: ignore[no-any-return]


@torch.no_grad()
def steps(format: Any, codes: Tensor, grid: Grid) -> Tensor:
    """(out, in): how far the level next to each code is (the nearer of the two)."""
    last = int(codes.max())
    here = format.decode(codes, grid)
    above = format.decode((codes.int() + 1).clamp_(max=last).to(codes.dtype), grid)
    below = format.decode((codes.int() - 1).clamp_(min=0).to(codes.dtype), grid)
    up, down = (above - here).abs_(), (here - below).abs_()
    return torch.where(up == 0, down, torch.where(down == 0, up, torch.minimum(up, down)))


def learnable(weight: Compressed) -> bool:
    """Whether a weight has anything to learn: a grid that its format can settle."""
    if weight.spec.sparsity is not None or not hasattr(weight.format, "settle"):
        return False
    return bool(weight.format.unpack(weight.parts, weight.shape)[1])
