"""Round the weights of one convolution or linear on the inputs that it will really get.

Inputs are columns (groups, in, positions): of a convolution in = channels / groups * kernel. With
C = cov(X̂) of the quantized inputs and G = cov(T, X̂) with the targets T:

    W* = W + (G - W C)(C + λI)⁻¹      what the weight should be, given its rounded inputs
    Q  = round with feedback, Hessian C     (the mean is left out: the bias makes up for it)
    b  = mean(T) - Q mean(X̂)

*Source:* Frantar et al. 2022, "GPTQ"; Nagel et al. 2019, "Data-Free Quantization", section 4.2
(bias correction), here exact and in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lighten.network import LINEAR
from lighten.registry import formats, solvers
from lighten.rewrite import groups, transposed
from lighten.soft_rounding import learn_codes
from lighten.sparse import fit_kept
from lighten.sweep import DAMP
from lighten.types import Compressed, Spec, Stats

LEARNED_STEPS = 100
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Tried for λ, times the mean of diag(C); the best on images left out is used, or W itself."""


@dataclass
class Moments:
    """Sums over positions, per group of channels: n, mean and product sums.

    x (g, in), t (g, out / g), xx (g, in, in), tx (g, out / g, in), tt (g, out / g).
    """

    n: float
    x: Tensor
    t: Tensor
    xx: Tensor
    tx: Tensor
    tt: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n, self.x + other.x, self.t + other.t, self.xx + other.xx,
            self.tx + other.tx, self.tt + other.tt,
        )  # fmt: skip

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mean(X), mean(T), cov(X), cov(T, X)."""
        x, t = self.x / self.n, self.t / self.n
        c = self.xx / self.n - x.unsqueeze(2) * x.unsqueeze(1)
        return x, t, c, self.tx / self.n - t.unsqueeze(2) * x.unsqueeze(1)


def solvable(node: fx.Node) -> bool:
    """Whether `columns` knows this operator: convolution over one or two dimensions, linear."""
    if transposed(node):
        return False
    return node.target in LINEAR or node.meta["val"].ndim in (3, 4)


def columns(node: fx.Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """What a node's weight is multiplied with: (groups, in, positions)."""
    if node.target in LINEAR:
        return x.reshape(-1, x.shape[-1]).T.unsqueeze(0)
    arguments: list[Any] = [*node.args[3:], None, None, None]
    stride, padding, dilation = arguments[:3]
    g = groups(node)
    dims = len(kernel)
    kernel = list(kernel)
    if dims == 1:  # a row of height 1
        x, kernel = x.unsqueeze(2), [1, *kernel]
    stride, dilation = _pair(stride, dims, 1), _pair(dilation, dims, 1)
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        x = functional.pad(x, (total[1] // 2, total[1] - total[1] // 2,
                               total[0] // 2, total[0] - total[0] // 2))  # fmt: skip
        padding = [0, 0]
    else:
        padding = _pair(padding, dims, 0)
    if kernel == [1, 1] and padding == [0, 0]:
        x = x[:, :, :: stride[0], :: stride[1]]
        flat = x.flatten(2)
    else:
        flat = functional.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return grouped(flat, g)


def grouped(flat: Tensor, g: int) -> Tensor:
    """(n, channels, positions) -> (groups, channels / groups, n * positions)."""
    n, channels, positions = flat.shape
    return (
        flat.view(n, g, channels // g, positions).permute(1, 2, 0, 3).reshape(g, channels // g, -1)
    )


def _pair(value: Any, dims: int, fill: int) -> list[int]:
    """One number per spatial dimension of a plane."""
    if value is None:
        return [fill, fill]
    given = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    if len(given) == 1:
        given = given * dims
    return given if dims == 2 else [fill if fill == 0 else 1, *given]


def moments(x: Tensor, target: Tensor) -> Moments:
    """Sums for columns x (g, in, positions) and targets (g, out / g, positions)."""
    return Moments(
        x.shape[2], x.sum(2), target.sum(2), x @ x.transpose(1, 2), target @ x.transpose(1, 2),
        target.square().sum(2),
    )  # fmt: skip


def error(m: Moments, weight: Tensor) -> Tensor:
    """(g,): mean squared error of weight (g, out / g, in) with the best bias."""
    _, t, c, cross = m.centred()
    spread = m.tt / m.n - t.square()
    return (spread - 2 * (weight * cross).sum(2) + ((weight @ c) * weight).sum(2)).sum(1)


def fitted(folds: Sequence[Moments], weight: Tensor) -> Tensor:
    """The weight (g, out / g, in) that does best on these inputs: least squares drawn towards
    `weight`, as strongly as does best on folds that were left out."""
    whole = folds[0]
    for fold in folds[1:]:
        whole = whole + fold
    if len(folds) < 2:
        return weight
    scores = torch.zeros(len(RIDGES) + 1, dtype=torch.float64)
    for i, held in enumerate(folds):
        rest = None
        for j, fold in enumerate(folds):
            if j != i:
                rest = fold if rest is None else rest + fold
        assert rest is not None
        tried = [weight, *(_ridge(rest, weight, r) for r in RIDGES)]
        scores += torch.stack([error(held, w).sum().double() for w in tried])
    best = int(scores.argmin())
    return weight if best == 0 else _ridge(whole, weight, RIDGES[best - 1])


def _ridge(m: Moments, weight: Tensor, ridge: float) -> Tensor:
    _, _, c, cross = m.centred()
    diagonal = c.diagonal(dim1=1, dim2=2)
    size = ridge * diagonal.mean(1).clamp(min=1e-12)
    damped = c + torch.diag_embed(size.unsqueeze(1).expand_as(diagonal))
    step: Tensor = torch.linalg.solve(damped, (cross - weight @ c).transpose(1, 2))
    return weight + step.transpose(1, 2)


def rounded(m: Moments, weight: Tensor, spec: Spec, kept: Tensor | None = None) -> Compressed:
    """weight (g, out / g, in) -> codes as (out, in), each group rounded on its own Hessian.

    kept: (g, out / g, in) bool, None: all; the others, which were pruned, stay zero."""
    g, rows, n = weight.shape
    _, _, c, _ = m.centred()
    if g == 1:
        solver = solvers[spec.solver or "gptq"]
        stats = Stats(int(m.n), c[0])
        if kept is not None and spec.solver in (None, "gptq", "learned"):
            pruned: Compressed = solver(weight[0], stats, spec, kept=kept[0])
            return pruned
        result: Compressed = solver(weight[0] if kept is None else weight[0] * kept[0], stats, spec)
        return result
    kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    if spec.solver == "rtn":
        flat: Compressed = solvers["rtn"]((weight * kept).reshape(g * rows, n), None, spec)
        return flat
    return _grouped(weight, c, spec, kept)


def _grouped(weight: Tensor, hessian: Tensor, spec: Spec, kept: Tensor) -> Compressed:
    """The sweep over all groups at once, or what is learned from there: many small Hessians."""
    g, rows, n = weight.shape
    fmt = formats[str(spec.format)]
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(n, dtype=weight.dtype, device=weight.device)
    damped = hessian + DAMP * mean[:, None, None] * eye
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).transpose(1, 2)
    importance = upper.diagonal(dim1=1, dim2=2).square().reciprocal()  # (g, in)
    w = weight.clone()
    flat = (g * rows, n)
    stays = kept.reshape(flat)
    grid = fit_kept(fmt, w.reshape(flat), stays, importance.repeat_interleave(rows, 0))
    codes = []
    for i in range(n):
        code = fmt.encode((w[:, :, i] * kept[:, :, i]).reshape(-1, 1), grid, i)
        gap = w[:, :, i] - fmt.decode(code, grid, i).view(g, rows)
        gap = gap / upper[:, i, i].unsqueeze(1)
        w[:, :, i:] -= gap.unsqueeze(2) * upper[:, i, i:].unsqueeze(1)
        codes.append(code)
    swept = torch.cat(codes, 1)
    nearest = fmt.encode((weight * kept).reshape(flat), grid)

    def cost(code: Tensor) -> Tensor:
        gap = weight - fmt.decode(code, grid).view(g, rows, n)
        return torch.einsum("gri,gij,grj->gr", gap, hessian, gap).flatten()

    better = cost(swept) <= cost(nearest)
    chosen = torch.where(better.unsqueeze(1), swept, nearest)
    if spec.solver == "learned":

        def product(d: Tensor) -> Tensor:
            return (d.view(g, rows, n) @ hessian).reshape(flat)

        diagonal = hessian.diagonal(dim1=1, dim2=2).repeat_interleave(rows, 0)
        learned = learn_codes(
            weight.reshape(flat), product, diagonal, fmt, chosen, grid, LEARNED_STEPS
        )
        learned = torch.where(stays, learned, chosen)
        chosen = torch.where((cost(learned) < cost(chosen)).unsqueeze(1), learned, chosen)
    return Compressed(spec, flat, fmt, fmt.pack(chosen, grid))
