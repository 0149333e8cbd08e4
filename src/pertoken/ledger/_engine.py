"""Where the ledger's tables live: one function, `connect`, behind which an engine runs the same plain SQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa

from pertoken.errors import InputError, PerTokenError

Parameters = Sequence[object]


class Engine(Protocol):
    """What the ledger asks of an engine."""

    def execute(self, sql: str, parameters: Parameters = ()) -> None:
        """Run one statement."""

    def query(self, sql: str, parameters: Parameters = ()) -> pa.Table:
        """Run one SELECT and return its rows."""

    def load(self, table: str, rows: pa.Table) -> None:
        """Append rows whose columns are in the table's order."""

    def transaction(self) -> AbstractContextManager[None]:
        """All statements inside happen, or none; inside another one of its thread it is a part of that one."""

    def close(self) -> None:
        """Release the engine."""


class LedgerBrokenError(PerTokenError):
    """The disk or the memory under the ledger failed: what was to be written is not."""


_BROKEN = (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.FatalException)


class _DuckDB:
    """DuckDB in this process, in memory or in one file that only this process may hold."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._local = threading.local()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        # DuckDB wants one cursor per thread; a cursor shares the database, not the transaction.
        cursor: duckdb.DuckDBPyConnection | None = getattr(self._local, "cursor", None)
        if cursor is None:
            cursor = self._local.cursor = self._connection.cursor()
            cursor.execute("SET TimeZone = 'UTC'")
        return cursor

    def execute(self, sql: str, parameters: Parameters = ()) -> None:
        self._cursor().execute(sql, list(parameters)).fetchall()

    def query(self, sql: str, parameters: Parameters = ()) -> pa.Table:
        rows: pa.Table = self._cursor().sql(sql, params=list(parameters)).to_arrow_table()
        return rows

    def load(self, table: str, rows: pa.Table) -> None:
        cursor = self._cursor()
        cursor.register("incoming", rows)
        try:
            columns = ", ".join(rows.column_names)
            cursor.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM incoming").fetchall()
        except duckdb.Error:
            with suppress(duckdb.Error):  # in a transaction that failed it fails, too, and would hide why
                cursor.unregister("incoming")
            raise
        cursor.unregister("incoming")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if getattr(self._local, "begun", False):
            yield
            return
        cursor = self._cursor()
        cursor.execute("BEGIN TRANSACTION").fetchall()
        self._local.begun = True
        try:
            try:
                yield
            except BaseException:
                with suppress(*_BROKEN):  # what was wrong is what the caller shall see
                    cursor.execute("ROLLBACK").fetchall()
                raise
            cursor.execute("COMMIT").fetchall()
        except _BROKEN as error:
            reason = str(error).splitlines()[0]
            raise LedgerBrokenError(f"the ledger cannot be written: {reason}") from error
        finally:
            self._local.begun = False

    def close(self) -> None:
        self._connection.close()


def connect(where: str | Path | None = None) -> Engine:
    """The engine at `where`: None for DuckDB in memory, a path for DuckDB in that file.

    Raises InputError where the file is not a ledger or another process holds it.
    """
    try:
        connection = duckdb.connect(":memory:" if where is None else str(where))
    except duckdb.IOException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot open the ledger {where}: {reason}; only one process may hold it at a time"
        ) from error
    return _DuckDB(connection)
