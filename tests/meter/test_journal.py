"""The journal keeps what it acknowledged, once, through crashes, full disks, damage and repetition."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError
from pertoken.meter import Journal, JournalBrokenError, JournalFullError, open_journal, records, totals
from pertoken.meter import _blocks as blocks
from pertoken.meter._window import Window, identities

HOUR = datetime(2026, 11, 24, 7, tzinfo=UTC)
WRITER = Path(__file__).with_name("_crash_writer.py")


def batch(*keys: str, at: datetime = HOUR, source: str = "usage/test", quantity: float = 1.0) -> pa.Table:
    return records(
        {
            "ts": [at.timestamp() + 1.0] * len(keys),
            "source": source,
            "key": list(keys),
            "pool": "h100",
            "model": "m",
            "tenant": "team",
            "meter": "output_tokens",
            "quantity": [quantity] * len(keys),
        },
        len(keys),
    )


def keys(journal: Journal, hour: datetime = HOUR) -> list[str]:
    return [str(k) for k in journal.read(hour).records.column("key").to_pylist()]


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*.ptj"))


def test_what_was_appended_is_read_back_exactly(tmp_path: Path) -> None:
    rows = records(
        {
            "ts": [HOUR.timestamp() + 0.123456, HOUR.timestamp() + 3599.0],
            "source": ["usage/a", "engine/é"],
            "key": ["k·1", "k2"],
            "pool": ["", "pool"],
            "model": ["x/y", ""],
            "tenant": ["t", "日本"],
            "meter": ["energy_kwh:tier2", "prefill_seconds"],
            "quantity": [0.1, 1e12],
            "basis": ["measured", "measured:power"],
        },
        2,
    )
    with open_journal(tmp_path) as journal:
        journal.append(rows)
    with open_journal(tmp_path) as journal:
        assert journal.read(HOUR).records.equals(rows)
        assert journal.totals(HOUR).records.equals(totals(rows))


def test_a_record_sent_again_counts_once_even_after_reopening(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        assert journal.append(batch("a", "b"))[:2] == (2, 0)
        assert journal.append(batch("b", "c", "c"))[:2] == (1, 2)
    with open_journal(tmp_path) as journal:
        assert journal.append(batch("a", "d"))[:2] == (1, 1)
        assert journal.append(batch("a", source="usage/other"))[:2] == (1, 0)
        assert sorted(keys(journal)) == ["a", "a", "b", "c", "d"]


def test_marks_become_durable_with_their_batch(tmp_path: Path) -> None:
    with open_journal(tmp_path, segment_bytes=500) as journal:
        for number in range(20):
            journal.append(batch(str(number)), marks={"engine/a": str(number).encode(), f"n{number}": b"x"})
        journal.append(batch("0"), marks={"engine/a": b"alone"})
    assert len(segments(tmp_path)) > 5
    for path in segments(tmp_path)[:-2]:
        path.unlink()  # newer segments carry the marks of older ones on
    with open_journal(tmp_path) as journal:
        assert journal.marks["engine/a"] == b"alone"
        assert {f"n{number}" for number in range(20)} <= set(journal.marks)


def test_hours_are_dirty_until_cleaned_and_again_when_late_records_come(tmp_path: Path) -> None:
    later = HOUR + timedelta(hours=1)
    with open_journal(tmp_path) as journal:
        journal.append(batch("b", at=later))
        journal.append(batch("a"))
        assert journal.dirty_hours() == [HOUR, later]
        read = journal.totals(HOUR)
        journal.append(batch("late"))  # between reading and closing
        journal.clean(HOUR, read.sequence)
        assert journal.dirty_hours() == [HOUR, later]
        journal.clean(HOUR, journal.totals(HOUR).sequence)
        assert journal.dirty_hours() == [later]
    with open_journal(tmp_path) as journal:
        assert journal.dirty_hours() == [later]
        journal.append(batch("later still"))
        assert journal.dirty_hours() == [HOUR, later]


def test_only_one_process_holds_a_journal(tmp_path: Path) -> None:
    with open_journal(tmp_path), pytest.raises(InputError, match="another process"):
        open_journal(tmp_path)
    journal = open_journal(tmp_path)
    journal.shut()
    with pytest.raises(InputError, match="shut"):
        journal.append(batch("a"))


def test_a_torn_tail_is_cut_wherever_it_tears(tmp_path: Path) -> None:
    with open_journal(tmp_path / "whole") as journal:
        journal.append(batch("a"))
        first = segments(tmp_path / "whole")[0].stat().st_size
        journal.append(batch("b"))
    whole = segments(tmp_path / "whole")[0].read_bytes()
    for size in range(first, len(whole)):
        folder = tmp_path / str(size)
        (folder / "segments").mkdir(parents=True)
        (folder / "segments" / "00000001.ptj").write_bytes(whole[:size])
        with open_journal(folder) as journal:
            assert journal.recovery.torn_bytes == size - first
            assert keys(journal) == ["a"]
            assert journal.append(batch("b")).rows == 1
            assert keys(journal) == ["a", "b"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_byte_loses_its_block_alone_and_is_reported(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    with open_journal(folder) as journal:
        for name in ("a", "b", "c"):
            journal.append(batch(name))
    path = segments(folder)[0]
    raw = bytearray(path.read_bytes())
    ends = [b.end for b in blocks.scan(memoryview(bytes(raw))) if isinstance(b, blocks.Block)]
    at = data.draw(st.integers(0, ends[1] - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    with open_journal(folder) as journal:
        lost = "a" if at < ends[0] else "b"
        assert keys(journal) == [k for k in ("a", "b", "c") if k != lost]
        ((name, _, size),) = journal.recovery.damaged
        assert (name, journal.recovery.torn_bytes) == (path.name, 0)
        assert size == (ends[0] if lost == "a" else ends[1] - ends[0])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_no_journal_but_no_crash(raw: bytes) -> None:
    parts = list(blocks.scan(memoryview(blocks.MAGIC + raw)))
    assert all(isinstance(part, blocks.Damage) for part in parts)


def test_a_full_disk_refuses_and_keeps_nothing_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(tmp_path) as journal:
        journal.append(batch("a"))
        real, left = os.write, [30]

        def full(file: int, data: bytes) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            room, left[0] = left[0], 0
            return real(file, data[:room])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(JournalFullError, match="send again"):
            journal.append(batch("b"), marks={"engine/a": b"new"})
        monkeypatch.setattr(os, "write", real)
        assert journal.marks == {}
        assert keys(journal) == ["a"]
        assert journal.append(batch("b")).rows == 1, "what was refused may be sent again"
    with open_journal(tmp_path) as journal:
        assert keys(journal) == ["a", "b"]
        assert journal.recovery.torn_bytes == 0


def test_a_disk_that_fills_between_two_segments_loses_no_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(tmp_path, segment_bytes=50) as journal:
        journal.append(batch("a"), marks={"engine/a": b"old"})
        real = os.write

        def full(file: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(JournalFullError):
            journal.append(batch("b"))
        monkeypatch.setattr(os, "write", real)
        journal.append(batch("b"))
    first, second = segments(tmp_path)
    first.unlink()
    with open_journal(tmp_path) as journal:
        assert journal.marks == {"engine/a": b"old"}
        assert keys(journal) == ["b"]
    assert second.exists()


def test_a_real_file_limit_refuses(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from pertoken.meter import open_journal, records, JournalFullError\n"
        "j = open_journal(sys.argv[1]); n = 0\n"
        "try:\n"
        "  while n < 100:\n"
        "    j.append(records({'ts': [1e9], 'source': 'usage/a', 'key': [str(n)], 'meter': 'requests',"
        " 'quantity': [1.0]}, 1)); n += 1\n"
        "except JournalFullError: print(n)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    acknowledged = int(done.stdout)
    assert 0 < acknowledged < 100
    with open_journal(tmp_path) as journal:
        hour = datetime.fromtimestamp(1e9, UTC).replace(minute=0, second=0)
        assert keys(journal, hour) == [str(n) for n in range(acknowledged)]


def test_little_free_space_refuses_before_it_is_gone(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path, reserve_bytes=1 << 60) as journal,
        pytest.raises(JournalFullError, match="bytes are free"),
    ):
        journal.append(batch("a"))


def test_after_a_failed_flush_nothing_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(tmp_path) as journal:

        def broken(file: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(JournalBrokenError):
            journal.append(batch("a"))
        monkeypatch.undo()
        with pytest.raises(JournalBrokenError):
            journal.append(batch("b"))


def test_threads_share_flushes_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    real = os.fdatasync

    def counted(file: int) -> None:
        flushes.append(file)
        real(file)

    monkeypatch.setattr(os, "fdatasync", counted)
    with open_journal(tmp_path, segment_bytes=20_000) as journal:

        def write(name: int) -> None:
            for i in range(40):
                assert journal.append(batch(f"{name}-{i}", f"shared-{i}")).rows >= 1

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = Counter(keys(journal))
    assert set(found.values()) == {1}
    assert len(found) == 8 * 40 + 40
    assert len(flushes) <= 8 * 40 + len(segments(tmp_path)) + 1


def test_days_are_exported_segments_dropped_and_late_records_merged(tmp_path: Path) -> None:
    day, next_day = HOUR, HOUR + timedelta(days=1)
    with open_journal(tmp_path, segment_bytes=300, window_rows=2) as journal:
        for i in range(10):
            journal.append(batch(f"a{i}"), marks={"engine/x": str(i).encode()})
        for i in range(4):
            journal.append(batch(f"n{i}", at=next_day))
        assert journal.compact(next_day.date()) == 0, "an hour that is not closed keeps its segments"
        journal.clean(day, journal.totals(day).sequence)
        before = journal.totals(day).records
        assert journal.compact(next_day.date()) > 0
        assert journal.totals(day).records.equals(before)
        assert journal.dirty_hours() == [next_day]
        assert journal.append(batch("late")).rows == 1
        assert journal.dirty_hours() == [day, next_day]
        assert sorted(keys(journal)) == sorted([*(f"a{i}" for i in range(10)), "late"])
        assert journal.export(day.date()) is not None
    with open_journal(tmp_path) as journal:
        assert sorted(keys(journal)) == sorted([*(f"a{i}" for i in range(10)), "late"])
        assert journal.marks == {"engine/x": b"9"}
        assert journal.export(date(2020, 1, 1)) is None
        assert journal.forget(next_day.date()) == 1
        assert len(keys(journal, next_day)) == 4


def test_the_window_knows_the_newest_rows_and_forgets_by_generation() -> None:
    window = Window(1000)
    rng = np.random.default_rng(1)
    everything = np.unique(rng.integers(1, 2**63, 5000).astype(np.uint64))
    rng.shuffle(everything)
    for start in range(0, len(everything), 50):
        part = everything[start : start + 50]
        assert window.fresh(part).all()
        window.add(part)
        assert not window.fresh(part).any()
    assert not window.fresh(everything[-1000:]).any()
    assert window.fresh(everything[:2000]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=60, unique=True))
def test_identities_differ_where_keys_do(texts: list[str]) -> None:
    rows = batch(*(t.encode(errors="ignore").decode() for t in texts))
    found = identities(blocks.pack(rows)).tolist()
    assert len(set(found)) == len({t.encode(errors="ignore") for t in texts})
    alone = [identities(blocks.pack(rows.slice(i, 1))).tolist()[0] for i in range(rows.num_rows)]
    assert alone == found, "an identity does not depend on its neighbours"


def test_kill_9_at_random_fifty_times_loses_and_repeats_nothing(tmp_path: Path) -> None:
    rng = random.Random(9)
    acknowledged: set[str] = set()
    pipe, folder = tmp_path / "pipe", tmp_path / "journal"
    os.mkfifo(pipe)
    nursery = subprocess.Popen(
        [sys.executable, str(WRITER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    with nursery, nursery.stdin, nursery.stdout:
        for run in range(50):
            nursery.stdin.write(f"{folder} {run} {pipe}\n")
            nursery.stdin.flush()
            pid = int(nursery.stdout.readline())
            with pipe.open("rb", buffering=0) as said:
                heard = b""
                wanted = rng.randrange(1, 60)
                while heard.count(b"\n") < wanted:
                    part = said.read(rng.randrange(1, 200))
                    assert part, "the writer stopped by itself"
                    heard += part
                os.kill(pid, signal.SIGKILL)
                heard += said.readall()  # until the killed process is gone, and its lock with it
            acknowledged.update(line.decode() for line in heard.split(b"\n")[:-1])
    with open_journal(folder) as journal:
        found = Counter(
            k for hour in journal.dirty_hours() for k in journal.read(hour).records.column("key").to_pylist()
        )
        marks = journal.marks
        assert not journal.recovery.damaged
    assert set(found.values()) == {1}
    assert {f"{name}-{i}" for name in acknowledged for i in range(40)} <= set(found)
    batches = Counter(str(k).rpartition("-")[0] for k in found)
    assert set(batches.values()) == {40}, "a batch is kept whole or not at all"
    for name in batches:
        writer, _, number = name.rpartition("-")
        assert int(marks[writer]) >= int(number)
