"""One tree of errors, so that a caller can catch exactly what it can mend.

::

    PerTokenError                 everything we raise on purpose; the CLI prints it in one line, exit code 2
    ├── InputError                a file, an option or a value from a human or a network
    │   ├── UnknownNameError      a name that is in no catalogue; carries the nearest ones
    │   └── ScenarioError         a scenario file: path, line and field
    ├── CannotServeError          physics says no: does not fit, precision missing, SLO out of reach
    ├── NoEvidenceError           nothing supports the number that was asked for
    ├── MissingRateError          usage that no rate prices
    ├── InfeasibleError           a plan no schedule can meet; names the constraint in the way
    ├── NoPlanError               no plan within the limits was found, which does not prove that there is none
    └── MissingExtraError         an optional part is not installed; carries the pip line
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerTokenError(Exception):
    """Base of all errors PerToken raises on purpose."""


class InputError(PerTokenError):
    """A value from a human, a file or the network that cannot be used."""


SHOWN = 12
"""Known names told where none is near."""


class UnknownNameError(InputError):
    """A name that is in no catalogue.

    Parameters: what the name should name ("GPU", "model"), the name asked for, the known names, the list of
    `pertoken catalog` to look at where none is near (empty: it is in none, the known names are told), and the part
    of the name that counts (empty: all of it).

    >>> str(UnknownNameError("scope", "admin", ["read", "write"]))
    "unknown scope 'admin': there is read, write"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "", like: str = "") -> None:
        self.kind, self.name, known = kind, name, list(known)
        self.nearest = nearest(like or name, known)
        super().__init__(f"unknown {kind} {name!r}: {self._remedy(known, hint)}")

    def _remedy(self, known: list[str], hint: str) -> str:
        if self.nearest:
            return f"did you mean {', '.join(self.nearest)}?"
        if hint:
            return f"see `pertoken catalog {hint}`"
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        return f"there is {', '.join(known[:SHOWN])}{more}" if known else "there is none"


class ScenarioError(InputError):
    """A scenario or fleet file that cannot be used; says file, line, field, what was found and what fits.

    `field` is the path of keys to it, such as ``pools.h100.price``; empty where it is the file as a whole.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class CannotServeError(PerTokenError):
    """The hardware cannot do what was asked, whatever it costs; the message says by how much."""


class NoEvidenceError(PerTokenError):
    """No measurement, fit or physical model supports the number that was asked for."""


class MissingRateError(PerTokenError):
    """Usage that no rate prices: close refuses to call it free."""


class InfeasibleError(PerTokenError):
    """No schedule meets every constraint; names the one in the way and what is missing."""


class NoPlanError(PerTokenError):
    """No plan within the limits was found, which does not prove that there is none."""


class MissingExtraError(PerTokenError):
    """An optional part is not installed.

    >>> str(MissingExtraError("kernels", "kernel-level prediction"))
    "kernel-level prediction needs the extra 'kernels': pip install 'pertoken[kernels]'"
    """

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r}: pip install 'pertoken[{extra}]'")


LEAST_BEGUN = 4
"""Letters and digits of a name from which those that begin with it come first."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that begin with `name` or look most like it, best first; case and punctuation do not count.

    >>> nearest("h100-smx", ["H100-SXM", "H200-SXM", "L4"])
    ['H100-SXM', 'H200-SXM']
    >>> nearest("llama-3.3", ["Llama-3.2-3B", "Llama-3.3-70B-Instruct"])
    ['Llama-3.3-70B-Instruct', 'Llama-3.2-3B']
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    by_plain: dict[str, str] = {}
    for candidate in known:
        by_plain.setdefault(plain(candidate), candidate)
    target = plain(name)
    begin = sorted((p for p in by_plain if len(target) >= LEAST_BEGUN and p.startswith(target)), key=len)
    alike = difflib.get_close_matches(target, by_plain, n=count, cutoff=0.5)
    contain = sorted((p for p in by_plain if target and target in p), key=len)
    return [by_plain[p] for p in list(dict.fromkeys((*begin, *alike, *contain)))[:count]]
