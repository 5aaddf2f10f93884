"""Where a student learns and in which precision: Lightning Fabric, set up quietly.

Needs the package `lightning`, imported when learning begins.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from lighten import sharding
from lighten.cpu import multiplies_bfloat16
from lighten.errors import MissingPackage, WrongUse

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_SHARDING = ("fsdp", "deepspeed", "modelparallel", "model_parallel")
"""In names of Lightning's own strategies that spread weights."""

FSDP = "fsdp"

PRECISIONS = ("auto", "32-true", "bf16-mixed")


def start_fabric(
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: Any = "auto",
) -> Fabric:
    """Fabric on the best device, its processes started; raises MissingPackage, WrongUse."""
    need_lightning()
    from lightning.fabric import Fabric

    device = chosen(accelerator)
    how = _spread(device) if strategy == FSDP else strategy
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if how is strategy and any(word in name.lower() for word in _SHARDING):
        raise WrongUse(
            f"strategy `{name}` spreads the student's weights in a way that is not known here",
            '"fsdp" spreads them, "ddp" keeps all weights on each device',
        )
    # it tells everyone which precision it was given, through whichever logger was made last
    logs = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        fabric = Fabric(
            accelerator=device,
            devices=devices,
            strategy=how,
            precision=best_precision(precision, device),  # type: ignore[arg-type]
        )
        fabric.launch()
    except (ValueError, RuntimeError, ImportError) as error:
        raise WrongUse(
            f"accelerator={accelerator}, devices={devices}, strategy={strategy}: {error}",
            'accelerator "auto", devices 1 and strategy "auto" run everywhere',
        ) from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    return fabric


def _spread(device: str) -> Any:
    if device not in ("cpu", "cuda", "gpu"):
        raise WrongUse(f'strategy "fsdp" does not run on {device}', 'on "cuda" and "cpu" it does')
    return sharding.strategy()


def need_lightning() -> None:
    """Raises MissingPackage where the package `lightning` is not installed."""
    try:
        import lightning.fabric  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            "learning needs the package `lightning`", "pip install lighten[train]"
        ) from error


def chosen(accelerator: str) -> str:
    """The accelerator that "auto" means here: cuda, mps or cpu."""
    if accelerator != "auto":
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def widest(device: torch.device) -> torch.dtype:
    """What sums over many numbers are kept in: float64, float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def several(devices: Any, accelerator: str) -> bool:
    """Whether Lightning would take more than one device.

    >>> several(1, "cpu"), several("2", "cpu"), several("auto", "cpu"), several([0, 1], "cuda")
    (False, True, False, True)
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | tuple):
        return len(devices) > 1
    if devices in ("auto", -1, "-1"):
        return chosen(accelerator) in ("cuda", "gpu") and torch.cuda.device_count() > 1
    try:
        return int(devices) > 1
    except (TypeError, ValueError) as error:
        raise WrongUse(f"devices={devices!r} cannot be", 'a number, or "auto"') from error


def best_precision(precision: str, device: str) -> str:
    """ "auto": bfloat16 where the device multiplies it faster than float32, else float32.

    Raises WrongUse for another word.
    """
    if precision not in PRECISIONS:
        raise WrongUse(f"precision `{precision}` is not known", f"known: {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device in ("cuda", "gpu"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "cpu" and multiplies_bfloat16()
    return "bf16-mixed" if fast else "32-true"
