"""Properties of the wire layer: splits do not matter, changes are found, garbage is only a protocol error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flowengine.errors import (
    AuthenticationError,
    FlowError,
    IntegrityError,
    PeerError,
    ProtocolError,
    TemporaryError,
)
from flowengine.wire.control import ControlDecoder, encode
from flowengine.wire.filters import FilterSet
from flowengine.wire.frames import (
    FRAME_SIZES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    FrameOpener,
    FrameSealer,
)
from flowengine.wire.handshake import ClientHandshake, ServerHandshake
from flowengine.wire.keys import NO_FINGERPRINT, Direction, SessionSecrets, StreamKeys
from flowengine.wire.paths import check_link_target, check_relative_path, collision_key
from flowengine.wire.preamble import PREAMBLE_BYTES, Preamble, PreambleRegistry
from flowengine.wire.proofs import TicketProof, among
from flowengine.wire.ticket import Ticket

pytestmark = pytest.mark.slow


def stream_keys(stream: int = 1, epoch: int = 0) -> StreamKeys:
    secrets = SessionSecrets(
        b"c" * 32, b"s" * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=b"S" * 32
    )
    return secrets.stream_keys(bytes(16), stream, Direction.SOURCE_TO_TARGET, epoch)


def sealed(payloads: list[bytes], epoch: int = 0) -> list[bytes]:
    """The frames of a whole stream, its end included."""
    sealer = FrameSealer(stream_keys(epoch=epoch))
    out, frames = bytearray(MAX_FRAME_BYTES), []
    for payload in payloads:
        cut = len(payload) // 2
        frames.append(bytes(out[: sealer.seal_into([payload[:cut], payload[cut:]], out)]))
    frames.append(bytes(out[: sealer.seal_end(out)]))
    return frames


def read_stream(data: bytes, opener: FrameOpener) -> Iterator[bytes]:
    """Payloads of the frames in `data`, as a receiver reads them."""
    at = 0
    out = bytearray(MAX_FRAME_BYTES)
    while len(data) - at >= HEADER_BYTES:
        header = data[at : at + HEADER_BYTES]
        length = opener.parse_header(header)
        at += HEADER_BYTES
        if len(data) - at < length:
            break
        yield bytes(out[: opener.open_into(header, data[at : at + length], out)])
        at += length
    opener.finish()


payload_lists = st.lists(st.binary(max_size=200) | st.integers(0, 70_000).map(lambda n: b"x" * n), max_size=4)


@given(payload_lists)
def test_streams_come_back(payloads: list[bytes]) -> None:
    frames = sealed(payloads)
    assert {len(frame) for frame in frames} <= set(FRAME_SIZES)
    opener = FrameOpener(stream_keys())
    assert list(read_stream(b"".join(frames), opener)) == [*payloads, b""]
    assert opener.totals == (len(payloads), sum(map(len, payloads)))


FLIP_PAYLOADS = [b"one", b"two" * 1500, b""]
FLIP_FRAMES = sealed(FLIP_PAYLOADS)


def check_flipped(frame: int, bit: int) -> None:
    """The flip is found, at its frame: what came before is right, and nothing comes after."""
    frames = list(map(bytearray, FLIP_FRAMES))
    frames[frame][bit // 8] ^= 1 << bit % 8
    reader = read_stream(b"".join(frames), FrameOpener(stream_keys()))
    assert [next(reader) for _ in range(frame)] == FLIP_PAYLOADS[:frame]
    # A size code that asks for more than there is looks like a cut.
    with pytest.raises((ProtocolError, IntegrityError, TemporaryError)):
        next(reader)


@given(st.integers(0, len(FLIP_FRAMES) - 1), st.data())
def test_any_flipped_bit_is_found_before_its_frame_gives_a_byte(frame: int, data: st.DataObject) -> None:
    check_flipped(frame, data.draw(st.integers(0, len(FLIP_FRAMES[frame]) * 8 - 1)))


def test_every_flipped_bit_of_a_header_trailer_or_tag_is_found() -> None:
    for frame, sealed_frame in enumerate(FLIP_FRAMES):
        last = len(sealed_frame) * 8
        for bit in [*range(HEADER_BYTES * 8), *range(last - 20 * 8, last)]:
            check_flipped(frame, bit)


@given(st.permutations(range(4)), st.integers(0, 4), st.sampled_from([0, 1]))
@example([0, 1, 2, 3], 4, 1)
def test_reordered_replayed_cut_or_foreign_streams_are_refused(
    order: list[int], keep: int, epoch: int
) -> None:
    frames = sealed([b"a", b"b", b"c"], epoch=epoch)
    chosen = [frames[number] for number in order[:keep]]
    assume(epoch or order[:keep] != [0, 1, 2, 3])
    with pytest.raises(FlowError) as caught:
        list(read_stream(b"".join(chosen), FrameOpener(stream_keys())))
    whole = order[:keep] == list(range(keep)) and not epoch
    assert (caught.value.reason == "disconnected") is (whole or not keep)


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_garbage_frames_give_only_known_errors(header: bytes, body: bytes) -> None:
    opener = FrameOpener(stream_keys())
    good = sealed([])[0][:HEADER_BYTES]
    for candidate in (header[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), good):
        try:
            length = opener.parse_header(candidate)
            opener.open_into(candidate, body.ljust(length, b"\0")[:length], bytearray(length))
        except (ProtocolError, IntegrityError):
            continue
        raise AssertionError("garbage was opened")


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.data())
def test_any_split_gives_the_same_messages(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    decoder, got = ControlDecoder(), list[bytes]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[start:end])
    assert got == messages
    decoder.finish()


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_garbage_on_the_control_connection_stays_bounded(pieces: list[bytes]) -> None:
    decoder = ControlDecoder(max_message=30)
    try:
        for piece in pieces:
            for message in decoder.feed(piece):
                assert 0 < len(message) <= 30
            assert decoder.buffered_bytes < 34
    except ProtocolError:
        assert decoder.buffered_bytes == 0


@given(st.binary(max_size=200))
@example(b"\x81\xa4type\xa5proof")
def test_garbage_in_the_handshake_gives_only_known_errors(message: bytes) -> None:
    client = ClientHandshake(TicketProof(b"k" * 24), b"F" * 32, b"c" * 32)
    server = ServerHandshake(among([TicketProof(b"k" * 24)]), b"F" * 32, b"s" * 32)
    server.start()
    hello = client.start()[0]
    for prepare in (False, True):
        if prepare:
            server = ServerHandshake(among([TicketProof(b"k" * 24)]), b"F" * 32, b"s" * 32)
            server.start()
            server.receive(hello)
        for machine in (client, server):
            with pytest.raises((ProtocolError, AuthenticationError, PeerError)):
                machine.receive(message)


@given(st.binary(min_size=PREAMBLE_BYTES, max_size=PREAMBLE_BYTES))
def test_no_garbage_opens_a_data_connection(data: bytes) -> None:
    registry = PreambleRegistry()
    registry.register(bytes(16), b"k" * 32)
    for candidate in (data, Preamble(bytes(16), 0, 0).encode(b"k" * 32)[:32] + data[32:]):
        with pytest.raises((ProtocolError, AuthenticationError)):
            registry.accept(candidate)


path_bytes = st.lists(
    st.sampled_from([b"a", b"..", b".", b"", b"/", b"\0", b"\xff", "é".encode()]) | st.binary(max_size=5),
    max_size=8,
).flatmap(lambda parts: st.sampled_from([b"/".join(parts), b"".join(parts)]))


@given(path_bytes)
def test_an_accepted_path_stays_below_its_root(path: bytes) -> None:
    try:
        check_relative_path(path)
    except ProtocolError:
        return
    depth = 0
    for name in path.split(b"/"):
        depth += {b"..": -1, b".": 0, b"": 0}.get(name, 1)
        assert depth > 0
    assert b"\0" not in path
    assert not path.startswith(b"/")


@given(path_bytes, path_bytes)
def test_an_accepted_link_never_steps_above_the_root(link: bytes, target: bytes) -> None:
    try:
        check_relative_path(link)
        check_link_target(link, target)
    except ProtocolError:
        return
    depth = link.count(b"/")
    for name in target.split(b"/"):
        depth += {b"..": -1, b".": 0, b"": 0}.get(name, 1)
        assert depth >= 0
    assert not target.startswith(b"/")


@given(st.text(max_size=20) | st.binary(max_size=20))
def test_collision_keys_are_fixed_points(name: str | bytes) -> None:
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
    key = collision_key(raw)
    assert collision_key(key) == key


_component = st.binary(min_size=1, max_size=8).map(lambda raw: raw.replace(b"/", b"-").replace(b"\0", b"_"))


@given(st.lists(_component, min_size=1, max_size=5).map(b"/".join), st.binary(min_size=24, max_size=64))
def test_tickets_come_back(path: bytes, secret: bytes) -> None:
    try:
        check_relative_path(path)
    except ProtocolError:
        assume(False)
    ticket = Ticket("h.example", 7171, path, b"F" * 32, secret)
    assert Ticket.parse(ticket.format_secret_url()) == ticket


def naive(pattern: bytes, text: bytes) -> bool:
    """Whether a pattern of stars, question marks and letters matches all of a text: tries everything."""
    if not pattern:
        return not text
    if pattern.startswith(b"**"):
        rest = pattern.lstrip(b"*")
        return any(naive(rest, text[at:]) for at in range(len(text) + 1))
    if pattern.startswith(b"*"):
        end = text.find(b"/")
        return any(naive(pattern[1:], text[at:]) for at in range((len(text) if end < 0 else end) + 1))
    if not text:
        return False
    if pattern[:1] == b"?":
        return text[:1] != b"/" and naive(pattern[1:], text[1:])
    return pattern[:1] == text[:1] and naive(pattern[1:], text[1:])


@settings(max_examples=max(400, settings.default.max_examples))
@given(
    st.lists(st.sampled_from([b"a", b"b", b"*", b"**", b"?", b"/"]), min_size=1, max_size=9).map(b"".join),
    st.lists(st.text("ab", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=5).map(b"/".join),
)
@example(b"/**a*b**b", b"ab/aab/b")
@example(b"/a*b*a/b", b"abba/b")
def test_atomic_groups_lose_no_match(body: bytes, path: bytes) -> None:
    """A second, naive matcher agrees for anchored patterns, where the whole path must match."""
    assume(not body.startswith(b"/") and not body.endswith((b"/", b"***")))
    assume(b"*" in body or b"?" in body)
    rules = FilterSet([(False, b"/" + body)])
    assert rules.allows(path, False) is not naive(body, path)
    tail = FilterSet([(False, body)])
    expected = naive(b"**/" + body, b"/" + path) or (body.startswith(b"**") and naive(body, b"/" + path))
    assert tail.allows(path, False) is not expected


wire_rules = st.lists(st.tuples(st.booleans(), st.binary(max_size=12)), max_size=4)


@given(wire_rules, path_bytes, st.booleans())
def test_any_pattern_compiles_or_is_refused(
    rules: list[tuple[bool, bytes]], path: bytes, is_dir: bool
) -> None:
    try:
        found = FilterSet.from_wire(rules)
    except ProtocolError:
        assert any(not pattern or b"\0" in pattern for _, pattern in rules)
        return
    assert found.allows(path, is_dir) in (True, False)
