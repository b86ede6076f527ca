"""Admission of requests: the token, the address that was asked for, and pages of other sites."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from .settings import is_loopback


class Refusal(Exception):
    """An answer that is an error: an HTTP status, a text, and OpenAI's terms for it.

    param: the field at fault. headers: further ones.
    """

    def __init__(
        self,
        status: int,
        text: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(text)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def to_dict(self) -> dict[str, object]:
        """The error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def admit(headers: Mapping[str, str], token: bytes | None) -> None:
    """Raises Refusal for a request that may not be served.

    headers: by lower-case name. token: SHA-256 of the one that is asked for. Without one only this machine is served:
    the address asked for must be a loopback one, as a page of the web can give its own name that address (DNS
    rebinding). A page of another site is refused in any case.
    """
    host = headers.get("host", "")
    if token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise Refusal(403, "Host: this server answers on 127.0.0.1 and localhost only", "wrong_host")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is not None and urlsplit(origin).netloc != host) or site not in (None, "same-origin", "none"):
        raise Refusal(403, "Origin: requests from pages of other sites are refused", "cross_site")
    if token is not None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        if not hmac.compare_digest(digest, token) or scheme.lower() != "bearer":
            raise Refusal(
                401,
                "Authorization: missing or wrong; send Authorization: Bearer <token>",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
