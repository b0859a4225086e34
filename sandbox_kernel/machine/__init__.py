"""One micro-VM from power-on to power-off: its states, its processes, its console, its accelerator."""
