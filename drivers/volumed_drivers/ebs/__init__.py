from volumed_drivers.ebs.driver import EbsDriver
from volumed_drivers.ebs.options import EbsOptions, EbsVolumeOptions

__all__ = ["EbsDriver", "EbsOptions", "EbsVolumeOptions"]
