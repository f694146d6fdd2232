"""Lines, duties and reasons in English and Chinese, from templates per operator and type; never free text."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from flowengine.policy.model import Duty, Line, ListRef, Literal, PolicySet, Reference
from flowengine.units import format_bytes

__all__ = ["KINDS", "LANGUAGES", "USE_NAMES", "duty_text", "line_text", "moment_text"]

LANGUAGES: Final = ("en", "zh")

USE_NAMES: Final = {
    "release": ("release", "发出"),
    "relay": ("relay", "中转"),
    "hold": ("hold (sealed, without key)", "密文保管"),
    "land": ("land", "落地"),
    "process": ("process", "处理"),
}
KINDS: Final = {
    "permitted": ("Permitted", "允许"),
    "forbidden": ("Denied (forbidden)", "拒绝（被禁止）"),
    "not permitted": ("Denied (not permitted)", "拒绝（未获许可）"),
    "undetermined": ("Denied (facts are missing)", "拒绝（缺少事实）"),
    "colliding obligations": ("Denied (duties collide)", "拒绝（义务互相冲突）"),
    "unsupported obligation": ("Denied (the agent cannot do a duty)", "拒绝（节点无法履行义务）"),
}
"""Kinds of decisions in English and Chinese."""

_OPERATORS: Final[Mapping[str, tuple[str, str]]] = {
    "is": ("{a} is {b}", "{a}为{b}"),
    "is not": ("{a} is not {b}", "{a}不是{b}"),
    "in": ("{a} is on the list {b}", "{a}属于{b}"),
    "not in": ("{a} is not on the list {b}", "{a}不属于{b}"),
    "includes": ("{a} include {b}", "{a}包含{b}"),
    "excludes": ("{a} do not include {b}", "{a}不包含{b}"),
    "includes any of": ("{a} include one of {b}", "{a}包含{b}之一"),
    "includes all of": ("{a} include all of {b}", "{a}包含全部{b}"),
    "subset of": ("{a} are all on the list {b}", "{a}全部属于{b}"),
    "<": ("{a} is below {b}", "{a}小于{b}"),
    "<=": ("{a} is at most {b}", "{a}不超过{b}"),
    ">": ("{a} is above {b}", "{a}大于{b}"),
    ">=": ("{a} is at least {b}", "{a}不少于{b}"),
    "before": ("{a} is before {b}", "{a}早于{b}"),
    "after": ("{a} is after {b}", "{a}晚于{b}"),
    "not before": ("{a} is not before {b}", "{a}不早于{b}"),
}


def line_text(line: Line, policies: PolicySet, language: str) -> str:
    """A condition line as a sentence.

    Args:
        line: The line.
        policies: Where lists have their titles.
        language: `en` or `zh`.
    """
    column = LANGUAGES.index(language)
    left = _reference_text(line.left, column)
    if isinstance(line.right, Literal) and line.right.type == "flag":
        yes = line.right.value is (line.op == "is")
        return (f"{left}: {'yes' if yes else 'no'}", f"{left}：{'是' if yes else '否'}")[column]
    return _OPERATORS[line.op][column].format(a=left, b=_right_text(line, policies, column))


def _reference_text(reference: Reference, column: int) -> str:
    name = (reference.attribute.en, reference.attribute.zh)[column]
    return f"{name} ({', '.join(reference.arguments)})" if reference.arguments else name


def _right_text(line: Line, policies: PolicySet, column: int) -> str:
    right = line.right
    if isinstance(right, Reference):
        return _reference_text(right, column)
    if isinstance(right, ListRef):
        found = policies.lists.get(right.name)
        title = found.title if found is not None and found.title else ""
        return f"{right.shown} ({title})" if title and column == 0 else right.shown
    return f"“{right.value}”" if right.type == "text" else right.shown


def moment_text(at: int) -> str:
    """An instant as RFC 3339 in UTC.

    >>> moment_text(0)
    '1970-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _span(seconds: object) -> tuple[str, str]:
    assert isinstance(seconds, int)
    for size, unit, zh in (
        (365 * 86400, "year", "年"),
        (86400, "day", "天"),
        (3600, "hour", "小时"),
        (60, "minute", "分钟"),
    ):
        if seconds % size == 0 and seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count != 1 else ''}", f"{count}{zh}"
    return f"{seconds} s", f"{seconds}秒"


def _list(value: object) -> str:
    assert isinstance(value, tuple)
    return ", ".join(value) if len(value) <= 8 else f"{', '.join(value[:6])} … ({len(value)})"


def duty_text(duty: Duty, language: str) -> str:
    """A duty as a sentence."""
    return _duty(duty)[LANGUAGES.index(language)]


def _duty(duty: Duty) -> tuple[str, str]:
    params = dict(duty.params)
    value = params.get("value")
    if duty.type == "encrypt":
        return _encrypt(params)
    if duty.type in ("delete_by", "delete_after"):
        proof_en = f", with a {params['proof']}" if params.get("proof") not in (None, "none") else ""
        proof_zh = "，并出具证明" if proof_en else ""
        if duty.type == "delete_by":
            assert isinstance(value, int)
            return (
                f"delete by {moment_text(value)[:10]}{proof_en}",
                f"于{moment_text(value)[:10]}前删除{proof_zh}",
            )
        return f"delete after {_span(value)[0]}{proof_en}", f"{_span(value)[1]}后删除{proof_zh}"
    if duty.type == "log":
        return _log(params)
    if duty.type == "columns":
        return _columns(params)
    if duty.type == "approve":
        groups = _list(params["from"])
        return (
            f"approval by {params['people']} people from {groups}, not the requester",
            f"需{groups}中{params['people']}人审批，请求者本人除外",
        )
    if duty.type == "rate_max":
        assert isinstance(value, int)
        return f"at most {format_bytes(value // 8)}/s", f"速率不超过{format_bytes(value // 8)}/s"
    return _other(duty, params, value)


def _encrypt(params: Mapping[str, object]) -> tuple[str, str]:
    places = params.get("at", ())
    assert isinstance(places, tuple)
    en = "encrypt " + " and ".join({"flight": "in flight", "rest": "at rest"}[place] for place in places)
    zh = "与".join({"flight": "传输", "rest": "存储"}[place] for place in places) + "加密"
    if params.get("end_to_end"):
        en, zh = en + ", end to end", zh + "，端到端"
    if suites := params.get("suite"):
        en, zh = en + f", with {_list(suites)}", zh + f"，套件{_list(suites)}"
    if keys := params.get("keys_in"):
        en, zh = en + f", keys kept in {_list(keys)}", zh + f"，密钥保存在{_list(keys)}"
    return en, zh


def _log(params: Mapping[str, object]) -> tuple[str, str]:
    level = {"full": "完整", "summary": "摘要", "digest": "摘要值"}[str(params["evidence"])]
    en, zh = f"log {params['evidence']} evidence", f"记录{level}证据"
    if keep := params.get("keep"):
        en, zh = en + f", kept {_span(keep)[0]}", zh + f"，保存{_span(keep)[1]}"
    if stays := params.get("stays_in"):
        en, zh = en + f", which stays in {_list(stays)}", zh + f"，证据留在{_list(stays)}"
    return en, zh


def _columns(params: Mapping[str, object]) -> tuple[str, str]:
    words = {"drop": "删除", "tokenise": "令牌化", "mask": "遮蔽", "generalise": "泛化"}
    en, zh = [], []
    for act, chinese in words.items():
        items = params.get(act, ())
        assert isinstance(items, tuple)
        if items:
            names = [f"{item[0]} to {item[1]}" if act == "generalise" else item for item in items]
            en.append(f"{act} {', '.join(names)}")
            zh.append(f"{chinese}{'、'.join(item[0] if act == 'generalise' else item for item in items)}")
    return "columns: " + "; ".join(en), "列：" + "；".join(zh)


_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "spill": ("write nothing to disk in passing ({value})", "中转不落盘（{value}）"),
    "count": ("count: {entries}", "计数：{entries}"),
    "retain": ("keep for {span_en}", "保存{span_zh}"),
    "legal_hold": ("no deletion while the case {value} is open", "案件{value}未结期间不得删除"),
    "onward": ("no onward transfer ({value})", "不得再转移（{value}）"),
    "rows": ("only rows with {keep}", "仅限满足{keep}的行"),
    "suppress": ("suppress groups smaller than {k}", "抑制少于{k}的分组"),
    "aggregate_only": ("only groups by {by} of at least {min_group}", "仅按{by}汇总，每组不少于{min_group}"),
    "relabel": ("labels removed: {remove}; added: {add}", "移除标签：{remove}；添加标签：{add}"),
    "window": ("only within {windows}", "仅在{windows}时段"),
    "notify": ("notify {value}", "通知{value}"),
    "review_by": ("review within {span_en}", "{span_zh}内复核"),
    "place_copies": ("keep at least {at_least} copies", "至少保留{at_least}份副本"),
    "isolate": ("share no {value} with others", "不与他人共享{value}"),
    "purge": ("purge {value}", "清除{value}"),
    "stop": ("on a change: {value}", "变更时：{value}"),
    "quarantine": ("quarantine what has arrived", "隔离已到达的数据"),
}


def _other(duty: Duty, params: Mapping[str, object], value: object) -> tuple[str, str]:
    shown: dict[str, object] = dict.fromkeys(("remove", "add"), "-")
    for key, item in params.items():
        shown[key] = _list(item) if isinstance(item, tuple) else item
    if isinstance(value, int) and not isinstance(value, bool):
        shown["span_en"], shown["span_zh"] = _span(value)
    en, zh = _WORDS[duty.type]
    return en.format(**shown), zh.format(**shown)
