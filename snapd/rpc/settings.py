"""What `snapd serve` can be told, by option or by environment (SNAPD_STATE_DIR, SNAPD_LISTEN)."""

import errno
import os
from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from snapd.block.errors import SnapdError
from snapd.manager.paths import SOCKET_PATH_MAX, default_socket, default_state_directory


class Settings(BaseSettings):
    """Options win over the environment, which wins over the defaults for root or for an ordinary user."""

    model_config = SettingsConfigDict(env_prefix="SNAPD_")

    state_dir: Path = Field(default_factory=lambda: Path(default_state_directory()))
    listen: str = Field(default_factory=lambda: f"unix:{default_socket()}")

    @field_validator("listen")
    @classmethod
    def _unix_socket(cls, value: str) -> str:
        kind, _, path = value.partition(":")
        if kind != "unix" or not path:
            raise ValueError(f"{value!r} is not unix:PATH")
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ValueError(f"{value!r} is longer than a socket path may be ({SOCKET_PATH_MAX} bytes)")
        return value

    @property
    def socket_path(self) -> str:
        """The path of the socket to listen at."""
        return os.path.abspath(self.listen.removeprefix("unix:"))

    @classmethod
    def of(cls, **options: object) -> "Settings":
        """The settings with the given options; None means not given. EINVAL names the one that is wrong."""
        try:
            return cls(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            raise SnapdError(errno.EINVAL, f"{first['loc'][0]}: {first['msg']}") from error
