"""The file that holds one emulated GPU, shared by every process that reads, controls or loads it.

Layout, little-endian (`struct` formats below are the truth; `tests/nvml_simulator/state.h` is the same in C):

    header      written once: magic, version, boot id, names, counter and table sizes, load classes' power
    settings    8-byte fields set one by one: switch latency and jitter, how long driver calls take, faults
    tables      clocks; time and relative power per load class and clock, how long a change to a clock takes
    slots       two copies of the changing state (`dynamics.Dynamics`)
    log         ring of lock and reset calls

A writer holds `flock` on the file, fills the slot that is not current, and then raises the generation
number, whose lowest bit says which slot is current. So a writer that dies leaves the old state whole and the
kernel frees its lock, and readers need no lock at all.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.errors import GpuError, os_problem
from perseus_plugin.files import Descriptor, open_file
from perseus_plugin.gpus.emulated.dynamics import MAX_PENDING, Dynamics, Tables
from perseus_plugin.gpus.emulated.physics import LOAD_CLASSES

MAGIC = b"PERSEUSG"
VERSION = 3
MAX_CLOCKS = 256
LOG_CAPACITY = 4096

HEADER = struct.Struct(f"<8sIIII40s64s96sddd{LOAD_CLASSES}dd4d")
"""magic, version, clocks, load classes, log capacity, boot id, uuid, name, tick period, window and origin,
dynamic_w per class, static_w, tick lag, highest and first power limit, burst."""
SETTINGS_OFFSET = 512
SETTINGS = ("latency_s", "jitter_s", "set_call_s", "energy_call_s", "call_s", "faults")
TABLES_OFFSET = 1024
CLOCKS = struct.Struct(f"<{MAX_CLOCKS}I")
CURVE = struct.Struct(f"<{MAX_CLOCKS}d")
CURVES = 2 * LOAD_CLASSES + 2
GENERATION_OFFSET = TABLES_OFFSET + CLOCKS.size + CURVES * CURVE.size
DYNAMICS = struct.Struct(f"<14d{LOAD_CLASSES}dq3Q5I4x" + "dI4x" * MAX_PENDING)
"""The fields of `Dynamics` in the order of `_pack_dynamics`."""
SLOT_BYTES = 512
SLOTS_OFFSET = GENERATION_OFFSET + 64
LOG_OFFSET = SLOTS_OFFSET + 2 * SLOT_BYTES
LOG_ENTRY = struct.Struct("<dIIII")
FILE_BYTES = LOG_OFFSET + LOG_CAPACITY * LOG_ENTRY.size

NO_PERMISSION, NOT_SUPPORTED, GPU_LOST, IGNORE_LOCKS, MIG_ENABLED, NO_COUNTER, NO_FIELDS = 1, 2, 4, 8, 16, 32, 64
"""Bits of the `faults` setting: setting clocks refused; not supported; all calls fail; locks do nothing; it is
partitioned (told only by the simulated NVML); there is no energy counter; the call for field values is refused (known
only to the simulated NVML)."""


@dataclass(frozen=True, slots=True)
class ClockEvent:
    """One lock or reset call as the emulated driver saw it.

    Attributes:
        time_s: when it arrived.
        mhz: the clock of a lock, 0 for a reset.
        pid: the calling process.
        refused: whether the driver refused it.
    """

    time_s: float
    mhz: int
    pid: int
    refused: bool


class StateFile:
    """One opened state file.

    Raises:
        GpuError: on opening, for a file that is missing, of another version, or from before the last boot.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._thread_lock = threading.Lock()
        self._file: Descriptor | None = None
        self._open()
        header = HEADER.unpack_from(self._map, 0)
        if header[0] != MAGIC or header[1] != VERSION:
            raise GpuError(f"{self.path}: not an emulated GPU of version {VERSION}; remove it to have a new one made")
        if header[5].rstrip(b"\0").decode() != boot_id():
            raise GpuError(f"{self.path}: from before the last boot; remove it to have a new one made")
        self.uuid: str = header[6].rstrip(b"\0").decode()
        self.name: str = header[7].rstrip(b"\0").decode()
        self.tables = _read_tables(self._map, header)
        _opened.add(self)

    def close(self) -> None:
        """Unmap and close; the file stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._map.close()

    def snapshot(self) -> Dynamics:
        """The changing state as last written, without taking the lock."""
        while True:
            generation = self._generation()
            offset = SLOTS_OFFSET + (generation & 1) * SLOT_BYTES
            raw = self._map[offset : offset + DYNAMICS.size]
            if self._generation() == generation:
                return _unpack_dynamics(raw)

    @contextmanager
    def update(self) -> Iterator[Dynamics]:
        """The changing state under the lock; it is written back when the block ends without an exception.

        Raises:
            GpuError: the file cannot be locked.
        """
        with self._thread_lock:
            try:
                number = self._lockable()
                fcntl.flock(number, fcntl.LOCK_EX)
            except OSError as error:
                raise GpuError(f"{self.path}: the emulated GPU's file cannot be locked: {os_problem(error)}") from error
            try:
                dynamics = self.snapshot()
                yield dynamics
                generation = self._generation() + 1
                _pack_dynamics(self._map, SLOTS_OFFSET + (generation & 1) * SLOT_BYTES, dynamics)
                struct.pack_into("<Q", self._map, GENERATION_OFFSET, generation)
            finally:
                fcntl.flock(number, fcntl.LOCK_UN)

    def setting(self, name: str) -> float:
        """One of `SETTINGS`."""
        return float(struct.unpack_from("<d", self._map, SETTINGS_OFFSET + 8 * SETTINGS.index(name))[0])

    def set_setting(self, name: str, value: float) -> None:
        """Change one of `SETTINGS`."""
        struct.pack_into("<d", self._map, SETTINGS_OFFSET + 8 * SETTINGS.index(name), value)

    def log(self, dynamics: Dynamics, time_s: float, mhz: int, refused: bool) -> None:
        """Append to the ring log; to be called inside `update`."""
        offset = LOG_OFFSET + (dynamics.log_count % LOG_CAPACITY) * LOG_ENTRY.size
        LOG_ENTRY.pack_into(self._map, offset, time_s, mhz, os.getpid(), int(refused), 0)
        dynamics.log_count += 1

    def events(self) -> list[ClockEvent]:
        """The lock and reset calls that the ring still holds, oldest first."""
        count = self.snapshot().log_count
        entries = []
        for number in range(max(0, count - LOG_CAPACITY), count):
            offset = LOG_OFFSET + (number % LOG_CAPACITY) * LOG_ENTRY.size
            time_s, mhz, pid, refused, _ = LOG_ENTRY.unpack_from(self._map, offset)
            entries.append(ClockEvent(time_s, mhz, pid, bool(refused)))
        return entries

    def _generation(self) -> int:
        return int(struct.unpack_from("<Q", self._map, GENERATION_OFFSET)[0])

    def _open(self) -> None:
        try:
            self._file = Descriptor(open_file(self.path, os.O_RDWR))
            size = os.fstat(self._file.number).st_size
            if size != FILE_BYTES:
                raise OSError(f"its size is {size} bytes instead of {FILE_BYTES}")
            self._map = mmap.mmap(self._file.number, FILE_BYTES)
        except OSError as error:
            raise GpuError(f"{self.path}: cannot open the emulated GPU: {os_problem(error)}") from error

    def _lockable(self) -> int:
        """A descriptor of our own: opened again after a fork, and when the script has closed it."""
        with suppress(OSError):
            if self._file is not None:
                return self._file.number
        self._file = Descriptor(open_file(self.path, os.O_RDWR))
        return self._file.number

    def _after_fork_in_child(self) -> None:
        # A forked child shares the open file and with it the lock: it must neither hold the parent's lock
        # when the parent dies nor take part in it.
        self._thread_lock = threading.Lock()
        if self._file is not None:
            self._file.close()
            self._file = None


_opened: weakref.WeakSet[StateFile] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for file in list(_opened):
        file._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def boot_id() -> str:
    """Names this boot: monotonic times of another one mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def initial_bytes(uuid: str, name: str, tables: Tables, dynamics: Dynamics, settings: dict[str, float]) -> bytearray:
    """Content of a new state file."""
    content = bytearray(FILE_BYTES)
    HEADER.pack_into(
        content,
        0,
        MAGIC,
        VERSION,
        len(tables.clocks_mhz),
        LOAD_CLASSES,
        LOG_CAPACITY,
        boot_id().encode(),
        uuid.encode(),
        name.encode(),
        tables.tick_period_s,
        tables.tick_window_s,
        tables.tick_origin_s,
        *tables.dynamic_w,
        tables.static_w,
        tables.tick_lag_s,
        tables.most_w,
        tables.limit_w,
        tables.burst_j,
    )
    for index, key in enumerate(SETTINGS):
        struct.pack_into("<d", content, SETTINGS_OFFSET + 8 * index, settings.get(key, 0.0))
    CLOCKS.pack_into(content, TABLES_OFFSET, *_padded(tables.clocks_mhz, 0))
    offset = TABLES_OFFSET + CLOCKS.size
    for curve in (*tables.stretch, *tables.relative_power, tables.rise_s, tables.drop_s):
        CURVE.pack_into(content, offset, *_padded(curve, 0.0))
        offset += CURVE.size
    _pack_dynamics(content, SLOTS_OFFSET, dynamics)
    return content


def _padded(values: object, filler: float) -> list[float]:
    listed = list(values)  # type: ignore[call-overload]
    return [*listed, *[filler] * (MAX_CLOCKS - len(listed))]


def _read_tables(source: mmap.mmap, header: tuple[object, ...]) -> Tables:
    count = int(header[2])  # type: ignore[call-overload]
    curves = []
    offset = TABLES_OFFSET + CLOCKS.size
    for _ in range(CURVES):
        curves.append(CURVE.unpack_from(source, offset)[:count])
        offset += CURVE.size
    numbers = [float(value) for value in header[8:]]  # type: ignore[arg-type]
    return Tables(
        clocks_mhz=CLOCKS.unpack_from(source, TABLES_OFFSET)[:count],
        stretch=tuple(curves[:LOAD_CLASSES]),
        relative_power=tuple(curves[LOAD_CLASSES:-2]),
        dynamic_w=tuple(numbers[3:-5]),
        static_w=numbers[-5],
        tick_period_s=numbers[0],
        tick_window_s=numbers[1],
        tick_origin_s=numbers[2],
        tick_lag_s=numbers[-4],
        rise_s=curves[-2],
        drop_s=curves[-1],
        most_w=numbers[-3],
        limit_w=numbers[-2],
        burst_j=numbers[-1],
    )


def _pack_dynamics(target: bytearray | mmap.mmap, offset: int, d: Dynamics) -> None:
    pending = [field for change in d.pending for field in change]
    pending += [0.0, 0] * (MAX_PENDING - len(d.pending))
    DYNAMICS.pack_into(
        target,
        offset,
        *(d.at_s, d.energy_j, d.counter_j, d.window_j, d.capped_s, d.static_w, d.dynamic_w),
        *(d.work_s, d.done_s, d.started_s, d.finished_s, d.limit_w, d.spare_j, d.tick_j),
        *d.slowdown,
        *(d.ticks, d.work_id, d.log_count, d.random),
        *(d.load, d.clock_mhz, d.locked_mhz, d.cap_mhz, len(d.pending)),
        *pending,
    )


def _unpack_dynamics(raw: bytes) -> Dynamics:
    v = DYNAMICS.unpack(raw)
    n = 14 + LOAD_CLASSES
    ticks, work_id, log_count, random, load, clock_mhz, locked_mhz, cap_mhz, pending = v[n : n + 9]
    changes = v[n + 9 :]
    return Dynamics(
        *(v[0], clock_mhz, v[5], ticks),
        energy_j=v[1],
        counter_j=v[2],
        window_j=v[3],
        capped_s=v[4],
        dynamic_w=v[6],
        work_s=v[7],
        done_s=v[8],
        started_s=v[9],
        finished_s=v[10],
        limit_w=v[11],
        spare_j=v[12],
        tick_j=v[13],
        slowdown=list(v[14:n]),
        work_id=work_id,
        log_count=log_count,
        random=random,
        load=load,
        locked_mhz=locked_mhz,
        cap_mhz=cap_mhz,
        pending=[(changes[2 * i], changes[2 * i + 1]) for i in range(pending)],
    )
