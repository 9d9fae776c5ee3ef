"""A driver's options: one pydantic model validates them, words the error and fills the documentation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of both kinds: what a backend's table in volumed.toml holds, and what `-o key=value` may say.

    Field names use underscores, the keys people write use dashes (`direct_io` is `direct-io`); each field has a
    description. Values arrive as text from `-o` and as TOML values from the config, so use types that pydantic
    can read from both. Sizes: `Annotated[int, BeforeValidator(parse_size)]` with `volumed.units.parse_size`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda field: field.replace("_", "-"), populate_by_name=True
    )


class NoOptions(Options):
    """For a driver whose volumes, or backends, have no options of their own."""
