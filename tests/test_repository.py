"""What people who work on the repository rely on: changelog, hooks, issue forms, licence."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from chronos import __version__

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_changelog_keeps_its_format() -> None:
    """Keep a Changelog: unreleased changes on top, then the versions with their dates, newest first."""
    headings = re.findall(r"^#.*$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["# Changelog", "## [Unreleased]"]
    released = []
    for heading in headings[2:]:
        if heading.startswith("### "):
            kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
            assert heading.removeprefix("### ") in kinds
            continue
        found = re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        assert found, heading
        released.append((date.fromisoformat(found[2]), [int(part) for part in found[1].split(".")]))
    assert released == sorted(released, reverse=True)
    assert not released or ".".join(map(str, released[0][1])) == __version__
    for line in read("CHANGELOG.md").splitlines():
        assert line == "" or line.startswith(("#", "- ", "  ", "What changed")), line


def test_the_hooks_run_what_make_check_runs() -> None:
    [repository] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched: the tools are those of requirements-dev.txt
    entries = [hook["entry"] for hook in repository["hooks"]]
    makefile = read("Makefile")
    for tool in ("ruff format", "ruff check", "mypy"):
        assert f"$(RUN) {tool}" in makefile
        assert any(entry.startswith(f".venv/bin/python -m {tool}") for entry in entries)
    [mypy] = [entry for entry in entries if " mypy " in entry]
    [sources] = re.findall(r"^SOURCES := \$\(wildcard (.*)\)$", makefile, re.MULTILINE)
    assert mypy.endswith(f" mypy {sources}")


def test_the_issue_form_requires_what_an_answer_needs() -> None:
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/report.yml"))
    fields: dict[str, dict[str, Any]] = {field["id"]: field for field in form["body"] if "id" in field}
    needed = {key for key, field in fields.items() if field.get("validations", {}).get("required")}
    assert {"happened", "versions", "status"} <= needed
    assert "report" in fields
    assert "chronos status --json" in fields["status"]["attributes"]["label"]
    assert "chronos --version" in fields["versions"]["attributes"]["value"]


def test_the_licence_is_mit() -> None:
    assert read("LICENSE").startswith("MIT License\n")
