"""Everything that can go wrong for a reason a person can mend.

    UserError                 what went wrong, with which values, and a hint           exit 2
    ├── WrongUse              an option, a name or a combination that cannot be        exit 2
    │   ├── UnknownName       a name that no registry knows (nearest ones are named)   exit 2
    │   ├── ChangedRequest    a run directory that belongs to another request          exit 2
    │   └── ImpossibleBudget  a budget that no plan meets (says the smallest)          exit 2
    ├── BadInput              a model or data file that is damaged, hostile or empty   exit 1
    ├── MissingPackage        an optional package that this step needs                 exit 1
    ├── NoRoom                too little disk or memory for what was asked             exit 1
    └── BadOutput             what was written does not read back, or is worse         exit 1

Anything else that escapes is a bug in lighten and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that its reader can mend: `message` says what and with which values, `hint` how."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class WrongUse(UserError):
    """An option, a name or a combination that cannot be."""


class UnknownName(WrongUse, KeyError):
    """A name that a registry does not know."""

    __str__ = UserError.__str__  # KeyError would quote the whole message


class ChangedRequest(WrongUse):
    """A run directory that was begun for another request."""


class ImpossibleBudget(WrongUse):
    """A budget that no plan meets. least: what the cheapest costs, where that is known."""

    def __init__(self, message: str, hint: str = "", least: float | None = None) -> None:
        super().__init__(message, hint)
        self.least = least


class BadInput(UserError):
    """A model or data file that is damaged, hostile or empty."""

    exit_code = 1


class MissingPackage(UserError):
    """An optional package that this step needs."""

    exit_code = 1


class NoRoom(UserError):
    """Too little disk or memory for what was asked."""

    exit_code = 1


class BadOutput(UserError):
    """What was written does not read back, or does worse than a plain baseline."""

    exit_code = 1
