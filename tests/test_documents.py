"""What the documents mention exists (links, commands, options, ids, files), and what exists is mentioned."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import psycopg2
import pytest
from sqlalchemy import create_engine

from chronos.cli import cli
from chronos.demo.rows import create_webhook_log
from chronos.errors import ChronosError, ExitCode, RefusedError
from chronos.explain import explain, id_of, paragraphs
from chronos.migration.checks import CHECKS
from tests.command import chronos
from tests.conftest import MakeDatabase
from tests.tables import query

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    Path(line)
    for line in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    if not (ROOT / line).is_symlink()
)  # fmt: skip
GUIDE = Path("PARTITION_MIGRATION_GUIDE.md")
OPERATIONS = Path("docs/OPERATIONS.md")

# Headings and messages that people search for by the names they have always had.
HEADINGS = """
# PostgreSQL Partitioning Migration Guide
## Overview
## Pre-Migration Checklist
### 1. Test in Development/Staging First
### 2. Verify Application Compatibility
### 3. Backup Production Database
### 4. Review Changes
## Migration Procedure
### Step 1: Choose Migration Window
### Step 2: Deploy Code Changes
### Step 3: Run Migration Script
### Step 4: Monitor Migration Progress
### Step 5: Verify Migration Success
### Step 6: Monitor for 24 Hours
### Step 7: Cleanup (After 7+ Days of Stability)
## Rollback Procedure
### If Migration Fails During Execution
### Manual Rollback (If Needed)
### Rollback Code Changes
## Post-Migration Benefits
### Performance Improvements
### Operational Benefits
### Expected Metrics
## Troubleshooting
### Migration Script Fails
### New Jobs Failing
### Application Errors
## Monitoring Commands
### Check Partition Count
### View Partition Sizes
### Check Oldest and Newest Partitions
### Verify Data Distribution
### Monitor Job Execution
## FAQs
## Support
## Summary
"""
SEARCHED_FOR = [
    "Table webhook_log_old already exists",
    "Cannot create partition for past date",
    "Function create_future_webhook_log_partitions does not exist",
    "Partition already exists",
    "Column 'id' is not part of primary key",
    "No partition exists for value",
    "SSL SYSCALL EOF",
    "Expected Output",
]
MOST_LINES = {"PARTITION_MIGRATION_GUIDE.md": 400, "README.md": 125}


def text_of(document: Path) -> str:
    return (ROOT / document).read_text("utf-8")


def prose_of(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_has_a_target(document: Path) -> None:
    text = prose_of(document)
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert (ROOT / file).exists(), target
        assert not anchor or anchor in anchors_of(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_everything_mentioned_exists(document: Path) -> None:
    text = text_of(document)
    assert isinstance(cli, click.Group)
    ours = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    for line in re.findall(r"python -m chronos[\w.]*([^`\n]*)", text):
        words = line.partition("#")[0].split()
        assert set(re.findall(r"--[a-z-]+", line.partition("#")[0])) <= ours, line
        if words and words[0].isalpha():
            assert words[0] in cli.commands, line
    targets = set(re.findall(r"^([a-z-]+):", text_of(Path("Makefile")), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target
    for path in re.findall(r"`((?:chronos|tests|docs|bench|deploy)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for one in re.findall(r"\[([a-z]+(?:-[a-z]+)+)\]`", text):
        assert one in paragraphs(), one


def test_the_guide_has_the_headings_and_messages_people_search_for() -> None:
    text = text_of(GUIDE)
    found = re.findall(r"^#+ .+$", text, re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS.split("\n")] == HEADINGS.split("\n")[1:-1]
    for message in SEARCHED_FOR:
        assert message in text, message


@pytest.mark.parametrize("document", MOST_LINES)
def test_a_document_is_no_longer_than_its_limit(document: str) -> None:
    assert len(text_of(Path(document)).splitlines()) <= MOST_LINES[document]


def test_each_option_of_migrate_is_explained() -> None:
    for param in cli.commands["migrate"].params:
        if isinstance(param, click.Option):
            assert f"`{param.opts[0]}" in text_of(OPERATIONS), param.opts[0]


# --- docs/TROUBLESHOOTING.md, and the verb that prints from it ---


def ids() -> set[str]:
    """Every id that is printed after a message."""
    found = {check.id for check in CHECKS}
    for module in (ROOT / "chronos" / "migration").glob("*.py"):
        found |= set(re.findall(r'(?:Finding|Obstacle)\(\s*"([a-z-]+)"', module.read_text("utf-8")))
    kinds = [ChronosError]
    for kind in kinds:  # grows during the loop
        kinds += kind.__subclasses__()
        if kind.id:
            found.add(kind.id)
    return found


def test_every_id_has_a_paragraph_and_every_paragraph_an_id() -> None:
    codes = {*map(str, ExitCode), *(one for one in paragraphs() if len(one) == 5 and one[0].isdigit())}
    assert {"disk-full"} | ids() == set(paragraphs()) - codes
    assert codes <= set(paragraphs())


def test_explain_prints_the_paragraph_of_an_id(database: str) -> None:
    shown = chronos(database, "explain", "[inbound-fk]")
    assert shown.returncode == 0
    assert shown.stdout.rstrip("\n") == explain("inbound-fk") == explain("self-fk")
    assert "`" not in shown.stdout.splitlines()[0]


def test_explain_of_an_unknown_id_suggests_a_similar_one(database: str) -> None:
    shown = chronos(database, "explain", "inbound-key")
    assert shown.returncode == 2
    assert "inbound-fk" in shown.stderr


def test_an_error_takes_the_id_of_its_cause() -> None:
    class OneError(ChronosError):
        id = "lock-unavailable"

    two = RefusedError("two")
    two.__cause__ = OneError("one")
    assert id_of(two) == "lock-unavailable"
    assert id_of(RefusedError("alone")) is None


# Statements that make PostgreSQL raise the error that the page has under an SQLSTATE.
SAID_BY_POSTGRES = {
    "23514": "INSERT INTO webhook_log (status, timestamp) VALUES ('x', now() + interval '40 days')",
    "42P10": "INSERT INTO webhook_log (id, status, timestamp) VALUES (1, 'x', now())"
    " ON CONFLICT (id) DO NOTHING",
    "42883": "DROP FUNCTION create_future_webhook_log_partitions;"
    " SELECT create_future_webhook_log_partitions(30)",
}


def test_the_page_quotes_the_messages_of_postgres(make_database: MakeDatabase) -> None:
    url = make_database()
    create_webhook_log(create_engine(url), 100)
    assert chronos(url, "migrate", "--yes").returncode == 0
    for state, statement in SAID_BY_POSTGRES.items():
        with pytest.raises(psycopg2.Error) as complaint:
            query(url, statement)
        assert complaint.value.pgcode == state
        assert f"`{complaint.value.diag.message_primary}`" in explain(state)
