"""Where a server is and how to authenticate to it. Secrets stay in memory: they are neither written nor printed."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import quote

import httpx2

from topd.errors import ServerError

logger = logging.getLogger(__name__)

HIDDEN = "***"
"""Stands for a user, a password or the value of a query parameter."""

_given: dict[str, str] = {}
"""Addresses with secrets that this process was given, by what is written in their place."""
_certificates = cache(httpx2.create_ssl_context)
"""The machine's, read once: that takes some 30 ms."""


def without_secrets(url: str) -> str:
    """`url` with its user, password and query values replaced by `***`; this process still reaches it by that text."""
    try:
        before = r"[^/?#]*@" if httpx2.URL(url).host else ".*@"
    except (httpx2.InvalidURL, TypeError):  # a slash in a password, for instance
        before = ".*@"
    shown = re.sub(rf"^(\w[\w+.-]*://)?{before}", rf"\1{HIDDEN}@", url, flags=re.DOTALL)
    shown = re.sub(r"([?&][^=&#]*=)[^&#]*", rf"\1{HIDDEN}", shown)
    if shown != url:
        _given[shown] = url
    return shown


@dataclass(frozen=True)
class Address:
    """A server's address, taken apart."""

    url: str  # scheme, host, port and path, without `/v1` and without secrets
    auth: tuple[str, str] | None = field(default=None, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    key: str | None = field(default=None, repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that must not be shown, also as a URL has them."""
        plain = [text for text in (*(self.auth or ()), *self.query.values(), self.key) if text]
        return tuple(dict.fromkeys(form for text in plain for form in (text, quote(text), quote(text, safe=""))))

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine; 0.0.0.0 too, which servers print as theirs."""
        host = httpx2.URL(self.url).host.removesuffix(".")
        try:
            address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))  # 127.1 is 127.0.0.1
        except OSError:
            return host == "localhost" or host.endswith(".localhost")
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified

    def client(self, connections: int) -> httpx2.AsyncClient:
        """An HTTP client for it. Proxies of the environment are not used for this machine itself."""
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=60)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        host = httpx2.URL(self.url).host
        direct = {f"all://[{host}]" if ":" in host else f"all://{host}": None} if self.is_loopback else None
        try:
            return httpx2.AsyncClient(
                base_url=self.url, auth=self.auth, params=self.query, headers=headers, limits=limits,
                mounts=direct, verify=_certificates(),
            )  # fmt: skip
        except (httpx2.InvalidURL, ValueError, ImportError) as error:  # the message may hold the proxy's password
            raise ServerError(
                f"{self.url} cannot be reached through the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names "
                f"({type(error).__name__}). Correct it, or add the host to NO_PROXY."
            ) from None


def parse_address(url: str, name: str, key_variable: str | None = None) -> Address:
    """Take an address apart; warn of a password or key that would travel unencrypted.

    `url`: with or without `/v1`, or what `without_secrets` made of it. `name`: of the server, for messages.
    `key_variable`: environment variable that holds the API key, sent as `Authorization: Bearer KEY`. Raises
    `ServerError` if `url` is not a valid URL, its secrets are not known any more, or the variable holds no key.
    """
    shown = without_secrets(url)
    try:
        parsed = httpx2.URL(_given.get(shown, shown))
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except (httpx2.InvalidURL, TypeError):
        good = False
    if not good:
        raise ServerError(f"{name}: {shown!r} is not a valid URL. Write http://HOST:PORT (or https).")
    auth = (parsed.username, parsed.password) if parsed.userinfo else None
    query, key = dict(parsed.params), os.environ.get(key_variable or "", "").strip() or None
    if key_variable and not (key and key.isascii() and key.isprintable()):
        state = "contains characters that no key has" if key else "is not set"
        raise ServerError(f"{name}: the environment variable {key_variable!r} {state}. Put the API key into it.")
    if HIDDEN in (*(auth or ()), *query, *query.values()):
        raise ServerError(
            f"{name}: {shown!r} lacks its password or key, which is never saved. Give the URL again, or the "
            "name of an environment variable that holds the key (teacher_server_key_env, --server-key-env)."
        )
    if auth and key:
        raise ServerError(f"{name}: give a user and password in the address, or a key ({key_variable}), not both.")
    plain = str(parsed.copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/").removesuffix("/v1")
    address = Address(plain, auth, query, key)
    if parsed.scheme == "http" and (auth or (address.secrets and not address.is_loopback)):
        what = "The password" if auth else "The key"
        logger.warning(f"{what} of {name[0].lower() + name[1:]} at {plain} travels unencrypted over http. Use https.")
    return address
