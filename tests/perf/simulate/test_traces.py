"""Traces: each public format is read, and a bad file gets one line that names the line."""

from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import InputError
from pertoken.perf.simulate import Requests, Trace, read_trace

EXAMPLES = Path(__file__).parents[3] / "examples" / "traces"
DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "traces"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,API log
"""
PLAIN = """arrival_s,input_tokens,output_tokens,priority,cached_tokens
0.5,100,10,0,0
1.5,200,20,2,64
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1300, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 600, "output_length": 4, "hash_ids": [0, 7]}
"""


def whole(trace: Trace) -> Requests:
    parts = list(trace.chunks())
    assert len(parts) == 1
    return parts[0]


def written(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_azure_2023(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, AZURE.replace("\n", "\r\n")))
    found = whole(trace)
    assert trace.kind == "azure"
    assert trace.start == datetime(2023, 11, 16, 18, 15, 46, 680590)  # noqa: DTZ001
    np.testing.assert_allclose(found.arrival_s, [0.0, 4.314579], atol=1e-6)
    assert found.input_tokens.tolist() == [374, 396]
    assert found.output_tokens.tolist() == [44, 109]


def test_azure_2024_has_a_zone_and_no_fraction_on_the_second(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, AZURE_2024))
    np.testing.assert_allclose(whole(trace).arrival_s, [0.0, 0.99007], atol=1e-6)
    assert trace.start is not None
    assert trace.start.tzinfo is not None


def test_burstgpt(tmp_path: Path) -> None:
    found = whole(read_trace(written(tmp_path, BURSTGPT), rate_factor=2.0))
    assert found.arrival_s.tolist() == [0.0, 20.25, 56.5]
    assert found.output_tokens.tolist() == [18, 230, 276]


def test_burstgpt_failed_requests_are_left_out_only_if_asked(tmp_path: Path) -> None:
    path = written(tmp_path, BURSTGPT.replace("1087,230,1317", "1087,0,1087"))
    with pytest.raises(InputError, match=r"line 3: 0 output tokens, must be 1 or more; a failed request\?"):
        list(read_trace(path).chunks())
    assert whole(read_trace(path, skip_failed=True)).arrival_s.tolist() == [0.0, 113.0]


def test_plain(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, PLAIN))
    found = whole(trace)
    assert found.priority is not None
    assert found.cached_tokens is not None
    assert found.priority.tolist() == [0, 2]
    assert found.cached_tokens.tolist() == [0, 64]
    assert trace.classes > 2


def test_mooncake_keeps_hashes_of_whole_blocks(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE, "m.jsonl"))
    found = whole(trace)
    assert trace.block_tokens == 512
    assert found.blocks is not None
    assert found.at is not None
    assert found.arrival_s.tolist() == [0.0, 3.052]
    rows = [found.hashes[a : a + b].tolist() for a, b in zip(found.at, found.blocks, strict=True)]
    assert rows == [[0, 1], [0]]


def test_packed_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.replace("\n", "\n\n").encode()))
    assert len(whole(read_trace(path))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (PLAIN.splitlines()[0], "no requests, only a heading"),
        ("a,b,c\n1,2,3\n", r"line 1: no heading of a trace: found 'a,b,c'"),
        ("arrival_s,input_tokens\n1,2\n", r"line 1: column 'output_tokens' is missing"),
        ("TIMESTAMP,ContextToken,GeneratedTokens\n", r"line 1: column 'ContextTokens' is missing \(is it 'Cont.*\?"),
        (PLAIN + "1.0,5,5,0,0\n", r"line 4: arrives 0.5 s before the line above: sort the file by time"),
        (PLAIN + "2.0,0,5,0,0\n", r"line 4: 0 input tokens, must be 1 or more"),
        (PLAIN + "2.0,-3,5,0,0\n", r"line 4: -3 input tokens, must be 1 or more"),
        (PLAIN + "2.0,5,99999999999,0,0\n", r"line 4: 99999999999 output tokens, more than 16,777,216: a mistake\?"),
        (PLAIN + "2.0,5,999999999999999999999,0,0\n", r"line 4: 9+ output tokens, more than"),
        (PLAIN + "2.0,5,1.5,0,0\n", r"line 4: output_tokens '1.5' is not a whole number"),
        (PLAIN + "2.0,5,,0,0\n", r"line 4: output_tokens '' is not a whole number"),
        (PLAIN + "two,5,5,0,0\n", r"line 4: arrival_s 'two' is not a number"),
        (PLAIN + "nan,5,5,0,0\n", r"line 4: the time is not a finite number"),
        (PLAIN + "2.0,5,5,99,0\n", r"line 4: priority 99, must lie in 0..15"),
        (PLAIN + "2.0,5,5,0,-1\n", r"line 4: -1 cached tokens"),
        (PLAIN + "2.0,5", r"line 4: 2 columns where the heading has 5; is the file cut short\?"),
        (PLAIN + "\n2.0,5,5,0,0,7\n", r"line 5: 6 columns where the heading has 5"),
        (AZURE + "2023-11-16 18:15:40,5,5\n", r"line 4: arrives 10.9\d* s before"),
        (AZURE + "yesterday,5,5\n", r"line 4: TIMESTAMP 'yesterday' is not a date and time"),
        (AZURE.replace("2023-11-16 18:15:46.6805900", "soon"), r"line 2: TIMESTAMP 'soon' is not a date and time"),
        (MOONCAKE + '{"timestamp": 4000, "input_le', r"line 3: not JSON: .*cut short\?"),
        (MOONCAKE + "[1, 2]\n", r"line 3: not a JSON object"),
        (MOONCAKE + '{"timestamp": 4000, "output_length": 4}\n', r"line 3: input_length missing"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 4, "output_length": 4}\n', r"line 3: arrives 3.051 s before"),
        (MOONCAKE + '{"timestamp": 4e3, "input_length": 0, "output_length": 4}\n', r"line 3: 0 input tokens"),
        (MOONCAKE + '{"timestamp": 4e3, "input_length": 9, "output_length": 4, "hash_ids": [-1]}\n', r"3: hash_ids"),
        (MOONCAKE + '{"timestamp": 4e3, "input_length": 9, "output_length": 4, "hash_ids": 3}\n', r"line 3: hash_ids"),
        (PLAIN + "2.0,5\r,5,0,0\n", r"trace.csv"),
        (b"\x00\x01\x02\xff" * 40, r"line 1: not a text file"),
        (b"\xff\xfe\x80\x81garbage", r"line 1: not a text file"),
        (PLAIN.encode() + b"\xff\xfe\x80\n", r"line 4: not a text file"),
        (PLAIN.encode() + b"2.0,\x00\x00,5,0,0\n", r"line 4: not a text file"),
    ],
)  # fmt: skip
def test_bad_files_get_one_line_with_its_number(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        list(read_trace(path).chunks())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_cut_off_archive(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    rows = "".join(f"{i},{i % 97 + 1},{i % 89 + 1},0,0\n" for i in range(2, 20_000))
    path.write_bytes(gzip.compress((PLAIN + rows).encode())[:20_000])
    with pytest.raises(InputError, match="damaged or cut short"):
        list(read_trace(path).chunks())


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([PLAIN, AZURE, BURSTGPT, MOONCAKE, ""]))
def test_any_garbage_is_an_input_error_or_requests(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, head: str
) -> None:
    path = written(tmp_path_factory.mktemp("t"), head.encode() + tail)
    try:
        parts = list(read_trace(path).chunks())
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert all(p.input_tokens.min() >= 1 and (np.diff(p.arrival_s) >= 0).all() for p in parts)


def test_large_files_come_in_pieces_with_the_line_of_a_late_fault(tmp_path: Path) -> None:
    rows = [f"{i / 16},{i % 97 + 1},{i % 89 + 1}" for i in range(300_000)]
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    parts = list(read_trace(path).chunks())
    assert len(parts) > 1
    assert sum(map(len, parts)) == 300_000
    assert parts[-1].arrival_s[-1] == 299_999 / 16
    assert [p.read_fraction for p in parts] == sorted(p.read_fraction for p in parts)
    rows[250_000] = "1.0,5,5"
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"line 250002: arrives .* before the line above"):
        list(read_trace(path).chunks())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*")), ids=lambda p: p.name)
def test_example_traces(path: Path) -> None:
    assert sum(map(len, read_trace(path).chunks())) > 100


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366),
        ("AzureLLMInferenceTrace_code.csv", 8_819),
        ("mooncake_conversation_first2000.jsonl", 2_000),
    ],
)
def test_published_traces(name: str, count: int) -> None:
    if not DATA.exists():
        pytest.skip("../shared/data is absent")
    parts = list(read_trace(DATA / name).chunks())
    assert sum(map(len, parts)) == count
