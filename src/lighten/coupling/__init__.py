"""Which channels live and die together: labels run through the torch.export graph."""

from lighten.coupling import moves, norms, pointwise, products, recurrent  # noqa: F401  (rules)
from lighten.coupling.axes import Couplings, Keep, analyse, stored_names
from lighten.network import Network


def couple(network: Network) -> Couplings:
    """Find which channels of a network live and die together; every axis is tried out once.

    On the meta device there are no values to try it on. Raises BadInput where torch.export cannot
    trace the module.
    """
    from lighten.shrink import verified  # which itself reads couplings

    return verified(network, analyse(network))


__all__ = ["Couplings", "Keep", "analyse", "couple", "stored_names"]
