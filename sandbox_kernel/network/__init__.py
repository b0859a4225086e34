"""A VM's network: a namespace of its own, filtered outside of the guest, its uplink an ordinary process."""
