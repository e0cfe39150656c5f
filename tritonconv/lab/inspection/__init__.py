"""Compiles Triton kernels for a GPU that need not be here: to judge them, or to launch them there.

``compiling.py`` compiles one launch for a target, ``workers.py`` does such work in other processes.

``tritonconv inspect``: ``jobs.py`` lists the launches, ``machine_code.py`` reads the result (``listing.py``,
``in_flight.py``), ``records.py`` names its faults, ``tables.py`` shows it; ``verdicts.py`` does so for the whole of the
tuner's space (``shallow.py``), ``accesses.py`` and ``interpreted.py`` for loads and stores.

``tritonconv compile``: ``ahead.py`` fills a folder with kernels that ``precompile.py`` compiles, the host side of their
launches too (``launchers.py``); ``launches.py`` says which launches a folder holds. The tuner and the benchmark use the
last two.
"""
