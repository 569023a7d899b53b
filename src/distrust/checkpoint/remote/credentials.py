"""Where the credentials of a store come from: the usual environment and files, looked up before any request.

The client would ask a metadata address (169.254.169.254) for a machine's role when it finds none, whatever
AWS_EC2_METADATA_DISABLED says. That is never done unasked: ``DISTRUST_INSTANCE_CREDENTIALS=1`` asks for it.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrust.errors import ConfigError, RemoteError

#: Set to 1, it allows to ask the machine's metadata address for the credentials of its role.
INSTANCE = "DISTRUST_INSTANCE_CREDENTIALS"
# By scheme; any such variable is enough: the client reads them all from the environment itself.
_VARIABLES = {
    "s3": "AWS_(ACCESS_KEY_ID|WEB_IDENTITY_TOKEN_FILE|CONTAINER_CREDENTIALS_(RELATIVE|FULL)_URI"
    "|SKIP_SIGNATURE)",
    "gs": "GOOGLE_(SERVICE_ACCOUNT(_PATH|_KEY)?|APPLICATION_CREDENTIALS|BEARER_TOKEN|SKIP_SIGNATURE)",
    "az": "AZURE_(STORAGE_(ACCOUNT_KEY|ACCESS_KEY|SAS_KEY|SAS_TOKEN|TOKEN|CLIENT_SECRET|USE_EMULATOR)"
    "|CLIENT_SECRET|FEDERATED_TOKEN_FILE|USE_AZURE_CLI|SKIP_SIGNATURE)",
}
_PLACES = {
    "s3": "the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE) and ~/.aws",
    "gs": "the environment (GOOGLE_APPLICATION_CREDENTIALS) and ~/.config/gcloud",
    "az": "the environment (AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_CLIENT_SECRET)",
}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
#: What the files of the AWS tools state; the client takes these names, too.
_SETTINGS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region", "endpoint_url")


def options(scheme: str, url: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments of the client's store beyond what it reads from the environment itself.

    Raises RemoteError if no credentials are found; ConfigError if an endpoint in the environment is no URL.
    """
    for name in _ENDPOINTS.get(scheme, ()):
        if not environ.get(name, "http://").startswith(("http://", "https://")):  # the client would panic
            raise ConfigError(
                f"{name} is {environ[name]!r}: give http://HOST:PORT or https://HOST, or unset it"
            )
    is_set = any(value and re.fullmatch(_VARIABLES[scheme], name) for name, value in environ.items())
    arguments: dict[str, Any] | None = {} if is_set else None
    if scheme == "s3":
        arguments = _aws(environ, is_set=is_set)
    elif scheme == "gs" and not is_set:
        folder = Path(environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()
        if (default := folder / "application_default_credentials.json").is_file():
            arguments = {"application_credentials": str(default)}
    if arguments is None and environ.get(INSTANCE) != "1":
        raise RemoteError(
            f"{url}: no credentials were found in {_PLACES[scheme]}; set them, or {INSTANCE}=1 to use the "
            "role of this machine",
            url=url,
        )
    return arguments or {}


def _aws(environ: Mapping[str, str], *, is_set: bool) -> dict[str, Any] | None:
    """Keys in the environment come first, as for the AWS tools; a profile gives what they lack."""
    profile = environ.get("AWS_PROFILE")
    settings = _profile(profile or "default", environ)
    stated = {name: settings[name] for name in _SETTINGS if name in settings}
    stated["region"] = (
        environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or settings.get("region", "us-east-1")
    )
    if any(environ.get(name) for name in _ENDPOINTS["s3"]):
        stated.pop("endpoint_url", None)
    if is_set:
        return {name: stated[name] for name in ("region", "endpoint_url") if name in stated}
    if "aws_access_key_id" in stated or not settings:
        return stated if settings else None
    try:  # single sign-on, roles, and programs that give credentials
        import boto3
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        return None
    tools = botocore.session.Session(profile=profile)
    if environ.get(INSTANCE) != "1":
        tools.get_component("credential_provider").remove("iam-role")
    session = boto3.Session(botocore_session=tools)
    if session.get_credentials() is None:
        return None
    return stated | {"credential_provider": Boto3CredentialProvider(session)}


def _profile(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings of a profile in the files of the AWS tools; of two, the credentials file's counts."""
    settings: dict[str, str] = {}
    for variable, default, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(environ.get(variable) or default).expanduser(), "utf-8")
        except (configparser.Error, UnicodeError):
            continue
        if parser.has_section(section):
            settings |= dict(parser.items(section))
    return settings
