"""Batches on disk: one file each, written whole or not at all, leased to one reader at a time.

The intake writes, one sender at a time reads, a shutdown writes; several processes share a directory. Nothing is
written but payloads that were ready to be sent, masked already. `Spool` has the files, `Disk` decides when batches go
there and when they come back.

A file is named `moesif-<binding>-<milliseconds of its first event>-<unique>-<events>.batch`. The binding is a digest of
application id and address, so that two applications on one directory leave each other's files alone and nobody reads
the id in a listing. Credentials in the address are no part of it: files outlive a change of password. It is written as
`.partial` and renamed: a reader never sees half of one, unless the machine itself went down; a check sum finds that. A
lease is an advisory lock (flock(2)) on the file, which ends with its process however that ends. What cannot be read is
renamed to `.unreadable` and kept until its space is needed. A file that somebody else could have written (another
owner, writable by others, a link) is left alone and never sent.
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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moesif_otel._delivery.process import Turn
from moesif_otel._delivery.queue import Batch, Prepared
from moesif_otel._delivery.stats import DropReason
from moesif_otel._guard import get_logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from moesif_otel._delivery.process import Collaborators, ProcessState

_logger: Final = get_logger(__name__)

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
_LARGEST_FILE_BYTES: Final = 16_000_000  # a batch is at most 5 MB, or one event
_MOST_EVENTS: Final = 100_000  # in a file: more are no batch of ours, and cost memory whatever their size
_LIST_AGAIN_S: Final = 30.0
_UNLISTED_SHARE: Final = 1 / 32  # of `max_bytes`: ten processes on one directory exceed it by a third at most
_FOREIGN: Final = (
    "moesif_otel: SPOOL_DIRECTORY contains files that belong to another user or that other users can write to, so they "
    "are not sent; use a directory that only this service can write to"
)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_OLD_FILE: Final = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class _File(NamedTuple):
    path: Path
    kind: str
    first_ms: int
    events: int
    size_bytes: int
    modified_s: float


@dataclass(slots=True, repr=False)  # no event is ever shown
class Claim:
    """A batch that this process alone may send, until it is finished or released."""

    payloads: list[bytes]
    first_time_s: float  # when its first event came, seconds since the epoch
    path: Path
    descriptor: int
    events: int


class Spool:
    """The batches of one destination in one directory, which is made (mode 0700) when it is first needed.

    Its files take at most `SPOOL_MAX_BYTES`: the oldest make room. `binding`, 32 hexadecimal digits, stands for the
    destination.
    """

    def __init__(self, directory: str, binding: str, parts: Collaborators) -> None:
        self._directory = Path(directory)
        self._max_bytes = parts.settings.spool_max_bytes
        self._binding = binding
        self._ledger = parts.ledger
        self._guard = parts.guard
        self._clock = parts.clock
        self._told_foreign = False
        self._leases: set[int] = set()  # open descriptors
        self._not_removed: set[Path] = set()  # settled, but the directory does not let go of them
        self._forget()

    def _forget(self) -> None:
        self._listed: deque[_File] = deque()
        self._oldest: deque[_File] = deque()
        self._size_bytes = 0
        self._list_again_at_s = -1.0  # until then the size is what it was, and what we have written since
        self._unlisted_bytes = 0  # this is what; the others may have written as much

    def after_fork(self) -> None:
        """Begin anew in a forked child: the ledger does too."""
        self._abandon()
        self._forget()

    def write(self, payloads: Sequence[bytes], first_time_s: float) -> Path | None:
        """Put a batch on disk; return the file's path, None when it could not be written (counted)."""
        try:
            if not _HAS_LOCKS:
                raise OSError("no file locks on this system")  # noqa: TRY301 - one place counts them all
            data = _encode(self._binding, payloads)
            if len(data) > self._max_bytes:
                raise OSError("one batch is more than SPOOL_MAX_BYTES")  # noqa: TRY301 - as above
            self._make_room(len(data))
            stem = f"moesif-{self._binding}-{int(first_time_s * 1000):013d}-{uuid.uuid4().hex}-{len(payloads)}."
            path = self._directory / (stem + _BATCH)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(self._directory / (stem + _PARTIAL), path, data)
        except Exception as exc:  # of the disk as a rule; memory may be short too
            self._guard.caught("writing to SPOOL_DIRECTORY", exc)
            self._ledger.add("spool_errors")
            return None
        self._note_size(self._size_bytes + len(data))
        self._unlisted_bytes += len(data)
        return path

    def claim(self) -> Claim | None:
        """Lease the oldest batch that nobody else has, if any; unreadable and expired ones are put away on the way."""
        if not _HAS_LOCKS:
            return None
        try:
            # One listing serves many claims: a thousand files are not listed a thousand times. When it is used up,
            # one new look decides.
            return self._claim_listed() or self._claim_listed(self._files())
        except OSError as exc:
            self._guard.caught("reading from SPOOL_DIRECTORY", exc)
            self._ledger.add("spool_errors")
        return None

    def _claim_listed(self, files: Iterable[_File] = ()) -> Claim | None:
        self._listed.extend(files)
        while self._listed:
            claimed = self._claim_file(self._listed.popleft())
            if claimed is not None:
                return claimed
        return None

    def _claim_file(self, file: _File) -> Claim | None:
        if file.kind == _PARTIAL and self._clock.time() - file.modified_s > _ABANDONED_S:
            self._set_aside(file)
        if file.kind != _BATCH:
            return None
        descriptor = self._lease(file.path)
        if descriptor is None:
            return None
        if self._is_expired(file):
            self._lose(file, descriptor, DropReason.EXPIRED)
            return None
        try:
            payloads = _read(descriptor, self._binding)
        except (ValueError, OSError):
            self._set_aside(file)
            self._unlock(descriptor)
            return None
        return Claim(payloads, file.first_ms / 1000, file.path, descriptor, len(payloads))

    def finish(self, claim: Claim) -> None:
        """Remove a batch whose events are settled."""
        with contextlib.suppress(OSError):
            self._note_size(self._size_bytes - os.fstat(claim.descriptor).st_size)
        self.remove(claim.path)
        self._unlock(claim.descriptor)

    def release(self, claim: Claim) -> None:
        """Leave a batch to whoever comes next."""
        self._unlock(claim.descriptor)
        self._listed.clear()

    def _abandon(self) -> None:
        """Close the leased files without ending the leases: in a forked child these are the parent's."""
        # Closing a copy of a descriptor leaves the lock with the parent (flock(2)); unlocking would take it away.
        leases, self._leases = self._leases, set()
        for descriptor in leases:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    __del__ = _abandon

    # -- inside

    def _files(self) -> list[_File]:
        """List our files, oldest first, and note their size."""
        try:
            files = sorted(self._scan(), key=lambda file: (file.first_ms, file.path))
        except FileNotFoundError:
            files = []
        self._list_again_at_s = self._clock.monotonic() + _LIST_AGAIN_S
        self._unlisted_bytes = 0
        self._note_size(sum(file.size_bytes for file in files))
        return files

    def _scan(self) -> Iterator[_File]:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if name is None:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone meanwhile
                if not _is_own(status):
                    if not self._told_foreign:
                        self._told_foreign = True
                        self._ledger.add("spool_foreign")
                        _logger.warning(_FOREIGN)
                    continue
                size_bytes, modified_s = status.st_size, status.st_mtime
                file = _File(
                    Path(entry.path), name["kind"], int(name["ms"]), int(name["events"]), size_bytes, modified_s
                )
                if name["binding"] == self._binding:
                    yield file
                elif self._is_expired(file) and (descriptor := self._lease(file.path)) is not None:
                    # Of an application id or address that is not used any more: nobody else would ever remove it.
                    self._lose(file, descriptor, DropReason.EXPIRED)

    def _is_expired(self, file: _File) -> bool:
        return self._clock.time() - file.first_ms / 1000 > MAX_AGE_S

    def _make_room(self, wanted_bytes: int) -> None:
        if self._clock.monotonic() >= self._list_again_at_s or self._unlisted_bytes > self._max_bytes * _UNLISTED_SHARE:
            self._oldest = self._in_order_of_loss()
        listed = False
        while self._size_bytes + wanted_bytes > self._max_bytes:
            if not self._oldest:
                if listed:
                    raise OSError("SPOOL_MAX_BYTES are in use by other processes")
                listed, self._oldest = True, self._in_order_of_loss()
                continue
            file = self._oldest.popleft()
            if file.kind == _UNREADABLE:
                self.remove(file.path)
            elif file.kind == _BATCH and (descriptor := self._lease(file.path)) is not None:
                self._lose(file, descriptor, DropReason.SPOOL_FULL)
            else:
                continue
            self._note_size(self._size_bytes - file.size_bytes)

    def _in_order_of_loss(self) -> deque[_File]:
        # What cannot be sent any more goes first.
        return deque(sorted(self._files(), key=lambda file: file.kind != _UNREADABLE))

    def _lease(self, path: Path) -> int | None:
        """Lock a file; return its descriptor, None when somebody else has it, or anybody is done with it."""
        if path in self._not_removed:
            self.remove(path)
            return None
        try:
            descriptor = os.open(path, _OLD_FILE)
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._ledger.add("spool_errors")
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(descriptor), path.lstat()
            if (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev) and _is_own(mine):
                self._leases.add(descriptor)
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
        return None

    def _unlock(self, descriptor: int) -> None:
        if descriptor not in self._leases:
            return  # a fork has happened in between: it is not ours
        self._leases.discard(descriptor)
        with contextlib.suppress(OSError):
            # Closing alone would not do: a child of a fork may have a copy.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def _lose(self, file: _File, descriptor: int, reason: DropReason) -> None:
        # Whoever settles a spooled event accepts it and drops it in one step: see `stats`.
        self._ledger.accept(file.events)
        self._ledger.drop(reason, file.events)
        self.remove(file.path)
        self._unlock(descriptor)

    def _set_aside(self, file: _File) -> None:
        try:
            file.path.rename(file.path.with_suffix("." + _UNREADABLE))
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._guard.caught("setting aside a file in SPOOL_DIRECTORY", exc)
            return
        self._ledger.add("spool_set_aside")
        if file.events:
            self._ledger.accept(file.events)
            self._ledger.drop(DropReason.SPOOL_UNREADABLE, file.events)

    def remove(self, path: Path) -> None:
        """Remove a file; one that cannot be removed is not sent, or counted, a second time by this process."""
        try:
            path.unlink(missing_ok=True)
            self._not_removed.discard(path)
        except OSError as exc:
            self._not_removed.add(path)
            self._guard.caught("removing a file from SPOOL_DIRECTORY", exc)
            self._ledger.add("spool_errors")

    def _note_size(self, size_bytes: int) -> None:
        # The ledger adds up: tell it the difference.
        change, self._size_bytes = size_bytes - self._size_bytes, size_bytes
        if change:
            self._ledger.add("spool_bytes", change)


def _write_whole(partial: Path, final: Path, data: bytes) -> None:
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


def _encode(binding: str, payloads: Sequence[bytes]) -> bytes:
    body = b"".join(part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload))
    return _HEAD.pack(_MAGIC, binding.encode(), len(payloads), len(body), zlib.crc32(body)) + body


def _is_own(status: os.stat_result) -> bool:
    """Tell whether only this user can have written a file."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _read(descriptor: int, binding: str) -> list[bytes]:
    """Read a batch; what a head says is believed only within bounds, before anything is read for it."""
    if os.fstat(descriptor).st_size > _LARGEST_FILE_BYTES:
        raise ValueError("too large")
    with os.fdopen(descriptor, "rb", closefd=False) as reader:
        head: Any = reader.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise ValueError("too short")
        magic, bound_to, events, size, check = _HEAD.unpack(head)
        if magic != _MAGIC or bound_to != binding.encode() or events > _MOST_EVENTS or size > _LARGEST_FILE_BYTES:
            raise ValueError("not a batch of ours")
        body: Any = reader.read(size + 1)
    if len(body) != size or zlib.crc32(body) != check:
        raise ValueError("not whole")
    payloads: list[bytes] = []
    at = 0
    while at < size:
        start = at + _LENGTH.size
        if start > size or len(payloads) == events:
            raise ValueError("not the events that it says")
        (length,) = _LENGTH.unpack_from(body, at)
        at = start + length
        payloads.append(body[start:at])
    if len(payloads) != events or at != size:
        raise ValueError("not the events that it says")
    return payloads


_NEARLY_FULL: Final = 0.75  # of either bound of memory: batches begin to go to disk
_EASED: Final = 0.5  # and stop
_FILES_IN_A_ROW: Final = 4
_PAUSE_S: Final = 1.0
_LOOK_AGAIN_S: Final = 30.0
_WRITE_AGAIN_S: Final = 30.0  # after the disk refused


class Disk:
    """Moves batches between a process state and its spool, `SPOOL_DIRECTORY` for one destination."""

    def __init__(self, directory: str, binding: str, parts: Collaborators) -> None:
        self._spool = Spool(directory, binding, parts)
        self._parts = parts
        self._forget()

    def _forget(self) -> None:
        self._write_again_at_s = 0.0
        self._replay_at_s = 0.0
        self._files_in_a_row = 0

    def after_fork(self) -> None:
        """Begin anew in a forked child, and leave the parent its leases."""
        self._spool.after_fork()
        self._forget()

    def keep(self, batch: Batch) -> bool:
        """Write a batch whose events are settled by the caller, and count it; return whether it is on disk."""
        path = self._write(batch)
        if path is not None:
            self._count_spooled(batch)
        return path is not None

    def relieve(self, state: ProcessState[Any]) -> None:
        """Write the oldest batches when memory is nearly full, until it is half full."""
        clock = self._parts.clock
        if not self._fuller_than(_NEARLY_FULL) or clock.monotonic() < self._write_again_at_s or state.closing:
            return
        while self._fuller_than(_EASED):
            with state.lock:
                if not state.queue.has_fresh and not state.queue.close():
                    return
                batch = state.queue.take()
            path = self._write(batch)
            with state.lock:
                if path is None:
                    state.queue.put_back(batch)
                elif state.queue.settle(batch):
                    self._count_spooled(batch)
                    self._parts.budget.release(batch.size_bytes)
                    self._replay_at_s = 0.0  # back as soon as there is nothing fresh and the server is there
                else:
                    self._spool.remove(path)  # a shutdown has settled it meanwhile
                state.note_change()
            if path is None:
                self._write_again_at_s = clock.monotonic() + _WRITE_AGAIN_S
                return

    def _fuller_than(self, share: float) -> bool:
        parts = self._parts
        return (
            parts.ledger.pending > parts.settings.event_queue_size * share
            or parts.budget.held_bytes > parts.settings.event_queue_bytes * share
        )

    def _write(self, batch: Batch) -> Path | None:
        path = self._spool.write(batch.payloads, batch.first_time_s)
        if path is None:
            self._parts.log.failure(
                "spool",
                "a batch could not be written to SPOOL_DIRECTORY; events stay in memory, within its bounds "
                "(spool_errors in stats())",
            )
        return path

    def _count_spooled(self, batch: Batch) -> None:
        self._parts.ledger.drop(DropReason.SPOOLED, len(batch))
        self._parts.ledger.add("spooled", len(batch))

    def replay(self, state: ProcessState[Any], turn: Turn) -> Turn:
        """Put one file into the queue, if the time has come and the server may be asked.

        Return when to take the next turn: `turn`, which is what the sender would do otherwise, if nothing changes that.
        """
        now_s = self._parts.clock.monotonic()
        with state.lock:
            if state.closing or state.replaying or state.version != turn.version:
                return turn
            if not state.health.may_ask:
                return turn  # the one who asks wakes everybody when he knows
            # Files wait for the server as long as anybody; they are not read before it may be asked.
            open_at_s = max(self._replay_at_s, state.health.opens_at())
            if now_s < open_at_s:
                return Turn(open_at_s - now_s, turn.version)
            state.replaying = True
        claim = None
        try:
            claim = self._spool.claim()
        finally:
            with state.lock:
                state.replaying = claim is not None
        if claim is None:
            self._replay_at_s = self._parts.clock.monotonic() + _LOOK_AGAIN_S
            return Turn(_LOOK_AGAIN_S, turn.version)
        self._files_in_a_row += 1
        if self._files_in_a_row >= _FILES_IN_A_ROW:
            self._files_in_a_row = 0
            self._replay_at_s = self._parts.clock.monotonic() + _PAUSE_S
        batch = Batch([Prepared(payload, len(payload)) for payload in claim.payloads], claim.first_time_s)
        claim.payloads = []  # the batch has them
        batch.origin = claim
        with state.lock:
            if not state.stopped:
                self._parts.budget.charge(batch.size_bytes)
                state.queue.add_replayed(batch)
                state.note_batch()
                return Turn(0.0, state.version)
        self._spool.release(claim)  # a shutdown, meanwhile, has taken back what there was
        return turn

    def finish(self, state: ProcessState[Any], batch: Batch) -> None:
        """Remove the file of a batch whose events are settled, all of them."""
        self._spool.finish(batch.origin)
        with state.lock:
            state.replaying = False
            state.note_change()

    def take_back(self, state: ProcessState[Any]) -> None:
        """Leave on disk, once the threads end, what is not settled of the file that is being replayed.

        A piece that is on its way right now is left to its sender, which comes back here.
        """
        with state.lock:
            pieces = state.queue.take_replayed()
        if not pieces:
            return
        claim: Claim = pieces[0].origin
        left = [event.payload for piece in pieces for event in piece.events]
        self._parts.budget.release(sum([piece.size_bytes for piece in pieces]))
        # If the rest cannot be written the whole file stays: the server recognizes by their ids what it has already.
        if len(left) < claim.events and self._spool.write(left, claim.first_time_s) is not None:
            self._spool.finish(claim)
        else:
            self._spool.release(claim)
