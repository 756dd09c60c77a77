"""Benchmarks: what a masked layer costs beside plain PyTorch, ``torch.compile`` and a dense layer.

``python -m metamask_ext.bench.run`` measures a suite, ``python -m metamask_ext.bench.report`` shows what was measured. They need
the extra ``bench``.
"""
