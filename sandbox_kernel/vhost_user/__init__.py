"""The back-end of the vhost-user protocol: QEMU hands over a guest's memory, rings and doorbells."""
