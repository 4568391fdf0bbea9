"""Answers other than 200, worded as the published description words them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping

KEY_MANAGER = "https://jina.ai/api-dashboard/key-manager"
_PROXY_PAGE = (
    "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
_LOGIN_PAGE = "<html><head><title>Sign in</title></head><body>Please sign in to continue.</body></html>\n"


class Refused(Exception):
    """An answer without vectors. kind: its `code`, or the status where the body has none; html: a page instead of JSON."""

    def __init__(self, status: int, code: str | None, detail: str, *, html: str = "", **more: object) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = code or str(status)
        self.content_type = "text/html" if html else "application/json"
        fields = {"detail": detail, **({"code": code} if code else {}), **more, "request_id": uuid.uuid4().hex[:16]}
        self.body = html.encode() if html else json.dumps(fields).encode()


def missing_key() -> Refused:
    return Refused(
        401,
        "AUTH_MISSING_API_KEY",
        "Authentication required. Provide your API key via the Authorization header: 'Authorization: Bearer <api-key>'."
        f" Get your API key at {KEY_MANAGER}.",
    )


def malformed_key() -> Refused:
    return Refused(
        401,
        "AUTH_INVALID_FORMAT",
        "Invalid authorization format. Use 'Authorization: Bearer <api-key>' with a valid Jina API key (65 characters,"
        " starts with 'jina_').",
    )


def invalid_key() -> Refused:
    return Refused(
        401, "AUTH_INVALID_API_KEY", f"Invalid API key. Verify your API key at {KEY_MANAGER} or generate a new one."
    )


def no_balance() -> Refused:
    return Refused(
        403, "AUTHZ_INSUFFICIENT_BALANCE", f"Insufficient account balance. Top up your account at {KEY_MANAGER}."
    )


def unknown_model(name: object, available: Mapping[str, object]) -> Refused:
    return Refused(400, "INPUT_MODEL_NOT_FOUND", f"Model '{name}' not found. Available models: {', '.join(available)}.")


def input_too_long(max_tokens: int) -> Refused:
    return Refused(
        400,
        "INPUT_TOKEN_LIMIT_EXCEEDED",
        f"Input text exceeds the model's maximum of {max_tokens} tokens. Use 'truncate: true' to automatically truncate,"
        " or split into smaller chunks.",
    )


def not_found(resource: str, name: str) -> Refused:
    return Refused(
        404,
        "RESOURCE_NOT_FOUND",
        f"{resource} '{name}' not found or access denied. Verify the ID and your permissions.",
    )


def invalid(field: str, message: str, kind: str, value: object = None) -> Refused:
    """422: field is a place such as `body -> MODEL -> task`, kind the validator's name of the error."""
    place = field if field.startswith("body") else f"body -> {field}"
    detail = f"[RID: {uuid.uuid4().hex}] Validation error: '{place}' {message}. Field errors: {place}: {message}"
    return Refused(422, None, detail, errors=[{"field": place, "message": message, "type": kind, "input": value}])


def too_many_requests(current: float, limit: int) -> Refused:
    return Refused(
        429,
        "RATE_REQUEST_LIMIT_EXCEEDED",
        f"Request rate limit exceeded: {int(current)}/{limit} requests per minute. Reduce request frequency or upgrade"
        f" your plan at {KEY_MANAGER}.",
    )


def too_many_tokens(current: float, limit: int) -> Refused:
    """current: tokens of the window and of this request together."""
    return Refused(
        429,
        "RATE_TOKEN_LIMIT_EXCEEDED",
        f"Token rate limit exceeded: {int(current):,}/{limit:,} tokens per minute. Reduce batch sizes or upgrade your"
        f" plan at {KEY_MANAGER}.",
    )


def too_many_at_once(current: int, limit: int) -> Refused:
    return Refused(
        429,
        "RATE_CONCURRENCY_LIMIT_EXCEEDED",
        f"Concurrency limit exceeded: {current}/{limit} concurrent requests. Wait for pending requests to complete"
        " before sending new ones.",
    )


def too_many_from_address() -> Refused:
    return Refused(
        429,
        "RATE_IP_LIMIT_EXCEEDED",
        "IP rate limit exceeded. Too many requests from this IP address. Reduce request frequency.",
    )


def internal_error() -> Refused:
    return Refused(
        500,
        "INTERNAL_ERROR",
        "An unexpected error occurred. If this persists, contact support with the request_id from this response.",
    )


def bad_gateway() -> Refused:
    return Refused(502, None, "a proxy's page", html=_PROXY_PAGE)


def login_page() -> Refused:
    """What a captive portal says, with status 200."""
    return Refused(200, "login page", "a login page", html=_LOGIN_PAGE)


def unavailable() -> Refused:
    return Refused(
        503, "SERVICE_UNAVAILABLE", "Service temporarily unavailable. Please retry with exponential backoff."
    )


def timed_out(timeout_s: int = 60) -> Refused:
    return Refused(
        504,
        "SERVICE_TIMEOUT",
        f"Request timed out after {timeout_s} seconds. Try with smaller inputs or retry later.",
    )
