"""What each type of EBS volume can be, so that EC2 need not be asked to refuse it.

https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volume-types.html and
https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateVolume.html
"""

from __future__ import annotations

from typing import Any, NamedTuple

from volumed.errors import InvalidRequest, OutOfRange
from volumed.units import GIB, format_size


class Type(NamedTuple):
    sizes: tuple[int, int]  # GiB
    iops: tuple[int, int] | None = None  # None: not to be chosen
    iops_per_gib: int = 0
    iops_needed: bool = False
    throughput: tuple[int, int] | None = None  # MiB/s
    iops_per_throughput: int = 0  # at least so many for each MiB/s


TYPES = {
    "gp2": Type((1, 16384)),
    "gp3": Type((1, 65536), (3000, 80000), 500, throughput=(125, 2000), iops_per_throughput=4),
    "io1": Type((4, 16384), (100, 64000), 50, iops_needed=True),
    "io2": Type((4, 65536), (100, 256000), 1000, iops_needed=True),
    "st1": Type((125, 16384)),
    "sc1": Type((125, 16384)),
    "standard": Type((1, 1024)),
}
_FREE_IOPS = 3000  # that a gp3 volume has in any case, however small


class Wanted(NamedTuple):
    """What a volume is to be, in EC2's words; None: as EC2 has it by itself."""

    type: str
    iops: int | None = None
    throughput: int | None = None

    def parameters(self) -> dict[str, Any]:
        return {
            "VolumeType": self.type,
            **({"Iops": self.iops} if self.iops is not None else {}),
            **({"Throughput": self.throughput} if self.throughput is not None else {}),
        }

    @classmethod
    def of(cls, type_: str, iops: int | None, throughput: int | None) -> Wanted:
        """As a volume is: of what EC2 tells of it, what can be asked for."""
        kind = TYPES[type_]
        return cls(type_, iops if kind.iops else None, throughput if kind.throughput else None)

    def met_by(self, type_: str, iops: int | None, throughput: int | None) -> bool:
        return (self.type, self.iops or iops, self.throughput or throughput) == (type_, iops, throughput)

    def check(self, gib: int, *, subject: str) -> None:
        """Raises OutOfRange and InvalidRequest, saying what would be possible."""
        kind = TYPES[self.type]
        self.check_size(gib, subject=subject)
        self._check_iops(kind, gib, subject)
        self._check_throughput(kind, subject)

    def check_size(self, gib: int, *, subject: str) -> None:
        least, most = TYPES[self.type].sizes
        if not least <= gib <= most:
            raise OutOfRange(
                f"a volume of type {self.type} cannot have {format_size(gib * GIB)}",
                subject=subject,
                hint=f"ask for {format_size(least * GIB)} to {format_size(most * GIB)}, or for another type",
            )

    def _check_iops(self, kind: Type, gib: int, subject: str) -> None:
        if self.iops is None:
            if kind.iops_needed:
                raise InvalidRequest(f"a volume of type {self.type} needs iops", subject=subject, hint="set iops")
            return
        if kind.iops is None:
            able = ", ".join(name for name, each in TYPES.items() if each.iops)
            raise InvalidRequest(f"iops cannot be chosen for {self.type}", subject=subject, hint=f"only for {able}")
        least, most = kind.iops
        most = min(most, max(kind.iops_per_gib * gib, _FREE_IOPS if self.type == "gp3" else 0))
        if not least <= self.iops <= most:
            raise OutOfRange(
                f"{self.iops} IOPS are not possible for {format_size(gib * GIB)} of type {self.type}",
                subject=subject,
                hint=f"{least} to {most} are, {kind.iops_per_gib} for each GiB",
            )

    def _check_throughput(self, kind: Type, subject: str) -> None:
        if self.throughput is None:
            return
        if kind.throughput is None:
            raise InvalidRequest(f"throughput cannot be chosen for {self.type}", subject=subject, hint="only for gp3")
        least, most = kind.throughput
        most = min(most, (self.iops or _FREE_IOPS) // kind.iops_per_throughput)
        if not least <= self.throughput <= most:
            raise OutOfRange(
                f"{self.throughput} MiB/s are not possible with {self.iops or _FREE_IOPS} IOPS",
                subject=subject,
                hint=f"{least} to {most} are: {kind.iops_per_throughput} IOPS for each MiB/s",
            )
