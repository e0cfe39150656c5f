"""The tuner: it times candidates beside torch's own, verifies the winners and stores them.

``contest.py`` measures, ``tuner.py`` decides for one problem, ``session.py`` goes through many, ``api.py`` is
``tritonconv.tune``.
"""
