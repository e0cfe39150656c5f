"""``tritonconv inspect``: what the compiler makes of every Triton variant for a named target, with no GPU at hand.

:mod:`~tritonconv.inspection.jobs` says what is compiled, :mod:`~tritonconv.inspection.compiling` compiles one launch,
:mod:`~tritonconv.inspection.machine_code` reads the result, :mod:`~tritonconv.inspection.records` judges it, and
:mod:`~tritonconv.inspection.report` and :mod:`~tritonconv.inspection.readme` show it.
"""
