"""`microvm-provisioner`: a Jupyter kernel manager's view of a kernel that lives in a micro-VM.

One instance belongs to one KernelManager and is reused over restarts; each launch has a supervisor of its
own. The contract is `jupyter_client.provisioning.KernelProvisionerBase`. What it does not say:

- A launch that raises is not followed by a clean-up, so launch cleans up after itself. At the first start
  the exception's sentence reaches the user; during an automatic restart raising would leave the notebook at
  "restarting" for ever, so launch then returns and `poll` tells of a dead kernel.
- Endpoints stay the same over restarts, because open websockets keep their sockets.
- Methods run in short-lived event loops on any thread: no task, lock or asyncio process is kept here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from dataclasses import replace
from typing import Any

import zmq
from jupyter_client.connect import KernelConnectionInfo, LocalPortCache
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Float, Int, List, Unicode

from sandbox_kernel import exposure, mount, paths, volume
from sandbox_kernel.death import Death
from sandbox_kernel.errors import ConfigurationError, GuestError, HostError, SandboxKernelError
from sandbox_kernel.pool.client import take
from sandbox_kernel.ports.listener import is_free
from sandbox_kernel.provisioner.command import guest_argv
from sandbox_kernel.provisioner.threads import in_thread
from sandbox_kernel.spec import (
    CAPS,
    ENVIRONMENT_PREFIX,
    KEYS,
    VMSpec,
    forwarded,
    from_environment,
    max_expose,
    mount_roots,
    placed,
    resolve,
)
from sandbox_kernel.supervisor.control import CHANNELS, LaunchRequest
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.nursery import nursery
from sandbox_kernel.trace import summary

_FOR_GOOD = ("IdleTimeLimitExceeded", "LifetimeLimitExceeded")
"""Deaths after which nobody wants a new kernel at once."""


class MicroVMProvisioner(KernelProvisionerBase):
    """Starts each kernel in a micro-VM of its own.

    Traits are the administrator's defaults; a kernelspec's `config` overrides them, `max_*` binds both. Each
    trait also has an environment variable, `SANDBOX_KERNEL_` and its name in capitals.
    """

    image = Unicode(None, allow_none=True, config=True, help="Name or digest of the guest image.")
    memory = Int(None, allow_none=True, config=True, help="RAM of the guest in MiB.")
    vcpus = Int(None, allow_none=True, config=True, help="Virtual CPUs of the guest.")
    accelerator = Unicode(None, allow_none=True, config=True, help="auto, kvm or tcg.")
    vsock = Unicode(None, allow_none=True, config=True, help="auto, kernel or userspace.")
    transport = Unicode(None, allow_none=True, config=True, help="ipc or tcp, on the client's side.")
    env: Any = List(
        default_value=None,
        allow_none=True,
        config=True,
        help="Host variables the kernel may see (NAME or PREFIX_*).",
    )
    boot_timeout = Float(None, allow_none=True, config=True, help="Seconds until the kernel must accept.")
    processes = Int(None, allow_none=True, config=True, help="Processes and threads in the guest.")
    start = Unicode(None, allow_none=True, config=True, help="auto (from a template) or cold.")
    preload: Any = List(
        default_value=None, allow_none=True, config=True, help="Modules imported in the template."
    )
    cpu_quota = Float(None, allow_none=True, config=True, help="CPUs of the host for the VM; 0: no limit.")
    disk = Int(None, allow_none=True, config=True, help="MiB of a scratch disk; 0: in memory, half of it.")
    disk_bandwidth = Float(None, allow_none=True, config=True, help="MiB/s of the VM's disks; 0: no limit.")
    disk_iops = Int(None, allow_none=True, config=True, help="Reads and writes a second; 0: no limit.")
    cell_timeout = Float(None, allow_none=True, config=True, help="Seconds that a cell may run; 0: no limit.")
    cell_grace = Float(None, allow_none=True, config=True, help="Seconds between a late cell's warnings.")
    idle_timeout = Float(None, allow_none=True, config=True, help="Seconds of idleness; 0: no limit.")
    lifetime = Float(None, allow_none=True, config=True, help="Seconds that a kernel may live; 0: no limit.")
    output = Float(None, allow_none=True, config=True, help="MiB of output of a cell; 0: no limit.")
    message_size = Float(None, allow_none=True, config=True, help="MiB of one message of the kernel.")
    message_rate = Float(None, allow_none=True, config=True, help="Messages a second; 0: no limit.")
    unenforced = Unicode(
        None, allow_none=True, config=True, help="warn or refuse, where this host cannot enforce a limit."
    )
    mounts: Any = List(
        default_value=None, allow_none=True, config=True, help="Directories of the host: SOURCE:TARGET[:rw]."
    )
    volumes: Any = List(default_value=None, allow_none=True, config=True, help="Volumes: NAME:TARGET[:rw].")
    workdir = Unicode(None, allow_none=True, config=True, help="Directory that the kernel starts in.")
    network = Unicode(None, allow_none=True, config=True, help="none, allowlist, public or full.")
    network_allow: Any = List(
        default_value=None,
        allow_none=True,
        config=True,
        help="What may be reached: NAME, *.NAME, CIDR[:PORT].",
    )
    network_deny: Any = List(
        default_value=None, allow_none=True, config=True, help="What may not be reached, likewise."
    )
    network_bandwidth = Float(None, allow_none=True, config=True, help="MiB/s each way; 0: no limit.")
    network_connections = Int(None, allow_none=True, config=True, help="Connections at a time.")
    host_services: Any = List(
        default_value=None, allow_none=True, config=True, help="Ports of this host for the guest."
    )
    expose: Any = List(
        default_value=None,
        allow_none=True,
        config=True,
        help="Ports of the guest on the host's loopback: GUEST[:PORT] or GUEST:/SOCKET.",
    )
    max_expose = Int(None, allow_none=True, config=True, help="Most exposed ports; 0 forbids them.")
    mount_roots: Any = List(
        default_value=None,
        allow_none=True,
        config=True,
        help="Directories below which may be mounted, PATH or PATH:ro.",
    )
    max_memory = Int(None, allow_none=True, config=True, help="Most MiB of RAM a kernelspec may ask for.")
    max_vcpus = Int(None, allow_none=True, config=True, help="Most virtual CPUs a kernelspec may ask for.")
    max_boot_timeout = Float(None, allow_none=True, config=True, help="Longest boot_timeout in seconds.")
    max_processes = Int(None, allow_none=True, config=True, help="Most processes a kernelspec may ask for.")
    max_cpu_quota = Float(None, allow_none=True, config=True, help="Most CPUs of the host for a VM.")
    max_disk = Int(None, allow_none=True, config=True, help="Most MiB of a scratch disk.")
    max_disk_bandwidth = Float(None, allow_none=True, config=True, help="Most MiB/s of a VM's disks.")
    max_disk_iops = Int(None, allow_none=True, config=True, help="Most reads and writes a second.")
    max_cell_timeout = Float(None, allow_none=True, config=True, help="Longest cell_timeout in seconds.")
    max_idle_timeout = Float(None, allow_none=True, config=True, help="Longest idle_timeout in seconds.")
    max_lifetime = Float(None, allow_none=True, config=True, help="Longest lifetime in seconds.")
    max_output = Float(None, allow_none=True, config=True, help="Most MiB of output of a cell.")
    max_message_size = Float(None, allow_none=True, config=True, help="Most MiB of one message.")
    max_message_rate = Float(None, allow_none=True, config=True, help="Most messages a second.")
    max_network = Unicode(None, allow_none=True, config=True, help="Widest policy a kernelspec may ask for.")
    max_network_bandwidth = Float(None, allow_none=True, config=True, help="Most MiB/s of a VM's network.")
    max_network_connections = Int(None, allow_none=True, config=True, help="Most connections at a time.")

    def __init__(self, **kwargs: Any) -> None:
        """Takes the kernelspec's `config` apart from Jupyter's own arguments; it is checked at launch."""
        own = {"kernel_id", "kernel_spec", "parent", "config", "log"}
        self._from_kernelspec = {name: value for name, value in kwargs.items() if name not in own}
        super().__init__(**{name: value for name, value in kwargs.items() if name in own})
        self.connection_info: KernelConnectionInfo = {}
        self._handle: SupervisorHandle | None = None
        self._status: int | None = None
        self._launched = False
        self.report: dict[str, Any] = {}
        """What the supervisor has told of the VM."""
        self._asked_to_end = False
        self.death: Death | None = None
        """Why the last kernel that died did; None when none has, or when its end was asked for."""
        self._untold = False
        self._refusals = 0
        self._ports_cached = False

    @property
    def has_process(self) -> bool:
        """Whether a kernel was launched and has not been waited for."""
        return self._handle is not None or self._status is not None

    @property
    def _manager(self) -> Any:
        """The KernelManager this provisioner works for."""
        return self.parent

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor; None while there is none."""
        return self._handle.pid if self._handle is not None else None

    @property
    def handle(self) -> SupervisorHandle | None:
        """The supervisor's; None while there is none."""
        return self._handle

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Decides about the VM, its endpoints, its command and its environment.

        Raises:
            ConfigurationError: something was configured that is not allowed.
        """
        km = self._manager
        where = mount.places(kwargs.get("cwd"), kwargs.get("env", {}).get("JPY_SESSION_NAME", ""))
        self._mount_roots = mount_roots(os.environ, self.mount_roots)
        self._max_expose = max_expose(os.environ, self.max_expose)
        self._spec = spec = placed(self._resolve_spec(), where, self._mount_roots, self._max_expose)
        self._prepare_encryption(kwargs.pop("transport_encryption", None))
        self._choose_endpoints(spec)
        session = kwargs.get("env", {}).get("JPY_SESSION_NAME", "")
        km.write_connection_file(**({"jupyter_session": session} if session else {}))
        self.connection_info = km.get_connection_info()
        cmd = km.format_kernel_cmd(extra_arguments=kwargs.pop("extra_arguments", []))
        kwargs = await super().pre_launch(cmd=cmd, **kwargs)
        names = tuple(self.kernel_spec.env or {})
        kwargs["env"] = forwarded((*spec.env, *names), kwargs["env"])
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Boots the VM and starts the kernel; returns when it accepts connections, or is sure to.

        Raises:
            SandboxKernelError: with a sentence for the user, unless this is an automatic restart.
        """
        automatic = self._launched and not self._asked_to_end
        await self._discard()
        self._asked_to_end = False
        if automatic and self._stays_dead():
            self._status = 1
            return self.connection_info
        try:
            await self._launch(cmd, kwargs.get("env", {}))
        except SandboxKernelError as error:
            if not automatic:
                raise
            self.log.error("The kernel could not be restarted: %s", error)
            self._status = 1
        self._launched = True
        return self.connection_info

    async def poll(self) -> int | None:
        """None while the kernel runs; its exit status afterwards (0 when none was ever launched)."""
        if self._handle is not None:
            return self._handle.poll()
        return self._status if self._status is not None else 0

    async def wait(self) -> int | None:
        """Waits until the VM is gone and cleaned up."""
        if self._handle is None:
            status, self._status = self._status, None
            return status
        handle = self._handle
        status = await in_thread(handle.wait)
        self._note_death(handle)
        self._handle = None
        self._status = None
        return status

    async def send_signal(self, signum: int) -> None:
        """Sends a signal to the kernel's process group in the guest; nothing happens when it is dead."""
        if self._handle is None or self._handle.poll() is not None:
            return
        if signum == signal.SIGKILL:
            self._end_is_wanted()
        try:
            await in_thread(self._handle.signal, int(signum))
        except GuestError as error:
            # A manager that shuts down, or restarts, interrupts first; what does not take that is killed.
            if not self._manager.shutting_down:
                raise
            self.log.warning("The kernel was not interrupted: %s", error)

    async def kill(self, restart: bool = False) -> None:
        """Ends the VM at once; one that may write to a volume, when that is written out.

        What a killed process has written to files is there. Here it may be in the guest's memory alone. A
        manager waits some seconds for the end, and then cleans up, which waits for nothing.
        """
        self._end_is_wanted()
        if self._handle is not None:
            if any(volume.parse(text).writable for text in self._spec.volumes):
                self._handle.stop()
            else:
                self._handle.kill()

    async def terminate(self, restart: bool = False) -> None:
        """Ends the VM in an orderly way."""
        self._end_is_wanted()
        if self._handle is not None:
            self._handle.stop()

    async def shutdown_requested(self, restart: bool = False) -> None:
        """The client has asked the kernel to end: what follows is not a crash."""
        self._end_is_wanted()

    async def cleanup(self, restart: bool = False) -> None:
        """Leaves nothing behind; may be called more than once."""
        await self._discard()
        if self._ports_cached and not restart:
            for channel in CHANNELS:
                LocalPortCache.instance().return_port(getattr(self._manager, f"{channel}_port"))
            self._ports_cached = False

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What there is to know of the VM and of its predecessor's death, as JSON's types."""
        info: dict[str, Any] = await super().get_provisioner_info()
        if self._handle is not None and self._handle.poll() is not None:
            self._note_death(self._handle)
        vm = {"supervisor": self.pid, **self.report} if self._launched else None
        return {**info, "vm": vm, "death": self.death.to_dict() if self.death is not None else None}

    def resolve_path(self, path: str) -> str | None:
        """The host's path for a path of the guest; None where nothing of the host is mounted."""
        return mount.host_path(map(mount.parse, self._spec.mounts), path) if self._launched else None

    def _resolve_spec(self) -> VMSpec:
        environment = from_environment(os.environ)
        traits = {name: getattr(self, name) for name in KEYS}
        caps = from_environment(os.environ, tuple(CAPS)) | {
            name: getattr(self, name) for name in CAPS if getattr(self, name) is not None
        }
        self._network_caps = {name: cap for name, cap in caps.items() if name.startswith("max_network")}
        return resolve(
            [
                (
                    f"The kernelspec {self._manager.kernel_name!r}",
                    self._from_kernelspec,
                ),
                ("The configuration of MicroVMProvisioner", traits),
                (f"The environment ({ENVIRONMENT_PREFIX}…)", environment),
            ],
            caps,
        )

    def _prepare_encryption(self, requested: str | None) -> None:
        """Makes the CURVE keys that `transport_encryption` asks for (jupyter_client 8.9 or later)."""
        km = self._manager
        if not hasattr(km, "_transport_encryption_policy"):
            return
        policy = km._transport_encryption_policy(requested or km.transport_encryption)
        wanted = policy == "required" or (policy == "auto" and km._kernel_supports_curve_encryption())
        if wanted and km.curve_publickey is None:
            km.curve_publickey, km.curve_secretkey = zmq.curve_keypair()

    def _choose_endpoints(self, spec: VMSpec) -> None:
        """Sets the manager's transport, address and ports; the same ones at each restart."""
        km = self._manager
        if spec.transport == "ipc":
            km.transport = "ipc"
            km.ip = str(paths.runtime_dir() / self._vm_id() / "k")
            for port, channel in enumerate(CHANNELS, 1):
                setattr(km, f"{channel}_port", port)
            return
        if km.transport != "tcp":
            raise ConfigurationError(
                f"The kernel manager's transport is {km.transport!r}, the VM's is 'tcp'; make both the same."
            )
        if km.cache_ports and not self._ports_cached:
            for channel in CHANNELS:
                setattr(km, f"{channel}_port", LocalPortCache.instance().find_available_port(km.ip))
            self._ports_cached = True

    def _vm_id(self) -> str:
        return hashlib.sha256(f"{self.kernel_id} {os.getpid()} {id(self)}".encode()).hexdigest()[:12]

    async def _launch(self, cmd: list[str], env: dict[str, str]) -> None:
        info = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in self.connection_info.items()
        }
        argv = guest_argv(cmd, str(self._manager.connection_file))
        name = str(self._manager.kernel_name)
        request = LaunchRequest(
            self._vm_id(),
            replace(self._spec, expose=self._exposed_as_before()),
            argv,
            env,
            info,
            notice=self._notice(),
            kernel=name,
            mount_roots=self._mount_roots,
            network_caps=self._network_caps,
            max_expose=self._max_expose,
        )
        pooled = await in_thread(take, self._spec)
        if pooled is not None:
            try:
                await self._launch_in(pooled, request)
                self._untold = False
                return
            except (GuestError, HostError) as error:
                self.log.warning("The pool's VM is of no use: %s", error)
        await self._launch_alone(request)
        self._untold = False
        await in_thread(nursery.expect, self._spec)

    def _exposed_as_before(self) -> tuple[str, ...]:
        """What is to be exposed; a port that the system chose is kept over a restart, if it is free."""
        loopback = exposure.Exposure(1, 0).address.removesuffix("0")
        earlier = {
            each["port"]: int(each["address"].removeprefix(loopback))
            for each in self.report.get("exposed", ())
            if each["address"].startswith(loopback)
        }

        def place(text: str) -> str:
            wanted = exposure.parse(text)
            port = earlier.pop(wanted.guest, 0) if wanted.port == 0 else 0
            return str(wanted.at(port)) if port and is_free(port) else text

        return tuple(map(place, self._spec.expose))

    async def _launch_alone(self, request: LaunchRequest) -> None:
        """Launches in a VM that waits for this process's next kernel, or else in a new one."""
        waiting = await in_thread(nursery.waiting, self._spec)
        if waiting is not None:
            try:
                return await self._launch_in(waiting, request)
            except (GuestError, HostError) as error:
                self.log.info("The VM that waited is of no use: %s", error)
        return await self._launch_in(await in_thread(nursery.supervisor), request)

    async def _launch_in(self, handle: SupervisorHandle, request: LaunchRequest) -> None:
        self._handle = handle
        try:
            self.report = await in_thread(handle.launch, request)
        except BaseException:
            handle.kill()
            self._handle = None
            await asyncio.shield(in_thread(handle.wait))
            raise
        self.log.info(
            "The kernel runs in a micro-VM, %s (%s).", self.report["start"], summary(self.report["trace"])
        )
        for each in self.report["exposed"]:
            self.log.info("Its port %d is exposed at %s.", each["port"], each["address"])

    async def _discard(self) -> None:
        """Ends a VM that is still there: a second start on one manager, or a clean-up without a wait."""
        handle, self._handle, self._status = self._handle, None, None
        if handle is not None:
            handle.kill()
            await in_thread(handle.wait)
            self._note_death(handle)

    def _end_is_wanted(self) -> None:
        """What ends from now on was asked to; what is dead already was not."""
        if self._handle is not None and self._handle.poll() is None:
            self._asked_to_end = True

    def _note_death(self, handle: SupervisorHandle) -> None:
        if handle.death is not None and handle.death is not self.death:
            self.death, self._untold, self._refusals = handle.death, True, 0
            self.log.warning("The kernel died: %s", self.death.to_dict())

    def _notice(self) -> str:
        """What the first cell of a kernel that takes a dead one's place begins with."""
        if self.death is None or not self._untold:
            return ""
        return f"The kernel was started anew, without its variables, after this: {self.death.message}"

    def _stays_dead(self) -> bool:
        """Whether this launch is a restarter's, of a kernel that a limit of time has ended.

        Such a kernel is not wanted any more. A restarter takes "no" for an answer when it has heard it as
        often as it tries; whoever asks after that is a person.
        """
        restarter = getattr(self._manager, "_restarter", None)
        if restarter is None or not self._untold or self.death is None or self.death.name not in _FOR_GOOD:
            return False
        self._refusals += 1
        return bool(self._refusals <= restarter.restart_limit)
