"""ISO 3166-1 alpha-2 codes, so that 'UK', 'EU' or a typing slip in a country is found when a file is read."""

from __future__ import annotations

from typing import Final

__all__ = ["COUNTRIES", "NOT_COUNTRIES"]

COUNTRIES: Final = frozenset(
    """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT
    BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH
    ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT
    HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS
    LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI
    NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG
    SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG
    UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
    """.split()  # noqa: SIM905
)
"""The 249 officially assigned codes (ISO 3166 Maintenance Agency)."""

NOT_COUNTRIES: Final = {
    "UK": "the code of the United Kingdom is 'GB'",
    "EU": "the EU is no country; use a list: @eea",
    "EEA": "the EEA is no country; use a list: @eea",
    "EL": "the code of Greece is 'GR'",
}
"""What people write for a country and what they mean."""
