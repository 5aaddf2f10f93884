"""Which channels live and die together: labels run through the torch.export graph."""

from lighten.coupling import moves, norms, pointwise, products, recurrent  # noqa: F401  (rules)
from lighten.coupling.axes import Couplings, Keep, couple, stored_names

__all__ = ["Couplings", "Keep", "couple", "stored_names"]
