"""Which ops a function runs and how much memory it allocates, as torch's profiler sees it."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def metamask_ops(function):
    """The raw ops by name, with how often each ran: a composite op runs others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    found = {event.key.removeprefix("metamask::"): event.count for event in profiler.key_averages() if "metamask::" in event.key}
    return {name: count for name, count in found.items() if not name.startswith("compiled_")}


def largest_allocation(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max((event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0), default=0)


def allocated(function):
    """By the one op that ``function`` calls, in all."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    return max((event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0), default=0)


def aten_products(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profiler.events())
