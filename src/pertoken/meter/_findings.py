"""What an owner should know of an hour, as attribution comes across it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from pertoken.units import METERS, base_meter


@dataclass(frozen=True)
class Finding:
    """Something an owner should know: `kind` is one of `FINDINGS`, `amount` in the unit its text names."""

    kind: str
    hour: datetime
    pool: str
    text: str
    amount: float = 0.0


FINDINGS: dict[str, str] = {
    "gap": "a source was silent",
    "disagree": "two sources count the same thing differently",
    "unmatched": "usage events of a model no engine of the pool serves",
    "two_names": "engines of a pool name one model differently",
    "unknown_pool": "records of a pool the fleet does not have",
    "no_gpu_hours": "tokens, but nothing says how many GPUs were held",
    "no_energy": "GPUs held, but no reading of their energy, or of some of them alone",
    "overcommitted": "instances claim more GPUs than the pool has",
    "twice": "one engine reaches us two ways: one is booked",
    "unused": "records of a priced meter that nothing here books",
    "assumed_phase": "nothing but token counts says what prefill and decode took",
}


@dataclass(frozen=True)
class Notes:
    """Findings of one pool in one hour, as they are told."""

    hour: datetime
    pool: str
    found: list[Finding] = field(default_factory=list)

    def tell(self, kind: str, text: str, amount: float = 0.0) -> None:
        """One more."""
        self.found.append(Finding(kind, self.hour, self.pool, text, amount))

    def unused(self, kind: str, meter: str, amount: float, why: str) -> None:
        """Records of a priced meter from sources of a kind that nothing books."""
        unit = METERS[base_meter(meter)].unit
        text = f"{amount:.6g} {unit} of {meter} from {kind} sources are not booked: {why}"
        self.tell("unused", text, amount)
