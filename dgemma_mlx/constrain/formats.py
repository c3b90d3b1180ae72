"""The formats of strings in JSON schemas, as regular expressions.

They are those of the specification and those that pydantic and OpenAPI use; any other format is an annotation, which
allows all strings. Where the readers of a format differ, an expression is what all of them accept: a year is 0001 to
9999, a host name has no two hyphens in a row, and an address of mail has a domain with a dot.
"""

from __future__ import annotations

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    r"(?!0000)(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:[Zz]|[+\-]{_CLOCK})"
_PERIODS = ("[0-9]{1,6}Y(?:[0-9]{1,6}M(?:[0-9]{1,6}D)?)?", "[0-9]{1,6}M(?:[0-9]{1,6}D)?", "[0-9]{1,6}D")
_TIMES = ("[0-9]{1,6}H(?:[0-9]{1,6}M(?:[0-9]{1,6}S)?)?", "[0-9]{1,6}M(?:[0-9]{1,6}S)?", "[0-9]{1,6}S")
_DURATION = f"P(?:[0-9]{{1,6}}W|(?:{'|'.join(_PERIODS)})(?:T(?:{'|'.join(_TIMES)}))?|T(?:{'|'.join(_TIMES)}))"

_BYTE = r"(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join([
    f"(?:{_GROUP}:){{7}}{_GROUP}", *(f"(?:{_GROUP}:){{1,{n}}}(?::{_GROUP}){{1,{7 - n}}}" for n in range(1, 7)),
    f"(?:{_GROUP}:){{1,7}}:", f":(?::{_GROUP}){{1,7}}", "::", f"::(?:[fF]{{4}}:)?{_IPV4}",
])  # fmt: skip

_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,31}"
_NAME = "[A-Za-z](?:-?[A-Za-z0-9]){0,31}"  # the last label, which is not a number
_HOST = rf"(?=[^\n]{{1,253}}$)(?:{_LABEL}\.)*{_NAME}"
_LOWER = "[a-z0-9](?:-?[a-z0-9]){0,31}"
_EMAIL = rf"[A-Za-z0-9_+\-]{{1,30}}(?:\.[A-Za-z0-9_+\-]{{1,10}}){{0,3}}@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,20}}"

_CODED = "%[0-9A-Fa-f]{2}"
_PLAIN = rf"(?:[A-Za-z0-9\-._~!$&'()*+,;=@]|{_CODED})"  # of a first segment
_PATH = rf"(?:[A-Za-z0-9\-._~!$&'()*+,;=@:/]|{_CODED})*"
_TAIL = rf"(?:\?(?:[A-Za-z0-9\-._~!$&'()*+,;=@:/?]|{_CODED})*)?(?:#(?:[A-Za-z0-9\-._~!$&'()*+,;=@:/?]|{_CODED})*)?"
_AUTHORITY = (
    rf"(?:[A-Za-z0-9\-._~]+(?::[A-Za-z0-9\-._~]*)?@)?(?:(?:{_LABEL}\.)*{_NAME}|{_IPV4})"
    "(?::(?:[0-9]{1,4}|[1-5][0-9]{4}))?"
)
_SCHEME = r"[A-Za-z][A-Za-z0-9+\-.]*"
_URI = rf"{_SCHEME}:(?://{_AUTHORITY}(?:/{_PATH})?|/?(?:{_PLAIN}{_PATH})?){_TAIL}"
_REFERENCE = rf"(?:{_URI}|(?://{_AUTHORITY}(?:/{_PATH})?|(?:/(?:{_PLAIN}{_PATH})?|{_PLAIN}+(?:/{_PATH})?)?){_TAIL})"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*(?:\*|:[1-9][0-9]{0,2})?"
_TEMPLATE = rf"(?:[A-Za-z0-9\-._~:/?#@=&]|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_ATOM = r"(?:[A-Za-z0-9 _\-/,:;@.]|\\[dDsSwW.]|\[(?:a-z|A-Z|0-9|_)+\])"
_HEX = "[0-9a-fA-F]"


def _base64(marks: str) -> str:
    digit = f"[A-Za-z0-9{marks}]"
    return f"(?:{digit}{{4}})*(?:{digit}[AQgw]==|{digit}{{2}}[AEIMQUYcgkosw048]=)?"


FORMATS: dict[str, str] = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}[Tt]{_TIME}", "duration": _DURATION,
    "uuid": f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    **{f"uuid{n}": f"{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}" for n in range(1, 9)},
    "ipv4": _IPV4, "ipv6": _IPV6, "ipvanyaddress": f"{_IPV4}|{_IPV6}",
    "ipv4network": f"{_IPV4}(?:/32)?", "ipv6network": f"(?:{_IPV6})(?:/128)?",
    "ipvanynetwork": f"{_IPV4}(?:/32)?|(?:{_IPV6})(?:/128)?",
    "ipv4interface": f"{_IPV4}(?:/(?:[12]?[0-9]|3[0-2]))?", "ipv6interface": f"(?:{_IPV6})(?:/[1-9]?[0-9])?",
    "ipvanyinterface": f"{_IPV4}(?:/(?:[12]?[0-9]|3[0-2]))?|(?:{_IPV6})(?:/[1-9]?[0-9])?",
    "hostname": _HOST, "idn-hostname": rf"(?=[^\n]{{1,253}}$)(?:{_LOWER}\.)*[a-z](?:-?[a-z0-9]){{0,31}}",
    "email": _EMAIL, "idn-email": _EMAIL,
    "uri": _URI, "iri": _URI, "uri-reference": _REFERENCE, "iri-reference": _REFERENCE, "uri-template": _TEMPLATE,
    "json-pointer": _POINTER, "relative-json-pointer": f"(?:0|[1-9]{{1,9}}0?)(?:#|{_POINTER})",
    "regex": rf"\^?(?:{_ATOM}(?:[*+?]|\{{[1-9]\}})?)*\$?",
    "byte": _base64("+/"), "base64": _base64("+/"), "base64url": _base64(r"_\-"),
}  # fmt: skip
