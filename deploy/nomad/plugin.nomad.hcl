# volumed as a CSI plugin on every client: controller and node in one task, for that client's storage.
# nomad job run plugin.nomad.hcl
job "volumed" {
  datacenters = ["*"]
  type        = "system"

  group "volumed" {
    task "volumed" {
      driver = "docker"

      config {
        image      = "volumed:0.1.0"
        args       = ["--config", "/local/volumed.toml"]
        privileged = true
        pid_mode   = "host"

        mount {
          type     = "bind"
          source   = "/var/lib/volumed"
          target   = "/var/lib/volumed"
          readonly = false

          bind_options {
            propagation = "rshared"
          }
        }

        mount {
          type   = "bind"
          source = "/dev"
          target = "/dev"
        }
      }

      template {
        destination = "local/volumed.toml"
        data        = <<EOF
node = "{{ env "node.unique.name" }}"
runtime-dir = "/run/volumed"
default-backends = ["sized"]

[docker]
enabled = false

[csi]
enabled = true
socket = "/csi/csi.sock"
target-roots = ["/local/csi"]

[engines.docker]
enabled = false

[engines.podman]
enabled = false

[backends.sized]
driver = "image"
path = "/var/lib/volumed/images"
EOF
      }

      csi_plugin {
        id                     = "volumed"
        type                   = "monolith"
        mount_dir              = "/csi"
        stage_publish_base_dir = "/local/csi"
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
