"""Benchmarks: the price of a masked layer beside plain PyTorch, ``torch.compile`` and a dense layer.

``python -m metamask_ext.bench.run`` measures a suite, ``python -m metamask_ext.bench.report`` shows the results. They need the
extra ``bench``. The suites: ``core``, single ops and small layers; ``cpu``, what the CPU has targets for; ``grid``, a layer at
many batches and widths; ``tasks``, mixed-task batches and the bank; ``meta``, steps of MAML; ``cuda``, on a GPU.
"""
