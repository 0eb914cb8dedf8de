"""The report of a run: the same facts as a page and as JSON, however the run ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from chronos.migration.report_page import html, rate_chart, rows_chart
from tests.command import chronos
from tests.tables import holding, query, relations, value
from tests.test_migration import REFUSE, fill, stopped_in_the_copy

_VOID = {"meta", "rect", "line", "polyline"}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class _Page(HTMLParser):
    """Checks that elements are closed in order; keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {' '.join(data.split())}"


def page(path: Path) -> _Page:
    """The report, after checking that it is self-contained."""
    text = path.read_text("utf-8")
    found = _Page(text)
    assert path.stat().st_size < 300_000
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    opened_by_a_browser(path)
    return found


def opened_by_a_browser(path: Path) -> None:
    """If there is a headless browser: it draws both charts and reports no error."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        return  # the parser has read the page; CI has no browser
    found = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in found.stderr
    assert "<svg" in found.stdout or "<svg" not in path.read_text("utf-8")


def test_a_complete_run_reports_who_where_when_what_and_how_to_roll_back(
    database: str, tmp_path: Path
) -> None:
    fill(database)
    path = tmp_path / "ticket.html"

    result = chronos(database, "migrate", "--yes", "--batch-size", "500", "--report", str(path))

    assert result.returncode == 0, result.stderr
    found = page(path)
    rows = value(database, "SELECT count(*) FROM webhook_log")
    for fact in (
        "Complete.",
        "public.webhook_log",
        f"--batch-size 500 --report {path}",
        "PostgreSQL",
        "Notes replayed",
        "Swap, in total",
        f"{rows:,} rows in 16 partitions",
        "each is equal to its source",
        "no failed attempts at a lock",
        "python -m chronos status",
        "python -m chronos finalize",
        "python -m chronos rollback",
        "contents equal",
    ):
        assert fact in found.text, fact
    assert found.tags.count("svg") == 2
    assert next(v for n, v in found.attributes if n == "aria-label").startswith(f"{rows:,} rows")


def test_json_has_the_facts_of_the_page_under_documented_keys(database: str, tmp_path: Path) -> None:
    fill(database)
    path = tmp_path / "ticket.json"
    result = chronos(database, "migrate", "--yes", "--verify", "counts", "--report", str(path))
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())

    from chronos.migration import report

    assert report.__doc__
    assert [key for key in found if f"``{key}``" not in report.__doc__] == []
    assert (found["report"], found["outcome"], found["message"]) == (1, "complete", None)
    assert found["where"]["database"] == value(database, "SELECT current_database()")
    assert found["where"]["user"] == value(database, "SELECT current_user")
    assert found["options"] == f"--verify counts --report {path}"
    assert found["planned"]["partitions"] == found["happened"]["partitions"] == 46
    assert found["planned"].keys() == found["happened"].keys()
    assert all(found["planned"].values()), found["planned"]
    assert all(found["happened"].values()), found["happened"]
    assert found["happened"]["rows"] == found["copy"][-1]["rows"]
    assert all(period["alike"] is None for period in found["periods"])
    assert 0 < found["swap_milliseconds"] < 1_000 * found["seconds"]
    assert found["statistics_seconds"] > 0
    assert found["lock_waits"] == []
    assert found["watch"][0]["command"] == "python -m chronos status"
    assert found["go_back"] == [
        {
            "command": "python -m chronos rollback",
            "why": "the plain table again, with every row that was written since; until finalize",
        }
    ]
    # The page uses only these.
    (tmp_path / "again.html").write_text(html(found), "utf-8")
    assert "counts equal" in page(tmp_path / "again.html").text
    # It still fits into a ticket when a migration of years of hourly partitions was blocked all night.
    busy = {"old_rows": 1_234_567, "new_rows": 1_234_567}
    many = {
        "periods": [{**period, **busy} for period in found["periods"] * 200],
        "copy": [{"seconds": n * 99.99, "rows": n * 10_000_019} for n in range(240)],
        "lock_waits": [{"seconds": 9.99 * n, "what": "x" * 100, "who": "y" * 200} for n in range(5_000)],
    }
    (tmp_path / "large.html").write_text(html({**found, **many}), "utf-8")
    assert "and 4980 more" in page(tmp_path / "large.html").text


def test_an_attach_reports_that_nothing_was_copied_and_how_not_to_roll_back(
    database: str, tmp_path: Path
) -> None:
    fill(database)
    path = tmp_path / "ticket.html"
    result = chronos(database, "migrate", "--yes", "--strategy", "attach", "--report", str(path))
    assert result.returncode == 0, result.stderr
    found = page(path)
    words = " ".join(found.text.split())
    planned = r"Rows copied 0 none Six steps [\d.]+ s [\d.]+ s WAL; .*? Disk taken [\d.]+ [kM]B [\d.]+ [kM]B"
    assert re.search(planned, words), words
    assert "ALTER TABLE webhook_log DETACH PARTITION webhook_log_history;" in found.text
    assert "DROP TABLE webhook_log would drop every row" in found.text


def test_a_stopped_run_writes_a_partial_report_that_says_so(database: str, tmp_path: Path) -> None:
    fill(database)
    path = tmp_path / "ticket.html"
    with stopped_in_the_copy(database, "--report", str(path)) as migration:
        migration.process.send_signal(signal.SIGTERM)
        migration.release()
        _, errors = migration.process.communicate(timeout=60)
    assert migration.process.returncode == 3, errors
    found = page(path)
    assert "Stopped half-way: this report is partial." in found.text
    assert "webhook_log is the plain table, complete and in use" in found.text
    assert "stopped as asked in step 3" in found.text
    assert "not reached" in found.text
    assert "--resume" in found.text
    assert "drops what was built" in found.text


def test_a_resumed_run_reports_what_was_planned_when_the_migration_began(
    database: str, tmp_path: Path
) -> None:
    fill(database)
    path = tmp_path / "ticket.json"
    assert chronos(database, "migrate", "--yes", "--hold", "--report", str(path)).returncode == 0
    held = json.loads(path.read_text())
    assert held["outcome"] == "held"

    result = chronos(database, "migrate", "--yes", "--resume")

    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert found["outcome"] == "complete"
    assert found["planned"] == held["planned"]
    assert found["planned"]["wal_bytes"] > 0
    assert (found["steps"][0]["seconds"], found["steps"][2]["seconds"]) == (0, 0)


def test_a_failed_run_writes_a_partial_report_that_says_so(database: str, tmp_path: Path) -> None:
    fill(database)
    query(database, REFUSE.format(pattern="'%RENAME TO \"webhook_log_old\"%'"))
    path = tmp_path / "ticket.json"
    result = chronos(database, "migrate", "--yes", "--report", str(path))
    assert result.returncode == 1
    found = json.loads(path.read_text())
    assert found["outcome"] == "failed"
    assert found["last_step"] == 6
    assert f"Error: {found['message']}\n" == result.stderr
    assert found["tables"] == "webhook_log is the plain table it was before, with every row."
    assert (found["watch"], found["go_back"]) == ([], [])


def test_sessions_that_were_waited_for_are_reported(database: str, tmp_path: Path) -> None:
    fill(database, 100)
    path = tmp_path / "ticket.json"
    with holding(
        database, "SET application_name = 'nightly report'; SELECT FROM webhook_log LIMIT 1"
    ) as other:
        result = chronos_stopped_at_the_lock(database, path)
        pid = other.get_backend_pid()
    found = json.loads(path.read_text())
    assert (result, found["outcome"]) == (3, "stopped")
    assert {(w["what"], w["who"]) for w in found["lock_waits"]} == {
        ("a lock on webhook_log and webhook_log_new", f"pid {pid} (nightly report)")
    }


def chronos_stopped_at_the_lock(url: str, path: Path) -> int:
    from tests.command import started

    with started(url, "migrate", "--yes", "--report", str(path)) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "waiting for a lock on webhook_log" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no/such/folder/ticket.html", "No such file or directory"),
        (".", "does not end in .json or .html"),
        ("ticket.pdf", "does not end in .json or .html"),
        ("folder.json", "Is a directory"),
    ],
)
def test_an_unwritable_report_is_refused_before_anything_happens(
    database: str, tmp_path: Path, name: str, why: str
) -> None:
    fill(database, 10)
    before = relations(database)
    (tmp_path / "folder.json").mkdir()
    result = chronos(database, "migrate", "--yes", "--report", os.path.join(tmp_path, name))
    assert result.returncode == 2
    assert "nothing was changed" in result.stderr or "is a directory" in result.stderr
    assert why in result.stderr or "is a directory" in result.stderr
    assert relations(database) == before


def test_an_existing_report_is_kept_when_the_word_is_not_typed(database: str, tmp_path: Path) -> None:
    fill(database, 10)
    path = tmp_path / "ticket.json"
    path.write_text("of last time")
    assert chronos(database, "migrate", "--report", str(path), answer="no\n").returncode == 2
    assert path.read_text() == "of last time"
    path.unlink()
    assert chronos(database, "migrate", "--report", str(path), answer="no\n").returncode == 2
    assert not path.exists()


def test_charts_of_thousands_of_periods_stay_small() -> None:
    def period(number: int, new: int) -> dict[str, Any]:
        start = f"2026-01-{1 + number // 24 % 28:02}T{number % 24:02}:00:00+00:00"
        return {"start": start, "end": start, "old_rows": 10, "new_rows": new, "alike": True}

    chart = rows_chart([period(n, 9 if n == 4_000 else 10) for n in range(5_000)])
    assert chart is not None
    assert len(chart.bars) <= 62
    assert [bar.well for bar in chart.bars].count(False) == 1
    assert "one differs from its source" in chart.says
    assert rows_chart([]) is None
    assert rate_chart([{"seconds": 0.0, "rows": 0}], []) is None


def test_statistics_cover_the_whole_table_and_today_and_their_time_is_reported(database: str) -> None:
    create_webhook_log(connect_engine_of(database), 2_000)
    result = chronos(database, "migrate", "--yes")
    assert result.returncode == 0, result.stderr
    assert "Gathering statistics..." in result.stdout
    assert "✓ Statistics gathered in " in result.stdout
    # Large columns are left to this step: only tables that it analyzed have statistics on one.
    of = query(
        database,
        "SELECT tablename, bool_or(inherited) FROM pg_stats WHERE attname = 'request_body' GROUP BY 1",
    )
    analyzed = {table for table, _ in of} - {"webhook_log_old"}
    today = value(database, 'SELECT to_char(now() AT TIME ZONE \'UTC\', \'"webhook_log_y"YYYY"m"MM"d"DD\')')
    assert dict(of)["webhook_log"] is True
    assert {"webhook_log"} <= analyzed <= {"webhook_log", today}


def connect_engine_of(url: str) -> Any:
    from sqlalchemy.engine import make_url

    return connect_engine(make_url(url))
