"""The KVM lab: a Linux with a real /dev/kvm and a real /dev/vhost-vsock, on a machine that has neither.

QEMU's software emulation emulates AMD-V, so a Linux that it runs has KVM of its own. In that Linux an
ordinary user runs the project's tests: what they go through is the code path of real hardware, only slowly.
See `machine` for how slowly, and what time is in there.

    image      builds the lab's root with the project's own image builder: Debian, QEMU, Python, the wheel
    guests     the disk with the guest images that kernels in the lab run in
    machine    QEMU's command line, and one run of the lab from power-on to power-off
    suites     which tests run in there
    guest/     what runs in the lab as PID 1
"""
