"""Books to fill, for the tests of what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pertoken.fleet import load_fleet
from pertoken.report.books import Books, open_books


@pytest.fixture
def books_of(tmp_path: Path) -> Iterator[Callable[..., Books]]:
    """Opens books on a fleet written in YAML."""
    opened: list[Books] = []

    def make(text: str, folder: str = "data") -> Books:
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        opened.append(open_books(load_fleet(path), tmp_path / folder))
        return opened[-1]

    yield make
    for books in opened:
        books.shut()
