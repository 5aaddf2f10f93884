"""A student spread over processes: each holds a share of every weight (FSDP).

Weights are whole only where they are used: a block's while it runs, all of them while something
looks at the student as a module of its own (an evaluation, a hook). Gradients, the optimizer's
state and a moving average are shares from beginning to end.

*Source:* Rajbhandari et al. 2020, "ZeRO", section 5.3; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import WrongUse

ELEMENTWISE = ("sgd", "adamw")
"""Optimizers that move each entry of a weight without looking at the others."""

HINT = 'strategy "ddp" keeps all weights on each device'


def strategy() -> Any:
    """Lightning's strategy for a module that was spread by `spread`."""
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(parallelize_fn=spread)


def check_optimizer(kind: str) -> None:
    """Raises WrongUse for an optimizer that would take a share for the whole weight."""
    if kind not in ELEMENTWISE:
        raise WrongUse(f"optimizer `{kind}` looks at whole weights, not at shares", HINT)


def spreads(fabric: Any) -> bool:
    """Whether that is the strategy of this Fabric."""
    return getattr(fabric.strategy, "_parallelize_fn", None) is spread


def spread(module: nn.Module, mesh: Any) -> nn.Module:
    """Make shares of the parameters in place: those of each block together, then the rest.

    Scalars and empty parameters stay whole. mesh: of all processes, of any shape. Raises WrongUse.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    line = init_device_mesh(mesh.device_type, (mesh.size(),))
    whole = {p for p in module.parameters() if p.ndim == 0 or p.numel() == 0}
    try:
        for part in (*blocks(module), module):
            fully_shard(part, mesh=line, ignored_params=whole)
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise WrongUse(f"the student cannot be spread: {error}", HINT) from error
    return module


def blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost members of lists and sequences whose parameters nothing else uses."""
    owners = Counter(p for m in module.modules() for p in m._parameters.values() if p is not None)
    found = []
    for part in dict.fromkeys(_members(module)):
        own = Counter(p for m in part.modules() for p in m._parameters.values() if p is not None)
        if own and all(owners[p] == count for p, count in own.items()):
            found.append(part)
    return found


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(
            child, nn.ModuleList | nn.Sequential
        ):
            yield child
        else:
            yield from _members(child)


# -- shares as tensors -----------------------------------------------------------------------------
def is_share(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """A tensor, whole; of shares, every process must ask at once."""
    found: Tensor = tensor.detach().full_tensor() if is_share(tensor) else tensor.detach()
    return found


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """The share of a whole tensor that `like` is of its own; where that is whole, all of it."""
    if not is_share(like):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.detach().to(like.device), mesh, places, src_data_rank=None)


@torch.no_grad()
def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """load_state_dict for a module that may be spread; values are whole."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(share_of(values[name], tensor))


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients, of which some may be shares, to a norm of at most `most`."""
    grads: list[Any] = [p.grad for p in parameters if p.grad is not None]
    mine = [g.to_local() for g in grads if is_share(g)]
    every = [g for g in grads if not is_share(g)]
    total = torch.stack([g.float().square().sum() for g in mine]).sum()
    torch.distributed.all_reduce(total)
    total = torch.stack([total, *(g.float().square().sum() for g in every)]).sum()
    scale = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    for grad in (*mine, *every):
        grad.mul_(scale)


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give every process the first one's buffers: each saw other examples (running statistics)."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            torch.distributed.broadcast(buffer, 0)


# -- the module, spread and as it was --------------------------------------------------------------
class Shards:
    """Remembers a module as it is now; once it is spread, shows it so again, and puts it back so.

    Parameters come back as the same objects, which hold no memory in between.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = [(m, type(m), set(vars(m)), _hooks(m)) for m in module.modules()]
        self._slots = [
            (m, name, p) for m in module.modules() for name, p in m._parameters.items()
            if p is not None
        ]  # fmt: skip
        self._taken: list[tuple[nn.Module, type, dict[str, Any], dict[str, list[Any]]]] = []
        self._shares: dict[nn.Parameter, tuple[nn.Parameter, torch.Size]] = {}
        self._tried = False

    def began(self) -> None:
        """The module was spread: give the whole parameters' memory back."""
        for m, name, p in self._slots:
            now = m._parameters[name]
            if now is not None and now is not p and p not in self._shares:
                self._shares[p] = (now, p.shape)
        self._empty()

    @property
    def loose(self) -> list[nn.Parameter]:
        """Parameters that stayed whole, whose gradients nobody else averages."""
        return [p for p in dict.fromkeys(p for _, _, p in self._slots) if p not in self._shares]

    @contextmanager
    def whole(self, write: bool = False) -> Iterator[None]:
        """The module as it was, with the weights as they are, for as long as this lasts; every
        process must ask at once. write: gradients are there too, and what is done to the weights
        is done to the shares. Raises WrongUse for weights that another shape was given."""
        from torch.distributed.fsdp import FSDPModule

        for m, *_ in self._before:
            if isinstance(m, FSDPModule):  # after a forward without a backward, it is whole
                m.reshard()
        for p, (share, _) in self._shares.items():
            p.data = gathered(share)
            if write and share.grad is not None:
                p.grad = gathered(share.grad)
        self._take_off()
        try:
            yield
            if write:
                self._write()
        finally:
            self._put_on()
            self._empty()

    def charge(self, penalty: Callable[[], Tensor]) -> float:
        """Add a penalty's gradient to the shares' gradients; its value."""
        with self.whole():
            with torch.enable_grad():
                value = penalty()
                value.backward()  # type: ignore[no-untyped-call]
            for p, (share, _) in self._shares.items():
                if p.grad is not None:
                    grad = share_of(p.grad, share)
                    share.grad = grad if share.grad is None else share.grad + grad
        return float(value.detach())

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Around a step: what goes wrong in the first one is told as WrongUse; and a gradient that
        came to a whole parameter, not to its shares."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            if self._tried:
                raise
            raise WrongUse(f"the student cannot be learned in shares: {error}", HINT) from error
        self._tried = True
        names = [f"{type(m).__name__}.{name}" for m, name, p in self._slots
                 if p in self._shares and p.grad is not None]  # fmt: skip
        if names:
            raise WrongUse(f"{names[0]} is used outside of the student's modules", HINT)

    def end(self) -> None:
        """The module as it was, whole parameters without values: for load_state_dict to fill."""
        self._take_off()
        for p, (share, shape) in self._shares.items():
            p.data = torch.empty(shape, dtype=share.dtype, device=share.device)
            p.grad = None
        self._taken, self._shares = [], {}

    # -- between the two -----------------------------------------------------------------------
    def _empty(self) -> None:
        for p in self._shares:
            p.data = p.data.new_empty(0)
            p.grad = None

    def _take_off(self) -> None:
        self._taken = []
        for m, kind, known, before in self._before:
            more = {key: vars(m)[key] for key in vars(m).keys() - known}
            for key in more:
                del vars(m)[key]
            hooks = {}
            for key, had in before.items():
                now = vars(m)[key]
                hooks[key] = list(now.items())
                for handle in now.keys() - had:
                    del now[handle]
            self._taken.append((m, type(m), more, hooks))
            m.__class__ = kind
        for m, name, p in self._slots:
            m._parameters[name] = p

    def _put_on(self) -> None:
        for m, kind, more, hooks in self._taken:
            m.__class__ = kind
            vars(m).update(more)
            for key, items in hooks.items():
                now = vars(m)[key]
                late = [item for item in now.items() if item[0] not in dict(items)]
                now.clear()
                now.update([*items, *late])
        for m, name, p in self._slots:
            m._parameters[name] = self._shares[p][0] if p in self._shares else p

    @torch.no_grad()
    def _write(self) -> None:
        for m, name, p in self._slots:
            if m._parameters[name] is not p or (
                p in self._shares and p.shape != self._shares[p][1]
            ):
                raise WrongUse(
                    f"a hook put another parameter in the place of {type(m).__name__}.{name}",
                    HINT,
                )
        for p, (share, _) in self._shares.items():
            share.copy_(share_of(p, share))


def _hooks(module: nn.Module) -> dict[str, set[int]]:
    return {key: set(value) for key, value in vars(module).items()
            if key.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))
            and isinstance(value, dict)}  # fmt: skip
