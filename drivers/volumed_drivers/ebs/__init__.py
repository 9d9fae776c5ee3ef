from volumed_drivers.ebs.driver import EbsDriver, EbsOptions, EbsVolumeOptions

__all__ = ["EbsDriver", "EbsOptions", "EbsVolumeOptions"]
