"""Runs inside the machine: plugin.py ENDPOINT JSON, a request of the volume plugin protocol; prints the answer."""

import http.client
import socket
import sys

connection = http.client.HTTPConnection("localhost", timeout=120)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/docker/plugins/volumed.sock")
connection.request("POST", f"/VolumeDriver.{sys.argv[1]}", body=sys.argv[2])
print(connection.getresponse().read().decode())
