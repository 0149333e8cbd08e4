"""Documents tell what is true: generated ones are current, examples in Markdown are real files and verbs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_current() -> None:
    for path, text in generator().documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run `make docs`"


def test_every_setting_says_what_it_is() -> None:
    from pertoken.scenario import json_schema

    schema = json_schema()
    bare = [
        f"{name}.{field}"
        for name, body in [("Scenario", schema), *schema["$defs"].items()]
        for field, spec in body.get("properties", {}).items()
        if not spec.get("description")
    ]
    assert bare == []


MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: p.name)
def test_links_and_verbs_in_documents_exist(path: Path) -> None:
    import typer

    from pertoken.cli import app

    verbs = set(getattr(typer.main.get_command(app), "commands", {}))
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for verb in re.findall(r"(?:^|`|\s{4})pertoken ([a-z]+)", text, flags=re.MULTILINE):
        assert verb in verbs, f"{path.name} names `pertoken {verb}`"
    for example in re.findall(r"examples/[\w./-]+\.\w+", text):
        assert (ROOT / example).exists(), f"{path.name} names {example}"


def test_no_document_names_a_machine_or_an_index() -> None:
    here = str(ROOT.parent)
    for path in [*MARKDOWN, ROOT / "requirements.txt", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8")
        assert here + "/" not in text
        assert not re.search(r"index-url|find-links", text)
