"""What instances of endpoints cost and have: a TOML file that people keep, ``prices.toml`` by default."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ml.errors import InputError

PRICES_FILE = Path(__file__).with_name("prices.toml")

_HEAD = ("region", "as_of", "note")


class InstancePrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One type of instance."""

    instance_type: Annotated[str, Meta(pattern=r"^\S+$")]
    usd_per_hour: Annotated[float, Meta(gt=0, le=10_000)]
    vcpus: Annotated[int, Meta(ge=1)]
    memory_gib: Annotated[float, Meta(gt=0, le=100_000)]
    architecture: Literal["x86_64", "arm64"] = "x86_64"
    accelerator: Literal["", "neuron", "gpu"] = ""
    accelerator_cores: Annotated[int, Meta(ge=0)] = 0
    """Neuron cores, or GPUs."""
    source: str = ""
    """Where the price is from, in a word."""

    @property
    def family(self) -> str:
        """All sizes of it have the same cores: ``ml.c7i``."""
        return self.instance_type.rpartition(".")[0]


class PriceList(msgspec.Struct, frozen=True, kw_only=True):
    """A price file, as read."""

    region: str
    as_of: str
    """ISO date."""
    note: str
    instances: list[InstancePrice]

    @property
    def in_words(self) -> str:
        """Where the prices are from, for whoever reads a figure made of them."""
        return f"{self.region}, as of {self.as_of}" + (f"; {self.note}" if self.note else "")


def read_prices(path: str = "") -> PriceList:
    """Read a price file.

    Args:
        path: Of the TOML file; empty: the one that comes with this package.

    Raises:
        InputError: one line that names the file, the instance type and the key.
    """
    file = Path(path).expanduser() if path else PRICES_FILE
    try:
        return _read(file)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _read(file: Path) -> PriceList:
    content = _content(file)
    for key in content:
        if key not in (*_HEAD, "instances"):
            raise InputError(f"has the key {key!r}, which {_nearest(key, (*_HEAD, 'instances'))}")
    head = {key: content.get(key, "") for key in _HEAD}
    for key in ("region", "as_of"):
        if not head[key]:
            raise InputError(f"has no {key}: say of which region and day the prices are")
    tables = content.get("instances")
    if not isinstance(tables, dict) or not tables:
        raise InputError('has no prices: tables are called [instances."ml.c7i.xlarge"]')
    return PriceList(
        **{key: str(value) for key, value in head.items()},
        instances=[_instance(name, table) for name, table in tables.items()],
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no such file; {PRICES_FILE} is one to start from") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}") from None


def _instance(name: str, table: Any) -> InstancePrice:
    place = f'instances."{name}"'
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise InputError(f'{place} must be a table, its name in quotes: [instances."ml.c7i.xlarge"]')
    known = [field for field in InstancePrice.__struct_fields__ if field != "instance_type"]
    for key in table:
        if key not in known:
            raise InputError(f"{place} has the key {key!r}, which {_nearest(key, known)}")
    try:
        price = msgspec.convert({**table, "instance_type": name}, InstancePrice)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$.")
        raise InputError(f"{place}: {where.rstrip('`') or 'it'} is wrong: {problem}") from None
    if bool(price.accelerator) != bool(price.accelerator_cores):
        raise InputError(f"{place}: accelerator and accelerator_cores go together, one is missing")
    return price


def _nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"is unknown; did you mean {nearest}? ({', '.join(known)})"
