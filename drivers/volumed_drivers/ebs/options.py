"""What a backend's table and `-o` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from volumed.driver import Options, Secret
from volumed_drivers.ebs.client import METADATA

LONGEST = 256  # characters of a tag's value
TypeName = Literal["gp2", "gp3", "io1", "io2", "st1", "sc1", "standard"]


class EbsVolumeOptions(Options):
    type: TypeName | None = Field(default=None, description="EBS volume type; default: the backend's")
    iops: int | None = Field(default=None, gt=0, description="IOPS of gp3, io1 and io2")
    throughput: int | None = Field(default=None, gt=0, description="MiB/s of gp3")


class EbsOptions(Options):
    region: str = Field(default="", description="Default: the instance's")
    zone: str = Field(default="", description="Availability zone of the volumes; default: the instance's")
    type: TypeName = Field(default="gp3", description="EBS volume type")
    iops: int | None = Field(default=None, gt=0, description="IOPS of gp3, io1 and io2")
    throughput: int | None = Field(default=None, gt=0, description="MiB/s of gp3")
    encrypted: bool = Field(default=False, description="Encrypt, with the account's key unless `kms-key` names one")
    kms_key: str = Field(default="", description="KMS key to encrypt with: id, alias or ARN")
    tags: dict[str, str] = Field(default={}, description="A table of tags for all that is made")
    owner: str = Field(
        default="",
        max_length=LONGEST,
        description="Mark on all that is made; each ledger of an account needs its own; default: the backend's name",
    )
    access_key: Secret | None = Field(default=None, description="Where the access key lies; default: the role's")
    secret_key: Secret | None = Field(default=None, description="Where its secret lies")
    endpoint: str = Field(default="", pattern="^(https?://.*)?$", description="URL of the API, where it is not AWS's")
    metadata_endpoint: str = Field(default=METADATA, pattern="^http://", description="URL of the metadata service")

    @field_validator("tags")
    @classmethod
    def _not_reserved(cls, tags: dict[str, str]) -> dict[str, str]:
        for key in tags:
            if key.startswith(("aws:", "volumed:")):
                raise ValueError(f"tag {key!r} is reserved")
        return tags

    @model_validator(mode="after")
    def _both_or_none(self) -> EbsOptions:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access-key and secret-key go together")
        return self
