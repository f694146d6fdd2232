"""The standard vocabulary: every fact the engine itself asserts, the declared counters, kinds of sources.

A set of policy files may add attributes of its own (`attributes.toml`) and may narrow who is entitled to assert a
standard one; it cannot change what a standard attribute means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from flowengine.policy.model import Attribute, Counter

__all__ = ["ATTRIBUTES", "COUNTERS", "SOURCES", "SUBJECTS", "WINDOWS", "vocabulary_digest"]

SOURCES: Final = {
    "label": "a statement signed by the data owner's key",
    "manifest": "the signed manifest of the dataset version",
    "registry": "the site registry, pinned in the policy bundle",
    "attestation": "a measurement or third party that vouches for a site",
    "site": "the site itself; it may only narrow what others say",
    "agreement": "an agreement, by its reference and digest",
    "feed": "the feed of a public list (participants, sanctions)",
    "request": "whoever asks for the transfer",
    "engine": "derived by the agent from the protocol, never claimed",
    "ledger": "the counters, including reservations",
    "approval": "a signed approval",
    "case": "the register of legal cases",
    "clock": "the agent's clock, with its error bound",
}
"""Kinds of sources a fact can have; a fact's source is written `kind` or `kind:name`."""

_TABLE: Final = """
data.labels | set label | label | - | the data's labels | 数据标签
data.contracts | set | label manifest agreement | - | the contracts the data is under | 数据所属合同
data.collected_in | set country | label manifest | nonempty | the countries where the data was collected | 数据采集国家
data.source_labels | set label | manifest label | - | the labels of all data it was made from | 来源数据的标签
data.source_collected_in | set country | manifest label | nonempty | the countries where its sources were collected | 来源数据的采集国家
data.lineage_proved | flag | engine | - | the lineage is complete and verified | 数据血缘完整且已验证
data.persons | number count | manifest label | - | the number of persons in the data | 数据涉及人数
data.controller | text | label manifest | - | the controller of the data | 数据控制者
data.columns | set | manifest | - | the columns of the data | 数据列
data.category | text | label manifest | - | the category of the data | 数据类别
data.tenant | text | label manifest | - | the tenant who owns the data | 数据所属租户
data.cases | set | case | - | the legal cases the data belongs to | 数据涉及的案件
data.copies_in | set country | engine registry | - | the countries that hold a complete copy | 已有完整副本的国家
data.copies | number count | engine registry | - | the number of complete copies | 完整副本数量
data.embargo_until | time | label manifest | - | the end of the embargo | 禁止发布截止时间
data.tombstoned | flag | engine registry | - | an erasure request covers the data | 数据已被请求删除
data.is_aggregate | flag | manifest engine | - | the data is an aggregate | 数据为汇总统计
data.smallest_cell | number count | manifest engine | - | the smallest group behind any figure | 最小单元格人数
data.derivable_cells | flag | manifest engine | - | a small cell can be derived from the figures | 可推算出小单元格
site.id | text | registry | - | the site | 站点
site.country | text country | registry attestation | - | the site's country | 站点所在国家
site.subdivision | text | registry attestation | - | the site's subdivision (ISO 3166-2) | 站点所在地区
site.zone | text | registry | - | the site's zone | 站点所属区域
site.operator | text | registry | - | the site's operator | 站点运营方
site.operator_countries | set country | registry attestation site | nonempty union | the countries whose law the operator answers to | 运营方受其法律管辖的国家
site.owner_countries | set country | registry attestation site | nonempty union | the countries of the operator's ultimate owners | 运营方最终所有者所在国家
site.admin_countries | set country | registry attestation site | nonempty union | the countries its administrators work from | 管理员所在国家
site.admin_nationalities | set country | registry attestation site | nonempty union | the nationalities of administrators with key access | 有密钥权限管理员的国籍
site.key_countries | set country | registry attestation site | nonempty union | the countries where keys are kept | 密钥保存国家
site.certs | set | registry attestation site | intersect | the site's certificates | 站点认证
site.network | text | registry attestation | - | the site's kind of network | 站点网络类型
site.suites | set | registry attestation site | intersect | the site's crypto suites | 站点密码套件
site.spill | text | attestation engine | - | what the site writes to disk in passing | 站点落盘方式
site.has_key | flag | engine | - | the site has the key to this data | 站点持有该数据密钥
recipient.org | text | agreement registry | - | the receiving organisation | 接收机构
recipient.group | text | registry feed | - | the recipient's corporate group | 接收方所属集团
recipient.country | text country | agreement registry | - | the recipient's country | 接收方国家
recipient.sector | text | registry feed | - | the recipient's sector | 接收方行业
recipient.certifications | set | feed registry | - | the recipient's certifications | 接收方认证
recipient.covered_person | flag | feed registry | - | the recipient is a covered person | 接收方为受管辖主体
recipient.foreign | flag | registry agreement | - | the recipient is foreign | 接收方为外国主体
recipient.us_person | flag | registry agreement | - | the recipient is a US person | 接收方为美国人士
recipient.sanctioned_share | number percent | feed registry | - | the share held by sanctioned owners | 受制裁所有者持股比例
recipient.approved_user | flag | agreement approval | - | the recipient is an approved user | 接收方为获批用户
controller.ciio | flag | registry agreement | - | the controller runs critical infrastructure (CIIO) | 控制者为关键信息基础设施运营者
controller.country | text country | registry agreement | - | the controller's country | 控制者所在国家
controller.in_ftz | text | registry agreement | - | the controller's free-trade zone | 控制者所在自贸区
agreement.mechanism | text | agreement | - | the transfer mechanism agreed | 约定的传输机制
agreement.tia_done | flag | agreement approval | - | a transfer impact assessment is done | 已完成传输影响评估
agreement.expires | time | agreement | - | the end of the agreement | 协议到期时间
agreement.covers_data | flag | agreement | - | the agreement covers this data | 协议涵盖该数据
agreement.kinds | set | agreement | - | the kinds of agreement in force | 有效协议类型
agreement.exception | text | agreement approval | - | the listed exception relied on | 所依据的例外情形
agreement.consent_ref | text | agreement | - | the reference of the explicit consent | 明示同意编号
agreement.notified | flag | agreement approval | - | the authority has been notified | 已向主管机关备案
agreement.closed_out | flag | agreement | - | the project is closed out | 项目已结项
request.purpose | text | request | - | the stated purpose | 申明用途
request.requester | text | request | - | the requester | 请求者
request.role | text | registry | - | the requester's role | 请求者角色
request.break_glass | flag | request | - | an emergency is declared | 已声明紧急情况
transfer.bytes | number bytes | engine | - | the size of the transfer | 传输数据量
link.countries | set country | attestation | nonempty | the countries the path runs through | 路径经过的国家
link.attested | flag | attestation | - | both ends of the path are attested | 路径两端已证明
crypto.end_to_end | flag | engine | - | encryption is end to end | 端到端加密
crypto.strength_bits | number bits | engine | - | the strength of the encryption | 加密强度
crypto.fips140 | flag | engine attestation | - | the module is FIPS 140 validated | 密码模块通过FIPS 140
crypto.suite | text | engine | - | the crypto suite | 密码套件
time.now | time | clock | - | the time now | 当前时间
"""


def _attributes() -> dict[str, Attribute]:
    table: dict[str, Attribute] = {}
    for row in _TABLE.strip().splitlines():
        name, kind, by, flags, en, zh = (cell.strip() for cell in row.split("|"))
        kind, _, detail = kind.partition(" ")
        words = flags.split()
        narrow = next((word for word in words if word in ("union", "intersect")), "")
        table[name] = Attribute(
            name, kind, en, zh, tuple(by.split()), unit=detail if kind == "number" else "",
            domain="" if kind == "number" else detail, nonempty="nonempty" in words, narrow=narrow,
            secret=name == "data.cases",
        )  # fmt: skip
    return table


ATTRIBUTES: Final[Mapping[str, Attribute]] = _attributes()
SUBJECTS: Final = tuple(dict.fromkeys(attribute.subject for attribute in ATTRIBUTES.values()))

COUNTERS: Final[Mapping[str, Counter]] = {
    counter.name: counter
    for counter in (
        Counter(
            "ledger.persons_after", ("label", "to", "window"), "count",
            "persons sent, with this transfer", "含本次在内的累计人数", ("ledger",),
        ),
        Counter(
            "ledger.bytes_after", ("label", "to", "window"), "bytes",
            "bytes sent, with this transfer", "含本次在内的累计字节数", ("ledger",),
        ),
        Counter(
            "ledger.transfers_after", ("label", "to", "window"), "count",
            "transfers made, with this one", "含本次在内的累计传输次数", ("ledger",),
        ),
        Counter(
            "approvals.valid_from_group", ("group",), "count",
            "valid approvals from the group", "该组有效审批数", ("approval",),
        ),
    )
}  # fmt: skip

WINDOWS: Final = ("calendar_year", "calendar_month", "calendar_day", "rolling_12_months", "rolling_N_days")
"""Forms of a counter's window; N is a number."""


def vocabulary_digest() -> str:
    """Digest of the standard vocabulary, so that a replay notices that an engine understands facts otherwise."""
    counters = "\n".join(
        f"{counter.name}({','.join(counter.parameters)}) {counter.unit}" for counter in COUNTERS.values()
    )
    return "sha256:" + hashlib.sha256(f"{_TABLE}\n{counters}".encode()).hexdigest()
