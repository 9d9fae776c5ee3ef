#!/usr/bin/python3 -sES
"""The guest's side of tests/vm/machine.py: JSON lines over a virtio serial port, each answered by its id.

Needs neither network nor login, so it answers from the first seconds of the boot.
"""

import base64
import json
import os
import subprocess
import threading
import time

PORT = "/dev/virtio-ports/volumed.agent"
ENVIRONMENT = {
    "HOME": "/root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


def run(request):
    child = subprocess.Popen(
        request["argv"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=request.get("cwd", "/root"),
        env={**ENVIRONMENT, **request.get("env", {})},
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=request["timeout"])
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        output, _ = child.communicate()
        return {"status": -9, "output": output.decode(errors="replace") + "\n(killed: it took too long)"}
    return {"status": child.returncode, "output": output.decode(errors="replace")}


def put(request):
    os.makedirs(os.path.dirname(request["path"]), exist_ok=True)
    with open(request["path"], "ab" if request["append"] else "wb") as file:
        file.write(base64.b64decode(request["data"]))
    return {}


def set_time(request):
    time.clock_settime(time.CLOCK_REALTIME, request["now"])
    return {}


OPERATIONS = {"ping": lambda request: {}, "run": run, "put": put, "set_time": set_time}


def main():
    while not os.path.exists(PORT):
        time.sleep(0.05)
    port = os.open(PORT, os.O_RDWR)
    writing = threading.Lock()

    def serve(request):
        try:
            answer = OPERATIONS[request["operation"]](request)
        except Exception as error:
            answer = {"error": repr(error)}
        line = memoryview(json.dumps({"id": request["id"], **answer}).encode() + b"\n")
        with writing:
            while line:
                line = line[os.write(port, line) :]

    received = b""
    while True:
        try:
            data = os.read(port, 65536)
        except OSError:
            data = b""
        if not data:  # nobody on the other side
            time.sleep(0.02)
            continue
        *lines, received = (received + data).split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
            except ValueError:  # the rest of a line of before the machine was frozen
                continue
            threading.Thread(target=serve, args=(request,), daemon=True).start()


main()
