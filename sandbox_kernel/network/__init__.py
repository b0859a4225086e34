"""A VM's network: a namespace of its own, filtered outside of the guest, with an uplink that needs no rights."""
