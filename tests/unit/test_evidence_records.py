"""Records, chains, checkpoints and what decisions leave, without any file."""

import json

import pytest
from chains import NOW, pki

from flowengine.errors import AuthenticationError, IntegrityError
from flowengine.evidence.bodies import check_body, obligation_body, refusal_body, stop_body
from flowengine.evidence.canonical import canonical, read_canonical
from flowengine.evidence.chain import begin_chain, moment_ms, next_record, read_record
from flowengine.evidence.checkpoint import sign_checkpoint, verify_checkpoint
from flowengine.evidence.merkle import inclusion_path, merkle_root, root_from_path
from flowengine.evidence.private import Private, conceal, is_concealed, reveal
from flowengine.evidence.suites import DEFAULT_SUITE, find_suite
from flowengine.policy import Duty

SUITE = find_suite(DEFAULT_SUITE)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"€": 1, "\r": 2, "\ufb33": 3, "1": 4, "😀": 5, "\x80": 6, "ö": 7},
         '{"\\r":2,"1":4,"\x80":6,"ö":7,"€":1,"😀":5,"\ufb33":3}'),
        ("\x00\x1f\b\t\n\f\r\"\\/\x7f\u2028", '"\\u0000\\u001f\\b\\t\\n\\f\\r\\"\\\\/\x7f\u2028"'),
        ([2**53 - 1, -(2**53 - 1), 0, True, None, []], "[9007199254740991,-9007199254740991,0,true,null,[]]"),
    ],
)  # fmt: skip
def test_canonical_json_is_that_of_rfc_8785(value: object, expected: str) -> None:
    assert canonical(value) == expected.encode()
    assert read_canonical(expected.encode()) == value


@pytest.mark.parametrize(
    "value",
    [1.0, float("nan"), 2**53, {1: 2}, "\ud800", {"\udfff": 1}, b"bytes", {"a": [{"b": 0.5}]}, object()],
)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize(
    "text",
    ['{"b":1,"a":2}', '{"a":1,"a":1}', '{"a": 1}', "1.0", "1e2", "-0", "01", '"\\u0041"', '"\\/"', "NaN", "[1,]", "",
     " 1", "9007199254740992", "9" * 5000, "[" * 100_000],
)  # fmt: skip
def test_other_ways_to_write_it_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_canonical(text.encode())


def test_each_record_names_the_one_before() -> None:
    first, head = begin_chain("site:alpha", b"\1" * 16, NOW)
    second, head = next_record(head, "stop", stop_body("drain", "denied", transfer="tr-1"), NOW + 1)
    assert (first.seq, first.prev, second.seq, second.prev) == (1, SUITE.zero, 2, first.hash)
    assert (head.chain, head.hash) == (first.hash, second.hash)
    assert read_record(second.line, SUITE) == second
    assert second.time == "2026-03-02T12:00:05.218Z"


def test_an_altered_record_is_told() -> None:
    _, head = begin_chain("site:alpha", b"\1" * 16, NOW)
    record, _ = next_record(head, "stop", stop_body("drain", "denied", transfer="tr-1"), NOW)
    for altered in (
        record.line.replace(b"drain", b"plain"),
        record.line.replace(b'"seq":2', b'"seq":3'),
        record.line.replace(b'"stop"', b'"stoq"'),
        record.line + b" ",
        b"{}",
        b"[]",
        b"x",
    ):
        with pytest.raises(IntegrityError) as refused:
            read_record(altered, SUITE)
        assert refused.value.reason == "evidence"


def test_a_body_has_to_hold_what_its_kind_needs() -> None:
    _, head = begin_chain("site:alpha", b"\1" * 16, NOW)
    for kind, body in (("stop", {"transfer": "x"}), ("gossip", {}), ("chain", {})):
        with pytest.raises(ValueError):
            check_body(kind, body)
    for kind, body in (("gossip", {}), ("chain", {}), ("stop", {"seq": 3}), ("stop", {"x": 0.5})):
        with pytest.raises(ValueError):
            next_record(head, kind, body, NOW)


def test_a_chain_of_an_unknown_suite_is_refused_by_name() -> None:
    for name in ("sm3+sm2", "", None, 7):
        with pytest.raises(IntegrityError, match="suite") as refused:
            find_suite(name)
        assert refused.value.reason == "incompatible"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13])
def test_a_path_leads_to_the_root_from_its_own_leaf_alone(count: int) -> None:
    leaves = [SUITE.digest(bytes([number])) for number in range(count)]
    root = merkle_root(SUITE, leaves)
    for index, leaf in enumerate(leaves):
        path = inclusion_path(SUITE, leaves, index)
        assert root_from_path(SUITE, leaf, path) == root
        for other in leaves:
            assert other == leaf or root_from_path(SUITE, other, path) != root


def test_the_tree_is_that_of_rfc_9162() -> None:
    """By the recursive definition: split at the largest power of two below the number of leaves."""

    def root(leaves: list[str]) -> bytes:
        if len(leaves) == 1:
            return SUITE.raw(b"\0" + leaves[0].encode())
        split = 1 << ((len(leaves) - 1).bit_length() - 1)
        return SUITE.raw(b"\1" + root(leaves[:split]) + root(leaves[split:]))

    for count in range(1, 20):
        leaves = [SUITE.digest(bytes([number])) for number in range(count)]
        assert merkle_root(SUITE, leaves) == "sha256:" + root(leaves).hex()


def test_private_values_are_there_as_keyed_digests_only() -> None:
    key, salts = b"k" * 32, iter([b"a" * 16, b"b" * 16, b"c" * 16])
    body = {"facts": [{"attr": "data.persons", "value": Private("data.persons", 48_211)}], "by": Private("by", "eve"),
            "again": Private("by", "eve")}  # fmt: skip
    concealed, kept = conceal(body, SUITE, key, lambda _: next(salts))
    text = canonical(concealed).decode()
    assert "48211" not in text
    assert "eve" not in text
    assert concealed["by"] != concealed["again"], "two records of one value cannot be compared"
    assert all(is_concealed(concealed[name]) for name in ("by", "again"))
    for one in kept:
        assert reveal(one.digest, one, SUITE, key)
        assert not reveal(one.digest, one, SUITE, b"x" * 32)
        assert not reveal(one.digest, type(one)(one.digest, one.name, "mallory"), SUITE, key)
    with pytest.raises(ValueError):
        canonical(body)


def test_texts_are_in_both_languages() -> None:
    duty = Duty("delete_after", (("value", 86_400),), ("house/night",))
    for body in (
        stop_body("stop-now", "bundle-change", transfer="tr-1"),
        refusal_body("d1", "land", "beta", "alpha:/x", "target", "before-first-byte", "denied", "no ticket"),
        obligation_body(duty, "fulfilled", id="o1", transfer="tr-1"),
    ):
        text = body["text"]
        assert isinstance(text, dict)
        assert text["en"]
        assert any("\u4e00" <= letter <= "\u9fff" for letter in str(text["zh"]))


def test_moments_do_not_round_up() -> None:
    assert moment_ms(0.9999) == "1970-01-01T00:00:00.999Z"
    assert json.loads(canonical(moment_ms(NOW))) == "2026-03-02T12:00:04.218Z"


def test_a_checkpoint_is_its_sites_own_word() -> None:
    keys = pki()
    _, head = begin_chain("site:alpha", b"\1" * 16, NOW)
    hashes = [head.hash]
    for _ in range(3):
        record, head = next_record(head, "stop", stop_body("drain", "x", transfer="t"), NOW)
        hashes.append(record.hash)
    document = sign_checkpoint(head, hashes, NOW, *keys.signer("alpha"))
    found, facts = verify_checkpoint(document, keys.anchors)
    assert (found.agent, found.first, found.seq, found.hash) == ("site:alpha", 1, 4, head.hash)
    assert (facts.site, found.root) == ("alpha", merkle_root(SUITE, hashes))
    with pytest.raises(AuthenticationError, match="in the name of"):
        verify_checkpoint(sign_checkpoint(head, hashes, NOW, *keys.signer("beta")), keys.anchors)
    with pytest.raises(AuthenticationError):
        verify_checkpoint(document, pki(12).anchors)
    with pytest.raises(AuthenticationError):
        verify_checkpoint(
            sign_checkpoint(head, hashes, NOW + 40 * 86_400, *keys.signer("alpha")), keys.anchors
        )
    for at in range(0, len(document), 7):
        altered = document[:at] + bytes([document[at] ^ 1]) + document[at + 1 :]
        try:
            again, _ = verify_checkpoint(altered, keys.anchors)
        except (AuthenticationError, IntegrityError):
            continue
        assert again == found, (
            "what no signature covers (the name of the key) changes nothing that is believed"
        )
