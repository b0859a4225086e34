"""PID 1 of the lab: makes an ordinary user's Linux, runs one command as that user, hands back its results.

The exchange disk (/dev/vdc) is a tar archive both ways. What comes in holds `order.json`; what goes out holds
`status.json` and whatever the command has left in RESULTS. The command's output goes to the console as it
comes.

The project lies in the image: its wheel in `site`, everything else of the checkout in `checkout`, of which
the user gets a copy to work in, and in `sources` the source distributions that tests/conformance would
download. The disk of guests (/dev/vdb) holds a store of images.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tarfile
import termios
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import system  # noqa: E402  (the project's own, of its guests' PID 1)

USERS = ("sandbox", "neighbour")
"""Two ordinary users: what one host's kernels share (CIDs) is shared between users."""
DEVICES = ("/dev/kvm", "/dev/vhost-vsock")
CONSOLE = "/dev/ttyS0"
EXCHANGE = Path("/dev/vdc")
GUESTS = Path("/dev/vdb")
RESULTS = Path("/results")
RTC_UIE_ON = 0x7003
"""ioctl of Linux' include/uapi/linux/rtc.h."""
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
KVM = 104
"""Id of the group that may open the devices, which udev would have made."""


def main() -> None:
    """Boots, runs, hands back, switches off."""
    os.environ.clear()
    os.environ.update(PATH=_PATH, LANG="C.UTF-8", LC_ALL="C.UTF-8", TERM="dumb")
    os.umask(0o022)
    try:
        status = run(prepare())
    except Exception:
        status = {"failed": traceback.format_exc()}
    hand_back(status)
    os.sync()
    system.reboot()


def prepare() -> list[str]:
    """Everything between the initramfs and the user's command; returns the command."""
    system.mount_all()
    system.set_sysctls()
    system.loopback_up()
    keep_awake()
    for device in DEVICES:
        os.chown(device, 0, KVM)
        Path(device).chmod(0o660)
    Path("/dev/net/tun").chmod(0o666)  # as udev has it
    _append("group", f"kvm:x:{KVM}:{','.join(USERS)}")
    # As Debian 13 has it; and no directory can be served from the root, an overlay of several file systems.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777,size=40%", "tmpfs", "/tmp"], check=True)
    for number, name in enumerate(USERS):
        add_user(name, 1000 + number)
        for file in ("subuid", "subgid"):
            _append(file, f"{name}:{100000 + 65536 * number}:65536")
    share_control_groups()
    install_project()
    mount_guests()
    have_a_neighbour()
    lend_sources()
    with tarfile.open(EXCHANGE) as archive:
        written = archive.extractfile("order.json")
        assert written is not None
        command: list[str] = json.load(written)["command"]
    RESULTS.mkdir()
    shutil.chown(RESULTS, USERS[0])
    return command


def keep_awake() -> None:
    """Has the clock chip interrupt all the time, 64 times a second.

    QEMU 7.2 lost an interrupt, once in hours of labs. The processor then slept for good, and went on when the
    interrupt was set again by hand; the next one does the same, so there is always a next one.
    """
    fcntl.ioctl(os.open("/dev/rtc0", os.O_RDONLY), RTC_UIE_ON)  # until this descriptor is closed: never


def add_user(name: str, number: int) -> None:
    """A user with a home and a runtime folder in memory."""
    if not any(user.pw_name == name for user in pwd.getpwall()):
        _append("passwd", f"{name}:x:{number}:{number}::/home/{name}:/bin/bash")
        _append("group", f"{name}:x:{number}:")
    for folder, size in ((f"/home/{name}", "60%"), (f"/run/user/{number}", "64m")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        options = f"mode=700,uid={number},gid={number},size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def _append(file: str, line: str) -> None:
    with Path("/etc", file).open("a") as stream:
        stream.write(f"{line}\n")


def share_control_groups() -> None:
    """Delegates a part of the cgroup v2 tree to the first user, as systemd does for a session's scope."""
    root = Path("/sys/fs/cgroup")
    (root / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    session = root / "user" / "session"
    session.mkdir(parents=True)
    (root / "user/cgroup.subtree_control").write_text("+memory +pids +cpu")
    for folder in (root / "user", session):
        for file in (folder, folder / "cgroup.procs", folder / "cgroup.subtree_control"):
            shutil.chown(file, USERS[0], USERS[0])


def install_project() -> None:
    """Makes Python find the wheel, the shell its command, Jupyter its kernelspec."""
    found = next(Path("/usr/local/lib").glob("python3.*/dist-packages"))
    (found / "project.pth").write_text(f"{HERE / 'site'}\n")
    command = Path("/usr/local/bin/sandbox-kernel")
    command.write_text("#!/usr/bin/python3\nfrom sandbox_kernel.cli.main import main\n\nmain()\n")
    command.chmod(0o755)
    kernelspecs = Path("/usr/local/share/jupyter/kernels")
    kernelspecs.mkdir(parents=True, exist_ok=True)
    for kernelspec in (HERE / "site/share/jupyter/kernels").iterdir():
        (kernelspecs / kernelspec.name).symlink_to(kernelspec)


def mount_guests() -> None:
    """Puts the images where the user's installation has them; what is written there stays in memory."""
    Path("/lab/guests").mkdir(parents=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", str(GUESTS), "/lab/guests"], check=True)
    for name in USERS:
        home = pwd.getpwnam(name)
        data = Path(home.pw_dir, ".local/share/sandbox-kernel")
        changes = data.parent / ".images"
        for folder in (data / "images", changes / "upper", changes / "work"):
            folder.mkdir(parents=True)
        _give([Path(home.pw_dir, ".local"), *Path(home.pw_dir, ".local").rglob("*")], home)
        options = f"lowerdir=/lab/guests,upperdir={changes}/upper,workdir={changes}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "images", str(data / "images")], check=True)
        # The folders only: a file that changes hands is copied into memory.
        _give([data / "images", *(path for path in (data / "images").iterdir() if path.is_dir())], home)


def _give(paths: list[Path], user: pwd.struct_passwd) -> None:
    for path in paths:
        os.chown(path, user.pw_uid, user.pw_gid)


def lend_sources() -> None:
    """Puts the suites of Jupyter's projects where tests/conformance has what it downloaded."""
    user = pwd.getpwnam(USERS[0])
    cache = Path(user.pw_dir, ".cache/sandbox-kernel/conformance")
    cache.mkdir(parents=True)
    (cache / "sources").symlink_to(HERE / "sources")
    _give([cache, *list(cache.parents)[:2]], user)


def have_a_neighbour() -> None:
    """Has the second user hold a CID, as with a kernel of their own."""
    user = pwd.getpwnam(USERS[1])
    place = Path("/run/neighbour")
    place.mkdir()
    _give([place], user)
    program = (
        "import pathlib, signal\n"
        "from sandbox_kernel.vsock.reservation import reserve_cid\n"
        "device, cid = reserve_cid()\n"
        f"pathlib.Path({str(place / 'cid')!r}).write_text(str(cid))\n"
        "signal.pause()"
    )
    subprocess.Popen([*_as(user), "/usr/bin/python3", "-c", program], stdin=subprocess.DEVNULL)


def _as(user: pwd.struct_passwd) -> list[str]:
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--"]


def run(command: list[str]) -> dict[str, object]:
    """The command's exit status and how many seconds it took."""
    user = pwd.getpwnam(USERS[0])
    checkout = Path(user.pw_dir, "checkout")
    console = os.open(CONSOLE, os.O_RDWR | os.O_NOCTTY)
    os.chown(CONSOLE, user.pw_uid, user.pw_gid)
    subprocess.run(["stty", "-F", CONSOLE, "cols", "120", "rows", "40"], check=True)
    environment = {
        "HOME": user.pw_dir,
        "USER": user.pw_name,
        "XDG_RUNTIME_DIR": f"/run/user/{user.pw_uid}",
        "RESULTS": str(RESULTS),
        **os.environ,
    }
    as_user = _as(user)
    subprocess.run([*as_user, "cp", "-a", str(HERE / "checkout"), str(checkout)], check=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [*as_user, *command],
        stdin=console,
        stdout=console,
        stderr=console,
        cwd=checkout,
        env=environment,
        preexec_fn=_as_in_a_session,
    )
    return {"status": wait_as_init(process.pid), "seconds": time.monotonic() - began}


def wait_as_init(pid: int) -> int:
    """The exit status of a child; orphans that end meanwhile are collected, too."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def _as_in_a_session() -> None:
    Path("/sys/fs/cgroup/user/session/cgroup.procs").write_text(str(os.getpid()))
    system.set_limits()
    os.setsid()
    # /dev/console cannot be that (tty_io.c of Linux), and without one Ctrl-C interrupts nobody.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def hand_back(status: dict[str, object]) -> None:
    """Writes the archive of results over the exchange disk."""
    Path("/status.json").write_text(json.dumps(status))
    with tarfile.open(EXCHANGE, "w") as archive:
        archive.add("/status.json", "status.json")
        if RESULTS.is_dir():
            archive.add(RESULTS, "results")


main()
