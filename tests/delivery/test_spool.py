"""Batches on disk."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moesif_otel._delivery.process import Collaborators
from moesif_otel._delivery.spool import MAX_AGE_S, Spool
from moesif_otel._delivery.stats import Ledger
from moesif_otel._guard import Guard
from tests.delivery.delivery_kit import FakeClock, assert_law, settings

BINDING = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the spool needs flock(2)")


class Kit:
    """A spool with its books."""

    def __init__(self, directory, max_bytes=1_000_000, binding=BINDING) -> None:
        self.ledger, self.guard, self.clock = Ledger(), Guard(), FakeClock()
        wanted = settings(spool_max_bytes=max_bytes)
        parts = Collaborators(wanted, None, self.ledger, None, self.guard, self.clock, None)
        self.spool = Spool(str(directory), binding, parts)
        self.directory = Path(directory)

    def write(self, *payloads, age_s=0.0):
        return self.spool.write(payloads, self.clock.time() - age_s)

    def take_all(self) -> list[list[bytes]]:
        found = []
        while (claim := self.spool.claim()) is not None:
            found.append(claim.payloads)
            self.spool.finish(claim)
        return found

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    @property
    def stats(self):
        stats = self.ledger.snapshot()
        assert_law(stats)
        return stats


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path / "spool")


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=8))
def test_what_was_written_is_read_once(tmp_path_factory, batches) -> None:
    """Any payloads, in any batches, come back whole, oldest first, and once."""
    kit = Kit(tmp_path_factory.mktemp("spool"))
    for n, batch in enumerate(batches):
        assert kit.write(*batch, age_s=100 - n) is not None
    assert kit.take_all() == batches
    assert kit.take_all() == []
    assert kit.names == []
    assert kit.stats.spool_bytes == 0


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_found(tmp_path_factory, data) -> None:
    """A file with any byte changed, cut off, or added is set aside and counted, never sent, never an error."""
    kit = Kit(tmp_path_factory.mktemp("spool"))
    path = kit.write(b"one", b"two", b"three" * 10)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["change", "cut", "add"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "change":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[at:]
    else:
        content += b"x" * (at + 1)
    path.write_bytes(content)
    assert kit.spool.claim() is None
    assert [name.rpartition(".")[2] for name in kit.names] == ["unreadable"]
    assert kit.stats.dropped == {"spool_unreadable": 3}
    assert kit.stats.spool_set_aside == 1
    assert kit.spool.claim() is None
    assert kit.stats.spool_set_aside == 1


def test_modes_and_names(kit) -> None:
    """The folder is the owner's alone, so is each file; the name tells no application id."""
    path = kit.write(b"{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_existing_folder_keeps_its_mode(tmp_path) -> None:
    """A folder that somebody made is used as it is."""
    tmp_path.chmod(0o755)
    Kit(tmp_path).write(b"{}")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_others_files_are_left_alone(kit) -> None:
    """Another application's batches, and files that are nobody's, are neither read nor counted nor removed."""
    kit.write(b"mine")
    other = Kit(kit.directory, binding=OTHER)
    other.write(b"theirs")
    (kit.directory / "README").write_text("not yours")
    (kit.directory / f"moesif-{BINDING}-1-x.batch").write_text("an odd name")
    (kit.directory / f"moesif-{BINDING}-{1:013d}-{'a' * 32}-1.batch").mkdir()
    assert kit.take_all() == [[b"mine"]]
    assert other.take_all() == [[b"theirs"]]
    assert len(kit.names) == 3
    assert kit.stats.dropped == {}


def test_a_file_under_a_wrong_name_is_foreign(kit) -> None:
    """A batch of another application under our name is set aside: its events are not ours to send."""
    other = Kit(kit.directory, binding=OTHER)
    path = other.write(b"theirs")
    path.rename(str(path).replace(OTHER, BINDING))
    assert kit.take_all() == []
    assert kit.stats.dropped == {"spool_unreadable": 1}


def test_symbolic_links_are_not_followed(kit, tmp_path) -> None:
    """A link that lies in wait under our name is neither read nor written through."""
    path = kit.write(b"x")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path.unlink()
    path.symlink_to(secret)
    assert kit.take_all() == []
    assert secret.read_text() == "secret"


def test_leases_exclude_threads_and_processes(kit) -> None:
    """A batch that one reader has, another cannot have, in this process or another; released, it can."""
    kit.write(b"x")
    claim = kit.spool.claim()
    assert kit.spool.claim() is None
    assert Kit(kit.directory).spool.claim() is None
    assert in_another_process(kit.directory, "spool.claim()") == "None"
    kit.spool.release(claim)
    assert in_another_process(kit.directory, "spool.claim().payloads") == "[b'x']"
    # That process has ended without a word: its lease went with it.
    assert kit.take_all() == [[b"x"]]


def in_another_process(directory, expression) -> str:
    code = (
        "import os, sys\n"
        "from tests.delivery.test_spool import Kit\n"
        f"spool = Kit({str(directory)!r}).spool\n"
        f"print({expression}, flush=True)\n"
        "os._exit(0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork and threads
def test_a_fork_does_not_take_the_lease(kit) -> None:
    """A child of a process that holds a lease neither has it nor ends it, and does not keep it alive."""
    kit.write(b"x")
    claim = kit.spool.claim()
    read, write = os.pipe()
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        kit.spool.after_fork()
        kit.spool.release(claim)  # a stale claim in the child touches nothing
        os.write(write, b"1" if kit.spool.claim() is None else b"0")
        os.read(go_read, 1)
        os._exit(0)
    assert os.read(read, 1) == b"1"
    assert Kit(kit.directory).spool.claim() is None
    kit.spool.release(claim)
    assert Kit(kit.directory).take_all() == [[b"x"]]
    os.write(go_write, b"x")
    os.waitpid(pid, 0)
    for descriptor in (read, write, go_read, go_write):
        os.close(descriptor)


def test_readers_beside_each_other_get_each_batch_once(tmp_path) -> None:
    """Four readers on one folder: every batch is had once."""
    writer = Kit(tmp_path)
    for n in range(60):
        writer.write(b"%d" % n)
    found, lock = [], threading.Lock()

    def read() -> None:
        mine = [batch for kit in [Kit(tmp_path)] for batch in kit.take_all()]
        with lock:
            found.extend(mine)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(batch[0]) for batch in found) == list(range(60))


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=15), st.integers(1, 3000))
def test_bound_holds_and_the_oldest_go_first(tmp_path_factory, sizes, max_bytes) -> None:
    """However large the batches: the folder never exceeds SPOOL_MAX_BYTES, what stays is the youngest, all is counted."""
    kit = Kit(tmp_path_factory.mktemp("spool"), max_bytes)
    written = []
    for n, size in enumerate(sizes):
        if kit.write(bytes([n]) * size, age_s=100 - n) is not None:
            written.append(n)
        assert sum(p.stat().st_size for p in kit.directory.iterdir()) <= max_bytes
        assert kit.stats.spool_bytes == sum(p.stat().st_size for p in kit.directory.iterdir())
    left = [batch[0][0] for batch in kit.take_all()]
    assert left == written[len(written) - len(left) :]
    assert kit.stats.dropped.get("spool_full", 0) == len(written) - len(left)


def test_the_bound_holds_for_all_processes_together(tmp_path) -> None:
    """Ten that write at the same time see each other's files well before the next look by the clock."""
    kits = [Kit(tmp_path, 100_000) for _ in range(10)]
    for n in range(600):
        kits[n % 10].write(b"x" * 900)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 150_000


def test_unreadable_files_make_room_first(tmp_path) -> None:
    """What cannot be sent any more goes before anything that can."""
    kit = Kit(tmp_path, 900)
    bad = kit.write(b"b" * 300, age_s=1)
    bad.write_bytes(b"damaged" + b"x" * 350)
    kit.write(b"g" * 300, age_s=2)
    claim = kit.spool.claim()
    assert kit.spool.claim() is None  # the damaged one is found out on the way
    kit.spool.release(claim)
    kit.write(b"n" * 300)
    assert [b[0][:1] for b in kit.take_all()] == [b"g", b"n"]


def test_leased_batches_are_not_removed_for_room(tmp_path) -> None:
    """A batch that is being sent right now stays; the new one is refused instead."""
    kit = Kit(tmp_path, 500)
    kit.write(b"a" * 300)
    claim = kit.spool.claim()
    assert kit.write(b"b" * 300) is None
    assert kit.stats.spool_errors == 1
    kit.spool.finish(claim)
    assert kit.write(b"b" * 300) is not None


def test_expired_batches_are_counted_and_removed(kit) -> None:
    """Nothing older than the server takes is sent."""
    kit.write(b"old", b"older", age_s=MAX_AGE_S + 1)
    kit.write(b"fresh", age_s=MAX_AGE_S - 100)
    assert kit.take_all() == [[b"fresh"]]
    assert kit.stats.dropped == {"expired": 2}


def test_half_written_files_are_put_away_when_their_writer_is_gone(kit) -> None:
    """A `.partial` of a moment ago is somebody's work; an old one is a crash: set aside, its events counted as unreadable."""
    path = kit.write(b"one", b"two")
    partial = path.with_suffix(".partial")
    partial.write_bytes(path.read_bytes()[:20])
    path.unlink()
    now = kit.clock.time()
    os.utime(partial, (now, now))
    assert kit.spool.claim() is None
    assert kit.names == [partial.name]
    kit.clock.now_s += 601
    assert kit.spool.claim() is None
    assert kit.names == [path.with_suffix(".unreadable").name]
    assert kit.stats.dropped == {"spool_unreadable": 2}


def test_empty_file_is_set_aside(kit) -> None:
    """An empty file with our name is no batch."""
    kit.write(b"one").write_bytes(b"")
    assert kit.spool.claim() is None
    assert kit.stats.spool_set_aside == 1


def test_full_disk_is_counted_and_leaves_nothing(kit, monkeypatch) -> None:
    """ENOSPC in the middle of a write: counted, no half file, no error."""
    real = os.write

    def full(descriptor, data):
        if len(data) > 100:
            return real(descriptor, data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert kit.write(b"x" * 300) is None
    monkeypatch.undo()
    assert kit.names == []
    assert kit.stats.spool_errors == 1
    assert kit.guard.counts() == {"writing to SPOOL_DIRECTORY": 1}


def test_read_only_disk_is_counted(kit, monkeypatch) -> None:
    """A disk that is mounted read-only: counted, nothing raised; when it can be written again, it is."""
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    assert kit.write(b"x") is None
    monkeypatch.undo()
    assert kit.write(b"x") is not None
    assert kit.stats.spool_errors == 1


def test_what_cannot_be_removed_is_not_sent_or_counted_again(kit, monkeypatch) -> None:
    """A directory that became read-only: each batch is sent, or lost, once; when it can be written again, all are gone."""
    kit.write(b"sent")
    kit.write(b"old", age_s=MAX_AGE_S + 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))
        assert kit.take_all() == [[b"sent"]]
        assert kit.take_all() == []
        assert kit.stats.dropped == {"expired": 1}
        assert len(kit.names) == 2
    assert kit.take_all() == []
    assert kit.names == []


def test_folder_that_is_a_file_is_counted(tmp_path) -> None:
    """A path that cannot be a folder: nothing is written, nothing read, nothing raised."""
    (tmp_path / "file").write_text("x")
    kit = Kit(tmp_path / "file")
    assert kit.write(b"x") is None
    assert kit.spool.claim() is None
    assert kit.stats.spool_errors == 2


def test_folder_that_vanishes_is_made_again(kit) -> None:
    """Somebody cleans up while we run: the next batch makes the folder anew."""
    import shutil

    kit.write(b"x")
    shutil.rmtree(kit.directory)
    assert kit.spool.claim() is None
    assert kit.write(b"y") is not None
    assert kit.take_all() == [[b"y"]]


def planted(kit, name_from, data, mode=0o600):
    path = kit.directory / name_from.name.replace("-1.batch", "-2.batch")
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_file_that_others_could_have_written_is_not_sent(kit, tmp_path, caplog) -> None:
    """Writable by others, a link, or of another owner: left alone, not counted in, and said once."""
    kit.directory.mkdir()
    path = kit.write(b"ours")
    data = path.read_bytes()
    path.chmod(0o666)
    assert kit.spool.claim() is None
    path.chmod(0o600)
    target = tmp_path / "target"
    target.write_bytes(data)
    link = kit.directory / path.name.replace("-1.batch", "-2.batch")
    link.symlink_to(target)
    assert kit.take_all() == [[b"ours"]]
    assert target.exists()
    assert caplog.text.count("files that belong to another user") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_sent(kit) -> None:
    """In a directory that several users write to, only what is ours goes out."""
    path = kit.write(b"ours")
    os.chown(path, 12345, -1)
    assert kit.spool.claim() is None
    assert path.exists()


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_length_that_is_cut_sets_the_file_aside(kit, cut) -> None:
    """A head whose sizes fit and a body that ends within a length: damaged, and counted so."""
    import struct
    import zlib

    body = struct.pack(">I", 2) + b"ab" + b"\0" * cut
    path = kit.write(b"whole")
    path.write_bytes(struct.pack(">8s32sIQI", b"MSPOOL1\n", BINDING.encode(), 2, len(body), zlib.crc32(body)) + body)
    assert kit.spool.claim() is None
    assert kit.stats.dropped == {"spool_unreadable": 1}


def test_a_hostile_file_costs_no_memory(kit) -> None:
    """Half a million empty events in 2 MB: not believed before they are read."""
    import struct
    import tracemalloc
    import zlib

    body = b"\0" * 2_000_000
    path = kit.write(b"whole")
    path.write_bytes(struct.pack(">8s32sIQI", b"MSPOOL1\n", BINDING.encode(), 500_000, len(body), zlib.crc32(body)) + body)
    tracemalloc.start()
    try:
        assert kit.spool.claim() is None
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_write_does_not_list_the_directory(kit, monkeypatch) -> None:
    """Three thousand files make a write no slower: the size is known from the last look."""
    kit.write(b"first")
    looks = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or real(path))
    for n in range(50):
        kit.write(b"%d" % n)
    assert looks == []
    assert len(kit.take_all()) == 51


def test_files_of_an_address_that_is_gone_expire(kit) -> None:
    """Nobody would ever send what another application id or address left: after 30 days whoever looks removes it."""
    other = Kit(kit.directory, binding=OTHER)
    other.write(b"old", age_s=MAX_AGE_S + 10)
    other.write(b"young")
    assert kit.spool.claim() is None
    assert kit.stats.dropped == {"expired": 1}
    assert other.take_all() == [[b"young"]]


def test_a_batch_is_read_with_the_last_descriptor(kit, monkeypatch) -> None:
    """A process that has used up its file descriptors does not take a whole file for a damaged one."""

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    kit.write(b"{}")
    monkeypatch.setattr(os, "dup", none_left)
    assert kit.take_all() == [[b"{}"]]
    assert kit.stats.dropped == {}
