"""The guest's programs are importable here as they are in the guest: from one flat folder."""

from __future__ import annotations

import sys

from sandbox_kernel.resources import guest_dir

sys.path.append(str(guest_dir()))
