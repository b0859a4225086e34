"""Conformance: the tests that Jupyter's own projects wrote, run against a kernel in a micro-VM.

Theory of operation:

1. `suites.toml` pins source distributions (version and sha256) and names the tests to run in them. They are
   fetched by pip, verified, and kept in the cache (`sources`). The package's own folder gets another
   name when one is unpacked, so its tests meet the installed package.
2. A virtual environment in the cache holds what the suites need (`requirements.lock`); a wheel built from
   this checkout is installed into it before each run (`environment`). No suite sees the checkout.
3. Every suite runs unedited in folders of its own (`isolation`), with
   `JUPYTER_DEFAULT_PROVISIONER_NAME` naming the provisioner: ours, or Jupyter's local one for the
   baseline (`--target stock`). Time-outs are lifted for a slow machine in one place, `plugin`, for both
   targets.
4. The plugin writes each report as a line of JSON, so that a suite that dies still tells how far it came.
   `outcome` compares that with `expected_failures.toml`. An unexpected failure fails the run, and so does a
   listed failure that passes: the list is the truth or it is nothing.
5. Afterwards nothing may be left: no process of ours below this one, no file in the runtime directory
   (`leftovers`).
"""
