"""Batches on disk: one file each, written whole or not at all, leased to one reader at a time.

Owns: the files of one application id and base URI in `SPOOL_DIRECTORY`; writing, claiming, finishing, expiring them.
Threads: the intake writes, one sender at a time reads, shutdown writes; several processes share a directory.
Never: writes anything but payloads that were ready to be sent (masked already); touches a file that is not its own;
raises; keeps a lease beyond the life of its process.

A file is named `moesif-<binding>-<milliseconds of its first event>-<unique>-<events>.batch`. The binding is a digest of
application id and base URI, so that two applications on one directory leave each other's files alone and nobody reads
the id in a listing. It is written as `.partial` and renamed: a reader never sees half of one, unless the machine itself
went down; a check sum finds that. A lease is an advisory lock (flock(2)) on the file, which ends with its process
however that ends. What cannot be read is renamed to `.unreadable` and kept until its space is needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import uuid
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._delivery.stats import DropReason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from moesif_otel._delivery.clock import Clock
    from moesif_otel._delivery.stats import Ledger
    from moesif_otel._guard import Guard

__all__ = ["MAX_AGE_S", "Claim", "Spool"]

MAX_AGE_S: Final = 30 * 86_400.0
"""Moesif rejects events that are older (API documentation, "limits")."""

_HAS_LOCKS: Final[bool] = fcntl is not None
_MAGIC: Final = b"MSPOOL1\n"
_HEAD: Final = struct.Struct(">8s32sIQI")  # magic, binding, events, bytes of the rest, its CRC-32
_LENGTH: Final = struct.Struct(">I")
_NAME: Final = re.compile(
    r"moesif-(?P<binding>[0-9a-f]{32})-(?P<ms>\d{13})-[0-9a-f]{32}-(?P<events>\d{1,6})\.(?P<kind>\w+)"
)
_BATCH, _PARTIAL, _UNREADABLE = "batch", "partial", "unreadable"
# No write takes this long: whoever began it is gone. (A lock cannot tell, between making the file and locking it.)
_ABANDONED_S: Final = 600.0
_LARGEST_FILE_BYTES: Final = 256 * 1024 * 1024
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_OLD_FILE: Final = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    kind: str
    first_ms: int
    events: int
    size_bytes: int
    modified_s: float


@dataclass(slots=True, repr=False)  # no event is ever shown
class Claim:
    """A batch that this process alone may send, until it is finished or released.

    Attributes:
        payloads: Its events.
        first_time_s: When its first event came, seconds since the epoch.
    """

    payloads: list[bytes]
    first_time_s: float
    path: Path
    descriptor: int


class Spool:
    """The batches of one destination in one directory.

    Args:
        directory: Where; made (mode 0700) when it is first needed.
        max_bytes: Most bytes that its files may take; the oldest make room.
        binding: 32 hexadecimal digits that stand for the destination.
        ledger: Where losses and sizes are counted.
        guard: Where errors of the disk are counted.
        clock: Time.
    """

    def __init__(
        self, directory: str, max_bytes: int, binding: str, *, ledger: Ledger, guard: Guard, clock: Clock
    ) -> None:
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._binding = binding
        self._ledger = ledger
        self._guard = guard
        self._clock = clock
        self._leases: dict[int, Path] = {}
        self._listed: deque[_File] = deque()
        self._size_bytes = 0

    def write(self, payloads: Sequence[bytes], first_time_s: float) -> Path | None:
        """Put a batch on disk.

        Args:
            payloads: Its events, ready to be sent.
            first_time_s: When the first of them came, seconds since the epoch.

        Returns:
            The file's path; None when it could not be written (counted).
        """
        data = _encode(self._binding, payloads)
        try:
            if not _HAS_LOCKS:
                raise OSError("no file locks on this system")  # noqa: TRY301 - one place counts them all
            if len(data) > self._max_bytes:
                raise OSError("one batch is more than SPOOL_MAX_BYTES")  # noqa: TRY301 - as above
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(len(data))
            stem = f"moesif-{self._binding}-{int(first_time_s * 1000):013d}-{uuid.uuid4().hex}-{len(payloads)}."
            path = self._directory / (stem + _BATCH)
            self._write_whole(self._directory / (stem + _PARTIAL), path, data)
        except OSError as exc:
            self._guard.caught("spool.write", exc)
            self._ledger.count("spool_errors")
            return None
        self._note_size(self._size_bytes + len(data))
        return path

    def _write_whole(self, partial: Path, final: Path, data: bytes) -> None:
        descriptor = os.open(partial, _NEW_FILE, 0o600)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
            finally:
                os.close(descriptor)
            # Not synced: the page cache outlives the process, and the check sum finds what a power cut took.
            partial.rename(final)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def claim(self) -> Claim | None:
        """Take the oldest batch that nobody else has; unreadable and expired ones are put away on the way.

        Returns:
            The batch, leased to this process; None when there is none.
        """
        if not _HAS_LOCKS:
            return None
        try:
            # One listing serves many claims: a thousand files are not listed a thousand times. When it is used up,
            # one new look decides.
            return self._claim_listed() or self._claim_listed(self._files())
        except OSError as exc:
            self._guard.caught("spool.read", exc)
            self._ledger.count("spool_errors")
        return None

    def _claim_listed(self, files: Iterable[_File] = ()) -> Claim | None:
        self._listed.extend(files)
        while self._listed:
            claimed = self._claim_file(self._listed.popleft())
            if claimed is not None:
                return claimed
        return None

    def _claim_file(self, file: _File) -> Claim | None:
        now_s = self._clock.time()
        if file.kind == _PARTIAL and now_s - file.modified_s > _ABANDONED_S:
            self._set_aside(file)
        if file.kind != _BATCH:
            return None
        descriptor = self._lease(file.path)
        if descriptor is None:
            return None
        if now_s - file.first_ms / 1000 > MAX_AGE_S:
            self._lose(file, descriptor, DropReason.EXPIRED)
            return None
        try:
            payloads = _decode(self._binding, _read(descriptor))
        except (ValueError, OSError):
            self._set_aside(file)
            self._unlock(descriptor)
            return None
        return Claim(payloads, file.first_ms / 1000, file.path, descriptor)

    def finish(self, claim: Claim) -> None:
        """Remove a batch whose events are settled."""
        with contextlib.suppress(OSError):
            self._note_size(self._size_bytes - os.fstat(claim.descriptor).st_size)
        self._remove(claim.path)
        self._unlock(claim.descriptor)

    def release(self, claim: Claim) -> None:
        """Leave a batch to whoever comes next."""
        self._unlock(claim.descriptor)
        self._listed.clear()

    def remove(self, path: Path) -> None:
        """Remove a batch that was just written and is not wanted after all."""
        self._remove(path)

    def after_fork(self) -> None:
        """Let go, in a forked child, of the parent's leases without ending them."""
        # Closing a copy of a descriptor leaves the lock with the parent (flock(2)); unlocking would take it away.
        leases, self._leases = self._leases, {}
        for descriptor in leases:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._listed.clear()
        self._size_bytes = 0

    # -- inside

    def _files(self) -> list[_File]:
        """List our files, oldest first, and note their size."""
        try:
            files = sorted(self._scan(), key=lambda file: (file.first_ms, file.path))
        except FileNotFoundError:
            files = []
        self._note_size(sum(file.size_bytes for file in files))
        return files

    def _scan(self) -> Iterator[_File]:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is None or match["binding"] != self._binding:
                    continue  # somebody else's
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone meanwhile
                if stat.S_ISREG(status.st_mode):
                    yield _File(
                        Path(entry.path),
                        match["kind"],
                        int(match["ms"]),
                        int(match["events"]),
                        status.st_size,
                        status.st_mtime,
                    )

    def _make_room(self, wanted_bytes: int) -> None:
        files = self._files()
        over_bytes = self._size_bytes + wanted_bytes - self._max_bytes
        # What cannot be sent any more goes first.
        for file in sorted(files, key=lambda file: file.kind != _UNREADABLE):
            if over_bytes <= 0:
                return
            if file.kind == _UNREADABLE:
                self._remove(file.path)
            elif file.kind == _BATCH and (descriptor := self._lease(file.path)) is not None:
                self._lose(file, descriptor, DropReason.SPOOL_FULL)
            else:
                continue
            over_bytes -= file.size_bytes
            self._note_size(self._size_bytes - file.size_bytes)
        if over_bytes > 0:
            raise OSError("SPOOL_MAX_BYTES are in use by other processes")

    def _lease(self, path: Path) -> int | None:
        """Lock a file; gives its descriptor, or None when somebody else has it, or had it and is done with it."""
        try:
            descriptor = os.open(path, _OLD_FILE)
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._ledger.count("spool_errors")
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(descriptor), path.stat()
            if (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev):
                self._leases[descriptor] = path
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
        return None

    def _unlock(self, descriptor: int) -> None:
        if self._leases.pop(descriptor, None) is None:
            return  # a fork has happened in between: it is not ours
        with contextlib.suppress(OSError):
            # Closing alone would not do: a child of a fork may have a copy.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def _lose(self, file: _File, descriptor: int, reason: DropReason) -> None:
        # Whoever settles a spooled event accepts it and drops it in one step: see `stats`.
        self._ledger.accept(file.events)
        self._ledger.drop(reason, file.events)
        self._remove(file.path)
        self._unlock(descriptor)

    def _set_aside(self, file: _File) -> None:
        try:
            file.path.rename(file.path.with_suffix("." + _UNREADABLE))
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._guard.caught("spool.set_aside", exc)
            return
        self._ledger.count("spool_set_aside")
        if file.events:
            self._ledger.accept(file.events)
            self._ledger.drop(DropReason.SPOOL_UNREADABLE, file.events)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink()
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._guard.caught("spool.remove", exc)
                self._ledger.count("spool_errors")

    def _note_size(self, size_bytes: int) -> None:
        # The ledger adds up: tell it the difference.
        change, self._size_bytes = size_bytes - self._size_bytes, size_bytes
        if change:
            self._ledger.count("spool_bytes", change)


def _encode(binding: str, payloads: Sequence[bytes]) -> bytes:
    body = b"".join(part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload))
    return _HEAD.pack(_MAGIC, binding.encode(), len(payloads), len(body), zlib.crc32(body)) + body


def _decode(binding: str, data: bytes) -> list[bytes]:
    if len(data) < _HEAD.size:
        raise ValueError("too short")
    magic, bound_to, events, size, check = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if magic != _MAGIC or bound_to != binding.encode() or len(body) != size or zlib.crc32(body) != check:
        raise ValueError("not a whole batch of ours")
    payloads: list[bytes] = []
    at = 0
    while at < size:
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        payloads.append(bytes(body[at : at + length]))
        at += length
    if len(payloads) != events or at != size:
        raise ValueError("not the number of events that it says")
    return payloads


def _read(descriptor: int) -> bytes:
    if os.fstat(descriptor).st_size > _LARGEST_FILE_BYTES:
        raise ValueError("too large")
    with os.fdopen(os.dup(descriptor), "rb") as reader:
        data: Any = reader.read()
    return bytes(data)
