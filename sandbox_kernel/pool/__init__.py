"""A small per-user service that keeps VMs restored and waiting, and how a provisioner gets one of them."""
