# nomad volume create volume.nomad.hcl
id        = "pgdata"
name      = "pgdata"
type      = "csi"
plugin_id = "volumed"

capacity_min = "5GiB"
capacity_max = "20GiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

mount_options {
  fs_type     = "ext4"
  mount_flags = ["noatime"]
}

parameters {
  backend = "sized"
}
