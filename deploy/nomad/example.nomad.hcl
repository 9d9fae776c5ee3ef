# A job that uses the volume of volume.nomad.hcl.
job "db" {
  datacenters = ["*"]

  group "db" {
    volume "data" {
      type            = "csi"
      source          = "pgdata"
      access_mode     = "single-node-writer"
      attachment_mode = "file-system"
    }

    task "db" {
      driver = "docker"

      config {
        image   = "busybox"
        command = "sh"
        args    = ["-c", "date >>/data/starts; exec sleep infinity"]
      }

      volume_mount {
        volume      = "data"
        destination = "/data"
      }
    }
  }
}
