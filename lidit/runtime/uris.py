"""Secrets in addresses: found, refused in configs, and struck out of whatever is shown.

A secret is a password in `scheme://user:password@host`, whoever is named before the host of an http address (a token, for all
one knows), and the value of a query key that names one, such as `X-Amz-Signature`. Words of a path are not looked at.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

STRUCK = "***"
FREE_TEXT = {"prompt", "negative_prompt", "instruction"}  # fields of configs that hold sentences
REFERENCES = ("github", "git")  # of fsspec: `github://owner:repository@branch` is no password
NO_SCHEME = re.compile(r"[^A-Za-z0-9+.{},-]")  # braces may stand in one
# What stands between `://` and the last @ before a slash. A password with a slash in it, unquoted, is known by what it leaves
# before that slash: a colon, and then no port.
USER = re.compile(
    r"://(?P<user>[^/?#\s]*|[^/?#\s@:]{1,200}:(?![\d{},.]*(?:[/?#]|::))(?!\[)[^\s@/:]{1,200}[/?#][^\s@]{0,200})@"
)
KEY = re.compile(r"[?&;#](?:amp;)?(?P<key>[\w.%-]+)=")
VALUE_END = re.compile(r"[&\s\"'<>`]")
WORD = re.compile(r"[^\s\"'<>`]+")
ENCODED = re.compile(r"%(?:25)*(?:3A|2F|40|3D|3F|26)", re.IGNORECASE)
TIMES_ENCODED = 3  # at most
SECRET_KEYS = {
    "sig", "key", "pass", "passwd", "pwd", "auth", "authorization", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid",
    "keypairid", "jwt", "bearer",
}  # fmt: skip
SECRET_ENDINGS = (
    "signature", "token", "secret", "password", "credential", "credentials", "apikey", "accesskey", "secretkey", "authkey",
    "privatekey", "accountkey", "accesskeyid", "subscriptionkey", "functionskey",
)  # fmt: skip


def check_uri(uri: str, what: str) -> None:
    """Refuses an address with a secret in it.

    Args:
        uri: an address, several of them (braces, chained by `::`), or a path.
        what: the field that it came from.

    Raises:
        ValueError: names the field, shows the address without the secret, and says what to do.
    """
    text = re.sub(r"\s", "%20", uri)  # one address, blanks and all
    if "://" not in _decoded(text) or shown(text) == text:
        return
    raise ValueError(
        f"{what}: expected an address without credentials, received {shown(text)}: what stands in an address is kept in "
        f"configs, tables and messages. Remove them, and have the environment give them: a profile, a role, ~/.ssh, ~/.netrc "
        f"(docs/ingest.md); what only a signed link gives, copy to storage of yours"
    )


def check_config(config: Any) -> None:
    """Refuses a config with a secret in any address, also in its parts, so that a config can be written down as it is.

    Raises:
        ValueError: names the field.
    """
    for what, text in _texts(config, ""):
        check_uri(text, what)


def shown(text: str) -> str:
    """The text with the secrets of all addresses in it as `***`: for errors, logs and names."""
    if "=" not in text and "://" not in text and "%" not in text:
        return text
    struck = _struck(text)
    return WORD.sub(_without_encoded, struck) if ENCODED.search(struck) else struck


def _struck(text: str) -> str:
    """The same, but for what is percent-encoded."""
    text, parts, place = USER.sub(_without_user, text), [], 0
    for found in KEY.finditer(text):
        if found.start() >= place and _is_secret(found["key"]):
            end = _end_of_value(text, found.end())
            parts += [text[place : found.end()], STRUCK if end > found.end() else ""]
            place = end
    return "".join([*parts, text[place:]])


def _without_user(found: re.Match[str]) -> str:
    scheme = NO_SCHEME.split(found.string[max(0, found.start() - 40) : found.start()])[-1].lower()
    _, _, password = found["user"].partition(":")
    is_secret = "http" in scheme or (password and not scheme.endswith(REFERENCES))
    return f"://{STRUCK}@" if is_secret else found[0]


def _end_of_value(text: str, start: int) -> int:
    found = VALUE_END.search(text, start)
    return len(text) if found is None else found.start()


def _is_secret(key: str) -> bool:
    name = re.sub(r"[^a-z0-9]", "", _decoded(key).lower())
    return name in SECRET_KEYS or name.endswith(SECRET_ENDINGS)


def _without_encoded(word: re.Match[str]) -> str:
    """The same for an address inside another's query, or one that was encoded as a whole: decoded, where it has a secret."""
    if not ENCODED.search(word[0]):
        return word[0]
    plain = _decoded(word[0])
    struck = _struck(plain)
    return word[0] if struck == plain else struck


def _decoded(text: str) -> str:
    for _ in range(TIMES_ENCODED):
        text = unquote(text)
    return text


def _texts(value: Any, what: str) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of all text in a config, but sentences."""
    if isinstance(value, str):
        yield what, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in FREE_TEXT:
                yield from _texts(getattr(value, field.name), f"{what}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(key, what)
            yield from _texts(each, f"{what}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _texts(each, f"{what}.{number}".lstrip("."))
