"""How the address of a shard is shown, and what identifies it. Nothing else decides this.

The user info, the query and the fragment of a URL may hold credentials (`http://user:password@...`,
`...?X-Amz-Signature=...`). They are used only to open the URL: no message, report, log or record
holds them, and a renewed signature is the same shard. A token in the path looks like a name, so it
is shown. A token in the words of a `pipe:` command is not shown, but it is a part of the command's
identity: let the command read it from a file instead.
"""

import re
from typing import Any
from urllib.parse import unquote

SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# A password may hold the signs that end the host. A port is a number, anything else a password.
USER_INFO = r"(?:(?!\[)[^\s/?#@]*:(?!\d*(?:[/?#]|$))[^\s@]*@|[^\s/?#]*@)"
URL = re.compile(
    rf"(?P<scheme>{SCHEME}){USER_INFO}?(?P<host>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL
)
# URLs in a text end at a blank or a quotation mark.
URL_IN_TEXT = re.compile(rf"{SCHEME}[^\s'\"`<>]*")
# Messages of urllib3 name host and port apart from the rest: "with url: /a.tar?sig=...".
REQUEST_IN_TEXT = re.compile(r"(?<=url: )(/[^\s?#]*)[?#][^\s]*")
HEADER_IN_TEXT = re.compile(
    r"(?i)\b(authorization|cookie|x-[\w-]*token)(\s*:\s*)(?:(?:bearer|basic)\s+)?[^\s'\"]+"
)
PARAMETER_IN_TEXT = re.compile(
    r"(?i)\b([\w-]*(?:signature|token|secret|password|credential)[\w-]*=)[^\s'\"&]+"
)
NAMES_A_FILE = re.compile(r"(?:/|\.(?:tar|json|sha256))$")
# Parameters of a query that sign or authorise: of S3, Google, Azure, CloudFront, and usual names.
CREDENTIAL = re.compile(
    r"(?i)x-(?:amz|goog|oss|ms|cos)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|key-pair-id"
    r"|.*(?:signature|token|secret|password|credential).*|expires?|policy|sig|s[eprtv]|sdd|sip|spr"
    r"|srt|ss|sk(?:oid|tid|[tesv])|(?:api|access)[_-]?key|auth|authorization|hdnt[sl]"
)
VERSION = re.compile(r"(?i)version(?:-?id)?|generation|revision|snapshot")
PORTS = {"http": ":80", "https": ":443"}


def shown(address: str) -> str:
    """Return a URL or `pipe:` command without credentials, for messages; or a path as it is."""
    if address.startswith("pipe:"):
        return _shown_command(address)
    if not (found := URL.fullmatch(address)):
        return hide(address)
    return f"{found['scheme']}{found['host']}{found['path']}"


def identity(address: str) -> str:
    """Return what stays the same when credentials are renewed; a path as it is. Not for messages.

    A part of the query that names a version belongs to it. If the path of a URL names no file, the
    query does (`/download?file=a.tar`). Then only parameters that sign or authorise are left out.
    """
    if address.startswith("pipe:"):
        return URL_IN_TEXT.sub(lambda found: identity(found[0]), address)
    if not (found := URL.fullmatch(address)):
        return address
    scheme, host, path = found["scheme"].lower(), found["host"].lower(), found["path"]
    host = host.removesuffix(PORTS.get(scheme.removesuffix("://"), ""))
    query = found["rest"].partition("#")[0].removeprefix("?").split("&")
    if NAMES_A_FILE.search(path):
        kept = [part for part in query if VERSION.fullmatch(part.partition("=")[0])]
    else:
        kept = [part for part in query if not CREDENTIAL.fullmatch(part.partition("=")[0])]
    return f"{scheme}{host}{path}" + (f"?{'&'.join(kept)}" if any(kept) else "")


def base_name(address: str) -> str:
    """Return the file name of a shard, the last part of its path."""
    name = identity(address)
    path = name.partition("?")[0]
    return (path if NAMES_A_FILE.search(path) and URL.match(name) else name).rpartition("/")[2]


def hide(text: str, address: str = "") -> str:
    """Return a text, such as a message of another library, without the credentials of URLs in it.

    `address` is the URL that the text is about. Its credentials may also stand there alone.
    """
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = URL_IN_TEXT.sub(lambda found: shown(found[0]), text)
    text = REQUEST_IN_TEXT.sub(r"\1", text)
    text = HEADER_IN_TEXT.sub(r"\1\2***", text)
    return PARAMETER_IN_TEXT.sub(r"\1***", text)


def public(value: Any) -> Any:
    """Return a nest of dicts and lists with every URL and command in it as it is `shown`."""
    return _each(value, shown)


def identified(value: Any) -> Any:
    """Return a nest of dicts and lists with the `identity` of every URL and command in it."""
    return _each(value, identity)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _each(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(inner, change) for inner in value)
    remote = isinstance(value, str) and (value.startswith("pipe:") or "://" in value)
    return change(value) if remote else value


def _shown_command(command: str) -> str:
    """Return the program and the shard that it names. Any other word may be a credential."""
    words = command.removeprefix("pipe:").split()
    program = next((word for word in words if "=" not in word), "").rpartition("/")[2]
    shards = re.findall(r"[^\s'\"/=@]+\.tar\b", identity(command))
    return " ".join([f"pipe:{hide(program)}", *(["...", shards[-1]] if shards else [])])


def _secrets(address: str) -> set[str]:
    """Return the parts of a URL that are not shown, as they stand in it and decoded."""
    found = URL.fullmatch(address)
    if not found:
        return set()
    info = address[len(found["scheme"]) : found.start("host")].removesuffix("@")
    rest = found["rest"].lstrip("?#")
    values = [part.partition("=")[2] for part in re.split(r"[&#]", rest)]
    parts = {info, info.partition(":")[2], rest, *values}
    return {text for part in parts for text in (part, unquote(part)) if len(text) > 3}
