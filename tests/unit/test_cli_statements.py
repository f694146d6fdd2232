"""Statements that owners and authorities sign on the command line: what they say is what was meant, or they are not made."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from flowengine.cli.main import main
from flowengine.trust.agreement import peek_agreement
from flowengine.trust.labels import peek_labels


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    private = Ed25519PrivateKey.generate()
    path.touch(0o600)
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def sign(kind: str, key: Path, output: Path, *more: str) -> int:
    about = (
        ["label", "sign", "paris:/data", "--owner", "lab", "--label", "a"]
        if kind == "label"
        else ["agreement", "sign", "ag-1", "--as", "counsel", "--data", "paris:/data"]
    )
    with pytest.raises(SystemExit) as ended:
        main([*about, "--key", str(key), "--number", "1", "-o", str(output), *more])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_facts_are_typed_as_their_attributes_are(key: Path, tmp_path: Path) -> None:
    assert sign("label", key, tmp_path / "l", "--fact", "persons=12", "--fact", "collected_in=FR,DE") == 0
    assert peek_labels((tmp_path / "l").read_bytes()).facts == {
        "data.persons": 12,
        "data.collected_in": ["DE", "FR"],
    }
    assert (
        sign("agreement", key, tmp_path / "a", "--fact", "tia_done=true", "--fact", "mechanism=scc-2021") == 0
    )
    assert peek_agreement((tmp_path / "a").read_bytes()).facts == {
        "agreement.tia_done": True,
        "agreement.mechanism": "scc-2021",
    }


@pytest.mark.parametrize(
    ("kind", "fact"), [("label", ("collected_in=FR", "collected_in=DE")), ("agreement", ("id=1", "id=2"))]
)
def test_a_fact_that_is_said_twice_is_not_signed(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, fact: tuple[str, str]
) -> None:
    assert sign(kind, key, tmp_path / "said", "--fact", fact[0], "--fact", fact[1]) == 2
    assert "said twice" in capsys.readouterr().err
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("kind", ["label", "agreement"])
def test_a_file_that_cannot_be_written_is_named(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert sign(kind, key, tmp_path / "nowhere/said") != 0
    said = capsys.readouterr().err
    assert "cannot write" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["label", "agreement"])
@pytest.mark.parametrize("bits", [0o644, 0o640, 0o602])
def test_a_key_that_others_can_read_signs_nothing(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, bits: int
) -> None:
    key.chmod(bits)
    assert sign(kind, key, tmp_path / "said") == 1
    said = capsys.readouterr().err
    assert f"mode {bits:04o}" in said
    assert f"chmod 600 {key}" in said
    assert not (tmp_path / "said").exists()
    key.chmod(0o400)
    assert sign(kind, key, tmp_path / "said") == 0
