"""``tritonconv inspect``: what the compiler makes of every Triton variant for a named target, with no GPU at hand.

``jobs.py`` says what is compiled, ``compiling.py`` compiles one launch,
``machine_code.py`` reads the result, ``records.py`` judges it, and
``report.py`` and ``readme.py`` show it.
"""
