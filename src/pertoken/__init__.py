"""PerToken: cost per token as the unit of total cost of ownership for AI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.client import Client
    from pertoken.report.compare import compare

__version__ = "0.1.0"
__all__ = ["Client", "__version__", "compare"]


def __getattr__(name: str) -> Any:
    if name == "compare":
        from pertoken.report.compare import compare

        return compare
    if name == "Client":
        from pertoken.client import Client

        return Client
    raise AttributeError(f"module 'pertoken' has no attribute {name!r}")
