"""Failures on the way to the Hub, each as one message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_AGAIN = "push again: files that were uploaded are not sent a second time"
_LOGIN = "log in with `hf auth login`, or pass a token with write access"
_ADVICE = {
    400: "the Hub rejected the request",
    401: f"the Hub did not accept the token, or there is none: {_LOGIN}",
    402: "the namespace is out of storage: make room, or choose another one",
    403: f"the token has no permission to write there: {_LOGIN} to this namespace",
    404: "the repository does not exist, or the token has no access to it: check the name",
    409: f"another operation on the repository is in progress, or its name is taken: wait, then {_AGAIN}",
    412: "the branch has changed since this push began: look at what is there, then push again",
    413: "a file is too large for the Hub: save the model in smaller shards (--max-shard-size)",
    429: f"too many requests: wait a few minutes, then {_AGAIN}",
}
# JSONDecodeError: a proxy may answer with a page instead of JSON. OSErrors of the local disk are not among them.
_FAILURES = (
    HTTPError,
    RuntimeError,
    ConnectionError,
    TimeoutError,
    json.JSONDecodeError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)


class PushError(RuntimeError):
    """A push that failed. The model on disk is unchanged; the message says what to do."""


@contextmanager
def told_plainly(repo_id: str) -> Iterator[None]:
    """Turn failures of the network or the Hub into a `PushError` that names the repository.

    Raises:
        PushError: the network or the Hub failed in the body.
    """
    try:
        yield
    except PushError:
        raise
    except _FAILURES as error:
        raise PushError(f"the push to {repo_id} did not finish: {_explanation(error)}") from error
    except PermissionError as error:
        if type(error).__module__ != "hf_xet":  # of a local file
            raise
        raise PushError(f"the push to {repo_id} did not finish: {_ADVICE[401]} ({_short(error)})") from error


def _explanation(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is in offline mode: unset HF_HUB_OFFLINE and push again"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token: {_LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return "the revision does not exist: check the name of the branch"
    # The upload of a file wraps the actual error.
    if not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError):
        return _explanation(error.__cause__)
    if not isinstance(error, HfHubHTTPError):
        return f"the connection failed ({_short(error)}): {_AGAIN}"
    status = error.response.status_code
    said = f", it says: {error.server_message}" if error.server_message else ""
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        status = 404
    if status >= 500:
        return f"the Hub has a problem (status {status}{said}): wait, then {_AGAIN}"
    return f"{_ADVICE.get(status, _short(error))} (status {status}{said})"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
