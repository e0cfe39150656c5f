"""The tuner: candidates are timed beside torch's own, the winners verified and stored.

:mod:`tritonconv.tuning.contest` measures, :mod:`~tritonconv.tuning.tuner` decides for one problem,
:mod:`~tritonconv.tuning.session` goes through many, :mod:`~tritonconv.tuning.api` is ``tritonconv.tune``.
"""
