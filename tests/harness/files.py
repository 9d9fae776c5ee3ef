"""A CephFS and an S3 gateway of the test's Ceph, as tables of volumed's configuration."""

from __future__ import annotations

import secrets
from pathlib import Path

from tests.harness.ceph import Ceph


def backend_tables(ceph: Ceph, folder: Path, *, group: str) -> str:
    """Backends `files` (cephfs) and `objects` (s3), with volumes of nobody else; their keys lie in the folder."""
    filesystem, endpoint = ceph.start_filesystem(), ceph.start_gateway()
    user = ceph.make_s3_user(f"{group}-{secrets.token_hex(3)}")
    ceph.allow_quotas(user)
    for name, text in (("access", user.access_key), ("secret", user.secret_key)):
        path = folder / f"{name}.key"
        path.write_text(text)
        path.chmod(0o600)
    return f"""
[backends.files]
driver = "cephfs"
filesystem = "{filesystem}"
group = "{group}"
conf = "{ceph.conf}"
user = "files"
key = "file:{ceph.make_files_user()}"
[backends.objects]
driver = "s3"
endpoint = "{endpoint}"
access-key = "file:{folder}/access.key"
secret-key = "file:{folder}/secret.key"
prefix = "{group}-"
"""
