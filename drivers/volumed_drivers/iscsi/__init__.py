from volumed_drivers.iscsi.driver import IscsiDriver
from volumed_drivers.iscsi.options import IscsiOptions, IscsiVolumeOptions

__all__ = ["IscsiDriver", "IscsiOptions", "IscsiVolumeOptions"]
