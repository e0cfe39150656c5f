"""The tuned choices: tables shipped with the package, one per device, under the user's own.

The user's folder is ``$TRITONCONV_CACHE``, else ``$XDG_CACHE_HOME/tritonconv``, else ``~/.cache/tritonconv`` (XDG Base
Directory Specification). A table is one JSON file, with the format in its name; it is written whole beside the old one
and then put in its place, under a lock and with the entries that are there by then, so two processes lose nothing and a
reader never sees half a file. A reader passes a damaged file over with a warning, and never moves one: the next writer
sets it aside under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from tritonconv.autotune.key import Key
from tritonconv.errors import StoreError, StoreWarning
from tritonconv.kernels.registry import renamed

FORMAT = 2
SHIPPED: Any = files("tritonconv") / "autotune" / "tables"  # a Path, and the like of one inside a zip file
LOCK_SECONDS = 60
Known = dict[str, Any] | None  # ceilings as JSON, where any were measured


@dataclass(frozen=True)
class Eager:
    """The choice for eager calls, where it is not the entry's own; its fields are as there.

    ``torch_ms`` and ``timed`` are None where they are the entry's.
    """

    variant: str
    config: Mapping[str, int]
    ms: float
    host_ms: float
    source: str
    torch_ms: float | None = None
    timed: str | None = None


@dataclass(frozen=True)
class Entry:
    """One stored choice: the fastest on the device. Times in ms, of the choice and of torch's own in the same rounds.

    ``problem`` says in words what was measured, ``timed`` which part of it (a gradient is timed in a training step),
    ``versions`` what with; ``source`` is the variant's revision then (:mod:`tritonconv.autotune.sources`). ``rivals``
    is how many candidates it was chosen from: a tuner that knows more of them chooses anew. ``host_ms`` is the host's
    time for the call that was timed, None where it is the same (a CPU) or was not taken; ``eager`` is the best choice
    by both times (:func:`tritonconv.autotune.model.eager_ms`), None where that is this one.
    """

    variant: str
    config: Mapping[str, int]
    ms: float
    torch_ms: float
    source: str
    problem: str
    timed: str
    utc: str
    versions: Mapping[str, str | None] = field(default_factory=dict)
    rivals: int = 0
    host_ms: float | None = None
    eager: Eager | None = None

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Raises ValueError for anything that :meth:`to_json` did not make."""
        try:
            entry = cls(**data)
            eager = None if entry.eager is None else Eager(**data["eager"])
        except TypeError as error:
            raise ValueError(str(error)) from None
        sound = (
            all(type(each) is str for each in (entry.problem, entry.timed, entry.utc))
            and isinstance(entry.versions, dict)
            and type(entry.rivals) is int
            and _is_time(entry.torch_ms)
            and (entry.host_ms is None or _is_time(entry.host_ms))
            and (eager is None or (_is_time(eager.host_ms) and (eager.torch_ms is None or _is_time(eager.torch_ms))))
            and (eager is None or type(eager.timed) in (str, type(None)))
            and all(_is_choice(each) for each in (entry, eager) if each is not None)
        )
        if not sound:
            raise ValueError(f"not an entry: {data!r}")
        return replace(entry, **_today(entry), eager=None if eager is None else replace(eager, **_today(eager)))

    def to_json(self) -> dict[str, Any]:
        """Without the fields that are None."""
        return _known(asdict(self))

    def choices(self, graphs: bool) -> tuple[Entry, ...]:
        """The choice that holds in a CUDA graph or, without ``graphs``, in an eager call; then the other, if there is
        one. Each is an entry without ``eager``."""
        own = replace(self, eager=None)
        if self.eager is None:
            return (own,)
        eager = replace(own, **{name: value for name, value in vars(self.eager).items() if value is not None})
        return (own, eager) if graphs else (eager, own)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None, of a choice in it too."""
    known = {name: value for name, value in fields.items() if value is not None}
    return known | {"eager": _known(known["eager"])} if "eager" in known else known


def _is_choice(choice: Entry | Eager) -> bool:
    config_ok = isinstance(choice.config, dict) and all(type(value) is int for value in choice.config.values())
    return config_ok and _is_time(choice.ms) and type(choice.variant) is str and type(choice.source) is str


def _is_time(ms: Any) -> bool:
    return isinstance(ms, (int, float)) and 0 < ms < float("inf")


def _today(choice: Entry | Eager) -> dict[str, Any]:
    """The variant and config that a stored one stands for today."""
    name, config = renamed(choice.variant, choice.config)
    return {"variant": name, "config": config}


@dataclass
class Table:
    """The table of one device: entries by the text of their :class:`Key`, and its measured ceilings or None."""

    device: str
    entries: dict[str, Entry] = field(default_factory=dict)
    ceilings: Known = None

    def find(self, key: Key) -> Entry | None:
        return self.entries.get(str(key))

    def over(self, lower: Table) -> Table:
        """This table, completed by the entries and ceilings that only ``lower`` has."""
        return Table(self.device, {**lower.entries, **self.entries}, self.ceilings or lower.ceilings)

    def text(self) -> str:
        entries = {key: self.entries[key].to_json() for key in sorted(self.entries)}
        data = {"format": FORMAT, "device": self.device, "ceilings": self.ceilings, "entries": entries}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


def user_folder() -> Path:
    """Where the user's tables are, whether the folder exists or not.

    Raises StoreError where that is a home directory, and the user has none, as in some containers.
    """
    own = os.environ.get("TRITONCONV_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            return Path(own).expanduser()
        # The specification: a path that is not absolute is to be ignored.
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "tritonconv"
    except RuntimeError as error:
        raise StoreError(f"no folder for tuned choices (TRITONCONV_CACHE may name one): {error}") from None


def slug(device: str) -> str:
    """The device's name as a file name: ``NVIDIA H200`` is ``nvidia_h200``.

    Where letters do not tell names apart, as in ``AMD EPYC, 2 threads``, a hash of the name follows.
    """
    plain = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    if plain and plain == device.lower().replace(" ", "_"):
        return plain
    return f"{plain}_{hashlib.sha256(device.encode()).hexdigest()[:6]}".lstrip("_")


def path_of(device: str, folder: Path | None = None) -> Path:
    """The file of a device's table in a folder; None is the user's. Raises StoreError as :func:`user_folder` does."""
    return (folder or user_folder()) / f"{slug(device)}.v{FORMAT}.json"


def read(device: str, folder: Path | None = None) -> Table:
    """The table of a device, the user's entries before the shipped ones. Never raises for what a file holds."""
    return own(device, folder).over(shipped_table(device))


def own(device: str, folder: Path | None = None) -> Table:
    """The user's own table of a device; empty, with a warning, where it cannot be read."""
    try:
        path = path_of(device, folder)
    except StoreError as error:
        warnings.warn(f"tuned choices: {error}", StoreWarning, stacklevel=3)
        return Table(device)
    return _load(path, device)[0]


def shipped_table(device: str) -> Table:
    """The table of a device that comes with the package."""
    return _load(path_of(device, SHIPPED), device)[0]


def merge(table: Table, folder: Path | None = None, ceilings: Callable[[Known], Known] | None = None) -> None:
    """Adds entries (and ceilings, unless None) to the user's table, in place of those with the same key.

    ``ceilings`` makes the ceilings of those that :func:`read` would find by then, and no other process comes between.
    A damaged file is set aside, and its sound part is kept.
    Raises StoreError where the folder cannot be written; the old file is then as it was.
    """
    path = path_of(table.device, folder)
    with locked(path):
        there, fault = _load(path, table.device)
        whole = table.over(there)
        if ceilings is not None:
            whole.ceilings = ceilings(whole.over(shipped_table(table.device)).ceilings)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with new.open("w", encoding="utf-8") as file:
                new.chmod(shared_mode(path))
                file.write(whole.text())
                file.flush()
                os.fsync(file.fileno())
            if fault:
                _set_aside(path)
            os.replace(new, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise StoreError(f"cannot write {path}: {error}") from None


def shared_mode(path: Path) -> int:
    """The permissions of a file of the store: who may write into its folder may write it."""
    return stat.S_IMODE(path.parent.stat().st_mode) & 0o666


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file of the store and makes its folder. Raises StoreError where that cannot be had."""
    from filelock import Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            yield
    except Timeout as error:
        raise StoreError(f"{error.lock_file} was held by another process for {LOCK_SECONDS} s") from None
    except OSError as error:
        raise StoreError(f"cannot write into {path.parent}: {error}") from None


def _lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    """Acquired; on a file system without locks a file that is there stands for one."""
    from filelock import FileLock, SoftFileLock

    how: Any = {"timeout": LOCK_SECONDS, "mode": shared_mode(path)}
    try:
        return FileLock(f"{path}.lock", **how).acquire()
    except NotImplementedError:
        return SoftFileLock(f"{path}.held", **how).acquire()


def _load(path: Path, device: str) -> tuple[Table, bool]:
    """The sound part of a file, and whether any part is damaged; a warning then says so."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Table(device), False
    except OSError as error:  # no permission: the file may be all right
        return _fault(path, Table(device), f"cannot be read, and is not used: {error}")
    except (ValueError, RecursionError) as error:  # of an integer of thousands of digits, of thousands of brackets
        return _fault(path, Table(device), f"not JSON, and not used: {error}")
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("device") != device:
        header = {name: data.get(name) for name in ("format", "device")} if isinstance(data, dict) else type(data)
        return _fault(path, Table(device), f"expected format {FORMAT} of {device!r}, found {header}; it is not used")
    entries, bad = {}, []
    raw = data.get("entries")
    for key, value in raw.items() if isinstance(raw, dict) else ():
        try:
            entries[key] = Entry.from_json(value)
        except ValueError:
            bad.append(key)
    ceilings = data.get("ceilings")
    table = Table(device, entries, ceilings if isinstance(ceilings, dict) else None)
    if bad or not isinstance(raw, dict):
        fault = f"{len(bad)} invalid entries (first: {bad[0]!r}) are" if bad else "no entries; it is"
        return _fault(path, table, f"{fault} not used")
    return table, False


def _fault(path: Path, sound: Table, why: str) -> tuple[Table, bool]:
    warnings.warn(f"tuned choices: {path}: {why}", StoreWarning, stacklevel=5)
    return sound, True


def _set_aside(path: Path) -> None:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    aside = path.with_name(f"{path.stem}.damaged-{stamp}-{secrets.token_hex(2)}")
    with contextlib.suppress(OSError):
        os.replace(path, aside)
        warnings.warn(f"tuned choices: {path} was set aside as {aside.name}", StoreWarning, stacklevel=4)
