"""HTTP to servers of this machine; httpx itself reads the certificates for every call, 20 ms of work each."""

from __future__ import annotations

import ssl
from functools import partial

import httpx

_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

Client = partial(httpx.Client, verify=_NO_CERTIFICATES, trust_env=False)
get = partial(httpx.get, verify=_NO_CERTIFICATES, trust_env=False)
post = partial(httpx.post, verify=_NO_CERTIFICATES, trust_env=False)
