"""Every numbered statement in docs/spec is cited by a test, or says why it cannot be."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATEMENT = re.compile(r"^- \*\*([A-Z]+-?\d+[a-z]?)\*\* (.*)$", re.MULTILINE)
DOCUMENTS = sorted((ROOT / "docs" / "spec").glob("*.md"))


def cited() -> set[str]:
    """Every statement number that a test names; `UNDO-1 to 6` counts for each of them."""
    numbers: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        numbers |= set(re.findall(r"\b(?:[A-Z]+-\d+[a-z]?|V\d+)\b", text))
        for prefix, first, last in re.findall(r"\b([A-Z]+-|V)(\d+) to (?:\1)?(\d+)\b", text):
            numbers |= {f"{prefix}{n}" for n in range(int(first), int(last) + 1)}
    return numbers


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_statements_are_cited(document: Path) -> None:
    statements = STATEMENT.findall(document.read_text())
    assert statements, "no statements found: the form is '- **ID** text'"
    numbers = cited()
    missing = [name for name, text in statements if name not in numbers and "*No test: " not in text]
    assert missing == []


def test_statements_are_unique() -> None:
    names = [name for path in DOCUMENTS for name, _ in STATEMENT.findall(path.read_text())]
    assert len(names) == len(set(names))
