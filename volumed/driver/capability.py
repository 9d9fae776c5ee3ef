"""What a backend can do. Computed from its class and its probe, never written down twice."""

from __future__ import annotations

import enum


class Capability(enum.StrEnum):
    SIZE = "size"  # a volume's size is enforced
    FILESYSTEM = "filesystem"  # volumes that are a tree
    BLOCK = "block"  # volumes that are a raw device
    SNAPSHOT = "snapshot"
    SNAPSHOT_LIVE = "snapshot-live"  # ... in so short a time that a mounted volume can be frozen for it
    CLONE = "clone"
    CLONE_LIVE = "clone-live"
    EXPAND = "expand"  # a volume grows; while it is mounted, too
    MULTI_NODE = "multi-node"  # volumes are reachable from several nodes at once
    GROUP_SNAPSHOT = "group-snapshot"  # of several volumes at one instant
    CHANGED_BLOCKS = "changed-blocks"  # tells which blocks of a snapshot hold data, and which differ between two
    NATIVE_COPY = "native-copy"  # takes the data of a volume from another backend of its kind by itself
    MODIFY = "modify"  # some of a volume's options can be changed later
    CAPACITY = "capacity"  # the backend tells how much room it has
    ATTACH = "attach"  # its volumes are attached to a machine before they can be used there
    FENCING = "fencing"  # knows who has a volume open, and can cut one of them off
    IMPORT = "import"  # what volumed did not make can become a volume
