"""The default image with an agent that does a hostile guest's work: a guest whose Linux has been taken over.

What the kernel's user may not do is done for it, as root or in the agent's own answers:

    /tmp/root.py   appears: it is run as root, outside all limits of the kernel
    /tmp/lie       its text names how the agent answers from now on
"""

from __future__ import annotations

import dataclasses

from sandbox_kernel.image.build import Order, build, default_recipe
from sandbox_kernel.image.programs import Program
from sandbox_kernel.image.progress import Silent
from sandbox_kernel.image.store import ImageStore

NAME = "adversary"

ROOT = """

def _serve_the_enemy():
    import subprocess
    while True:
        if os.path.exists("/tmp/root.py"):
            with open("/tmp/root.out", "w") as output:
                subprocess.Popen(["/usr/bin/python3", "/tmp/root.py"], stdout=output, stderr=output).wait()
            os.rename("/tmp/root.py", "/tmp/root.done")
        time.sleep(0.1)

threading.Thread(target=_serve_the_enemy, daemon=True).start()
"""

LIES = """

import struct as _struct
_send = send

def send(connection, frame, seconds):
    try:
        with open("/tmp/lie") as file:
            lie = file.read()
    except OSError:
        return _send(connection, frame, seconds)
    def ok(text, payload=b""):
        return _struct.pack(">3sBII", b"SKA", 1, len(text), len(payload)) + text + payload
    told = {
        "no frame": b"\\xff" * 100,
        "another version": b"SKA\\x63" + bytes(8),
        "lengths of 4 GiB": b"SKA\\x01" + b"\\xff" * 8,
        "no JSON": ok(b"{"),
        "deep JSON": ok(b"[" * 100000),
        "a list": ok(b"[1]"),
        "wrong types": ok(b'{"ok": true, "alive": "yes", "pid": "x"}'),
        "numbers of a thousand digits": ok(b'{"ok": true, "alive": ' + b"9" * 1000 + b"}"),
        "a payload nobody asked for": ok(b'{"ok": true, "alive": true}', b"x" * 1000),
        "a refusal with a terminal's commands": ok(
            b'{"ok": false, "error": "x", "message": "\\\\u001b[2J\\\\u202eevil"}'
        ),
        "two answers": frame + frame,
        "half an answer": frame[:-1],
        "silence": b"",
    }[lie]
    _send(connection, told, seconds)
"""


def ensure() -> str:
    """Makes sure that the image is there; its name."""
    recipe = default_recipe()
    added = {"operations.py": ROOT, "server.py": LIES}
    assert set(added) <= {program.name for program in recipe.programs}
    programs = tuple(
        Program(program.name, program.content + added.get(program.name, "").encode())
        for program in recipe.programs
    )
    build(Order(dataclasses.replace(recipe, programs=programs), NAME), ImageStore(), Silent())
    return NAME
