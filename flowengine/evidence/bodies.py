"""What records of each kind hold, beside decisions: one function per kind, with its sentence in English and Chinese.

`check_body` is asked before anything is recorded: a record that lacks what its kind needs would prove nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from flowengine.evidence.checkpoint import Checkpoint
from flowengine.evidence.private import Private
from flowengine.policy.explain import duty_record
from flowengine.policy.model import Duty
from flowengine.policy.phrases import duty_text, moment_text
from flowengine.units import format_bytes

__all__ = [
    "activate_body", "approval_body", "break_glass_body", "check_body", "checkpoint_body", "chunk_root_body",
    "delete_certificate_body", "obligation_body", "quarantine_body", "recheck_body", "recovery_body", "refusal_body",
    "stop_body",
]  # fmt: skip

_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "recovery": ("cut_bytes", "digest"),
    "policy.activate": ("bundle", "version", "not_after", "signers"),
    "decision": ("decision_id", "point", "phase", "ask", "bundle", "decision", "text"),
    "obligation": ("id", "state", "duty"),
    "chunk-root": ("transfer", "task", "direction", "path", "root", "objects", "size_bytes"),
    "recheck": ("cause", "result"),
    "stop": ("transfer", "mode", "cause"),
    "quarantine": ("transfer", "task", "path", "cause", "objects", "size_bytes"),
    "delete-certificate": ("path", "cause", "objects", "size_bytes"),
    "approval": ("id", "state"),
    "break-glass": ("rule", "review_by"),
    "checkpoint": ("of", "document"),
}

DutyState = Literal["accepted", "fulfilled", "failed"]
StopMode = Literal["stop-now", "finish-file", "drain"]

_STATES: Final = {"accepted": "接受", "fulfilled": "已履行", "failed": "未履行"}
_MODES: Final = {"stop-now": "立即停止", "finish-file": "完成当前文件后停止", "drain": "完成在途数据后停止"}


def check_body(kind: str, body: Mapping[str, object]) -> None:
    """Refuse a body that its kind could not be made from.

    Raises:
        ValueError: the kind is unknown, or a field is missing.
    """
    needed = _NEEDED.get(kind)
    if needed is None:
        raise ValueError(f"{kind!r} is no kind of record that can be added")
    missing = [name for name in needed if name not in body]
    if missing:
        raise ValueError(f"a record of kind {kind!r} needs {', '.join(missing)}")


def _text(en: str, zh: str) -> dict[str, object]:
    return {"en": en, "zh": zh}


def activate_body(
    bundle: str,
    version: int,
    not_after: int,
    signers: Sequence[tuple[str, str]],
    replaces: str = "",
) -> dict[str, object]:
    """A bundle came into force.

    Args:
        bundle: its digest.
        signers: role and key id of each signature that counted.
        replaces: digest of the bundle before; empty for the first.
    """
    return {
        "bundle": bundle,
        "version": version,
        "not_after": moment_text(not_after),
        "signers": [{"role": role, "key": key} for role, key in signers],
        "replaces": replaces,
        "text": _text(
            f"Policy bundle version {version} came into force; valid until {moment_text(not_after)}.",
            f"策略包版本 {version} 已生效，有效期至 {moment_text(not_after)}。",
        ),
    }


def refusal_body(
    decision_id: str,
    use: str,
    site: str,
    data: str,
    point: str,
    phase: str,
    reason: str,
    why: str,
    *,
    bundle: str = "",
    transfer: str = "",
    task: str = "",
) -> dict[str, object]:
    """A use was denied before the policies were asked: a forged or missing ticket, an expired bundle, a lie.

    Args:
        reason: code of the error.
        why: its message.
        bundle: digest of the bundle in force; empty for none.
    """
    return {
        "decision_id": decision_id,
        "point": point,
        "phase": phase,
        "ask": {"use": use, "site": site, "data": data},
        "bundle": bundle,
        "decision": "deny",
        "refused": reason,
        "transfer": transfer,
        "task": task,
        "text": _text(f"Refused before any policy was asked: {why}", f"未经政策评估即被拒绝（{reason}）。"),
    }


def obligation_body(
    duty: Duty,
    state: DutyState,
    *,
    id: str,
    transfer: str,
    task: str = "",
    decision_id: str = "",
    proof: Mapping[str, object] | None = None,
    why: str = "",
) -> dict[str, object]:
    """A duty was accepted, fulfilled or failed.

    Args:
        id: the duty's name in its decision, as `o1`.
        proof: figures and digests that show it.
        why: for a failed one, the reason.
    """
    english = {"accepted": "Accepted", "fulfilled": "Fulfilled", "failed": "Failed"}[state]
    return {
        "id": id,
        "state": state,
        "duty": duty_record(duty),
        "transfer": transfer,
        "task": task,
        "decision_id": decision_id,
        "proof": dict(proof or {}),
        "why": why,
        "text": _text(
            f"{english}: {duty_text(duty, 'en')}." + (f" {why}" if why else ""),
            f"{_STATES[state]}：{duty_text(duty, 'zh')}。",
        ),
    }


def chunk_root_body(
    *,
    transfer: str,
    task: str,
    direction: Literal["left", "landed", "passed"],
    path: str,
    root: str,
    objects: int,
    size_bytes: int,
    peer: Mapping[str, object] | None = None,
    receipt: str = "",
) -> dict[str, object]:
    """What left, landed or passed.

    Args:
        path: as `site:/path`.
        root: version id, the Merkle root over all of it (docs/spec/manifest.md); hexadecimal, empty for what a relay
            cannot see.
        receipt: the signed receipt, base64; where there is one.
    """
    words = {"left": ("Left", "已发出"), "landed": ("Landed", "已落地"), "passed": ("Passed on", "已转发")}
    en, zh = words[direction]
    body: dict[str, object] = {
        "transfer": transfer,
        "task": task,
        "direction": direction,
        "path": path,
        "root": root,
        "objects": objects,
        "size_bytes": size_bytes,
        "text": _text(
            f"{en}: {objects} objects, {format_bytes(size_bytes)}, at {path}.",
            f"{zh}：{objects} 个对象，{format_bytes(size_bytes)}，位于 {path}。",
        ),
    }
    if peer is not None:
        body["peer"] = dict(peer)
    if receipt:
        body["receipt"] = receipt
    return body


def recheck_body(
    cause: str, result: Literal["permit", "deny"], *, transfer: str, task: str = "", decision_id: str = ""
) -> dict[str, object]:
    """A running transfer was judged anew.

    Args:
        cause: "bundle-change", "fact-change", "timer", "offline" or "approval-change".
        decision_id: the decision that came out of it.
    """
    zh = {"permit": "仍然允许", "deny": "不再允许"}[result]
    en = {"permit": "still permitted", "deny": "no longer permitted"}[result]
    return {
        "cause": cause,
        "result": result,
        "transfer": transfer,
        "task": task,
        "decision_id": decision_id,
        "text": _text(f"Checked again ({cause}): {en}.", f"重新评估（{cause}）：{zh}。"),
    }


def stop_body(
    mode: StopMode,
    cause: str,
    *,
    transfer: str,
    task: str = "",
    decision_id: str = "",
    bytes_after: int = 0,
    quarantined: str = "",
) -> dict[str, object]:
    """A transfer was stopped.

    Args:
        cause: reason code or rule.
        bytes_after: payload bytes that still went or came between the decision and the stop.
        quarantined: site path where the partial data lies now; empty for none.
    """
    return {
        "transfer": transfer,
        "task": task,
        "mode": mode,
        "cause": cause,
        "decision_id": decision_id,
        "bytes_after": bytes_after,
        "quarantined": quarantined,
        "text": _text(f"Stopped ({mode}): {cause}.", f"已停止（{_MODES[mode]}）：{cause}。"),
    }


def quarantine_body(
    *, transfer: str, task: str, path: str, cause: str, objects: int, size_bytes: int, missing: int = 0
) -> dict[str, object]:
    """What had landed, whole or in part, was moved out of the way.

    Args:
        path: as `site:/path`.
        cause: reason code.
        missing: objects that had landed and were not there any more.
    """
    return {
        "transfer": transfer,
        "task": task,
        "path": path,
        "cause": cause,
        "objects": objects,
        "size_bytes": size_bytes,
        "missing": missing,
        "text": _text(
            f"Moved to quarantine ({cause}): {objects} objects, {format_bytes(size_bytes)}, from {path}.",
            f"已移入隔离区（{cause}）：{objects} 个对象，{format_bytes(size_bytes)}，来自 {path}。",
        ),
    }


def delete_certificate_body(
    *,
    path: str,
    cause: str,
    objects: int,
    size_bytes: int,
    transfer: str = "",
    task: str = "",
    root: str = "",
    verified: str = "",
    failed: int = 0,
    certificate: str = "",
) -> dict[str, object]:
    """Data was deleted.

    Args:
        path: as `site:/path`.
        cause: "delete_by", "delete_after", "purge", "erasure".
        objects, size_bytes: what was removed.
        root: version id of what was removed, hexadecimal, where known.
        verified: how absence was checked, as "listed-empty".
        failed: objects that could not be removed.
        certificate: the signed certificate of deletion, base64.
    """
    return {
        "path": path,
        "cause": cause,
        "objects": objects,
        "size_bytes": size_bytes,
        "transfer": transfer,
        "task": task,
        "root": root,
        "verified": verified,
        "failed": failed,
        "certificate": certificate,
        "text": _text(
            f"Deleted ({cause}): {objects} objects, {format_bytes(size_bytes)}, at {path}"
            + (f"; {failed} could not be removed." if failed else "."),
            f"已删除（{cause}）：{objects} 个对象，{format_bytes(size_bytes)}，位于 {path}"
            + (f"；{failed} 个未能删除。" if failed else "。"),
        ),
    }


def approval_body(
    id: str,
    state: Literal["requested", "given", "refused", "withdrawn", "used"],
    *,
    group: str = "",
    by: str = "",
    binds: str = "",
    until: int | None = None,
    transfer: str = "",
) -> dict[str, object]:
    """An approval was asked for, given, refused, withdrawn or used.

    Args:
        by: the person; recorded as a keyed digest.
        binds: digest of what exactly is approved (data, recipient, purpose, duties).
    """
    zh = {
        "requested": "已申请",
        "given": "已批准",
        "refused": "已拒绝",
        "withdrawn": "已撤回",
        "used": "已使用",
    }[state]
    body: dict[str, object] = {
        "id": id,
        "state": state,
        "group": group,
        "binds": binds,
        "until": None if until is None else moment_text(until),
        "transfer": transfer,
        "text": _text(
            f"Approval {id} {state}" + (f" for group {group}." if group else "."),
            f"审批 {id} {zh}" + (f"（组：{group}）。" if group else "。"),
        ),
    }
    if by:
        body["by"] = Private("approval.by", by)
    return body


def break_glass_body(
    rule: str, review_by: int, *, transfer: str, decision_id: str = "", by: str = ""
) -> dict[str, object]:
    """A permit for an emergency was used; somebody has to look at it by a date."""
    body: dict[str, object] = {
        "rule": rule,
        "review_by": moment_text(review_by),
        "transfer": transfer,
        "decision_id": decision_id,
        "text": _text(
            f"Emergency permit {rule} was used; review due by {moment_text(review_by)}.",
            f"已启用紧急许可 {rule}；须于 {moment_text(review_by)} 前复核。",
        ),
    }
    if by:
        body["by"] = Private("break_glass.by", by)
    return body


def checkpoint_body(checkpoint: Checkpoint, document: str) -> dict[str, object]:
    """A checkpoint of this chain was signed, or one of another came in.

    Args:
        document: the signed document, base64.
    """
    return {
        "of": checkpoint.as_peer(),
        "document": document,
        "text": _text(
            f"Checkpoint of {checkpoint.agent} at record {checkpoint.seq}.",
            f"{checkpoint.agent} 的检查点，记录 {checkpoint.seq}。",
        ),
    }


def recovery_body(cut_bytes: int, digest: str) -> dict[str, object]:
    """A line that a crash had torn was cut off the end."""
    return {
        "cut_bytes": cut_bytes,
        "digest": digest,
        "text": _text(
            f"{cut_bytes} bytes of a record that was being written when the agent died were cut off.",
            f"已切除写入中断时残留的 {cut_bytes} 字节。",
        ),
    }
