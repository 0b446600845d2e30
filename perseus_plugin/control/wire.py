"""What goes through the pipes between a rank and its clock helper.

Commands (rank to helper) are fixed records of 32 bytes, so that a write is atomic and a full pipe drops whole
commands. Replies (helper to rank) are a header and a payload of at most 4,000 bytes: one atomic write too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

COMMAND = struct.Struct("<HHIQdd")
"""magic, what, number, seq, sent at, time."""
REPLY_HEADER = struct.Struct("<HHI")
"""magic, what, payload bytes."""
MAGIC = 0x5E50
MAX_PAYLOAD = 4000

SET_CLOCK, POLL_ENERGY, MARK, MEASURE_LATENCY, CLOSE, FREE_AFTER = range(1, 7)
AT_ONCE_AND_LAST = -1.0
"""Apply time of a SET_CLOCK that nothing shall hold up, not even a timing of clock changes."""
EXIT_NO_GPU, EXIT_RESET_FAILED = 2, 3
"""Exit statuses of a helper that could not open its GPU, or could not make sure that its clock is free."""
READY, TICK, MARKED, APPLIED, LATENCY, DEVIATION, TROUBLE, HEARTBEAT, BYE = range(1, 10)


class WireError(Exception):
    """Bytes on a pipe that are no command or reply."""


class Command(NamedTuple):
    """One command.

    Attributes:
        what: `SET_CLOCK` and so on.
        number: MHz (0: reset) of SET_CLOCK, tag of MARK, rounds of MEASURE_LATENCY.
        seq: rising number.
        sent_s: when it was sent.
        time_s: apply time of SET_CLOCK (0: at once; `AT_ONCE_AND_LAST`), interval of POLL_ENERGY (0: stop), silence
            of FREE_AFTER.
    """

    what: int
    number: int
    seq: int
    sent_s: float
    time_s: float

    def pack(self) -> bytes:
        """As it goes through the pipe."""
        return COMMAND.pack(MAGIC, self.what, self.number, self.seq, self.sent_s, self.time_s)


def split_commands(buffer: bytearray) -> Iterator[Command]:
    """Take the whole commands off the front of `buffer`.

    Raises:
        WireError: bytes that are no command.
    """
    while len(buffer) >= COMMAND.size:
        magic, *fields = COMMAND.unpack_from(buffer)
        if magic != MAGIC or not SET_CLOCK <= fields[0] <= FREE_AFTER:
            raise WireError(f"not a command: {bytes(buffer[: COMMAND.size])!r}")
        del buffer[: COMMAND.size]
        yield Command._make(fields)


def pack_reply(what: int, payload: bytes = b"") -> bytes:
    """A reply as it goes through the pipe."""
    payload = payload[:MAX_PAYLOAD]
    return REPLY_HEADER.pack(MAGIC, what, len(payload)) + payload


def split_replies(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """Take the whole replies off the front of `buffer`.

    Raises:
        WireError: bytes that are no reply.
    """
    while len(buffer) >= REPLY_HEADER.size:
        magic, what, length = REPLY_HEADER.unpack_from(buffer)
        if magic != MAGIC or not READY <= what <= BYE or length > MAX_PAYLOAD:
            raise WireError(f"not a reply: {bytes(buffer[: REPLY_HEADER.size])!r}")
        end = REPLY_HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[REPLY_HEADER.size : end])
        del buffer[:end]
        yield what, payload


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the helper found out about its GPU at start-up.

    Attributes:
        name, uuid, emulated, clocks_mhz: as of the `Gpu`.
        can_lock: whether clocks can be set by this helper.
        why_not: the reason and the remedy if not, else empty.
        leftover: what a dead run had left locked and was reset now, else empty.
        pid: of the helper.
        backend: through which the clock is set, by its name in `gpus.registry`; empty if it cannot be.
        driver: version of the driver, empty if there is none.
        foreign: what is known or suspected of a lock that somebody else had made, with what becomes of it; else empty.
        counter: what is wrong with the energy counter, empty if it moves or was not looked at.
        busy: somebody else's helper controls the GPU.
        power_limit_w: the most that the card may be set to draw (0: not known).
        enforced_limit_w: the power limit in force (0: not known).
    """

    name: str
    uuid: str
    emulated: bool
    clocks_mhz: tuple[int, ...]
    can_lock: bool
    why_not: str
    leftover: str
    pid: int
    backend: str = ""
    driver: str = ""
    foreign: str = ""
    counter: str = ""
    busy: bool = False
    power_limit_w: float = 0.0
    enforced_limit_w: float = 0.0

    def pack(self) -> bytes:
        """As the payload of READY."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> DeviceFacts:
        """Inverse of `pack`."""
        fields = json.loads(payload)
        return cls(**{**fields, "clocks_mhz": tuple(fields["clocks_mhz"])})


@dataclass(frozen=True, slots=True)
class Tick:
    """The energy counter has moved.

    Attributes:
        previous_poll_s: the last poll that still saw the old value.
        time_s: the poll that saw the new one; the tick lies between the two.
        energy_j: the new value.
        clock_mhz: SM clock read with it.
        capped_s: time in all below the clock asked for because of the power limit (NaN: unknown).
        epoch: see `readings.CheckedEnergy`.
    """

    previous_poll_s: float
    time_s: float
    energy_j: float
    clock_mhz: int
    capped_s: float
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """Answer to `mark(tag)`: the counter (NaN: not to be believed) and the clock as of `time_s`.

    `epoch` is as in `readings.CheckedEnergy`.
    """

    tag: int
    time_s: float
    energy_j: float
    clock_mhz: int
    capped_s: float
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Applied:
    """A request that reached the driver.

    Attributes:
        seq: its number.
        frequency_mhz: the clock, None for a reset.
        requested_s: when the rank sent it; apply_at_s: the time it asked for (0: at once).
        called_s, applied_s: when the driver call began and returned.
    """

    seq: int
    frequency_mhz: int | None
    requested_s: float
    apply_at_s: float
    called_s: float
    applied_s: float


@dataclass(frozen=True, slots=True)
class SwitchLatency:
    """Time from a lock call until the SM clock reads the target, over `samples` changes.

    `timeouts` changes never read the target; the percentiles are NaN if all did that.
    """

    p50_s: float
    p95_s: float
    samples: int
    timeouts: int


@dataclass(frozen=True, slots=True)
class Deviation:
    """The GPU does not run at the clock it was asked for.

    Below it: a power or thermal limit, or a lower lock. Above it: the lock is not there any more, or never took effect.
    """

    time_s: float
    requested_mhz: int
    read_mhz: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something went wrong.

    Attributes:
        code: `"lock_failed"`, `"gave_way"` (no clock will be set any more), `"read_failed"`, `"read_again"` (no
            trouble any more), `"reset_failed"` (the GPU may be left locked), `"helper_failed"` (it never started, or
            could not open the GPU), `"helper_died"`, `"helper_stuck"`, `"protocol"`; `"started_again"` (a helper that
            had ended: clocks are set as before), `"paused"` (the clock was free while the trainer did nothing).
        text: for people.
        time_s: when.
        free: False where the clock may still be locked although it should not be; the text says what frees it.
    """

    code: str
    text: str
    time_s: float
    free: bool = True

    def pack(self) -> bytes:
        """As the payload of TROUBLE."""
        return f"{self.code}\n{self.time_s!r}\n{int(self.free)}\n{self.text}".encode(errors="backslashreplace")[
            :MAX_PAYLOAD
        ]

    @classmethod
    def unpack(cls, payload: bytes) -> Trouble:
        """Inverse of `pack`."""
        code, time_s, free, text = payload.decode(errors="replace").split("\n", 3)
        return cls(code, text, float(time_s), bool(int(free)))


Event = Tick | Mark | Applied | SwitchLatency | Deviation | Trouble

_TICK = struct.Struct("<dddIdI")
_MARK = struct.Struct("<IddIdI")
_APPLIED = struct.Struct("<QIdddd")
_LATENCY = struct.Struct("<ddII")
_DEVIATION = struct.Struct("<dII")


def pack_event(event: Event) -> bytes:
    """The whole reply for an event."""
    if isinstance(event, Tick):
        fields = (event.previous_poll_s, event.time_s, event.energy_j, event.clock_mhz, event.capped_s, event.epoch)
        return pack_reply(TICK, _TICK.pack(*fields))
    if isinstance(event, Applied):
        times = (event.requested_s, event.apply_at_s, event.called_s, event.applied_s)
        return pack_reply(APPLIED, _APPLIED.pack(event.seq, event.frequency_mhz or 0, *times))
    if isinstance(event, Mark):
        seen = (event.time_s, event.energy_j, event.clock_mhz, event.capped_s, event.epoch)
        return pack_reply(MARKED, _MARK.pack(event.tag, *seen))
    if isinstance(event, SwitchLatency):
        return pack_reply(LATENCY, _LATENCY.pack(event.p50_s, event.p95_s, event.samples, event.timeouts))
    if isinstance(event, Deviation):
        return pack_reply(DEVIATION, _DEVIATION.pack(event.time_s, event.requested_mhz, event.read_mhz))
    return pack_reply(TROUBLE, event.pack())


def unpack_event(what: int, payload: bytes) -> Event:
    """The event in a reply.

    Raises:
        WireError: the payload does not fit.
    """
    try:
        if what == TICK:
            return Tick(*_TICK.unpack(payload))
        if what == APPLIED:
            seq, mhz, *times = _APPLIED.unpack(payload)
            return Applied(seq, mhz or None, *times)
        if what == MARKED:
            return Mark(*_MARK.unpack(payload))
        if what == LATENCY:
            return SwitchLatency(*_LATENCY.unpack(payload))
        if what == DEVIATION:
            return Deviation(*_DEVIATION.unpack(payload))
        if what == TROUBLE:
            return Trouble.unpack(payload)
    except (struct.error, ValueError) as error:
        raise WireError(f"reply {what} with a wrong payload: {error}") from error
    raise WireError(f"reply {what} is no event")
