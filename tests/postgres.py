"""A PostgreSQL server of the tests' own, gone when they end."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conftest import system_program

_PROGRAMS = "/usr/lib/postgresql/{}/bin"
"""Where Debian puts the server; not on the path, because there may be several."""
_STARTED_WITHIN_SECONDS = 60


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server that listens on a socket in a temporary folder only; skips where there is none."""
    path = os.environ["PATH"]
    places = [_PROGRAMS.format(version) for version in range(30, 11, -1)]
    initdb = Path(system_program("initdb", path=os.pathsep.join([path, *places])))
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # The server refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = f"{folder}/data"
        subprocess.run(
            [initdb, "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=folder,
        )
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen(
                [
                    *(initdb.with_name("postgres"), "-D", data, "-k", folder),
                    *("-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"),
                ],
                stdout=log,
                stderr=log,
                user=user,
                group=user,
                extra_groups=[] if user else None,
                cwd=folder,
            )
            try:
                url = f"postgresql+psycopg2://tests@/postgres?host={folder}"
                _wait_for(url, server, Path(log.name))
                yield url
            finally:
                server.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed any more
                server.wait(timeout=30)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of an empty schema: to make a database, the server copies some 1,000 files."""
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    yield f"{postgres_server}&options=-csearch_path%3D{name}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    end = time.monotonic() + _STARTED_WITHIN_SECONDS
    while True:
        try:
            engine.connect().close()
        except sa.exc.OperationalError:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"PostgreSQL does not start:\n{log.read_text()}")
            time.sleep(0.05)
        else:
            return
