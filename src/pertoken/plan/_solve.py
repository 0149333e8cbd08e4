"""HiGHS, driven: load a program in bulk, fix and free columns, watch the gap, stop when asked and keep the
best.

The solver runs in a thread of its own while the calling thread waits and passes on progress. Ctrl-C sets a flag
that everything looks at (`stoppable`), so that no interrupt unwinds through the solver or between two solves, and
the best solution so far is still there; a second Ctrl-C interrupts as ever.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import highspy
import numpy as np

from pertoken.errors import PerTokenError
from pertoken.plan._instance import Bools, Floats, Ints
from pertoken.plan._program import INF, Program

_POLL_S = 0.05


@dataclass(frozen=True)
class Progress:
    """Where a solve stands: the step, the best objective so far, the bound no plan can beat, and their
    gap."""

    elapsed_s: float
    step: str
    best: float | None
    bound: float | None
    gap_fraction: float | None


Report = Callable[[Progress], None]


@dataclass
class Watch:
    """Clock, progress and stop of one `plan` call."""

    time_limit_s: float
    report: Report | None = None
    began: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    abort: threading.Event = field(default_factory=threading.Event)
    """Set by a second Ctrl-C: not even what was begun is finished."""
    best: float | None = None
    bound: float | None = None
    queue: SimpleQueue[Progress] = field(default_factory=SimpleQueue)
    first_feasible_s: float | None = None

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def left_s(self) -> float:
        return max(0.0, self.time_limit_s - self.elapsed_s())

    @property
    def over(self) -> bool:
        return self.stop.is_set() or self.left_s() <= 0

    def finish(self, limit_s: float) -> Watch:
        """A watch for what must still be done once this one is over, so that there is a whole plan."""
        return Watch(limit_s, None, stop=self.abort)

    def tell(self, step: str, best: float | None = None, bound: float | None = None) -> None:
        """Queue a report; the waiting thread hands it on."""
        self.best = best if best is not None else self.best
        self.bound = bound if bound is not None else self.bound
        if best is not None and self.first_feasible_s is None:
            self.first_feasible_s = self.elapsed_s()
        self.queue.put(Progress(self.elapsed_s(), step, self.best, self.bound, gap(self.best, self.bound)))

    def drain(self) -> None:
        while True:
            try:
                item = self.queue.get_nowait()
            except Empty:
                return
            if self.report is not None:
                try:
                    self.report(item)
                except KeyboardInterrupt:
                    if self.abort.is_set():
                        raise
                    self.stop.set()


@contextmanager
def stoppable(watch: Watch) -> Iterator[None]:
    """Ctrl-C asks the watch to stop; a second one interrupts. Only in the main thread, where nobody else listens."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def ask(number: int, frame: object) -> None:
        if watch.stop.is_set():
            watch.abort.set()
            raise KeyboardInterrupt
        watch.stop.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def gap(best: float | None, bound: float | None) -> float | None:
    """Relative distance of the best solution from the bound: |best − bound| / |best|.

    >>> gap(100.0, 99.0)
    0.01
    """
    if best is None or bound is None or not np.isfinite([best, bound]).all():
        return None
    return abs(best - bound) / max(abs(best), 1e-9)


class _Quiet(highspy.Highs):
    """HiGHS without a word on the terminal: its banner comes with the callbacks, before an option can be
    set."""

    def enableCallbacks(self) -> None:  # noqa: N802, the name is theirs
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


class Session:
    """One program inside HiGHS, kept warm between solves."""

    def __init__(self, program: Program, watch: Watch) -> None:
        self.program, self.watch = program, watch
        self.lower, self.upper = program.lower.copy(), program.upper.copy()
        self.highs: Any = _Quiet()  # type: ignore[no-untyped-call]
        self.status = "not solved"
        self.objective = INF
        self.x: Floats = np.zeros(0)
        self.row_dual: Floats = np.zeros(0)
        self.reduced_cost: Floats = np.zeros(0)
        self._load(program)

    def _load(self, p: Program) -> None:
        rows, columns, entries = p.shape
        sense = -1 if p.maximise else 1
        status = self.highs.passModel(
            columns, rows, entries, 2, sense, p.objective_offset, p.objective, p.lower, p.upper, p.row_lower,
            p.row_upper, p.start, p.index, p.value, np.zeros(columns, dtype=np.int32),
        )  # fmt: skip
        if status == highspy.HighsStatus.kError:
            raise PerTokenError("the optimiser refused the plan's program; please report the scenario")

    def bounds(self, columns: Ints, lower: Floats | float, upper: Floats | float) -> None:
        """Set the bounds of columns (−1 is passed over)."""
        number = columns.ravel()
        low = np.broadcast_to(np.asarray(lower, dtype=np.float64), columns.shape).ravel()
        high = np.broadcast_to(np.asarray(upper, dtype=np.float64), columns.shape).ravel()
        keep = number >= 0
        if keep.any():
            self.lower[number[keep]], self.upper[number[keep]] = low[keep], high[keep]
            self.highs.changeColsBounds(int(keep.sum()), number[keep].astype(np.int32), low[keep], high[keep])

    def free(self) -> None:
        """All columns back to the program's own bounds."""
        every = np.arange(len(self.program.lower))
        self.bounds(every, self.program.lower, self.program.upper)

    def relax(self, *, barrier: bool = False, cutoff: float | None = None) -> bool:
        """Solve as a linear program from where it stands; True where optimal.

        cutoff: give up (status ``cut off``) once the optimum is known to be no less.
        """
        self.highs.setOptionValue("solver", "ipm" if barrier else "simplex")
        self.highs.setOptionValue("objective_bound", INF if cutoff is None else cutoff)
        self._run()
        self.highs.setOptionValue("objective_bound", INF)
        return self.status == "optimal"

    def integer(
        self, gap_fraction: float, start: Floats | None, limit_s: float, *, only: Ints | None = None
    ) -> bool:
        """Solve as an integer program, from a solution if given; True where a solution is known at the end.

        only: the columns that are to be whole; None: all the program says.
        """
        highs, whole = self.highs, self.program.integer
        if only is not None:
            whole = np.zeros(len(whole), dtype=np.bool_)
            whole[only] = True
        kind = np.where(whole, highspy.HighsVarType.kInteger.value, highspy.HighsVarType.kContinuous.value)
        every = np.arange(len(kind), dtype=np.int32)
        highs.changeColsIntegrality(len(kind), every, kind.astype(np.uint8))
        highs.setOptionValue("solver", "choose")
        highs.setOptionValue("mip_rel_gap", float(gap_fraction))
        if start is not None:
            highs.setSolution(len(kind), every, start)
        watched = (
            (highs.cbMipImprovingSolution, highs.cbMipLogging) if only is None else (highs.cbMipLogging,)
        )
        listener = self._improved if only is None else self._bound_only
        for item in watched:
            item.subscribe(listener)
        self._run(limit_s)
        for item in watched:
            item.unsubscribe(listener)
        highs.changeColsIntegrality(len(kind), every, np.zeros(len(kind), dtype=np.uint8))
        return bool(np.isfinite(self.objective))

    def _bound_only(self, event: Any) -> None:
        """Pass on a better bound: that of a program with fewer whole columns bounds the whole one too."""
        watch, bound = self.watch, event.data_out.mip_dual_bound
        sign = -1 if self.program.maximise else 1
        if np.isfinite(bound) and (watch.bound is None or sign * bound > sign * watch.bound * (1 + 1e-9)):
            watch.tell("choosing what is held", None, bound)

    def _improved(self, event: Any) -> None:
        """Pass on what the integer program has found, where it is better than what is known."""
        watch, out, sign = self.watch, event.data_out, -1 if self.program.maximise else 1
        bound = out.mip_dual_bound if np.isfinite(out.mip_dual_bound) else None
        best = out.mip_primal_bound if np.isfinite(out.mip_primal_bound) else None
        better = best is not None and (watch.best is None or sign * best < sign * watch.best)
        tighter = bound is not None and (watch.bound is None or sign * bound > sign * watch.bound)
        if better or tighter:
            watch.tell("integer program", best if better else None, bound if tighter else None)

    def _run(self, limit_s: float | None = None) -> None:
        highs, watch = self.highs, self.watch
        left = watch.left_s() if limit_s is None else min(limit_s, watch.left_s())
        highs.setOptionValue("time_limit", float(max(left, 0.01)))

        def ask(event: Any) -> None:
            if watch.over:
                event.interrupt()

        interrupts = (highs.cbMipInterrupt, highs.cbSimplexInterrupt, highs.cbIpmInterrupt)
        for item in interrupts:
            item.subscribe(ask)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                highs.run()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True, name="pertoken-plan")
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            watch.drain()
        for item in interrupts:
            item.unsubscribe(ask)
        watch.drain()
        if failure:
            raise failure[0]
        self._read()

    def _read(self) -> None:
        highs = self.highs
        names = {
            highspy.HighsModelStatus.kOptimal: "optimal",
            highspy.HighsModelStatus.kInfeasible: "infeasible",
            highspy.HighsModelStatus.kUnboundedOrInfeasible: "infeasible",
            highspy.HighsModelStatus.kUnbounded: "unbounded",
            highspy.HighsModelStatus.kObjectiveBound: "cut off",
            highspy.HighsModelStatus.kTimeLimit: "time limit",
            highspy.HighsModelStatus.kInterrupt: "stopped",
        }
        info = highs.getInfo()
        status = highs.getModelStatus()
        # Its own interrupt has a name of its own that not every stub knows.
        told = "stopped" if "Interrupt" in status.name else str(highs.modelStatusToString(status))
        self.status = names.get(status, told)
        feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        if not feasible or self.status in ("infeasible", "unbounded", "cut off"):
            self.objective = INF
            return
        solution = highs.getSolution()
        self.objective = float(info.objective_function_value)
        self.x = np.asarray(solution.col_value, dtype=np.float64)
        if solution.dual_valid:
            self.row_dual = np.asarray(solution.row_dual, dtype=np.float64)
            self.reduced_cost = np.asarray(solution.col_dual, dtype=np.float64)

    @property
    def mip_bound(self) -> float:
        """What the integer solve proved: no solution beats this."""
        return float(self.highs.getInfo().mip_dual_bound)


def fix(session: Session, columns: Ints, values: Floats) -> None:
    """Hold columns at values."""
    session.bounds(columns, values, values)


def near(x: Floats) -> Floats:
    """Values a hair from a whole number made whole."""
    whole = np.round(x)
    return np.where(np.abs(x - whole) < 1e-6, whole, x)


def is_fraction(x: Floats) -> Bools:
    """Which values are not whole."""
    return np.asarray(np.abs(x - np.round(x)) >= 1e-6)
