"""What the service can be told: arguments, or environment variables with the prefix ``MCDROP_``."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mcdrop.errors import InputError

__all__ = ["Settings", "read_settings"]


def _names(given: Any) -> Any:
    """Names between commas, as an environment variable holds them."""
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


class Settings(BaseSettings):
    """Where the models are, where to listen, and how much one request may ask for.

    The environment is read when this is built, never at import; a variable that is empty says nothing.
    """

    model_config = SettingsConfigDict(env_prefix="MCDROP_", env_ignore_empty=True, frozen=True)

    store: Path = Field(default=Path("models/store"), description="folder of models: STORE/NAME/VERSION")
    default_model: str | None = Field(
        default=None, description="the model of requests that name none, where there are several"
    )
    devices: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        default=(), description="of torch, where its networks run, such as cuda:0,cuda:1; none is the CPU"
    )
    wait_for_models: bool = Field(
        default=False, description="load before the first request, instead of answering 503 meanwhile"
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="an empty one would be every network there is")
    port: int = Field(default=8000, ge=0, le=65_535, description="0 takes any free port")
    threads: int = Field(default=2, ge=1, description="requests that are computed at the same time; the others wait")
    max_waiting: int = Field(
        default=64, ge=0, description="requests that wait meanwhile; more are refused with 429 and Retry-After"
    )
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1)
    body_seconds: float = Field(default=60.0, gt=0, description="time in which the body of a request must have arrived")
    max_rows: int = Field(default=10_000, ge=1, description="rows of one request")
    max_passes: int = Field(default=10_000, ge=2, description="passes of one request")
    max_work: int = Field(
        default=10_000_000,
        ge=1,
        description="rows times passes of one request, a screen's among them that are scored anew",
    )
    max_kept: int = Field(
        default=1_000_000, ge=1, description="the same where every pass is kept: samples, quantile, some conformal"
    )
    max_numbers: int = Field(default=2_000_000, ge=1, description="numbers in one answer")
    drain_seconds: int = Field(
        default=30, ge=0, description="time that running requests have to finish when the service stops"
    )


def read_settings(**given: Any) -> Settings:
    """Gives the settings: what is given, else what the environment says.

    Raises:
        InputError: a value that cannot be used, in one sentence that names its variable.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = [f"MCDROP_{str(p['loc'][-1]).upper()}: {p['msg']}, got {p['input']!r}" for p in error.errors()]
        raise InputError("; ".join(problems)) from None
