"""Benchmark: the plain kernel and the micro-VM kernel side by side, in one run on one machine.

Theory of operation: kernels take turns (A B A B …), a fresh kernel each turn, so that whatever the machine
does meanwhile hits all alike. In each turn every measure runs once on that kernel, in the order of
`measures.ORDER`. A figure is the median over the turns; round trips are pooled over the turns, since their
tail is what matters. The first kernel named is the yardstick: ratios are against it.

    figures    samples, medians, percentiles, ratios (pure)
    phases     where the seconds of a VM's start go (pure)
    kernel     a started kernel and the few things that measures do with it
    pool       a pool service of the bench's own, and a place without any
    measures   one function per measure
    memory     what a kernel's processes have for themselves, from smaps
    machine    the line that says where this was measured
    report     the table, Markdown, JSON

`bench.density` asks how many kernels a machine holds: many starts at once, and a crowd that grows until
memory is short. It uses crowd (live kernels), growth (figures and table, pure) and picture (the curve).

`bench.vsock_device` measures the vsock device alone and belongs to another room; its JSON is included.
"""
